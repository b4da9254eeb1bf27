"""Whether synthetic images lie nearer to their nearest training image than other real images do.

A generator that copies training images makes images unusually near to one. How near is usual, real images
say that no training saw. It is a check for the owner of the images, and no proof: the guarantee is (ε, δ).
"""

from collections.abc import Mapping

import numpy as np
import scipy.stats

from dpp_jax.evaluation import scores

MOST_IMAGES = 5_000  # synthetic ones, and held-out real ones, that are looked at
_QUANTILE = 0.01  # of the distances of real images: what counts as near


def nearest(features: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distance and number of the nearest training image of each image.

    Args:
        features: real numbers (N, D).
        training: (M, D), M ≥ 1.

    Returns:
        Euclidean distances, float64 (N,), and rows of `training`, integers (N,).
    """
    center = training.mean(axis=0, dtype=np.float64).astype(np.float32)
    x, y = features - center, training - center
    rows = np.concatenate([squares.argmin(axis=1) for _, squares in scores.squared_distances(x, y)])
    # float32 finds the neighbor; its distance is computed again, without the rounding of large squares.
    return np.linalg.norm(features.astype(np.float64) - training[rows], axis=1), rows


def compare(synthetic: np.ndarray, real: np.ndarray) -> Mapping[str, float | int]:
    """Compare distances to the nearest training image: of synthetic images, and of held-out real ones.

    "Near" is what at most 1 % of the real images are: nearer than the j-th smallest of their M distances,
    j = max(1, M / 100). If synthetic images were as real ones, all orders of the N + M distances would be
    equally likely. The p-value is the probability, then, of as many near synthetic images as there are, or
    more: that among the first so many of the mixed order at most j - 1 are real. A small one (below 0.01)
    says that synthetic images lie nearer to training images than chance lets real ones lie.

    Args:
        synthetic: distances, (N,), N ≥ 1.
        real: distances, (M,), M ≥ 1.

    Returns:
        Numbers by name: near_distance, share_near (of the synthetic images), share_near_expected,
        median_distance, median_distance_of_real, median_ratio (below 1: synthetic ones are nearer), p_value.
    """
    number, others = len(synthetic), len(real)
    j = max(1, int(_QUANTILE * others))
    near = np.partition(real, j - 1)[j - 1]
    count = int((synthetic < near).sum())
    # The first count + j - 1 of the mixed order have count synthetic images, or more, if at most j - 1 real.
    p_value = scipy.stats.hypergeom.cdf(j - 1, number + others, others, count + j - 1)
    medians = float(np.median(synthetic)), float(np.median(real))
    return {
        'near_distance': float(near),
        'share_near': count / number,
        'share_near_expected': j / (others + 1),
        'median_distance': medians[0],
        'median_distance_of_real': medians[1],
        'median_ratio': medians[0] / max(medians[1], 1e-30),
        'p_value': float(min(p_value, 1.0)),
    }
