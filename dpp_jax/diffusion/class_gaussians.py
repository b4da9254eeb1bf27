"""A denoiser around class moments: what is known of each class need not be learned by the network.

D(x; σ, y) = G(x; σ, y) + c_out(σ) F([c_in(σ) x, G / σ_data]; c_noise(σ), y), where

    G(x; σ, y) = m + f/(f + σ²) (x - m) + Q V diag(λ/(λ + σ²) - f/(f + σ²)) Vᵀ Qᵀ (x - m)

is the best linear denoiser of a class with mean m whose covariance is Q V diag(λ) Vᵀ Qᵀ in the span of Q,
which is that of the frequencies asked for, and f I outside: for normal images it is E[x₀ | x]. It has the
released class moments in the place of N(0, σ_data²), whose best denoiser is EDM's c_skip x (Karras et al.
2022, appendix B.6).

f is what the covariances leave out, in the mean of a direction (`data.class_moments`). Directions in the
span whose eigenvalues are lost in the noise have it, too, as it is in averaged frequencies: enlarged with
them where `moments.average_down` is above 1. Outside there is less, so f stays as it is: on MNIST 28x28 a
direction outside has 0.08 (values in [-1, 1]), one that is lost inside 0.3 to 0.6, and f is 0.06 to 0.13.
At high noise, where the class of an image is decided, little is left for the network. The network sees G
beside the noised image.

Everything here follows from what a query released: post-processing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.diffusion.denoiser import SIGMA_DATA, Denoise, Kind, Network

_EXACT = jax.lax.Precision.HIGHEST  # an accelerator's short products would be an error in every image


class ClassGaussians(NamedTuple):
    """Normal distributions of images in [-1, 1], one for each class, and one for "no class".

    Attributes:
        means: (classes + 1, d) float32, m.
        basis: (d, r) float32, Q: orthonormal columns.
        vectors: (classes + 1, r, r) float32, V: orthonormal columns.
        values: (classes + 1, r) float32, λ ≥ 0, the variances along the columns of Q V.
        rest: () float32, f, the variance in other directions.
    """

    means: np.ndarray
    basis: np.ndarray
    vectors: np.ndarray
    values: np.ndarray
    rest: np.ndarray

    def denoise(self, x: jax.Array, sigma: jax.Array, label: jax.Array) -> jax.Array:
        """Return G(x; σ, y): x (n, H, W, C), sigma (n,), label (n,) → (n, H, W, C) float32."""
        noise = jnp.square(sigma)[:, None]
        mean, vectors, values = (jnp.asarray(leaf)[label] for leaf in (self.means, self.vectors, self.values))
        away = x.reshape(len(x), -1).astype(jnp.float32) - mean
        inside = jnp.matmul(away, self.basis, precision=_EXACT)
        along = jnp.einsum('nij,ni->nj', vectors, inside, precision=_EXACT)
        rest = self.rest / (self.rest + noise)
        along = along * (values / (values + noise) - rest)
        inside = jnp.einsum('nij,nj->ni', vectors, along, precision=_EXACT)
        found = mean + rest * away + jnp.matmul(inside, jnp.transpose(self.basis), precision=_EXACT)
        return found.reshape(x.shape)

    def denoiser(self, kind: Kind, network: Network) -> Denoise:
        """Return D around a network whose input has twice the channels: the noised image, and G."""

        def denoise(x, sigma, label):
            known = self.denoise(x, sigma, label)
            over_pixels = sigma[:, None, None, None]
            seen = jnp.concatenate([kind.c_in(over_pixels) * x, known / SIGMA_DATA], axis=-1)
            return known + kind.c_out(over_pixels) * network(seen, kind.c_noise(sigma), label)

        return denoise


def of_moments(
    means: np.ndarray, factors: np.ndarray, rest: np.ndarray, synthesis: np.ndarray
) -> ClassGaussians:
    """Make the distributions of images from class moments; "no class" has mean and covariance of all.

    Every class counts equally there, as in pre-training.

    Args:
        means: (classes, r), of the frequencies of images with pixels in [0, 1].
        factors: (classes, r, r), the covariance is factor factorᵀ.
        rest: (), variance along a direction that covariances leave out.
        synthesis: (d, r), what makes an image of frequencies. It is linear, but for the cut to [0, 1].
    """
    basis, triangle = np.linalg.qr(synthesis)
    factors, size = factors.astype(np.float64), factors.shape[-1]
    lost = np.eye(size) - factors @ np.linalg.pinv(factors, rcond=1e-5)  # projects on what they leave out
    covariances = 4 * triangle @ (factors @ factors.transpose(0, 2, 1) + rest * lost) @ triangle.T
    means = means.astype(np.float64)
    away = 2 * (means - means.mean(0)) @ triangle.T
    means = 2 * means @ synthesis.T - 1
    covariances = np.concatenate([covariances, (covariances.mean(0) + away.T @ away / len(away))[None]])
    values, vectors = np.linalg.eigh(covariances)
    return ClassGaussians(
        means=np.concatenate([means, means.mean(0)[None]]).astype(np.float32),
        basis=basis.astype(np.float32),
        vectors=vectors.astype(np.float32),
        values=np.maximum(values, 0).astype(np.float32),
        rest=np.asarray(4 * rest, np.float32),
    )


def stand_in(*, classes: int, pixels: int, size: int) -> ClassGaussians:
    """Return distributions of the right shapes that nothing was asked for: for measuring speed and memory."""
    return ClassGaussians(
        means=np.zeros((classes + 1, pixels), np.float32),
        basis=np.eye(pixels, size, dtype=np.float32),
        vectors=np.tile(np.eye(size, dtype=np.float32), (classes + 1, 1, 1)),
        values=np.ones((classes + 1, size), np.float32),
        rest=np.asarray(0.1, np.float32),
    )
