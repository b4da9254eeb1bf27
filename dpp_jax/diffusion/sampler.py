"""Samplers (Karras et al. 2022, EDM): from unit normal noise to images, as jitted loops.

Both keep the quirks of the PyTorch implementation: they end with an output of the denoiser, not with the
last point of the path.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.diffusion.denoiser import Denoise


def sigma_steps(
    steps: int, *, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
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
    t = jnp.asarray(sigmas)

    def step(i, x):
        slope = (x - denoise(x, jnp.full(x.shape[:1], t[i]), label)) / t[i]
        return x + (t[i + 1] - t[i]) * slope

    x = jax.lax.fori_loop(0, len(sigmas) - 1, step, t[0] * z)
    return denoise(x, jnp.full(x.shape[:1], t[-1]), label)


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
        (n, H, W, C), about [-1, 1]: the denoiser's output in the last step.
    """
    if s_churn > 0 and noise is None:
        raise ValueError(f's_churn is {s_churn}; churn needs a function `noise`')
    denoise = guided(denoise, guidance, no_class)
    t = jnp.asarray(sigmas)
    steps = len(sigmas)

    def churn(i, x):
        """The point x at σ = t_i moved up to t_hat by fresh noise."""
        if s_churn == 0:
            return x, t[i]
        in_range = (s_min <= t[i]) & (t[i] <= s_max)
        gamma = jnp.where(in_range, min(s_churn / steps, 1.0), 0.0)
        # t_hat² - t_i², factored: as a difference it can round to below 0 where γ = 0.
        std = s_noise * t[i] * jnp.sqrt(gamma * (2 + gamma))
        return x + std * noise(i), (1 + gamma) * t[i]

    def slope(x, sigma):
        return (x - denoise(x, jnp.full(x.shape[:1], sigma), label)) / sigma

    def step(i, x):
        x_hat, t_hat = churn(i, x)
        d = slope(x_hat, t_hat)
        x_next = x_hat + (t[i + 1] - t_hat) * d
        return x_hat + (t[i + 1] - t_hat) * (d + slope(x_next, t[i + 1])) / 2

    x = jax.lax.fori_loop(0, steps - 1, step, t[0] * z)
    x_hat, t_hat = churn(steps - 1, x)
    return denoise(x_hat, jnp.full(x.shape[:1], t_hat), label)
