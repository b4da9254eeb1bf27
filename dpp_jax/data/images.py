"""Labeled images, and the checks that every set of images passes."""

import dataclasses

import numpy as np

from dpp_jax.data.rows import Rows
from dpp_jax.data.stored import StoredImages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Labeled images of one split, or the share of them that a process keeps.

    Attributes:
        images: uint8 (n, H, W, C), 0..255; an array, or rows that are read when they are asked for.
        labels: int32 (n,), in 0..classes - 1.
        groups: integers (N,), of ALL rows of the split, also those that are not kept: images with the same
            number are of one person; None: not asked for.
        rows: which rows of the split's N the n are; None: all.
        stamp: SHA-256, in hexadecimal, of names, sizes and times of the files in which `images` stay, and of
            what decodes them; None: they are in memory.
    """

    images: np.ndarray | StoredImages
    labels: np.ndarray
    groups: np.ndarray | None = None
    rows: Rows | None = None
    stamp: str | None = None

    @property
    def total(self) -> int:
        """N, the number of rows of the whole split."""
        return len(self.images) if self.rows is None else self.rows.total

    @property
    def kept(self) -> Rows:
        """Which rows of the split these are."""
        return Rows(len(self.images)) if self.rows is None else self.rows

    @property
    def own_groups(self) -> np.ndarray | None:
        """The groups of the rows that are kept, (n,)."""
        return None if self.groups is None else self.groups[self.kept.numbers()]


def check_images(
    images: np.ndarray | StoredImages, *, name: str, image_shape: tuple[int, int, int] | None = None
) -> np.ndarray | StoredImages:
    """Return images as a NumPy array, after a check of dtype and shape; stored ones stay where they are.

    Args:
        images: must be uint8 (N, H, W, C), N ≥ 1.
        name: what the message calls the set.
        image_shape: the (H, W, C) that the images must have; None = any.

    Raises:
        ValueError: the images are not as above.
    """
    images = images if isinstance(images, StoredImages) else np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f'{name}: the images are {images.dtype} of shape {images.shape}; '
            'they must be uint8 of shape (images, height, width, channels)'
        )
    if images.size == 0:
        raise ValueError(f'{name}: the images have shape {images.shape}; there must be at least one image')
    if image_shape is not None and images.shape[1:] != tuple(image_shape):
        raise ValueError(
            f'{name}: each image has shape {images.shape[1:]}; it must have shape {tuple(image_shape)}'
        )
    return images


def check_labels(
    labels: np.ndarray, *, count: int, classes: int, name: str, every_class: bool = True
) -> np.ndarray:
    """Return labels as a NumPy array, after a check of dtype, shape and values.

    Args:
        labels: must be integers (count,) in 0..classes - 1.
        count: number of images, at least 1.
        classes: must be at least 1.
        name: what the message calls the set.
        every_class: whether each class must have an image.

    Raises:
        ValueError: the labels are not as above.
    """
    labels = np.asarray(labels)
    if classes < 1:
        raise ValueError(f'{name}: classes is {classes}; it must be at least 1')
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'{name}: the labels are {labels.dtype} of shape {labels.shape}; '
            f'they must be integers of shape ({count},), one per image'
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'{name}: the labels go from {labels.min()} to {labels.max()}; '
            f'they must lie in 0..{classes - 1}, because config.data.classes is {classes}'
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0).tolist()
    if missing and every_class:
        raise ValueError(
            f'{name}: no image has class {", ".join(map(str, missing))}; '
            f'each of the {classes} classes must have an image'
        )
    return labels


def check_groups(groups: np.ndarray, *, count: int, name: str) -> np.ndarray:
    """Return the groups of images as a NumPy array, after a check of dtype and shape.

    Args:
        groups: must be integers (count,).
        count: number of images.
        name: what the message calls the set.

    Raises:
        ValueError: the groups are not as above.
    """
    groups = np.asarray(groups)
    if groups.shape != (count,) or not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(
            f'{name}: the groups are {groups.dtype} of shape {groups.shape}; '
            f'they must be integers of shape ({count},), one per image'
        )
    return groups
