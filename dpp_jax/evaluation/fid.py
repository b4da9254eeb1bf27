"""Numbers that compare images: feature moments, the Fréchet distance, the share of right labels.

Also the checks of images and labels that the rest of the package shares. Sums are kept in float64
and reduced once at the end.
"""

from collections.abc import Iterable

import numpy as np

# How far, relative to its largest entry, a covariance may be from symmetric or from having no
# negative eigenvalue before it is called an error rather than rounding.
_COVARIANCE_TOLERANCE = 1e-6


class RunningMoments:
    """Mean and covariance of features that arrive in batches.

    The sums are taken around the first batch's mean: sums of raw squares would lose the covariance
    to rounding when the mean is large against the spread.
    """

    def __init__(self):
        self._count = 0
        self._origin = None
        self._sum = None
        self._sum_of_products = None

    def add(self, features: np.ndarray) -> None:
        """Adds one batch.

        Args:
            features: (N, D) real numbers, N ≥ 0, the same D in every batch.

        Raises:
            ValueError: not two-dimensional, another D than before, or not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f'features has shape {features.shape}; it must be (samples, features)')
        if self._origin is not None and features.shape[1] != self._origin.size:
            raise ValueError(
                f'features has {features.shape[1]} values per sample; earlier batches had {self._origin.size}'
            )
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise ValueError(f'features of {bad} samples are not finite; all must be finite')
        if len(features) == 0:
            return
        if self._origin is None:
            dimension = features.shape[1]
            self._origin = features.mean(axis=0)
            self._sum = np.zeros(dimension)
            self._sum_of_products = np.zeros((dimension, dimension))
        centred = features - self._origin
        self._count += len(features)
        self._sum += centred.sum(axis=0)
        self._sum_of_products += centred.T @ centred

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean, float64 (D,), and the unbiased covariance (divisor N − 1), float64 (D, D).

        Raises:
            ValueError: fewer than two samples were added.
        """
        if self._count < 2:
            raise ValueError(f'features has {self._count} samples; a covariance needs at least 2')
        shift = self._sum / self._count
        covariance = self._sum_of_products - self._count * np.outer(shift, shift)
        covariance /= self._count - 1
        return self._origin + shift, (covariance + covariance.T) / 2


def moments(features: np.ndarray | Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of feature vectors.

    Args:
        features: (N, D) real numbers, or an iterable of such batches.

    Returns:
        The mean, float64 (D,), and the unbiased covariance (divisor N − 1), float64 (D, D).

    Raises:
        ValueError: fewer than two samples, values that are not finite, batches that differ in D.
    """
    running = RunningMoments()
    # An array of shape (N, D) is one batch, not an iterable of N batches.
    is_array = hasattr(features, 'ndim')
    for batch in [features] if is_array else features:
        running.add(batch)
    return running.result()


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |m_1 − m_2|² + tr(C_1 + C_2 − 2 (C_1 C_2)^½). The trace of the root is the sum of the square
    roots of the eigenvalues of C_1^½ C_2 C_1^½; these are the singular values of F_1ᵀ F_2 for any
    factors C_i = F_i F_iᵀ, which nothing complex enters and which keep full precision where the
    covariances are singular (a square root of a rounded zero would not).

    Args:
        mean_1, mean_2: (D,).
        cov_1, cov_2: (D, D), symmetric, no negative eigenvalues.

    Returns:
        A number ≥ 0; 0 for equal arguments.

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


def label_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of entries in which two integer arrays of shape (N,), N ≥ 1, agree; in [0, 1]."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or predicted.size == 0:
        raise ValueError(
            f'predicted has shape {predicted.shape} and labels has shape {labels.shape}; '
            'both must be (N,) with the same N of at least 1'
        )
    return float(np.mean(predicted == labels))


def check_images(images: np.ndarray, image_shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The images, known to be uint8 (N, H, W, C), N ≥ 1, of `image_shape` (H, W, C) if given."""
    images = np.asarray(images)
    if images.ndim != 4 or images.size == 0 or images.dtype != np.uint8:
        raise ValueError(
            f'images is {images.dtype} of shape {images.shape}; '
            'it must be uint8 of shape (N, H, W, C) with at least one image'
        )
    if image_shape is not None and images.shape[1:] != tuple(image_shape):
        raise ValueError(
            f'images has the image shape {images.shape[1:]}; '
            f'it must be {tuple(image_shape)}, that of the training images'
        )
    return images


def check_labelled(images: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as numpy arrays, once the labels fit the images and every class has an image."""
    images = check_images(images)
    if classes < 2:
        raise ValueError(f'classes is {classes}; it must be at least 2')
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'labels is {labels.dtype} of shape {labels.shape}; '
            f'it must be integers of shape ({len(images)},), one per image'
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'labels range from {labels.min()} to {labels.max()}; they must lie in [0, {classes})'
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if missing.size:
        raise ValueError(f'labels has no image of class {missing.tolist()}; every class needs some')
    return images, labels


def _checked_moments(mean, covariance, which: str) -> tuple[np.ndarray, np.ndarray]:
    """The moments in float64, once their shapes and values are known to be those of a Gaussian."""
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
