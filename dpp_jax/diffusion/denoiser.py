"""Denoisers D(x; σ, label) around a network F (Karras et al. 2022, EDM, equation 7 and table 1).

D(x; σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x; c_noise(σ)). The four kinds differ in these scalings alone.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# (x (n, H, W, C), c_noise (n,), label (n,)) → (n, H, W, C)
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# (x (n, H, W, C), sigma (n,), label (n,)) → (n, H, W, C)
Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Scaling = Callable[[jax.Array], jax.Array]

SIGMA_DATA = 3**-0.5  # standard deviation of values spread uniformly over [-1, 1]
BETA_MIN, BETA_D = 0.1, 19.9  # of the VP process
VP_STEPS = 999  # M - 1, by which the VP network's time in [0, 1] is scaled


@dataclasses.dataclass(frozen=True)
class Scalings:
    """The scalars of a denoiser as functions of σ."""

    skip: Scaling
    out: Scaling
    into: Scaling
    noise: Scaling


def vp_sigma(t: jax.Array) -> jax.Array:
    """σ(t) of the VP process, t in [0, 1] (EDM, table 1)."""
    return jnp.sqrt(jnp.expm1(0.5 * BETA_D * t**2 + BETA_MIN * t))


def vp_time(sigma: jax.Array) -> jax.Array:
    """The inverse of `vp_sigma`."""
    return (jnp.sqrt(BETA_MIN**2 + 2 * BETA_D * jnp.log1p(sigma**2)) - BETA_MIN) / BETA_D


def _edm(sigma_data: float) -> Scalings:
    """Unit variance of the network's input and target."""
    total = lambda sigma: jnp.sqrt(sigma**2 + sigma_data**2)
    return Scalings(
        skip=lambda sigma: sigma_data**2 / total(sigma) ** 2,
        out=lambda sigma: sigma * sigma_data / total(sigma),
        into=lambda sigma: 1 / total(sigma),
        noise=lambda sigma: jnp.log(sigma) / 4,
    )


def _vp(sigma_data: float) -> Scalings:
    """The network predicts the noise (Song et al. 2021, variance preserving)."""
    del sigma_data
    return Scalings(
        skip=jnp.ones_like,
        out=lambda sigma: -sigma,
        into=lambda sigma: 1 / jnp.sqrt(sigma**2 + 1),
        noise=lambda sigma: VP_STEPS * vp_time(sigma),
    )


def _ve(sigma_data: float) -> Scalings:
    """The network predicts the score times σ (Song et al. 2021, variance exploding)."""
    del sigma_data
    return Scalings(
        skip=jnp.ones_like,
        out=lambda sigma: sigma,
        into=jnp.ones_like,
        noise=lambda sigma: jnp.log(sigma / 2),
    )


def _v(sigma_data: float) -> Scalings:
    """The network predicts the velocity, up to its sign (Salimans & Ho 2022); time in [0, 1)."""
    del sigma_data
    return Scalings(
        skip=lambda sigma: 1 / (sigma**2 + 1),
        out=lambda sigma: sigma / jnp.sqrt(sigma**2 + 1),
        into=lambda sigma: 1 / jnp.sqrt(sigma**2 + 1),
        noise=lambda sigma: jnp.arctan(sigma) * (2 / np.pi),
    )


DENOISERS = {'edm': _edm, 'vp': _vp, 've': _ve, 'v': _v}


def make_denoiser(kind: str, network: Network, *, sigma_data: float = SIGMA_DATA) -> Denoise:
    """The denoiser of this kind around a network.

    Args:
        kind: 'edm', 'vp', 've' or 'v'.
        network: F.
        sigma_data: standard deviation of the data; for 'edm'.
    """
    if kind not in DENOISERS:
        raise ValueError(f'denoiser is {kind!r}; it must be one of {sorted(DENOISERS)}')
    scalings = DENOISERS[kind](sigma_data)

    def denoise(x, sigma, label):
        over_pixels = sigma[:, None, None, None]
        output = network(scalings.into(over_pixels) * x, scalings.noise(sigma), label)
        return scalings.skip(over_pixels) * x + scalings.out(over_pixels) * output

    return denoise
