"""Losses of one image: the weighted squared error of the denoised image, averaged over noise draws.

Every kind is E_{σ, n} [ w(σ) |D(x + n; σ, y) - x|² ], n ~ N(0, σ²), with its own distribution of σ and
weight w: EDM by Karras et al. 2022 (table 1), the others as Dockhorn et al. 2023 (DPDM, appendix) train
them. Many draws per image ("noise multiplicity") lower the variance of its gradient at no privacy cost.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.diffusion import denoiser as denoiser_lib

P_MEAN, P_STD = -1.2, 1.2  # of ln σ; EDM
VP_T_MIN = 1e-5  # smallest time of the VP process
VE_SIGMAS = (0.02, 100.0)  # range of σ, spread evenly on a logarithmic scale
V_LOG_SNR = (-15.0, 15.0)  # range of ln σ^-2 that bounds the time of the v loss


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """Distribution of σ and the weight of its error.

    Attributes:
        sample: (key, number of draws) → (draws,) σ.
        weight: σ → w(σ).
    """

    sample: Callable[[jax.Array, int], jax.Array]
    weight: Callable[[jax.Array], jax.Array]


def edm_levels(
    sigma_data: float = denoiser_lib.SIGMA_DATA, mean: float = P_MEAN, std: float = P_STD
) -> NoiseLevels:
    """ln σ ~ N(mean, std²), w = (σ² + σ_data²) / (σ σ_data)²."""
    return NoiseLevels(
        sample=lambda key, draws: jnp.exp(mean + std * jax.random.normal(key, (draws,))),
        weight=lambda sigma: (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2,
    )


def vp_levels() -> NoiseLevels:
    """σ = σ(t) of the VP process, t uniform, w = σ^-2."""
    return NoiseLevels(
        sample=lambda key, draws: denoiser_lib.vp_sigma(
            jax.random.uniform(key, (draws,), minval=VP_T_MIN, maxval=1.0)
        ),
        weight=lambda sigma: sigma**-2,
    )


def ve_levels() -> NoiseLevels:
    """ln σ uniform, w = σ^-2."""
    low, high = np.log(VE_SIGMAS)
    return NoiseLevels(
        sample=lambda key, draws: jnp.exp(jax.random.uniform(key, (draws,), minval=low, maxval=high)),
        weight=lambda sigma: sigma**-2,
    )


def v_levels() -> NoiseLevels:
    """σ = tan(π t / 2) with t uniform, so that (cos, sin) turns evenly; w = (1 + σ²) / σ²."""
    low, high = (np.arctan(np.exp(-x / 2)) * 2 / np.pi for x in reversed(V_LOG_SNR))
    return NoiseLevels(
        sample=lambda key, draws: jnp.tan(
            jax.random.uniform(key, (draws,), minval=low, maxval=high) * (np.pi / 2)
        ),
        weight=lambda sigma: 1 + sigma**-2,
    )


LEVELS = {'edm': edm_levels, 'vp': vp_levels, 've': ve_levels, 'v': v_levels}


def weighted_errors(
    denoise: denoiser_lib.Denoise,
    image: jax.Array,
    labels: jax.Array,
    sigma: jax.Array,
    noise: jax.Array,
    weight: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The loss of every draw, with everything random given.

    Args:
        denoise: D.
        image: float32 in [-1, 1]; (H, W, C) for all draws, or (K, H, W, C).
        labels: (K,) int32, the label of each draw.
        sigma: (K,) float32 > 0.
        noise: (K, H, W, C) unit normal.
        weight: w(σ).

    Returns:
        (K,) float32, means over pixels.
    """
    noisy = image + sigma[:, None, None, None] * noise
    errors = jnp.square(denoise(noisy, sigma, labels) - image)
    return weight(sigma) * errors.mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class ImageLoss:
    """The loss of an image, in two steps: everything random at once, then the errors in any parts."""

    levels: NoiseLevels

    def draw(
        self,
        key: jax.Array,
        image_shape: tuple[int, ...],
        label: jax.Array,
        *,
        draws: int,
        label_dropout: float,
        no_class: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Noise levels, noise and label dropout.

        Args:
            key: of all randomness.
            image_shape: (H, W, C).
            label: () int32.
            draws: K.
            label_dropout: probability, per draw, of replacing the label by `no_class`.
            no_class: the label that stands for "no class".

        Returns:
            labels (K,) int32, sigma (K,) float32, noise (K, H, W, C) unit normal.
        """
        sigma_key, noise_key, label_key = jax.random.split(key, 3)
        sigma = self.levels.sample(sigma_key, draws)
        noise = jax.random.normal(noise_key, (draws,) + image_shape)
        dropped = jax.random.bernoulli(label_key, label_dropout, (draws,))
        return jnp.where(dropped, no_class, label), sigma, noise

    def errors(self, denoise: denoiser_lib.Denoise, image: jax.Array, drawn: tuple) -> jax.Array:
        """The weighted errors of what `draw` returned, or of some of its rows: (rows,) float32.

        The rows may be of several images, which then stand in `image` row by row.
        """
        return weighted_errors(denoise, image, *drawn, self.levels.weight)

    def __call__(
        self,
        denoise: denoiser_lib.Denoise,
        image: jax.Array,
        label: jax.Array,
        key: jax.Array,
        **settings: float,
    ) -> jax.Array:
        """The mean of both steps for an image (H, W, C) float32 in [-1, 1]; `settings` as for `draw`."""
        return self.errors(denoise, image, self.draw(key, image.shape, label, **settings)).mean()


def make_loss(kind: str, **settings: float) -> ImageLoss:
    """The loss of this kind: 'edm', 'vp', 've' or 'v'; `settings` are those of its levels."""
    if kind not in LEVELS:
        raise ValueError(f'loss is {kind!r}; it must be one of {sorted(LEVELS)}')
    return ImageLoss(LEVELS[kind](**settings))
