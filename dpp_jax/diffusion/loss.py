"""The loss of a private image: the weighted squared error of its denoised copies.

E_{σ, n} [ w(σ) |D(x + n; σ, y) - x|² ], n ~ N(0, σ²). The kind of denoiser gives the distribution of σ and
the weight w. Many noise draws per image ("noise multiplicity", Dockhorn et al. 2023) lower its gradient's
variance at no privacy cost.

The loss comes in two steps: `draw` makes everything random at once, `errors` takes any part of it.
"""

import jax
import jax.numpy as jnp

from dpp_jax.diffusion.denoiser import Denoise, Kind

Drawn = tuple[jax.Array, jax.Array, jax.Array]  # labels (K,) int32, sigma (K,), noise (K, H, W, C)


def draw(
    kind: Kind,
    key: jax.Array,
    image_shape: tuple[int, ...],
    label: jax.Array,
    *,
    draws: int,
    label_dropout: float,
    no_class: int,
) -> Drawn:
    """Return labels, noise levels and noise of an image's noise draws.

    Args:
        kind: of denoiser.
        key: of all randomness.
        image_shape: (H, W, C).
        label: () int32.
        draws: K.
        label_dropout: probability, per draw, that `no_class` replaces the label.
        no_class: the label that stands for "no class".

    Returns:
        labels (K,) int32, sigma (K,) float32, noise (K, H, W, C) unit normal.
    """
    sigma_key, noise_key, label_key = jax.random.split(key, 3)
    sigma = kind.sample_sigma(sigma_key, draws)
    noise = jax.random.normal(noise_key, (draws,) + image_shape)
    dropped = jax.random.bernoulli(label_key, label_dropout, (draws,))
    return jnp.where(dropped, no_class, label), sigma, noise


def errors(kind: Kind, denoise: Denoise, image: jax.Array, drawn: Drawn) -> jax.Array:
    """Return the weighted squared error of every noised image, (n,) float32: means over pixels.

    Args:
        kind: of denoiser.
        denoise: D.
        image: float32 in [-1, 1]; (H, W, C) for all rows of `drawn`, or (n, H, W, C).
        drawn: what `draw` returned, or n of its rows.
    """
    label, sigma, noise = drawn
    noised = image + sigma[:, None, None, None] * noise
    squares = jnp.square(denoise(noised, sigma, label) - image)
    return kind.weight(sigma) * squares.mean((1, 2, 3))
