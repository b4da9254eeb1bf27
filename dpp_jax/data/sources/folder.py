"""What sources that read files of a folder share."""

from collections.abc import Callable, Iterator
import contextlib
import gzip
import math
from pathlib import Path
from typing import BinaryIO
import zipfile
import zlib

import numpy as np

from dpp_jax.data.images import check_labels
from dpp_jax.data.rows import Rows
from dpp_jax.data.sources.source import SourceInfo
from dpp_jax.data.stored import memory_of_machine

_BLOCK = 2**20  # bytes of an array that are read at a time
# What NumPy, gzip and zipfile raise for a damaged file.
_DAMAGED = (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


_ENDS = 2**24  # bytes


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn all errors of a damaged file into a ValueError that names it."""
    try:
        yield
    except _DAMAGED as error:
        allowed = 'a whole gzip file, or npz file with the arrays images and labels'
        raise ValueError(f'{path} cannot be read ({error}); it must be {allowed}') from error


def read_rows(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, rows: Rows) -> tuple[np.ndarray, int]:
    """Read some rows of an array whose bytes come in order; of the others, only a block is in memory.

    Args:
        file: at the array's first byte.
        shape: of the whole array, (N, ...).
        dtype: of the array.
        rows: to keep, n of N.

    Returns:
        The rows (n, ...), and how many bytes the file has: of more than the array's, it is told by one more.
    """
    kept = np.empty((len(rows), *shape[1:]), dtype)
    bytes_per_row = math.prod(shape[1:]) * dtype.itemsize
    at_once, found = max(1, _BLOCK // max(1, bytes_per_row)), 0
    for start in range(0, shape[0], at_once):
        stop = min(start + at_once, shape[0])
        block = file.read((stop - start) * bytes_per_row)
        found += len(block)
        if len(block) < (stop - start) * bytes_per_row:
            return kept, found
        places, chosen = rows.within(start, stop)
        kept[places] = np.frombuffer(block, dtype).reshape(stop - start, *shape[1:])[chosen]
    return kept, found + len(file.read(1))


def checksum(path: Path) -> str:
    """Return name, size, and a checksum of the first and the last 16 MiB of a file."""
    with open(path, 'rb') as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return f'{path.name} {size} {zlib.crc32(file.read(_ENDS), zlib.crc32(start)):08x}'


def image_shape(
    path: Path, images: tuple[int, ...], labels: tuple[int, ...], rows: Callable[[int], Rows] = Rows
) -> tuple[int, ...]:
    """Return (N, H, W, C), after a check of two headers: what they claim is read only if it can be.

    Args:
        path: of the images.
        images: the shape that the header of the images claims, (N, H, W) or (N, H, W, C).
        labels: likewise, (N,).
        rows: N → those that are kept in memory.

    Raises:
        ValueError: the shapes do not fit each other, or more is claimed than this machine's memory holds.
    """
    if len(images) not in (3, 4) or math.prod(labels) != images[0]:
        raise ValueError(
            f'{path} has images of shape {images} and labels of shape {labels}; it must have images of shape '
            '(images, height, width) or (images, height, width, channels), and one label for each'
        )
    check_memory(path, len(rows(images[0])) * math.prod(images[1:]))
    return images if len(images) == 4 else (*images, 1)


def check_memory(path: Path, size: int) -> None:
    """Refuse an array of `size` bytes that this machine's memory cannot hold."""
    memory = memory_of_machine()
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
        class_counts=tuple(np.bincount(train_labels, minlength=classes).tolist()),
    )
