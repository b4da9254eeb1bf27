"""Grids of images as PNG files."""

import io
import math

import numpy as np
from PIL import Image


def grid(images: np.ndarray, columns: int, *, min_pixels: int = 48, gap: int = 2) -> np.ndarray:
    """Images side by side on white.

    Args:
        images: (n, H, W, C) uint8, row after row; C is 1 or 3.
        columns: images per row.
        min_pixels: small images are magnified by a whole number to about this size.
        gap: pixels between images.

    Returns:
        (height, width, C) uint8.
    """
    n, height, width, channels = images.shape
    zoom = max(1, round(min_pixels / height))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    cell_height, cell_width = height * zoom + gap, width * zoom + gap
    rows = math.ceil(n / columns)
    canvas = np.full((rows * cell_height + gap, columns * cell_width + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + (i // columns) * cell_height
        left = gap + (i % columns) * cell_width
        canvas[top : top + height * zoom, left : left + width * zoom] = image
    return canvas


def rows_by_class(images: np.ndarray, labels: np.ndarray, classes: int, columns: int) -> np.ndarray:
    """A grid with one row per class, of the first `columns` images of each."""
    chosen = np.full((classes * columns,) + images.shape[1:], 255, np.uint8)
    for label in range(classes):
        row = images[labels == label][:columns]
        chosen[label * columns : label * columns + len(row)] = row
    return grid(chosen, columns)


def png(image: np.ndarray) -> bytes:
    """(H, W, 1 or 3) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
    return buffer.getvalue()
