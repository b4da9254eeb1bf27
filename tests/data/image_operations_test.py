"""The operations of RandAugment against Pillow, torchvision's own reference, on real digits."""

import math

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
CASES = {
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
    'auto_contrast': (),
    'equalize': (),
}


def pillow(name: str, image: np.ndarray, magnitude: float = 0.0) -> np.ndarray:
    """uint8 (H, W, C) → the same, with what torchvision passes to Pillow."""
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    def affine(*matrix):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0
        )

    tangent = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    call = {
        'shear_x': lambda: affine(1, tangent, 0, 0, 1, 0),
        'shear_y': lambda: affine(1, 0, 0, tangent, 1, 0),
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


@pytest.fixture(scope='module')
def digits() -> np.ndarray:
    """uint8 (6, 28, 28): digits, upsampled to the size of MNIST; one with less contrast."""
    small = np.uint8(load_digits().images[:6] * (255 / 16))
    large = [Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for i in small]
    large = np.stack([np.asarray(image) for image in large])
    large[1] = large[1] // 2 + 40  # auto_contrast has something to do
    return large


@pytest.fixture(scope='module', params=['grey', 'rgb'])
def images(request, digits) -> np.ndarray:
    """uint8 (2, 28, 28, C): of three channels, each holds another digit."""
    if request.param == 'grey':
        return digits[:2, ..., None]
    return np.stack([digits[:3], digits[3:]]).transpose(0, 2, 3, 1)


@pytest.mark.parametrize('name', CASES)
def test_equals_pillow_plain_jitted_and_vmapped(name, images):
    operation = getattr(ops, name)
    floats = jnp.asarray(images, jnp.float32)
    jitted = jax.jit(operation)
    vmapped = jax.jit(jax.vmap(operation, in_axes=(0, None) if CASES[name] else 0))
    for magnitude in CASES[name] or (None,):
        plain = () if magnitude is None else (magnitude,)
        traced = () if magnitude is None else (jnp.asarray(magnitude),)
        expected = np.stack([pillow(name, image, *plain) for image in images])
        for i, image in enumerate(floats):
            result = operation(image, *plain)
            assert result.dtype == jnp.float32 and result.shape == image.shape
            np.testing.assert_array_equal(result, expected[i], f'{name} {magnitude}')
            together = jitted(image, *traced)
            if name == 'rotate':
                # A traced angle's sine and cosine are float32: of the pixels whose sources lie on
                # an edge, one or two may come from the other side.
                assert np.mean(np.any(together != expected[i], axis=-1)) <= 2 / SIZE**2
            else:
                np.testing.assert_array_equal(together, expected[i], f'{name} {magnitude}')
        batched = vmapped(floats, *traced)
        np.testing.assert_array_equal(batched, np.stack([jitted(image, *traced) for image in floats]))


def test_the_cases_change_the_images(images):
    """Otherwise the comparison with Pillow would show nothing."""
    for name, magnitudes in CASES.items():
        arguments = [(magnitude,) for magnitude in magnitudes] or [()]
        changes = [np.any(pillow(name, images[1], *a) != images[1]) for a in arguments]
        if name == 'color' and images.shape[-1] == 1:
            assert not any(changes)
        elif name not in ('auto_contrast', 'equalize') or images.shape[-1] == 1:
            assert any(changes), name


def test_images_that_are_not_square(digits):
    image = digits[2][:20, :, None]
    for name in ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate', 'sharpness'):
        for magnitude in CASES[name]:
            result = getattr(ops, name)(jnp.asarray(image, jnp.float32), magnitude)
            np.testing.assert_array_equal(result, pillow(name, image, magnitude))


def test_blend_of_every_pair_of_values_equals_pillow():
    one, two = np.mgrid[:256, :256].astype(np.uint8)
    blend = jax.jit(ops.blend)
    for factor in (0.1, 0.37, 0.7, 0.97, 1.0, 1.09, 1.6, 1.9):
        expected = Image.blend(Image.fromarray(one), Image.fromarray(two), factor)
        result = blend(one.astype(np.float32), two.astype(np.float32), factor)
        np.testing.assert_array_equal(result, expected)


def test_auto_contrast_of_every_range_of_values_equals_pillow():
    """Pillow's rounding leaves 255 at 254 for one range in seven."""
    stretch = jax.jit(jax.vmap(ops.auto_contrast))
    short = 0
    for low in (0, 1, 17, 100, 200, 254, 255):
        ramps = np.clip(np.arange(256, dtype=np.uint8), low, np.arange(256)[:, None])
        ramps = ramps.clip(low).astype(np.uint8)[..., None, None]
        result = np.asarray(stretch(jnp.asarray(ramps, jnp.float32)))
        expected = np.stack([pillow('auto_contrast', ramp) for ramp in ramps])
        np.testing.assert_array_equal(result, expected)
        short += np.sum(expected.max(axis=(1, 2, 3))[low + 1 :] < 255)
    assert short > 50


def test_constant_images_of_two_pixels():
    for value in (0, 7, 255):
        image = np.full((2, 1, 1), value, np.uint8)
        for name, magnitudes in CASES.items():
            result = getattr(ops, name)(jnp.asarray(image, jnp.float32), *magnitudes[-1:])
            np.testing.assert_array_equal(result, pillow(name, image, *magnitudes[-1:]))


def test_equalize_with_few_pixels():
    """Fewer than 255 pixels below the brightest: unchanged. With 255..509, values past 255."""
    rng = np.random.default_rng(0)
    for pixels in (200, 300, 511):
        image = rng.integers(0, 256, (pixels, 1, 1)).astype(np.uint8)
        result = ops.equalize(jnp.asarray(image, jnp.float32))
        np.testing.assert_array_equal(result, pillow('equalize', image))


def test_color_leaves_grey_images(digits):
    image = jnp.asarray(digits[0][..., None], jnp.float32)
    np.testing.assert_array_equal(ops.color(image, 1.9), image)
