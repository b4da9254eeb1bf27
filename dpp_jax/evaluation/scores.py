"""Scores of synthetic images by their features, beside FID: KID, Inception score, precision and recall.

Each comes with its spread, and with the number of images that it is of. All are computed in float64.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np
import scipy.special

MOST_IMAGES = 10_000  # of a set, that KID, precision and recall look at
_SUBSETS, _SUBSET_IMAGES = 50, 1_000  # of KID
SPLITS = 10  # of the Inception score
_NEIGHBORS = 3  # k of precision and recall
LEAST_IMAGES = 2 * (_NEIGHBORS + 1)  # of a set, for precision and recall
_HALVES = 5  # that give the spread of precision and recall
_BLOCK = 2**24  # distances at once: 128 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A score.

    Attributes:
        value: the score.
        spread: its standard deviation over parts of the images, see each score.
        images: how many synthetic images it is of.
    """

    value: float
    spread: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        return dataclasses.asdict(self)


def kid(features: np.ndarray, reference: np.ndarray, rng: np.random.Generator) -> Score:
    """Return the kernel inception distance (Bińkowski et al. 2018): the unbiased squared MMD.

    The kernel is (x·y / D + 1)³. Mean and standard deviation are over 50 pairs of random subsets, of 1,000
    images each, or of half of the smaller set, if that has fewer than 2,000.

    Args:
        features: real numbers (N, D), N ≥ 4, of the synthetic images.
        reference: (M, D), M ≥ 4.
        rng: chooses the subsets.
    """
    size = min(_SUBSET_IMAGES, len(features) // 2, len(reference) // 2)
    if size < 2:
        raise ValueError(f'KID is asked for {min(len(features), len(reference))} images; it needs at least 4')
    found = []
    for _ in range(_SUBSETS):
        x = features[rng.choice(len(features), size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
        found.append(within / (size * (size - 1)) - 2 * _kernel(x, y).mean())
    return Score(value=float(np.mean(found)), spread=float(np.std(found, ddof=1)), images=len(features))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    found = x @ y.T / x.shape[1] + 1
    return found * found * found


def inception_score(logits: np.ndarray, rng: np.random.Generator) -> Score:
    """Return the Inception score (Salimans et al. 2016): exp E KL(p(y|x) ‖ p(y)).

    Mean and standard deviation are over 10 parts of the images, in random order.

    Args:
        logits: real numbers (N, classes), N ≥ 10, of a classifier of the images.
        rng: gives the order.
    """
    if len(logits) < SPLITS:
        raise ValueError(f'the Inception score is asked for {len(logits)} images; it needs at least {SPLITS}')
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)[rng.permutation(len(logits))]
    found = []
    for part in np.array_split(log_p, SPLITS):
        log_mean = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
        found.append(np.exp(np.sum(np.exp(part) * (part - log_mean), axis=1).mean()))
    return Score(value=float(np.mean(found)), spread=float(np.std(found, ddof=1)), images=len(logits))


def precision_recall(
    features: np.ndarray, reference: np.ndarray, rng: np.random.Generator
) -> dict[str, Score]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019), with k = 3.

    Precision: the share of synthetic images that lie nearer to some real image than its third nearest
    real neighbor. Recall: the same with the roles exchanged. The spread is the standard deviation over 5
    random halves of the synthetic images (the delete-half jackknife). Both depend on the numbers of images.

    Args:
        features: real numbers (N, D), N ≥ 8, of the synthetic images.
        reference: (M, D), M ≥ 8, of the real ones.
        rng: chooses the halves.

    Returns:
        'precision' and 'recall'.
    """
    if min(len(features), len(reference)) < LEAST_IMAGES:
        raise ValueError(
            f'precision and recall are asked for {len(features)} and {len(reference)} images; they need at '
            f'least {LEAST_IMAGES}'
        )
    center = reference.mean(axis=0, dtype=np.float64)
    synthetic, real = features - center, reference - center
    real_radius = _radius(real)
    order = [rng.permutation(len(synthetic))[: len(synthetic) // 2] for _ in range(_HALVES)]
    found = [_precision_recall(synthetic[rows], real, real_radius) for rows in (slice(None), *order)]
    spread = np.std(found[1:], axis=0, ddof=1)
    return {
        name: Score(value=float(value), spread=float(std), images=len(synthetic))
        for name, value, std in zip(('precision', 'recall'), found[0], spread)
    }


def _precision_recall(
    synthetic: np.ndarray, real: np.ndarray, real_radius: np.ndarray
) -> tuple[float, float]:
    radius = _radius(synthetic)
    inside, covered = [], np.zeros(len(real), bool)
    for rows, squares in squared_distances(synthetic, real):
        inside.append((squares <= real_radius).any(axis=1))
        covered |= (squares <= radius[rows, None]).any(axis=0)
    return np.concatenate(inside).mean(), covered.mean()


def _radius(x: np.ndarray) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, (N,)."""
    found = []
    for rows, squares in squared_distances(x, x):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf  # itself
        found.append(np.partition(squares, _NEIGHBORS - 1, axis=1)[:, _NEIGHBORS - 1])
    return np.concatenate(found)


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield squared distances of some rows of x, (N, D), to all of y, (M, D): (which rows, (n, M)).

    The rows should be centered: rounding is relative to the squares of their values.
    """
    y_squares = np.einsum('ij,ij->i', y, y)
    at_once = max(1, _BLOCK // len(y))
    for start in range(0, len(x), at_once):
        part = x[start : start + at_once]
        squares = part @ y.T
        squares *= -2
        squares += y_squares
        squares += np.einsum('ij,ij->i', part, part)[:, None]
        yield slice(start, start + len(part)), squares
