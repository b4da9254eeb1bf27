import numpy as np


def nearest(images: np.ndarray, factor: int) -> np.ndarray:
    """(n, H, W, C) → every `factor`-th pixel, starting with the first."""
    return images[:, ::factor, ::factor]


def bilinear(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, h, w, C) float32 → (n, H, W, C), half-pixel centres, no antialiasing.

    The four products are summed with fused multiply-adds in the order in which PyTorch's CPU kernel
    does, so that its results are met bit for bit; float64 holds a product of float32 exactly.
    """
    if images.shape[1:3] == tuple(size):
        return images
    y0, y1, down0, down1 = _neighbours(images.shape[1], size[0])
    x0, x1, right0, right1 = _neighbours(images.shape[2], size[1])

    def product(rows, columns, row_weight, column_weight):
        weight = row_weight[:, None, None] * column_weight[:, None]
        return images[:, rows][:, :, columns].astype(np.float64) * weight

    total = product(y0, x1, down0, right1).astype(np.float32)
    for term in (
        product(y0, x0, down0, right0),
        product(y1, x0, down1, right0),
        product(y1, x1, down1, right1),
    ):
        total = (term + total).astype(np.float32)
    return total


def _neighbours(old: int, new: int) -> tuple[np.ndarray, ...]:
    """Per new position: the two old positions around it, and their float32 weights."""
    scale = np.float32(old) / np.float32(new)
    source = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    source = np.maximum(source, np.float32(0))
    low = np.minimum(source.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    weight = source - low.astype(np.float32)
    return low, high, np.float32(1) - weight, weight
