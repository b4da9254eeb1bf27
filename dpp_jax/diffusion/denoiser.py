"""Denoisers D(x; σ, label) around a network F, each with the noise levels that it is trained on.

D(x; σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x; c_noise(σ)) (Karras et al. 2022, EDM, equation 7).

A kind is a column of EDM's table 1, and a function below. 'vp', 've' and 'v' are trained as in Dockhorn et
al. 2023 (DPDM, appendix). A new kind is one more function, with its entry in `DENOISERS`.
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
OfSigma = Callable[[jax.Array], jax.Array]  # elementwise

SIGMA_DATA = 3**-0.5  # standard deviation of values spread uniformly over [-1, 1]
P_MEAN, P_STD = -1.2, 1.2  # of ln σ; EDM
VP_BETA_MIN, VP_BETA_D = 0.1, 19.9  # of the VP process
VP_T_MIN = 1e-5  # its smallest time in training
VP_STEPS = 999  # M - 1, by which the VP network's time in [0, 1] is scaled
VE_SIGMAS = (0.02, 100.0)  # range of σ, spread evenly on a logarithmic scale
V_LOG_SNR = (-15.0, 15.0)  # range of ln σ^-2 that bounds the time of the v loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of denoiser: a column of EDM's table 1.

    Attributes:
        c_skip: scaling of the noised image in the output.
        c_out: scaling of the network's output.
        c_in: scaling of the network's input.
        c_noise: the noise level as the network is told it.
        sample_sigma: (key, draws) → (draws,) float32, noise levels σ > 0 for training.
        weight: w(σ), of the squared error at σ; in all of them 1 / c_out².
    """

    c_skip: OfSigma
    c_out: OfSigma
    c_in: OfSigma
    c_noise: OfSigma
    sample_sigma: Callable[[jax.Array, int], jax.Array]
    weight: OfSigma

    def denoiser(self, network: Network) -> Denoise:
        """Return D around the network F."""

        def denoise(x, sigma, label):
            over_pixels = sigma[:, None, None, None]
            output = network(self.c_in(over_pixels) * x, self.c_noise(sigma), label)
            return self.c_skip(over_pixels) * x + self.c_out(over_pixels) * output

        return denoise


def edm(*, sigma_data: float = SIGMA_DATA, p_mean: float = P_MEAN, p_std: float = P_STD) -> Kind:
    """Return EDM: the network's input and target have unit variance (Karras et al. 2022).

    ln σ ~ N(p_mean, p_std²).
    """
    total = lambda sigma: jnp.sqrt(sigma**2 + sigma_data**2)
    return Kind(
        c_skip=lambda sigma: sigma_data**2 / total(sigma) ** 2,
        c_out=lambda sigma: sigma * sigma_data / total(sigma),
        c_in=lambda sigma: 1 / total(sigma),
        c_noise=lambda sigma: jnp.log(sigma) / 4,
        sample_sigma=lambda key, draws: jnp.exp(p_mean + p_std * jax.random.normal(key, (draws,))),
        weight=lambda sigma: (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2,
    )


def vp() -> Kind:
    """Return VP: the network predicts the noise (Song et al. 2021, variance preserving).

    σ = σ(t) with t uniform.
    """
    return Kind(
        c_skip=jnp.ones_like,
        c_out=lambda sigma: -sigma,
        c_in=lambda sigma: 1 / jnp.sqrt(sigma**2 + 1),
        c_noise=lambda sigma: VP_STEPS * vp_time(sigma),
        sample_sigma=lambda key, draws: vp_sigma(_uniform(key, draws, VP_T_MIN, 1.0)),
        weight=lambda sigma: sigma**-2,
    )


def ve() -> Kind:
    """Return VE: the network predicts σ times the score (Song et al. 2021, variance exploding).

    ln σ is uniform.
    """
    return Kind(
        c_skip=jnp.ones_like,
        c_out=lambda sigma: sigma,
        c_in=jnp.ones_like,
        c_noise=lambda sigma: jnp.log(sigma / 2),
        sample_sigma=lambda key, draws: jnp.exp(_uniform(key, draws, *np.log(VE_SIGMAS))),
        weight=lambda sigma: sigma**-2,
    )


def v() -> Kind:
    """Return v: the network predicts the velocity, up to its sign (Salimans & Ho 2022).

    Its time is t = 2 / π arctan σ, uniform: the angle between image and noise turns evenly.
    """
    low, high = (np.arctan(np.exp(-x / 2)) * 2 / np.pi for x in reversed(V_LOG_SNR))
    return Kind(
        c_skip=lambda sigma: 1 / (sigma**2 + 1),
        c_out=lambda sigma: sigma / jnp.sqrt(sigma**2 + 1),
        c_in=lambda sigma: 1 / jnp.sqrt(sigma**2 + 1),
        c_noise=lambda sigma: jnp.arctan(sigma) * (2 / np.pi),
        sample_sigma=lambda key, draws: jnp.tan(_uniform(key, draws, low, high) * (np.pi / 2)),
        weight=lambda sigma: 1 + sigma**-2,
    )


DENOISERS = {'edm': edm, 'vp': vp, 've': ve, 'v': v}


def make_kind(name: str, **settings: float) -> Kind:
    """Return the kind of this name.

    Args:
        name: one of `DENOISERS`.
        settings: arguments of its function; only 'edm' has any.

    Raises:
        ValueError: there is no such kind.
    """
    if name not in DENOISERS:
        raise ValueError(f'denoiser is {name!r}; it must be one of {sorted(DENOISERS)}')
    return DENOISERS[name](**settings)


def vp_sigma(t: jax.Array) -> jax.Array:
    """Return σ(t) of the VP process, t in [0, 1] (EDM, table 1)."""
    return jnp.sqrt(jnp.expm1(0.5 * VP_BETA_D * t**2 + VP_BETA_MIN * t))


def vp_time(sigma: jax.Array) -> jax.Array:
    """Return t, the inverse of `vp_sigma`."""
    return (jnp.sqrt(VP_BETA_MIN**2 + 2 * VP_BETA_D * jnp.log1p(sigma**2)) - VP_BETA_MIN) / VP_BETA_D


def _uniform(key: jax.Array, draws: int, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, (draws,), minval=low, maxval=high)
