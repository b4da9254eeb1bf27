"""Labeled images in an .npz file that any program may have written: what it must hold, and how it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
import zipfile

import numpy as np

from dpp_jax.data.images import Images, check_labels
from dpp_jax.data.rows import Rows
from dpp_jax.data.sources import folder, npz


class _Layout(NamedTuple):
    """How a file names its images and labels, and whether channels come before height and width."""

    names: tuple[str, str]
    is_channels_first: bool


_LAYOUTS = (_Layout(('x', 'y'), True), _Layout(('images', 'labels'), False))  # DPImageBench's, and ours
_AT_ONCE = 4096  # images that are converted together


def read(path: Path, *, image_shape: tuple[int, int, int], classes: int, least: int) -> Images:
    """Read a file with `x` (N, C, H, W) and `y` (N,), or with `images` (N, H, W, C) and `labels` (N,).

    Args:
        path: of the file. Pixels are uint8, or floating-point numbers in [0, 1], which are rounded; labels
            are integers.
        image_shape: (H, W, C) that each image must have.
        classes: labels must be in 0..classes - 1.
        least: number of images that each class must have.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not as above; one line for each thing that is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file')
    with folder.reading(path), zipfile.ZipFile(path) as archive:
        found = [name.removesuffix('.npy') for name in archive.namelist()]
    layout = next((each for each in _LAYOUTS if {*each.names} & {*found}), _LAYOUTS[0])
    images_name, labels_name = layout.names
    problems, images, labels, count = [], None, None, None
    if not {*layout.names} <= {*found}:
        has = ', '.join(found) or '(none)'
        problems.append(f'{path} has the arrays {has}; it must have x and y, or images and labels')
    if images_name in found:
        count = _try(problems, lambda: npz.read_header(path, images_name, Rows).shape[0])
    if count is not None:
        images = _try(problems, lambda: _images(path, layout, image_shape))
    if labels_name in found:
        labels = _try(problems, lambda: _labels(path, labels_name, count, classes, least))
    if problems:
        raise ValueError('\n'.join(problems))
    return Images(images=images, labels=labels)


def _try(problems: list[str], look: Callable[[], Any]) -> Any:
    """Return what `look` finds, or None with its lines added to the problems."""
    try:
        return look()
    except ValueError as error:
        problems.append(str(error))
        return None


def _images(path: Path, layout: _Layout, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images, uint8 (N, H, W, C)."""
    name, (height, width, channels) = layout.names[0], image_shape
    wanted = (channels, height, width) if layout.is_channels_first else image_shape
    header, problems = npz.read_header(path, name, Rows), []
    if header.shape[1:] != wanted or header.shape[0] < 2:
        allowed = ', '.join(map(str, wanted))
        problems.append(
            f'{path}: {name} has the shape {header.shape}; it must be (N, {allowed}) with at least 2 images, '
            'as config.data.image_size and data.channels say'
        )
    if header.dtype == np.uint8 or header.dtype.kind == 'f':
        pixels = _try(problems, lambda: _pixels(f'{path}: {name}', npz.read_array(path, name, Rows)))
    else:
        problems.append(
            f'{path}: {name} is {header.dtype}; it must be uint8, or floating-point numbers in [0, 1]'
        )
    if problems:
        raise ValueError('\n'.join(problems))
    return np.ascontiguousarray(np.moveaxis(pixels, 1, 3)) if layout.is_channels_first else pixels


def _pixels(name: str, array: np.ndarray) -> np.ndarray:
    """Return an array of pixels as uint8, rounded."""
    if array.dtype == np.uint8:
        return array
    pixels = np.empty(array.shape, np.uint8)
    unknown, least, most = 0, 0.0, 1.0
    for start in range(0, len(array), _AT_ONCE):
        block = array[start : start + _AT_ONCE].astype(np.float32)
        is_known = np.isfinite(block)
        unknown += block.size - np.count_nonzero(is_known)
        least = min(least, block.min(initial=0.0, where=is_known))
        most = max(most, block.max(initial=1.0, where=is_known))
        pixels[start : start + _AT_ONCE] = np.rint(255 * np.where(is_known, block, 0).clip(0, 1))
    problems = []
    if unknown:
        problems.append(f'{name} has NaN or infinite values, {unknown:,} of them; all must be numbers')
    if least < 0 or most > 1:
        problems.append(f'{name} has values from {least:g} to {most:g}; they must lie in [0, 1], or be uint8')
    if problems:
        raise ValueError('\n'.join(problems))
    return pixels


def _labels(path: Path, name: str, count: int | None, classes: int, least: int) -> np.ndarray:
    """Return the labels, int32 (N,)."""
    labels = npz.read_array(path, name, Rows)
    count = len(labels) if count is None else count
    labels = check_labels(labels, count=count, classes=classes, name=f'{path}: {name}', every_class=False)
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < least:
        few = ', '.join(f'{label} ({counts[label]})' for label in np.flatnonzero(counts < least)[:10])
        raise ValueError(
            f'{path}: of some classes there are too few images: {few}. Classifiers need {least} of each; '
            "without config.evaluate.classifiers ('()') no class is needed"
        )
    return labels.astype(np.int32)
