"""What sources that read files of a folder share."""

from collections.abc import Iterator
import contextlib
import gzip
import math
import os
from pathlib import Path
import zipfile
import zlib

import numpy as np

from dpp_jax.data.images import check_labels
from dpp_jax.data.sources.source import SourceInfo

# What NumPy, gzip and zipfile raise for a damaged file.
_DAMAGED = (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn all errors of a damaged file into a ValueError that names it."""
    try:
        yield
    except _DAMAGED as error:
        allowed = 'a whole gzip file, or npz file with the arrays images and labels'
        raise ValueError(f'{path} cannot be read ({error}); it must be {allowed}') from error


def image_shape(path: Path, images: tuple[int, ...], labels: tuple[int, ...]) -> tuple[int, ...]:
    """Return (N, H, W, C), after a check of two headers: what they claim is read only if it can be.

    Args:
        path: of the images.
        images: the shape that the header of the images claims, (N, H, W) or (N, H, W, C).
        labels: likewise, (N,).

    Raises:
        ValueError: the shapes do not fit each other, or more is claimed than this machine's memory holds.
    """
    if len(images) not in (3, 4) or math.prod(labels) != images[0]:
        raise ValueError(
            f'{path} has images of shape {images} and labels of shape {labels}; it must have images of shape '
            '(images, height, width) or (images, height, width, channels), and one label for each'
        )
    check_memory(path, math.prod(images))
    return images if len(images) == 4 else (*images, 1)


def check_memory(path: Path, size: int) -> None:
    """Refuse an array of `size` bytes that this machine's memory cannot hold."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if size > memory:
        raise ValueError(
            f'{path} claims an array of {size / 2**30:,.1f} GiB in its header; it must be less than the '
            f'{memory / 2**30:,.1f} GiB of memory of this machine'
        )


def describe_arrays(
    name: str, train_shape: tuple[int, ...], test_shape: tuple[int, ...], train_labels: np.ndarray
) -> SourceInfo:
    """Return what two image arrays and the training labels say.

    Args:
        name: of the source.
        train_shape, test_shape: (N, H, W, C).
        train_labels: integers (N,); the largest one gives the number of classes.

    Raises:
        ValueError: the splits differ in image shape.
    """
    if train_shape[1:] != test_shape[1:]:
        raise ValueError(
            f'the images of {name} have the shapes {train_shape} in train and {test_shape} in test; '
            'both must be (images, height, width, channels), of one size'
        )
    classes = int(train_labels.max()) + 1 if train_labels.size else 0
    check_labels(train_labels, count=train_shape[0], classes=max(1, classes), name=name, every_class=False)
    return SourceInfo(
        name=name,
        train_images=train_shape[0],
        test_images=test_shape[0],
        image_shape=train_shape[1:],
        classes=classes,
    )
