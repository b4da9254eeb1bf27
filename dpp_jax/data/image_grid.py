"""Grids of images as PNG files."""

from collections.abc import Sequence
import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TEXT_PIXELS = 14  # height of a name beside a row, or of as much as fits
_MOST_LETTERS = 24


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


def rows_by_class(
    images: np.ndarray, labels: np.ndarray, classes: int, columns: int, names: Sequence[str] = ()
) -> np.ndarray:
    """Return a grid with one row per class, which shows the first `columns` images of the class.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3.
        labels: integers (N,) in 0..classes - 1.
        classes: number of rows.
        columns: images per row, at least 1; places without an image stay white.
        names: of the classes, written beside the rows; (): nothing is.

    Returns:
        uint8 (height, width, C).
    """
    chosen = np.full((classes * columns, *images.shape[1:]), 255, np.uint8)
    for label in range(classes):
        row = images[labels == label][:columns]
        chosen[label * columns : label * columns + len(row)] = row
    return beside_rows(grid(chosen, columns), names)


def beside_rows(picture: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return a picture with a name to the left of each of its rows, which are equally high.

    Args:
        picture: uint8 (height, width, C), C = 1 or 3.
        names: one for each row, from above; long ones are cut; (): the picture stays as it is.
    """
    if not names:
        return picture
    height = picture.shape[0] / len(names)
    font = ImageFont.load_default(size=max(8, min(_TEXT_PIXELS, int(height))))
    texts = [name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + '…' for name in names]
    width = math.ceil(max(font.getlength(text) for text in texts)) + 8
    margin = Image.new('L', (width, picture.shape[0]), 255)
    draw = ImageDraw.Draw(margin)
    for row, text in enumerate(texts):
        draw.text((width - 4, (row + 0.5) * height), text, fill=0, font=font, anchor='rm')
    return np.concatenate(
        [np.repeat(np.asarray(margin)[..., None], picture.shape[-1], axis=-1), picture], axis=1
    )


def png(image: np.ndarray) -> bytes:
    """Return the content of a PNG file that holds the image, uint8 (H, W, C), C = 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
    return buffer.getvalue()
