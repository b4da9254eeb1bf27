"""Fréchet distance between two sets of images (FID), by the mean and covariance of their features.

Sums are kept in float64.
"""

from collections.abc import Iterable

import numpy as np

# What counts as rounding, relative to the largest value: how far a covariance may differ from its transpose,
# and its eigenvalues may lie below 0.
_COVARIANCE_TOLERANCE = 1e-6

# With fewer images in a set FID is too large by more than 1 (64 features): samples of one Gaussian are 2.2
# apart, 1,000 against 1,000, and 35 apart, 64 against 64.
FEW_IMAGES = 2_000


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
    if count < 2:
        raise ValueError(f'features has {count} samples; a covariance needs at least 2')
    shift = total / count
    covariance = (products - count * np.outer(shift, shift)) / (count - 1)
    return origin + shift, (covariance + covariance.T) / 2


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1 C_2)^½). The trace of the root is the sum of the singular values of
    F_1ᵀ F_2, for any factors C_i = F_i F_iᵀ. That way every number is real, and singular covariances lose
    no precision.

    Args:
        mean_1, mean_2: (D,).
        cov_1, cov_2: (D, D), symmetric, no negative eigenvalues.

    Returns:
        A number, at least 0; 0 for equal arguments.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or no covariance.
    """
    mean_1, cov_1 = _checked_moments(mean_1, cov_1, '1')
    mean_2, cov_2 = _checked_moments(mean_2, cov_2, '2')
    if mean_1.size != mean_2.size:
        raise ValueError(f'mean_1 has {mean_1.size} values and mean_2 has {mean_2.size}; they must agree')
    factor_1 = _factor(cov_1, 'cov_1')
    factor_2 = _factor(cov_2, 'cov_2')
    trace_of_root = np.linalg.svd(factor_1.T @ factor_2, compute_uv=False).sum()
    difference = mean_1 - mean_2
    distance = difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_of_root
    return max(float(distance), 0.0)


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
            f'mean_{which} has shape {mean.shape} and cov_{which} has shape {covariance.shape}; '
            'they must be (D,) and (D, D)'
        )
    for name, value in ((f'mean_{which}', mean), (f'cov_{which}', covariance)):
        if not np.isfinite(value).all():
            raise ValueError(f'{name} has values that are not finite; all must be finite')
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _COVARIANCE_TOLERANCE * np.abs(covariance).max():
        raise ValueError(f'cov_{which} differs from its transpose by {asymmetry:.3g}; it must be symmetric')
    return mean, covariance


def _factor(covariance: np.ndarray, name: str) -> np.ndarray:
    """F with F Fᵀ = covariance; eigenvalues that rounding made negative count as zero."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    if eigenvalues[0] < -_COVARIANCE_TOLERANCE * np.abs(eigenvalues).max():
        raise ValueError(f'{name} has the eigenvalue {eigenvalues[0]:.3g}; a covariance has none below 0')
    return eigenvectors * np.sqrt(np.clip(eigenvalues, 0, None))
