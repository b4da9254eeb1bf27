"""The operations of RandAugment against Pillow, torchvision's own reference, on real digits."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
from sklearn.datasets import load_digits

from dpp_jax.data import image_operations as ops

SIZE = 28
SHEARS = (0.0, 0.01, -0.07, 0.2, 0.3, -0.3)  # 0.2 puts sources exactly on pixels' edges
PIXELS = (0, 1.69, -4.23, 12.69, -12.69)
DEGREES = (0.0, 1.0, -7.0, 13.5, 30.0, -30.0)
FACTORS = (0.1, 0.97, 1.0, 1.03, 1.45, 1.9)
MAGNITUDES = {
    'shear_x': SHEARS,
    'shear_y': SHEARS,
    'translate_x': PIXELS,
    'translate_y': PIXELS,
    'rotate': DEGREES,
    'brightness': FACTORS,
    'color': FACTORS,
    'contrast': FACTORS,
    'sharpness': FACTORS,
    'posterize': (4, 6, 8),
    'solarize': (0.0, 8.5, 127.5, 238.0, 255.0),
    'auto_contrast': (None,),
    'equalize': (None,),
}
WARPS = {
    'shear_x': lambda factor, height, width: ops.shear_x_matrix(factor),
    'shear_y': lambda factor, height, width: ops.shear_y_matrix(factor),
    'translate_x': lambda pixels, height, width: ops.translate_matrix(pixels, 0),
    'translate_y': lambda pixels, height, width: ops.translate_matrix(0, pixels),
    'rotate': ops.rotate_matrix,
}
BACKGROUNDS = {
    'brightness': ops.black,
    'color': ops.gray,
    'contrast': ops.mean_gray,
    'sharpness': ops.smooth,
}
# These round: at least 99 % of their pixels equal Pillow's. All pixels of the other operations do.
ROUNDED = (*BACKGROUNDS, 'auto_contrast')


def ours(name: str):
    """(image, magnitude as `prepared`) → image."""
    if name in WARPS:
        return ops.warp
    if name in BACKGROUNDS:
        return lambda image, factor: ops.blend(BACKGROUNDS[name](image), image, factor)
    if name in ('posterize', 'solarize'):
        return getattr(ops, name)
    return lambda image, nothing: getattr(ops, name)(image)


def prepared(name: str, magnitude, shape) -> np.ndarray | float:
    """The magnitude as `ours` takes it."""
    return WARPS[name](magnitude, *shape[:2]) if name in WARPS else magnitude


def pillow(name: str, image: np.ndarray, magnitude=None) -> np.ndarray:
    """uint8 (H, W, C) → the same, with what torchvision passes to Pillow."""
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    def affine(*matrix):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0
        )

    call = {
        'shear_x': lambda: affine(1, magnitude, 0, 0, 1, 0),
        'shear_y': lambda: affine(1, 0, 0, magnitude, 1, 0),
        'translate_x': lambda: affine(1, 0, -int(magnitude), 0, 1, 0),
        'translate_y': lambda: affine(1, 0, 0, 0, 1, -int(magnitude)),
        'rotate': lambda: image.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=0),
        'brightness': lambda: ImageEnhance.Brightness(image).enhance(magnitude),
        'color': lambda: ImageEnhance.Color(image).enhance(magnitude),
        'contrast': lambda: ImageEnhance.Contrast(image).enhance(magnitude),
        'sharpness': lambda: ImageEnhance.Sharpness(image).enhance(magnitude),
        'posterize': lambda: ImageOps.posterize(image, int(magnitude)),
        'solarize': lambda: ImageOps.solarize(image, magnitude),
        'auto_contrast': lambda: ImageOps.autocontrast(image),
        'equalize': lambda: ImageOps.equalize(image),
    }[name]
    return np.asarray(call()).reshape(image.height, image.width, -1)


def assert_within_one_level(result, expected, equal: float, message: str = '') -> None:
    """No pixel differs by more than one gray level, and this share of them is equal."""
    difference = np.abs(np.asarray(result, np.float64) - expected)
    assert difference.max() <= 1, message
    assert np.mean(difference == 0) >= equal, message


@pytest.fixture(scope='module')
def digits() -> np.ndarray:
    """uint8 (6, 28, 28): digits, upsampled to the size of MNIST; one with less contrast."""
    small = np.uint8(load_digits().images[:6] * (255 / 16))
    large = [Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for i in small]
    large = np.stack([np.asarray(image) for image in large])
    large[1] = large[1] // 2 + 40  # auto_contrast has something to do
    return large


@pytest.fixture(scope='module', params=['gray', 'rgb'])
def images(request, digits) -> np.ndarray:
    """uint8 (2, 28, 28, C): of three channels, each holds another digit."""
    if request.param == 'gray':
        return digits[:2, ..., None]
    return np.stack([digits[:3], digits[3:]]).transpose(0, 2, 3, 1)


@pytest.mark.parametrize('name', MAGNITUDES)
def test_plain_jitted_and_vmapped_are_within_one_gray_level_of_pillow(name, images):
    operation = ours(name)
    in_axes = (0, None)
    ways = {
        'plain': lambda batch, value: jnp.stack([operation(image, value) for image in batch]),
        'jitted': lambda batch, value: jnp.stack([jitted(image, value) for image in batch]),
        'vmapped': jax.jit(jax.vmap(operation, in_axes)),
    }
    jitted = jax.jit(operation)
    floats = jnp.asarray(images, jnp.float32)
    values = [prepared(name, magnitude, images.shape[1:]) for magnitude in MAGNITUDES[name]]
    expected = np.stack([[pillow(name, image, m) for image in images] for m in MAGNITUDES[name]])
    for way, run in ways.items():
        results = np.stack([run(floats, value) for value in values])
        assert results.dtype == np.float32
        assert np.array_equal(results, np.round(results))
        assert_within_one_level(results, expected, 0.99 if name in ROUNDED else 1.0, way)


def test_the_magnitudes_change_the_images(images):
    """Otherwise the comparison with Pillow would show nothing."""
    for name, magnitudes in MAGNITUDES.items():
        changes = [np.any(pillow(name, images[1], magnitude) != images[1]) for magnitude in magnitudes]
        if name == 'color' and images.shape[-1] == 1:
            assert not any(changes)
        elif name not in ('auto_contrast', 'equalize') or images.shape[-1] == 1:
            assert any(changes), name


def test_images_that_are_not_square(digits):
    image = digits[2][:20, :, None]
    for name in (*WARPS, 'sharpness'):
        for magnitude in MAGNITUDES[name]:
            value = prepared(name, magnitude, image.shape)
            result = ours(name)(jnp.asarray(image, jnp.float32), value)
            equal = 0.99 if name in ROUNDED else 1.0
            assert_within_one_level(result, pillow(name, image, magnitude), equal)


def test_blend_of_every_pair_of_values_is_within_one_gray_level_of_pillow():
    one, two = np.mgrid[:256, :256].astype(np.uint8)
    blend = jax.jit(ops.blend)
    for factor in (0.1, 0.37, 0.7, 0.97, 1.0, 1.09, 1.6, 1.9):
        expected = Image.blend(Image.fromarray(one), Image.fromarray(two), factor)
        result = blend(one.astype(np.float32), two.astype(np.float32), factor)
        assert_within_one_level(result, np.asarray(expected), 0.98)


def test_gray_values_of_all_colors_are_within_one_level_of_pillow():
    colors = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(colors).convert('L'))[..., None]
    result = jax.jit(ops.gray)(jnp.asarray(colors, jnp.float32))
    assert_within_one_level(result, np.broadcast_to(expected, colors.shape), 0.99)


def test_auto_contrast_of_every_range_of_values_is_within_one_gray_level_of_pillow():
    """And it reaches 0 and 255, where Pillow leaves 255 at 254 for one range in seven."""
    stretch = jax.jit(jax.vmap(ops.auto_contrast))
    for low in (0, 1, 17, 100, 200, 254, 255):
        ramps = np.clip(np.arange(256, dtype=np.uint8), low, np.arange(256)[:, None])
        ramps = ramps.clip(low).astype(np.uint8)[..., None, None]
        result = np.asarray(stretch(jnp.asarray(ramps, jnp.float32)))
        expected = np.stack([pillow('auto_contrast', ramp) for ramp in ramps])
        assert_within_one_level(result, expected, 0.85)
        assert np.all(result.max(axis=(1, 2, 3))[low + 1 :] == 255)
        assert np.all(result.min(axis=(1, 2, 3))[low + 1 :] == 0)


def test_constant_images_of_two_pixels():
    for value in (0, 7, 255):
        image = np.full((2, 1, 1), value, np.uint8)
        for name, magnitudes in MAGNITUDES.items():
            last = prepared(name, magnitudes[-1], image.shape)
            result = ours(name)(jnp.asarray(image, jnp.float32), last)
            assert_within_one_level(result, pillow(name, image, magnitudes[-1]), 0.0)


def test_equalize_with_few_pixels():
    """Fewer than 255 pixels below the brightest: unchanged. With 255..509, values past 255."""
    rng = np.random.default_rng(0)
    for pixels in (200, 300, 511):
        image = rng.integers(0, 256, (pixels, 1, 1)).astype(np.uint8)
        result = ops.equalize(jnp.asarray(image, jnp.float32))
        np.testing.assert_array_equal(result, pillow('equalize', image))


def test_color_leaves_gray_images(digits):
    image = jnp.asarray(digits[0][..., None], jnp.float32)
    np.testing.assert_array_equal(ours('color')(image, 1.9), image)
