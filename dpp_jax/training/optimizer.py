"""The optimizer of the network's weights: Adam, a schedule of its learning rate, a correction for noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

# Name → (learning rate, steps) → the learning rate, or step → learning rate.
SCHEDULES: dict[str, Callable] = {
    'constant': lambda rate, steps: rate,
    'linear': lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    'cosine': optax.cosine_decay_schedule,
}
_B1, _B2, _EPS = 0.9, 0.999, 1e-8


def make(
    learning_rate: float, *, schedule: str = 'constant', steps: int = 1, noise: float = 0.0
) -> optax.GradientTransformation:
    """Make Adam.

    Args:
        learning_rate: of the first step.
        schedule: a name in `SCHEDULES`: how it falls until it is 0 after all steps.
        steps: of the training.
        noise: standard deviation, by coordinate, of the noise in a gradient, which is public: its square is
            taken from the mean square that Adam divides by, as DP-AdamBC does (Tang et al. 2024), but at most
            nine tenths of it, in place of a constant floor. 0: plain Adam.

    Raises:
        ValueError: there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule is {schedule!r}; it must be one of {sorted(SCHEDULES)}')
    rate = SCHEDULES[schedule](learning_rate, steps)
    if not noise:
        return optax.adam(rate, b1=_B1, b2=_B2, eps=_EPS)
    return optax.chain(_scale_by_corrected_adam(noise**2), optax.scale_by_learning_rate(rate))


def _scale_by_corrected_adam(variance: float) -> optax.GradientTransformation:
    """Make `optax.scale_by_adam` less the noise's share of the mean square.

    The floor keeps a coordinate whose gradient is noise from steps that noise alone decides.
    """
    plain = optax.scale_by_adam(b1=_B1, b2=_B2, eps=_EPS)

    def update(updates, state, params=None):
        _, new = plain.update(updates, state, params)
        first, second = (1 - decay ** new.count.astype(jnp.float32) for decay in (_B1, _B2))

        def scaled(mean, square):
            corrected = square / second
            corrected = jnp.maximum(corrected - variance, 0.1 * corrected)
            return mean / first / (jnp.sqrt(corrected) + _EPS)

        return jax.tree.map(scaled, new.mu, new.nu), new

    return optax.GradientTransformation(plain.init, update)
