"""The operations of RandAugment, as Pillow defines them, as pure functions: jit and vmap them.

**Value range.** An image is float32 (H, W, C), C = 1 or 3, and holds whole numbers in 0..255. So does
every result; it differs from Pillow's by one gray level at most. Gray images (C = 1) are Pillow's mode 'L'.

dm-pix has other definitions: its brightness, contrast and saturation neither saturate nor use Pillow's
gray value, and it has no shear, posterize, auto-contrast or equalize.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B: ITU-R 601-2, Pillow's convert('L')
_FRACTION_BITS = 16  # of the coordinates in a nearest-neighbor warp

Number = float | jax.Array


# ---- warps --------------------------------------------------------------------------------------


def shear_x_matrix(factor: float) -> np.ndarray:
    """Return the warp that moves row y to the left by factor · y."""
    return _warp_matrix(1.0, factor, 0.0, 0.0, 1.0, 0.0)


def shear_y_matrix(factor: float) -> np.ndarray:
    """Return the warp that moves column x up by factor · x."""
    return _warp_matrix(1.0, 0.0, 0.0, factor, 1.0, 0.0)


def translate_matrix(right: float, down: float) -> np.ndarray:
    """Return the warp that moves the image by whole pixels; fractions are dropped."""
    return _warp_matrix(1.0, 0.0, -np.trunc(right), 0.0, 1.0, -np.trunc(down))


def rotate_matrix(degrees: float, height: int, width: int) -> np.ndarray:
    """Return the warp that turns an image of this size counterclockwise around its center."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    x, y = width / 2, height / 2
    return _warp_matrix(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _warp_matrix(a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    """Return the `matrix` of `warp` in which point (x, y) comes from (ax + by + c, dx + ey + f).

    Here the center of pixel (x, y) is the point (x + ½, y + ½).
    """
    exact = np.array([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    return np.floor(exact * 2**_FRACTION_BITS + 0.5).astype(np.int32)


def warp(image: jax.Array, matrix: jax.Array | np.ndarray) -> jax.Array:
    """Return the image read at nearest neighbors; outside it is 0.

    Whole numbers, because many sources of a shear lie exactly on the edge between two pixels: float32
    rounds them to either side, and not to the same one plain and under jit.

    Args:
        image: float32 (H, W, C).
        matrix: int32 (6,), a to f in units of 2^-16 pixels: pixel (x, y) comes from the pixel that
            holds the point (ax + by + c, dx + ey + f).
    """
    height, width, channels = image.shape
    y, x = np.mgrid[:height, :width].astype(np.int32)
    column = (matrix[2] + matrix[0] * x + matrix[1] * y) >> _FRACTION_BITS
    row = (matrix[5] + matrix[3] * x + matrix[4] * y) >> _FRACTION_BITS
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixels = image.reshape(-1, channels)[jnp.where(inside, row * width + column, 0)]
    return jnp.where(inside[..., None], pixels, 0)


# ---- blends with a background -------------------------------------------------------------------


def blend(background: jax.Array, image: jax.Array, factor: Number) -> jax.Array:
    """Return background + factor · (image - background), saturated, fractions dropped."""
    return jnp.floor(jnp.clip(background + jnp.float32(factor) * (image - background), 0, 255))


def black(image: jax.Array) -> jax.Array:
    """Return the background of brightness: zeros."""
    return jnp.zeros_like(image)


def gray(image: jax.Array) -> jax.Array:
    """Return the background of color: each pixel's gray value in all channels."""
    return jnp.broadcast_to(_gray_values(image), image.shape)


def mean_gray(image: jax.Array) -> jax.Array:
    """Return the background of contrast: the mean gray value everywhere."""
    return jnp.full_like(image, jnp.round(jnp.mean(_gray_values(image))))


def smooth(image: jax.Array) -> jax.Array:
    """Return the background of sharpness: mean of 3x3 pixels, the center with weight 5.

    The outermost pixels stay.
    """
    height, width, _ = image.shape
    total = 4 * image[1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total += image[y : height - 2 + y, x : width - 2 + x]
    return image.at[1:-1, 1:-1].set(jnp.round(total / 13))


def _gray_values(image: jax.Array) -> jax.Array:
    """Return the gray value of each pixel, (H, W, 1)."""
    if image.shape[-1] == 1:
        return image
    return jnp.round(jnp.sum(image * _LUMA, axis=-1, keepdims=True))


# ---- changes of values --------------------------------------------------------------------------


def posterize(image: jax.Array, bits: int | jax.Array) -> jax.Array:
    """Return the image with only the `bits` (1..8) highest bits of each value."""
    lost = 8 - jnp.asarray(bits, jnp.int32)
    return (image.astype(jnp.int32) >> lost << lost).astype(image.dtype)


def solarize(image: jax.Array, threshold: Number) -> jax.Array:
    """Return the image with each value v ≥ threshold (0..255) replaced by 255 - v."""
    return jnp.where(image < threshold, image, 255 - image)


def auto_contrast(image: jax.Array) -> jax.Array:
    """Return the image with each channel's values stretched to 0..255."""
    pixels = image.astype(jnp.int32)  # a float32 quotient would leave some 255 at 254
    low, high = jnp.min(pixels, axis=(0, 1)), jnp.max(pixels, axis=(0, 1))
    stretched = (pixels - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, pixels).astype(image.dtype)


def equalize(image: jax.Array) -> jax.Array:
    """Return the image with each channel's histogram flattened."""
    channels = image.astype(jnp.int32).reshape(-1, image.shape[-1])
    flat = jax.vmap(_equalize_channel, in_axes=1, out_axes=1)(channels)
    return flat.reshape(image.shape).astype(image.dtype)


def _equalize_channel(pixels: jax.Array) -> jax.Array:
    """Return the equalized pixels of one channel, int32 (n,)."""
    histogram = jnp.zeros(256, jnp.int32).at[pixels].add(1)
    below = jnp.cumsum(histogram) - histogram
    # Pillow does not count the brightest value, so that it becomes 255.
    step = (pixels.size - histogram[jnp.max(pixels)]) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table[pixels], pixels)
