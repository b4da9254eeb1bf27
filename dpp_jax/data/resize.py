"""Resizing of batches of images, (N, H, W, C)."""

import jax
import numpy as np

from dpp_jax.data.stored import StoredImages


def nearest(images: np.ndarray | StoredImages, factor: int) -> np.ndarray | StoredImages:
    """Return every `factor`-th pixel of each row and column, the first included.

    Args:
        images: (..., H, W, C), of any dtype.
        factor: at least 1.

    Returns:
        (..., ceil(H / factor), ceil(W / factor), C), a view; of stored ones, made as they are read.
    """
    if isinstance(images, StoredImages):
        return images.mapped(lambda rows: nearest(rows, factor))
    return images[..., ::factor, ::factor, :]


def bilinear(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return images of another size by bilinear interpolation.

    Pixel centers lie at half-integers, and there is no antialiasing: PyTorch's
    `interpolate(mode='bilinear', align_corners=False)`, but for rounding. Edge pixels continue outward.

    Args:
        images: float32 (N, h, w, C).
        size: (H, W) of the result. An axis that has this length already keeps its values.

    Returns:
        float32 (N, H, W, C).
    """
    count, _, _, channels = images.shape
    return np.asarray(jax.image.resize(images, (count, *size, channels), 'bilinear', antialias=False))


def average_pool(images: np.ndarray | StoredImages, factor: int) -> np.ndarray | StoredImages:
    """Return the mean of each block of `factor` x `factor` pixels, halves rounded up.

    Args:
        images: uint8 (N, H, W, C).
        factor: at least 1; it must divide H and W.

    Returns:
        uint8 (N, H / factor, W / factor, C); of stored ones, made as they are read.
    """
    if factor == 1:
        return images
    if isinstance(images, StoredImages):
        return images.mapped(lambda rows: average_pool(rows, factor))
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // factor, factor, width // factor, factor, channels)
    total, pixels = blocks.sum((2, 4), dtype=np.uint32), factor**2
    return ((2 * total + pixels) // (2 * pixels)).astype(np.uint8)
