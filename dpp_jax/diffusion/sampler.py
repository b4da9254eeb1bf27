"""Samplers: from unit normal noise to images, as jitted loops.

Each is a function (denoise, z, label, *, sigmas, noise, churn) → images, with an entry in `SAMPLERS`. All end
with an Euler step from the last noise level to σ = 0. Its result is the denoiser's output, which the PyTorch
implementation returns. The network stands once in each loop: a second copy would be compiled anew.

| name | source | calls of the network for an image, in n steps | random |
|---|---|---|---|
| ddim | Song et al. 2021 | n | no |
| heun | EDM, Karras et al. 2022, algorithm 2 | 2n - 1 | with churn |
| dpmpp_2m | DPM-Solver++, Lu et al. 2022, algorithm 2 | n | no |
| dpmpp_2m_sde | the same for the reverse SDE, their section 4.3 | n | yes |
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.diffusion.denoiser import Denoise

# number of a step (traced) → (n, H, W, C) unit normal
Noise = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Churn:
    """How much noise a stochastic sampler puts back (EDM, algorithm 2).

    Attributes:
        s_churn: total amount, >= 0; in a step γ = min(s_churn / steps, 1).
        s_min, s_max: γ = 0 where σ is outside of [s_min, s_max].
        s_noise: standard deviation of the noise put back.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = np.inf
    s_noise: float = 1.0

    def gamma(self, t: jax.Array, steps: int) -> jax.Array:
        """Return γ of a step that starts at σ = t."""
        in_range = (self.s_min <= t) & (t <= self.s_max)
        return jnp.where(in_range, min(self.s_churn / steps, 1.0), 0.0)


def ddim(denoise: Denoise, z: jax.Array, label: jax.Array, *, sigmas: np.ndarray, **unused) -> jax.Array:
    """Return images by Euler steps along the probability flow (DDIM, Song et al. 2021): deterministic.

    Args:
        denoise: D.
        z: (n, H, W, C) unit normal.
        label: (n,) int32.
        sigmas: (steps,) decreasing, see `sigma_steps`.
        unused: `noise` and `churn`, of other samplers.

    Returns:
        (n, H, W, C), about [-1, 1].
    """
    del unused
    t = jnp.append(jnp.asarray(sigmas), 0.0)

    def step(i, x):
        d = (x - denoise(x, jnp.full(x.shape[:1], t[i]), label)) / t[i]
        return x + (t[i + 1] - t[i]) * d

    return jax.lax.fori_loop(0, len(sigmas), step, t[0] * z)


def heun(
    denoise: Denoise,
    z: jax.Array,
    label: jax.Array,
    *,
    sigmas: np.ndarray,
    noise: Noise | None,
    churn: Churn,
) -> jax.Array:
    """Return images by Heun's second-order steps, with noise put back before each (EDM, algorithm 2).

    Args:
        denoise, z, label, sigmas: as of `ddim`.
        noise: needed if `churn.s_churn` > 0.
        churn: how much noise is put back.

    Returns:
        (n, H, W, C), about [-1, 1].

    Raises:
        ValueError: there is churn, and no `noise`.
    """
    if churn.s_churn > 0 and noise is None:
        raise ValueError(f's_churn is {churn.s_churn}; churn needs a function `noise`')
    steps = len(sigmas)
    t = jnp.append(jnp.asarray(sigmas), 0.0)

    def step(i, x_cur):
        # Add noise: from t_i up to t_hat.
        gamma = churn.gamma(t[i], steps)
        t_hat = (1 + gamma) * t[i]
        # sqrt(t_hat² - t_i²), factored: the difference can round to below 0 where γ = 0.
        std = churn.s_noise * t[i] * jnp.sqrt(gamma * (2 + gamma))
        x_hat = x_cur + std * noise(i) if churn.s_churn > 0 else x_cur

        def advance(order, state):
            """Go from x_hat to t_{i+1}: by the slope at t_hat, then (order 1) by its mean with the next."""
            x, level, d_cur = state
            d_prime = (x - denoise(x, jnp.full(x.shape[:1], level), label)) / level
            d = jnp.where(order == 0, d_prime, (d_cur + d_prime) / 2)
            x_next = x_hat + (t[i + 1] - t_hat) * d
            return x_next, t[i + 1], d

        # An Euler step, and a correction of second order; the last step, down to σ = 0, has none.
        orders = jnp.where(t[i + 1] > 0, 2, 1)
        x_next, _, _ = jax.lax.fori_loop(0, orders, advance, (x_hat, t_hat, x_hat))
        return x_next

    return jax.lax.fori_loop(0, steps, step, t[0] * z)


def multistep(
    denoise: Denoise,
    z: jax.Array,
    label: jax.Array,
    *,
    sigmas: np.ndarray,
    noise: Noise | None,
    churn: Churn,
    is_stochastic: bool,
) -> jax.Array:
    """Return images by second-order steps that use the denoiser's output of the step before (DPM-Solver++).

    A step is exact where the denoiser's output is linear in the logarithm of σ. The first step and the last,
    down to σ = 0, are of first order.

    Args:
        denoise, z, label, sigmas: as of `ddim`.
        noise: needed if `is_stochastic`.
        churn: its `s_noise` scales the noise; the rest is of `heun`.
        is_stochastic: whether to solve the reverse SDE, or the probability flow.

    Returns:
        (n, H, W, C), about [-1, 1].

    Raises:
        ValueError: `noise` is missing.
    """
    if is_stochastic and noise is None:
        raise ValueError('noise is None; a stochastic sampler needs a function')
    t, steps = np.append(sigmas, 0.0).astype(np.float64), len(sigmas)
    decay = t[1:] / t[:-1]  # exp(-h)
    with np.errstate(divide='ignore'):
        h = -np.log(decay)
    # 1 / (2 r) of the paper, r = h of the step before / h.
    slope = np.zeros(steps)
    slope[1:-1] = h[1:-1] / (2 * h[:-2])
    keep = decay**2 if is_stochastic else decay
    std = churn.s_noise * t[1:] * np.sqrt(1 - decay**2)
    t, slope, keep, std = (jnp.asarray(each, jnp.float32) for each in (t, slope, keep, std))

    def step(i, state):
        x, d_before = state
        d = denoise(x, jnp.full(x.shape[:1], t[i]), label)
        x = keep[i] * x + (1 - keep[i]) * (d + slope[i] * (d - d_before))
        return (x + std[i] * noise(i) if is_stochastic else x), d

    x, _ = jax.lax.fori_loop(0, steps, step, (t[0] * z, jnp.zeros_like(z)))
    return x


SAMPLERS = {
    'ddim': ddim,
    'heun': heun,
    'dpmpp_2m': functools.partial(multistep, is_stochastic=False),
    'dpmpp_2m_sde': functools.partial(multistep, is_stochastic=True),
}


def make_sampler(
    name: str,
    *,
    no_class: int,
    steps: int,
    t_min: float,
    t_max: float,
    rho: float,
    guidance: float,
    guidance_min: float,
    guidance_max: float,
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> Callable:
    """Return (denoise, z (n, H, W, C) unit normal, label (n,), noise=) → images, about [-1, 1].

    Args:
        name: one of `SAMPLERS`.
        no_class: the label that stands for "no class".
        steps, t_min, t_max, rho: noise levels, see `sigma_steps`.
        guidance: g >= 0, see `guided`.
        guidance_min, guidance_max: noise levels σ between which there is guidance.
        s_churn, s_min, s_max, s_noise: see `Churn`.

    Raises:
        ValueError: there is no such sampler, or the noise levels are not in order.
    """
    if name not in SAMPLERS:
        raise ValueError(f'sampler is {name!r}; it must be one of {sorted(SAMPLERS)}')
    sigmas = sigma_steps(steps, t_min=t_min, t_max=t_max, rho=rho)
    churn = Churn(s_churn=s_churn, s_min=s_min, s_max=s_max, s_noise=s_noise)

    def sample(denoise, z, label, noise=None):
        # Where all levels have guidance, both labels go through the network at once.
        is_partial = guidance_min > t_min or guidance_max < t_max
        between = (guidance_min, guidance_max) if is_partial else None
        denoise = guided(denoise, guidance, no_class, between)
        return SAMPLERS[name](denoise, z, label, sigmas=sigmas, noise=noise, churn=churn)

    return sample


def sigma_steps(steps: int, *, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """Return noise levels from t_max down to t_min, (steps,) float32 (EDM, equation 5)."""
    if steps < 1:
        raise ValueError(f'steps is {steps}; it must be at least 1')
    if not 0 < t_min < t_max:
        raise ValueError(f't_min is {t_min} and t_max {t_max}; it must be 0 < t_min < t_max')
    ramp = np.linspace(t_max ** (1 / rho), t_min ** (1 / rho), steps)
    return (ramp**rho).astype(np.float32)


def guided(
    denoise: Denoise, guidance: float, no_class: int, between: tuple[float, float] | None = None
) -> Denoise:
    """Return (1 + g) D(x; y) - g D(x; no class): classifier-free guidance (Ho & Salimans 2022).

    Args:
        denoise: D.
        guidance: g >= 0; 0: D itself.
        no_class: the label that stands for "no class".
        between: the least and the largest σ with guidance; D itself elsewhere, where it is called once
            instead of twice (Kynkäänniemi et al. 2024). All images must then have the same σ. None: at all.
    """
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

    def partly_guided_denoise(x, sigma, label):
        is_guided = (between[0] <= sigma[0]) & (sigma[0] <= between[1])

        def add(call, total):
            """Add one term: D(x; y), or D(x; no class)."""
            weight = jnp.where(call == 0, jnp.where(is_guided, 1 + guidance, 1.0), -guidance)
            return total + weight * denoise(x, sigma, jnp.where(call == 0, label, no_class))

        return jax.lax.fori_loop(0, jnp.where(is_guided, 2, 1), add, jnp.zeros_like(x))

    return guided_denoise if between is None else partly_guided_denoise
