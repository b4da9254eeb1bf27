"""Samplers (Karras et al. 2022, EDM): from unit normal noise to images, as jitted loops.

Both end with an Euler step from the last noise level to σ = 0, whose result is the denoiser's output: the
PyTorch implementation returns that output. The network stands once in each loop: every further copy would
be compiled anew.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.diffusion.denoiser import Denoise


def sigma_steps(steps: int, *, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """Noise levels from t_max down to t_min (EDM, equation 5), (steps,) float32."""
    if steps < 1:
        raise ValueError(f'steps is {steps}; it must be at least 1')
    if not 0 < t_min < t_max:
        raise ValueError(f't_min is {t_min} and t_max {t_max}; it must be 0 < t_min < t_max')
    ramp = np.linspace(t_max ** (1 / rho), t_min ** (1 / rho), steps)
    return (ramp**rho).astype(np.float32)


def guided(denoise: Denoise, guidance: float, no_class: int) -> Denoise:
    """(1 + g) D(x; y) - g D(x; no class): classifier-free guidance (Ho & Salimans 2022)."""
    if guidance == 0:
        return denoise

    def guided_denoise(x, sigma, label):
        both = denoise(
            jnp.concatenate([x, x]),
            jnp.concatenate([sigma, sigma]),
            jnp.concatenate([label, jnp.full_like(label, no_class)]),
        )
        with_class, without_class = jnp.split(both, 2)
        return (1 + guidance) * with_class - guidance * without_class

    return guided_denoise


def ddim(
    denoise: Denoise,
    z: jax.Array,
    label: jax.Array,
    *,
    sigmas: np.ndarray,
    guidance: float = 0.0,
    no_class: int,
) -> jax.Array:
    """Deterministic Euler steps along the probability flow (DDIM, Song et al. 2021).

    Args:
        denoise: D.
        z: (n, H, W, C) unit normal.
        label: (n,) int32.
        sigmas: (steps,) decreasing, see `sigma_steps`.
        guidance: g >= 0.
        no_class: the label that stands for "no class".

    Returns:
        (n, H, W, C), about [-1, 1].
    """
    denoise = guided(denoise, guidance, no_class)
    t = jnp.append(jnp.asarray(sigmas), 0.0)

    def step(i, x):
        slope = (x - denoise(x, jnp.full(x.shape[:1], t[i]), label)) / t[i]
        return x + (t[i + 1] - t[i]) * slope

    return jax.lax.fori_loop(0, len(sigmas), step, t[0] * z)


def heun(
    denoise: Denoise,
    z: jax.Array,
    label: jax.Array,
    *,
    sigmas: np.ndarray,
    guidance: float = 0.0,
    no_class: int,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = np.inf,
    s_noise: float = 1.0,
    noise: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Heun's second-order steps with noise put back ("churn"; EDM, algorithm 2).

    Args:
        denoise, z, label, sigmas, guidance, no_class: as for `ddim`.
        s_churn: total amount of churn; γ = min(s_churn / steps, 1) where s_min <= σ <= s_max.
        s_min, s_max: range of σ with churn.
        s_noise: standard deviation of the noise put back.
        noise: number of a step (traced) → (n, H, W, C) unit normal; needed if s_churn > 0.

    Returns:
        (n, H, W, C), about [-1, 1].
    """
    if s_churn > 0 and noise is None:
        raise ValueError(f's_churn is {s_churn}; churn needs a function `noise`')
    denoise = guided(denoise, guidance, no_class)
    steps = len(sigmas)
    t = jnp.append(jnp.asarray(sigmas), 0.0)

    def churn(i, x):
        """The point x at σ = t_i moved up to t_hat by fresh noise."""
        in_range = (s_min <= t[i]) & (t[i] <= s_max)
        gamma = jnp.where(in_range, min(s_churn / steps, 1.0), 0.0)
        # t_hat² - t_i², factored: as a difference it can round to below 0 where γ = 0.
        std = s_noise * t[i] * jnp.sqrt(gamma * (2 + gamma))
        return (x + std * noise(i) if s_churn > 0 else x), (1 + gamma) * t[i]

    def euler(i, state):
        """Predict x at t_{i+1} from the slope d at t_hat."""
        x_hat, t_hat = churn(i, state['x'])
        return {**state, 'x_hat': x_hat, 't_hat': t_hat}, x_hat, t_hat

    def correct(i, state):
        """Go on to the slope at t_{i+1}, which is averaged with d."""
        return state, state['x'], t[i + 1]

    def evaluate(k, state):
        """Evaluation k of the network: the first or the second half of step k // 2."""
        i, is_second = k // 2, k % 2 == 1
        state, point, level = jax.lax.cond(is_second, correct, euler, i, state)
        slope = (point - denoise(point, jnp.full(point.shape[:1], level), label)) / level
        slope = jnp.where(is_second, (state['d'] + slope) / 2, slope)
        x = state['x_hat'] + (t[i + 1] - state['t_hat']) * slope
        return {**state, 'x': x, 'd': slope}

    x = t[0] * z
    start = {'x': x, 'x_hat': x, 't_hat': t[0], 'd': x}
    # The last step, down to σ = 0, has no second half.
    return jax.lax.fori_loop(0, 2 * steps - 1, evaluate, start)['x']
