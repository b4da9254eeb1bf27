"""Fréchet distance between two sets of images (FID), by the mean and covariance of their features.

Sums are kept in float64.
"""

from collections.abc import Iterable
import dataclasses

import numpy as np
import scipy.linalg

# What counts as rounding, relative to the largest value: how far a covariance may differ from its transpose,
# and its eigenvalues may lie below 0.
_COVARIANCE_TOLERANCE = 1e-6

# With fewer images in a set FID is too large by more than 1 (64 features): samples of one Gaussian are 2.2
# apart, 1,000 against 1,000, and 35 apart, 64 against 64.
FEW_IMAGES = 2_000
_HALVES = 5  # whose FIDs give the spread


def moments(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of feature vectors that come in batches.

    Args:
        batches: real numbers (N, D), N ≥ 0, with the same D in each; two vectors or more altogether.

    Returns:
        The mean, float64 (D,), and the unbiased covariance (divisor N - 1), float64 (D, D).

    Raises:
        ValueError: another shape, too few vectors, or values that are not finite.
    """
    count, origin, total, products = 0, None, 0.0, 0.0
    for features in batches:
        features = _checked_features(features, None if origin is None else origin.size)
        if len(features) == 0:
            continue
        if origin is None:
            # Sums are taken around the first batch's mean. Where the mean is far above the spread, sums of
            # raw squares would lose the covariance to rounding.
            origin = features.mean(axis=0)
        centered = features - origin
        count += len(features)
        total += centered.sum(axis=0)
        products += centered.T @ centered
    _check_count(count)
    shift = total / count
    covariance = (products - count * np.outer(shift, shift)) / (count - 1)
    return origin + shift, (covariance + covariance.T) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A normal distribution, by a factor of its covariance.

    Attributes:
        mean: float64 (D,).
        factor: F, float64 (D, r), with F Fᵀ = covariance; r is its rank, or little more.
    """

    mean: np.ndarray
    factor: np.ndarray = dataclasses.field(repr=False)

    @classmethod
    def of_moments(cls, mean: np.ndarray, covariance: np.ndarray, which: str = '') -> 'Gaussian':
        """Return the distribution with this mean, (D,), and covariance, (D, D), see `frechet_distance`."""
        mean, covariance = _checked_moments(mean, covariance, which)
        return cls(mean=mean, factor=_factor(covariance, f'cov{which}'))

    @classmethod
    def of_features(cls, features: np.ndarray) -> 'Gaussian':
        """Return the distribution with mean and unbiased covariance of features (N, D), N ≥ 2.

        With N ≤ D their differences from the mean are a factor already: nothing is to be decomposed.
        """
        if len(features) > features.shape[1]:
            return cls.of_moments(*moments([features]))
        features = _checked_features(features, None)
        _check_count(len(features))
        mean = features.mean(axis=0)
        return cls(mean=mean, factor=(features - mean).T / np.sqrt(len(features) - 1))


def distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians of one dimension, see `frechet_distance`."""
    if first.mean.size != second.mean.size:
        raise ValueError(
            f'mean_1 has {first.mean.size} values and mean_2 has {second.mean.size}; they must agree'
        )
    trace_of_root = scipy.linalg.svdvals(first.factor.T @ second.factor, check_finite=False).sum()
    difference = first.mean - second.mean
    traces = np.sum(first.factor**2) + np.sum(second.factor**2)
    return max(float(difference @ difference + traces - 2 * trace_of_root), 0.0)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1 C_2)^½). The trace of the root is the sum of the singular values of
    F_1ᵀ F_2, for any factors C_i = F_i F_iᵀ. That way every number is real, and singular covariances lose
    no precision. Factors have as many columns as the rank: few images make it fast.

    Args:
        mean_1, mean_2: (D,).
        cov_1, cov_2: (D, D), symmetric, no negative eigenvalues.

    Returns:
        A number, at least 0; 0 for equal arguments.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or no covariance.
    """
    return distance(Gaussian.of_moments(mean_1, cov_1, '_1'), Gaussian.of_moments(mean_2, cov_2, '_2'))


def spread(features: np.ndarray, reference: Gaussian, rng: np.random.Generator) -> float | None:
    """Return the standard error of FID that comes from the choice of images, by random halves.

    It is the standard deviation of the FIDs of 5 random halves: for halves drawn without replacement that
    estimates the standard error for all N images (the delete-half jackknife, Shao and Wu 1989). It says
    nothing of the bias: FID of few images is too large, of the halves too.

    Args:
        features: real numbers (N, D), of the images that FID compares with the reference.
        reference: of the other images.
        rng: chooses.

    Returns:
        A number, at least 0; None with fewer than 4 images.
    """
    half = len(features) // 2
    if half < 2:
        return None
    halves = (features[rng.permutation(len(features))[:half]] for _ in range(_HALVES))
    return float(np.std([distance(Gaussian.of_features(half), reference) for half in halves], ddof=1))


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f'features has {count} samples; a covariance needs at least 2')


def _checked_features(features: np.ndarray, dimension: int | None) -> np.ndarray:
    """Return a batch in float64, after a check of shape and values; earlier ones had `dimension` features."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f'features has shape {features.shape}; it must be (samples, features)')
    if dimension is not None and features.shape[1] != dimension:
        raise ValueError(
            f'features has {features.shape[1]} values per sample; it must have {dimension}, as before'
        )
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        raise ValueError(f'features has {bad} samples that are not finite; all must be finite')
    return features


def _checked_moments(mean, covariance, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the moments in float64, once their shapes and values are known to be those of a Gaussian."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or mean.size == 0:
        raise ValueError(
            f'mean{which} has shape {mean.shape} and cov{which} has shape {covariance.shape}; '
            'they must be (D,) and (D, D)'
        )
    for name, value in ((f'mean{which}', mean), (f'cov{which}', covariance)):
        if not np.isfinite(value).all():
            raise ValueError(f'{name} has values that are not finite; all must be finite')
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _COVARIANCE_TOLERANCE * np.abs(covariance).max():
        raise ValueError(f'cov{which} differs from its transpose by {asymmetry:.3g}; it must be symmetric')
    return mean, covariance


def _factor(covariance: np.ndarray, name: str) -> np.ndarray:
    """F with F Fᵀ = covariance; eigenvalues that are nothing but rounding count as zero."""
    eigenvalues, eigenvectors = scipy.linalg.eigh(covariance, driver='evd', check_finite=False)
    largest = np.abs(eigenvalues).max()
    if eigenvalues[0] < -_COVARIANCE_TOLERANCE * largest:
        raise ValueError(f'{name} has the eigenvalue {eigenvalues[0]:.3g}; a covariance has none below 0')
    kept = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * largest
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])
