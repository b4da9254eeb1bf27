"""The operations of RandAugment, as Pillow computes them, as pure functions: jit and vmap them.

**Value range.** An image is float32 (H, W, C), C = 1 or 3, and holds INTEGER values 0..255. Every
operation rounds or truncates and saturates as Pillow does with uint8, so it returns integer values
0..255 of the same shape, and they are Pillow's to the last grey level. Grey images (C = 1) are
Pillow's mode 'L': `color` leaves them as they are, all else works.

A magnitude may be a Python number or a traced scalar. The matrix of a warp is computed in double
precision from a number (as Pillow does) and in float32 from a traced scalar, which can move a pixel
that comes from within 2^-15 pixels of a pixel's edge.

dm-pix has `solarize`. Its brightness, contrast and saturation are other functions (additive; around
each channel's mean; in HSV; none saturates), its nearest neighbour rounds coordinates in another
way, and it has none of the other operations.
"""

from collections.abc import Callable
import functools

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

_LUMA = np.array([19595, 38470, 7471], np.int32)  # of R, G, B, in 2^-16: Pillow's convert('L')
# By span: every how many grey levels stretching the span to 255 gives a whole number.
_AUTO_CONTRAST_UNIT = np.arange(256, dtype=np.int32) // np.gcd(np.arange(256, dtype=np.int32), 255)
_FRACTION_BITS = 16  # of the coordinates in Pillow's nearest-neighbour warp

Number = float | jax.Array


# ---- geometric operations -----------------------------------------------------------------------


def shear_x(image: jax.Array, factor: Number) -> jax.Array:
    """Row y moves left by factor · y (both from the upper left corner); zeros come in."""
    return warp(image, shear_x_matrix(factor))


def shear_y(image: jax.Array, factor: Number) -> jax.Array:
    """Column x moves up by factor · x (both from the upper left corner); zeros come in."""
    return warp(image, shear_y_matrix(factor))


def translate_x(image: jax.Array, pixels: Number) -> jax.Array:
    """Moves right by `pixels`, truncated to whole ones; zeros come in."""
    return warp(image, translate_matrix(pixels, 0))


def translate_y(image: jax.Array, pixels: Number) -> jax.Array:
    """Moves down by `pixels`, truncated to whole ones; zeros come in."""
    return warp(image, translate_matrix(0, pixels))


def rotate(image: jax.Array, degrees: Number) -> jax.Array:
    """Turns counter-clockwise around the centre; zeros come in."""
    return warp(image, rotate_matrix(degrees, *image.shape[:2]))


def shear_x_matrix(factor: Number) -> jax.Array | np.ndarray:
    """The warp of `shear_x`, as `warp` takes it."""
    return _fixed_point(1.0, factor, 0.0, 0.0, 1.0, 0.0)


def shear_y_matrix(factor: Number) -> jax.Array | np.ndarray:
    """The warp of `shear_y`, as `warp` takes it."""
    return _fixed_point(1.0, 0.0, 0.0, factor, 1.0, 0.0)


def translate_matrix(right: Number, down: Number) -> jax.Array | np.ndarray:
    """The warp of both translations, as `warp` takes it."""
    xp = _array_module(right, down)
    return _fixed_point(1.0, 0.0, -xp.trunc(right), 0.0, 1.0, -xp.trunc(down))


def rotate_matrix(degrees: Number, height: int, width: int) -> jax.Array | np.ndarray:
    """The warp of `rotate` for images of this size, as `warp` takes it."""
    xp = _array_module(degrees)
    cos, sin = xp.cos(xp.deg2rad(degrees)), xp.sin(xp.deg2rad(degrees))
    x, y = width / 2, height / 2
    return _fixed_point(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _array_module(*values: Number):
    """NumPy (double precision) for numbers, jax.numpy if one is traced."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _fixed_point(*coefficients: Number) -> jax.Array | np.ndarray:
    """→ `warp`'s matrix, where the point (x, y) comes from (ax + by + c, dx + ey + f).

    That matrix takes the whole numbers x, y of a pixel, whose centre lies at (x + ½, y + ½). It is
    rounded as Pillow rounds.
    """
    xp = _array_module(*coefficients)
    a, b, c, d, e, f = coefficients
    exact = xp.stack([xp.asarray(v) for v in (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)])
    return xp.floor(exact * 2**_FRACTION_BITS + 0.5).astype(np.int32)


def warp(image: jax.Array, matrix: jax.Array | np.ndarray) -> jax.Array:
    """Reads the image at nearest neighbours, as Pillow's Image.transform does; 0 outside.

    Args:
        image: float32 (H, W, C).
        matrix: int32 (6,), a to f, in units of 2^-16 pixels: pixel (x, y) comes from the pixel in
            which (ax + by + c, dx + ey + f) lies.
    """
    height, width, channels = image.shape
    y, x = np.mgrid[:height, :width].astype(np.int32)
    column = (matrix[2] + matrix[0] * x + matrix[1] * y) >> _FRACTION_BITS
    row = (matrix[5] + matrix[3] * x + matrix[4] * y) >> _FRACTION_BITS
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixels = image.reshape(-1, channels)[jnp.where(inside, row * width + column, 0)]
    return jnp.where(inside[..., None], pixels, 0)


# ---- blends with another image ------------------------------------------------------------------


def brightness(image: jax.Array, factor: Number) -> jax.Array:
    """factor 0: black; 1: the image; beyond: brighter. Pillow's ImageEnhance.Brightness."""
    return blend(black(image), image, factor)


def color(image: jax.Array, factor: Number) -> jax.Array:
    """factor 0: grey; 1: the image; beyond: stronger colours. Pillow's ImageEnhance.Color."""
    return blend(grey(image), image, factor)


def contrast(image: jax.Array, factor: Number) -> jax.Array:
    """factor 0: the mean grey; 1: the image; beyond: more. Pillow's ImageEnhance.Contrast."""
    return blend(mean_grey(image), image, factor)


def sharpness(image: jax.Array, factor: Number) -> jax.Array:
    """factor 0: smoothed; 1: the image; beyond: sharper. Pillow's ImageEnhance.Sharpness."""
    return blend(smooth(image), image, factor)


def blend(background: jax.Array, image: jax.Array, factor: Number) -> jax.Array:
    """background + factor · (image - background), saturated, truncated. Pillow's Image.blend."""
    change = jnp.float32(factor) * (image - background)
    # Changes nothing (|change| < 2^15), but keeps compilers from fusing the product and the sum
    # into one operation with one rounding, which truncates to another grey level now and then.
    change = jnp.maximum(change, -(2.0**15))
    return jnp.floor(jnp.clip(background + change, 0, 255))


def black(image: jax.Array) -> jax.Array:
    """The background of `brightness`: zeros."""
    return jnp.zeros_like(image)


def _luma(image: jax.Array) -> jax.Array:
    """Pillow's grey value of every pixel, int32 (H, W, 1)."""
    pixels = image.astype(jnp.int32)
    if image.shape[-1] == 1:
        return pixels
    return (jnp.sum(pixels * _LUMA, axis=-1, keepdims=True) + 2**15) >> 16


def grey(image: jax.Array) -> jax.Array:
    """The background of `color`: every pixel's grey value in all channels."""
    return jnp.broadcast_to(_luma(image).astype(image.dtype), image.shape)


def mean_grey(image: jax.Array) -> jax.Array:
    """The background of `contrast`: the mean grey value, rounded half up, everywhere."""
    luma = _luma(image)
    mean = (2 * jnp.sum(luma) + luma.size) // (2 * luma.size)
    return jnp.full_like(image, mean.astype(image.dtype))


def smooth(image: jax.Array) -> jax.Array:
    """The background of `sharpness`, Pillow's SMOOTH filter: 3x3, centre 5, else 1, over 13.

    The outermost pixels stay.
    """
    height, width, _ = image.shape
    padded = jnp.pad(image.astype(jnp.int32), ((1, 1), (1, 1), (0, 0)))
    total = 4 * padded[1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total += padded[y : y + height, x : x + width]
    interior = np.zeros((height, width, 1), bool)
    interior[1:-1, 1:-1] = True
    return jnp.where(interior, ((2 * total + 13) // 26).astype(image.dtype), image)


# ---- operations on grey levels ------------------------------------------------------------------


def posterize(image: jax.Array, bits: int | jax.Array) -> jax.Array:
    """Keeps the `bits` (1..8) highest bits of every value."""
    mask = -jnp.left_shift(1, 8 - jnp.asarray(bits))
    return (image.astype(jnp.int32) & mask).astype(image.dtype)


def solarize(image: jax.Array, threshold: Number) -> jax.Array:
    """Inverts (255 - v) the values ≥ threshold (0..255)."""
    # dm-pix inverts to 1 - v. Put at the centre of its 1/256 of [0, 1], grey level v goes to that
    # of 255 - v, and every number here is exact in float32.
    limit = (jnp.ceil(threshold) + 0.5) / 256
    return dm_pix.solarize((image + 0.5) / 256, limit) * 256 - 0.5


def auto_contrast(image: jax.Array) -> jax.Array:
    """Stretches each channel's values to 0..255. Pillow's ImageOps.autocontrast."""
    return _each_channel(_auto_contrast_channel, image)


def equalize(image: jax.Array) -> jax.Array:
    """Flattens each channel's histogram. Pillow's ImageOps.equalize."""
    return _each_channel(_equalize_channel, image)


def _each_channel(change: Callable[[jax.Array], jax.Array], image: jax.Array) -> jax.Array:
    """`change` maps int32 pixels (n,) of one channel to others."""
    channels = image.astype(jnp.int32).reshape(-1, image.shape[-1])
    changed = jax.vmap(change, in_axes=1, out_axes=1)(channels)
    return changed.reshape(image.shape).astype(image.dtype)


def _auto_contrast_channel(pixels: jax.Array) -> jax.Array:
    """See `auto_contrast`."""
    low, high = jnp.min(pixels), jnp.max(pixels)
    span = jnp.maximum(high - low, 1)
    above = pixels - low
    stretched = above * 255 // span
    unit = jnp.asarray(_AUTO_CONTRAST_UNIT)[span]
    step = jnp.minimum(above // unit, 63)
    words = jnp.asarray(_auto_contrast_shortfall())[low, high]
    word = jnp.where(step < 32, words[0], words[1])
    short = (word >> (step % 32).astype(jnp.uint32)) & 1
    stretched -= jnp.where(above % unit == 0, short.astype(jnp.int32), 0)
    return jnp.where(high > low, stretched, pixels)


@functools.cache
def _auto_contrast_shortfall() -> np.ndarray:
    """Where Pillow's double-precision arithmetic falls short of a whole number, as bits.

    Pillow truncates v · s - low · s with s = 255 / (high - low). Where the exact result is a whole
    number (v - low is a multiple of `_AUTO_CONTRAST_UNIT`: steps 0, 1, …), rounding may leave it
    just below. → uint32 (256, 256, 2): bit `step` of [low, high]. No span needs more than 51 steps:
    for the larger divisors, 85 and 255, s is exact.
    """
    low, high, step = np.ogrid[:256, :256, :64]
    span = np.maximum(high - low, 1)
    unit = _AUTO_CONTRAST_UNIT[span]
    value, scale = low + step * unit, 255.0 / span
    short = (value * scale - low * scale).astype(np.int64) < step * unit * 255 // span
    short &= (value <= high) & (low < high)
    return np.packbits(short, axis=-1, bitorder='little').view('<u4').astype(np.uint32)


def _equalize_channel(pixels: jax.Array) -> jax.Array:
    """See `equalize`."""
    histogram = jnp.zeros(256, jnp.int32).at[pixels].add(1)
    below = jnp.cumsum(histogram) - histogram
    step = (pixels.size - histogram[jnp.max(pixels)]) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table[pixels], pixels)
