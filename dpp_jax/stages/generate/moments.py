"""Images drawn from the class moments, in the place of some of the model's. They cost no privacy either."""

from collections.abc import Callable

import numpy as np

from dpp_jax.stages.generate import sampling
from dpp_jax.training import progress

_AT_ONCE = 64  # images of a class that are drawn together, always as many: rounding may depend on the number


def places(labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Say which images are drawn from the class moments: this share of every class, spread evenly.

    Of the first n images of a class there are share · n, rounded, but never all.

    Args:
        labels: (n,) integers in 0 .. classes - 1.
        classes: their number.
        share: in [0, 1).

    Returns:
        (n,) bool.
    """
    before = sampling.image_numbers(labels, classes) // classes  # images of the same class
    count = lambda images: np.clip(np.floor(images * share + 0.5), 0, np.maximum(images - 1, 0))
    return count(before + 1) > count(before)


def fill(images: np.ndarray, chosen: np.ndarray, labels: np.ndarray, draw: Callable, key: int) -> np.ndarray:
    """Put images drawn from the class moments between those of the model.

    Image k of those drawn of a class is the same, however many there are of any class.

    Args:
        images: (m, H, W, C) uint8, of the model.
        chosen: (n,) bool, the places of the others; m are False.
        labels: (n,) integers, of all.
        draw: (labels, key, number of the batch) → images, as `ClassMoments.draw`.
        key: 128 bits.

    Returns:
        (n, H, W, C) uint8.
    """
    found = np.empty((len(labels), *images.shape[1:]), np.uint8)
    found[~chosen] = images
    classes = int(labels.max()) + 1
    with progress.bar(int(chosen.sum()), 'moments', 'image', compiles=False, meets=False) as bar:
        for label in range(classes):
            rows = np.flatnonzero(chosen & (labels == label))
            of_class = np.full(_AT_ONCE, label, np.int32)
            for batch, first in enumerate(range(0, len(rows), _AT_ONCE)):
                part = rows[first : first + _AT_ONCE]
                found[part] = draw(of_class, key, batch << 32 | label)[: len(part)]
                bar.update(len(part))
    return found
