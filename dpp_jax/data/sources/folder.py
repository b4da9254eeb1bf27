"""What sources that read files of a folder share."""

from collections.abc import Iterator
import contextlib
import gzip
from pathlib import Path
import zipfile
import zlib

import numpy as np

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


def describe_arrays(
    name: str, train_shape: tuple[int, ...], test_shape: tuple[int, ...], train_labels: np.ndarray
) -> SourceInfo:
    """Return what two image arrays and the training labels say.

    Args:
        name: of the source.
        train_shape, test_shape: (N, H, W) or (N, H, W, C).
        train_labels: integers (N,); the largest one gives the number of classes.

    Raises:
        ValueError: the splits differ in image shape, or the shapes are not as above.
    """
    if train_shape[1:] != test_shape[1:] or len(train_shape) not in (3, 4):
        raise ValueError(
            f'the images of {name} have the shapes {train_shape} in train and {test_shape} in test; '
            'both must be (images, height, width) or (images, height, width, channels), of one size'
        )
    return SourceInfo(
        name=name,
        train_images=train_shape[0],
        test_images=test_shape[0],
        image_shape=(*train_shape[1:3], train_shape[3] if len(train_shape) == 4 else 1),
        classes=int(train_labels.max()) + 1 if train_labels.size else 0,
    )
