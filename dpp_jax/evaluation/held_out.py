"""The held-out share of a training set, by which every classifier chooses what to keep."""

import jax
import numpy as np

from dpp_jax.data.images import Images, check_images, check_labels


def random_generator(key: jax.Array) -> np.random.Generator:
    """Return NumPy's generator for the order of images: a function of the typed jax.random key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def split(
    images: np.ndarray, labels: np.ndarray, *, classes: int, share: float, rng: np.random.Generator
) -> tuple[Images, Images]:
    """Return the images to train on, and those held out: the same share of every class.

    Args:
        images: uint8 (N, H, W, C).
        labels: integers (N,) in 0..classes - 1, at least two of every class.
        classes: number of classes, at least 2.
        share: what to hold out, in (0, 1); of every class at least one image, and never all.
        rng: chooses.

    Returns:
        Both sets in the order of `images`; together they hold every image once.

    Raises:
        ValueError: images, labels or classes other than described.
    """
    if classes < 2:
        raise ValueError(f'classes is {classes}; it must be at least 2')
    images = check_images(images, name='training set')
    labels = check_labels(labels, count=len(images), classes=classes, name='training set')
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < 2:
        raise ValueError(
            f'training set: {counts.min()} image has class {counts.argmin()}; each class needs at least 2, '
            'so that one can be held out'
        )
    is_held = np.zeros(len(labels), bool)
    for label in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        number = min(max(round(share * rows.size), 1), rows.size - 1)
        is_held[rows[:number]] = True
    return tuple(
        Images(images=images[chosen], labels=labels[chosen].astype(np.int32))
        for chosen in (~is_held, is_held)
    )


def label_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share, in [0, 1], of entries in which two integer arrays (N,) agree.

    Raises:
        ValueError: the shapes differ, or N is 0.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or predicted.size == 0:
        raise ValueError(
            f'predicted has shape {predicted.shape} and labels has shape {labels.shape}; '
            'both must be (N,) with the same N, at least 1'
        )
    return float(np.mean(predicted == labels))
