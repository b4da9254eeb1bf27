"""Grids of images as PNG files."""

import io
import math

import numpy as np
from PIL import Image


def grid(images: np.ndarray, columns: int, *, min_pixels: int = 48, gap: int = 2) -> np.ndarray:
    """Return one image that shows all images side by side on white.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3; they fill row after row.
        columns: images per row, at least 1.
        min_pixels: images that are less high are magnified by a whole number to about this height.
        gap: pixels between images and around all.

    Returns:
        uint8 (height, width, C).
    """
    count, height, width, channels = images.shape
    zoom = max(1, round(min_pixels / height))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    cell_height, cell_width = height * zoom + gap, width * zoom + gap
    rows = math.ceil(count / columns)
    canvas = np.full((rows * cell_height + gap, columns * cell_width + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + (i // columns) * cell_height
        left = gap + (i % columns) * cell_width
        canvas[top : top + height * zoom, left : left + width * zoom] = image
    return canvas


def rows_by_class(images: np.ndarray, labels: np.ndarray, classes: int, columns: int) -> np.ndarray:
    """Return a grid with one row per class, which shows the first `columns` images of the class.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3.
        labels: integers (N,) in 0..classes - 1.
        classes: number of rows.
        columns: images per row, at least 1; places without an image stay white.

    Returns:
        uint8 (height, width, C).
    """
    chosen = np.full((classes * columns, *images.shape[1:]), 255, np.uint8)
    for label in range(classes):
        row = images[labels == label][:columns]
        chosen[label * columns : label * columns + len(row)] = row
    return grid(chosen, columns)


def png(image: np.ndarray) -> bytes:
    """Return the content of a PNG file that holds the image, uint8 (H, W, C), C = 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
    return buffer.getvalue()
