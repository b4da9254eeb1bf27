"""Images drawn from class moments: a normal distribution of frequencies for each class."""

from typing import NamedTuple

import numpy as np

from dpp_jax.data.frequencies import Frequencies

_LEAST = 1e-4  # 0.01² of a pixel in [0, 1]


class ClassMoments(NamedTuple):
    """Mean and covariance of the frequencies of each class.

    Attributes:
        means: (classes, k) float32.
        factors: (classes, k, k) float32; the covariance is factor factorᵀ.
        rest: () float32, the variance along a direction that a covariance leaves out, in the mean over all.
    """

    means: np.ndarray
    factors: np.ndarray
    rest: np.ndarray

    def draw(self, frequencies: Frequencies, labels: np.ndarray, key: int, number: int) -> np.ndarray:
        """Draw one image for each label, (n, H, W, C) uint8.

        Args:
            frequencies: that the moments are of.
            labels: (n,).
            key: 128 bits.
            number: of the batch: with another one, the images are independent of these.
        """
        # Philox is counter-based: every batch has random numbers of its own.
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
        normal = generator.standard_normal((len(labels), self.means.shape[1]), np.float32)
        moved = np.matmul(self.factors[labels], normal[..., None])[..., 0]
        return frequencies.images(self.means[labels] + moved)


def fit(
    centers: np.ndarray,
    shifts: np.ndarray,
    seconds: np.ndarray,
    *,
    mean_noise: np.ndarray,
    second_noise: np.ndarray,
) -> ClassMoments:
    """Estimate class moments from noisy ones, by what is known of the noise.

    The shift is shrunk towards 0 as James and Stein do. Of the covariance those eigenvalues are kept that
    stand out of the noise's (`edge`), each less what noise adds to it: the limit of a matrix of low rank with
    symmetric noise (Benaych-Georges & Nadakuditi 2011). So eigenvalues are right in the mean. That
    eigenvectors are off, with cos² = 1 - k τ² / eigenvalue² of the angle, is left as it is.

    Args:
        centers: (classes, k), around which moments were asked for.
        shifts: (classes, k), noisy means minus centers.
        seconds: (classes, k, k), noisy second moments around the centers, symmetric.
        mean_noise: (classes,), standard deviation of noise in shifts.
        second_noise: (classes,), τ, of noise off the diagonal of seconds; on it, √2 τ.
    """
    size = shifts.shape[1]
    squares = np.maximum(np.sum(np.square(shifts), axis=1), np.finfo(np.float32).tiny)
    kept = np.maximum(0, 1 - max(size - 2, 0) * np.square(mean_noise) / squares)
    shifts = kept[:, None] * shifts
    covariances = seconds - shifts[:, :, None] * shifts[:, None, :]
    values, vectors = np.linalg.eigh(covariances.astype(np.float64))
    edges = edge(second_noise, size)[:, None]
    above = np.maximum(np.square(values) - np.square(edges), 0)
    kept = np.where(values > edges, (values + np.sqrt(above)) / 2, 0)
    means = (centers + shifts).astype(np.float32)
    factors = (vectors * np.sqrt(kept)[:, None, :]).astype(np.float32)
    rest = left_out(means - centers, seconds, factors, 1 / np.maximum(second_noise, 1e-30))
    return ClassMoments(means=means, factors=factors, rest=rest)


def left_out(
    shifts: np.ndarray, seconds: np.ndarray, factors: np.ndarray, counts: np.ndarray | float = 1.0
) -> np.ndarray:
    """Estimate the variance along a direction that covariances leave out, () float32, at least 1e-4.

    Noise hides these eigenvalues one by one, and hardly their sum: the noise in a trace is that of k numbers.

    Args:
        shifts: (classes, k), means minus centers.
        seconds: (classes, k, k), noisy second moments around the centers.
        factors: (classes, k, k) of the covariances.
        counts: (classes,) > 0, what sums of the classes were divided by, in any unit: noise falls with it.
    """
    traces = np.einsum('cii->c', seconds) - np.sum(np.square(shifts), axis=1)
    directions = factors.shape[1] - np.any(factors != 0, axis=1).sum(axis=1)
    left = traces - np.sum(np.square(factors), axis=(1, 2))
    weights = np.square(counts / np.max(counts)) * np.ones(len(left))
    mean = np.sum(weights * left) / max(np.sum(weights * directions), 1e-30)
    return np.asarray(max(mean, _LEAST), np.float32)


def edge(second_noise: np.ndarray | float, size: int) -> np.ndarray | float:
    """Return the largest eigenvalue that noise alone has, 2 τ √k: what stands out is above it."""
    return 2 * second_noise * np.sqrt(size)
