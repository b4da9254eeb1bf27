"""The random policies; the single operations are compared with Pillow in image_operations_test."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
from scipy import ndimage, stats
from sklearn.datasets import load_digits

from dpp_jax.data import augment

BINS = 31
STRONG = {'operations': 3, 'magnitude': 30}
AFFINE = ('shear_x', 'shear_y', 'translate_x', 'translate_y')


@pytest.fixture(scope='module')
def digits() -> np.ndarray:
    """uint8 (4, 28, 28, 1): digits, upsampled to the size of MNIST."""
    small = np.uint8(load_digits().images[:4] * (255 / 16))
    large = [Image.fromarray(i).resize((28, 28), Image.Resampling.BICUBIC) for i in small]
    return np.stack([np.asarray(image) for image in large])[..., None]


@pytest.fixture(scope='module')
def rgb(digits) -> np.ndarray:
    """uint8 (28, 28, 3): three digits."""
    return np.concatenate(list(digits[1:]), axis=-1)


@pytest.fixture(scope='module')
def vmapped():
    """Augmentations by name, of one image with a batch of keys, jitted."""
    policies = {name: augment.make_augmentation(name) for name in ('rand_augment', 'affine')}
    policies['strong'] = augment.make_augmentation('rand_augment', **STRONG)
    in_axes = (0, None)
    return {name: jax.jit(jax.vmap(policy, in_axes)) for name, policy in policies.items()}


def torchvision_magnitude(name: str, level: int, size: int) -> float:
    """What torchvision's table holds, in float64; the table is compared with PyTorch's below."""
    kind = name.split('_')[0]
    if kind == 'posterize':
        return 8 - round(4 * level / (BINS - 1))
    start = 255.0 if kind == 'solarize' else 0.0
    extremes = {'shear': 0.3, 'translate': 150 / 331 * size, 'rotate': 30.0, 'solarize': 0.0}
    return float(np.linspace(start, extremes.get(kind, 0.9), BINS)[level])


def pillow(name: str, image: np.ndarray, level: int, negative: bool) -> np.ndarray:
    """One operation of torchvision's RandAugment on a Pillow image; uint8 (H, W, C) → the same."""
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    magnitude = torchvision_magnitude(name, level, image.width) * (-1 if negative else 1)
    if name in AFFINE:
        shift = -int(magnitude)
        matrix = {
            'shear_x': (1, magnitude, 0, 0, 1, 0),
            'shear_y': (1, 0, 0, magnitude, 1, 0),
            'translate_x': (1, 0, shift, 0, 1, 0),
            'translate_y': (1, 0, 0, 0, 1, shift),
        }[name]
        changed = image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=0)
    elif name == 'rotate':
        changed = image.rotate(magnitude, fillcolor=0)
    elif name in ('brightness', 'color', 'contrast', 'sharpness'):
        changed = getattr(ImageEnhance, name.capitalize())(image).enhance(1 + magnitude)
    elif name == 'posterize':
        changed = ImageOps.posterize(image, int(abs(magnitude)))
    elif name == 'solarize':
        changed = ImageOps.solarize(image, abs(magnitude))
    elif name in ('auto_contrast', 'equalize'):
        changed = getattr(ImageOps, name.replace('_', ''))(image)
    else:
        assert name == 'identity'
        changed = image
    return np.asarray(changed).reshape(image.height, image.width, -1)


def as_floats(images: np.ndarray) -> jax.Array:
    """uint8 → what the policies take."""
    return jnp.asarray(images, jnp.float32)


def test_operations_are_torchvisions_fourteen():
    assert len(set(augment.OPERATIONS)) == len(augment.OPERATIONS) == 14


@pytest.mark.parametrize('channels', [1, 3])
def test_every_operation_at_every_level_and_sign_is_within_one_gray_level_of_pillow(digits, rgb, channels):
    """Of all pixels of an operation, at least 99 % are equal."""
    image = digits[0] if channels == 1 else rgb
    apply = jax.jit(jax.vmap(functools.partial(augment.apply_operation, bins=BINS), (None, 0, 0, 0)))
    levels, signs = (grid.ravel() for grid in np.meshgrid(np.arange(BINS), [False, True]))
    for index, name in enumerate(augment.OPERATIONS):
        changed = np.asarray(apply(as_floats(image), np.full(len(levels), index), levels, signs))
        expected = np.stack([pillow(name, image, *drawn) for drawn in zip(levels, signs)])
        difference = np.abs(changed - expected)
        assert difference.max() <= 1 and np.mean(difference == 0) >= 0.99, name


@pytest.mark.skipif(importlib.util.find_spec('torch') is None, reason='torch is not installed')
def test_magnitudes_are_those_of_torch():
    import torch

    for bins in (2, 5, 11, 31):
        matrices, values = augment._magnitudes(bins, 28, 28)
        of = {name: values[augment.OPERATIONS.index(name)] for name in augment.OPERATIONS}
        change = torch.linspace(0, 0.9, bins).numpy()
        for name in ('brightness', 'color', 'contrast', 'sharpness'):
            np.testing.assert_allclose(of[name], np.stack([1 + change, 1 - change], -1), rtol=3e-7)
        threshold = torch.linspace(255, 0, bins).numpy()
        np.testing.assert_allclose(of['solarize'], np.stack([threshold] * 2, -1), rtol=3e-7)
        bits = 8 - (torch.arange(bins) / ((bins - 1) / 4)).round().int().numpy()
        np.testing.assert_array_equal(of['posterize'], np.stack([bits] * 2, -1))
        shear = torch.linspace(0, 0.3, bins).numpy() * 2**16  # the unit of a warp
        rows = matrices[augment.OPERATIONS.index('shear_x'), :, :, 1]
        np.testing.assert_allclose(rows, np.stack([shear, -shear], -1), atol=0.51)
        pixels = np.trunc(torch.linspace(0, 150 / 331 * 28, bins).numpy()) * 2**16
        columns = matrices[augment.OPERATIONS.index('translate_x'), :, :, 2] - 2**15
        np.testing.assert_array_equal(columns, np.stack([-pixels, pixels], -1))


def test_rand_augment_is_its_draws_one_after_another(vmapped, digits):
    """Pillow gives the same when it is told what was drawn; the order matters.

    A pixel that differs by one gray level may differ by more after the next operation: count them.
    """
    keys = jax.random.split(jax.random.key(0), 60)
    results = np.asarray(vmapped['strong'](keys, as_floats(digits[1])))
    draws = jax.jit(jax.vmap(augment.RandAugment(**STRONG).draw))(keys)
    orders, equal = 0, []
    for result, *drawn in zip(results, *(np.asarray(part) for part in draws)):
        forward = backward = digits[1]
        for index, level, negative in zip(*drawn):
            forward = pillow(augment.OPERATIONS[index], forward, level, negative)
        for index, level, negative in reversed(list(zip(*drawn))):
            backward = pillow(augment.OPERATIONS[index], backward, level, negative)
        equal.append(np.mean(result == forward))
        orders += np.any(forward != backward)
    assert orders > 20
    assert np.mean(equal) > 0.99 and np.min(equal) > 0.9


def test_draws_are_uniform():
    draw = jax.jit(jax.vmap(augment.RandAugment(operations=2, magnitude=9).draw))
    index, level, negative = draw(jax.random.split(jax.random.key(1), 7000))
    for place in range(2):
        assert stats.chisquare(np.bincount(index[:, place], minlength=14)).pvalue > 1e-3
        counts = np.bincount(level[:, place], minlength=10)
        assert counts[0] == 0 and len(counts) == 10
        assert stats.chisquare(counts[1:]).pvalue > 1e-3
        assert abs(np.mean(negative[:, place]) - 0.5) < 0.025
    # The two operations of an image are drawn independently, and so are their three parts.
    for one, two in ((index[:, 0], index[:, 1]), (level[:, 0], level[:, 1]), (index, level)):
        assert abs(np.corrcoef(np.ravel(one), np.ravel(two))[0, 1]) < 0.05
    assert abs(np.corrcoef(np.ravel(index), np.ravel(negative))[0, 1]) < 0.05


def test_fixed_magnitude_is_torchvisions():
    policy = augment.RandAugment(operations=50, magnitude=9, random_magnitude=False)
    np.testing.assert_array_equal(policy.draw(jax.random.key(1))[1], 9)


@pytest.mark.parametrize(('name', 'channels'), [('rand_augment', 3), ('affine', 1)])
def test_plain_jitted_and_vmapped_are_the_same(vmapped, name, channels, digits, rgb):
    """But for rounding: compilers order sums, and where a value is cut to whole gray levels it may move."""
    image = as_floats(digits[0] if channels == 1 else rgb)

    def assert_same(one, two):
        if name == 'affine':
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-3)
        else:
            assert np.mean(one == two) > 0.99

    keys = jax.random.split(jax.random.key(3), 20)
    together = vmapped[name](keys, image)
    assert together.shape == (20, *image.shape) and together.dtype == jnp.float32
    policy = augment.make_augmentation(name)
    jitted = jax.jit(policy)
    for key, changed in zip(keys, together):
        assert_same(jitted(key, image), changed)
        np.testing.assert_array_equal(jitted(key, image), jitted(key, image))
    assert_same(policy(keys[0], image), together[0])
    assert len(np.unique(np.asarray(together).reshape(20, -1), axis=0)) > 12


def test_rand_augment_keeps_whole_values_in_range(vmapped, digits):
    keys = jax.random.split(jax.random.key(4), 600)
    changed = np.asarray(vmapped['strong'](keys, as_floats(digits[0])))
    assert np.array_equal(changed, np.round(changed))
    assert changed.min() == 0 and changed.max() == 255


def test_no_operations_and_none_leave_the_image(digits):
    image = as_floats(digits[0])
    key = jax.random.key(0)
    for policy in (
        augment.make_augmentation('none'),
        augment.make_augmentation('rand_augment', operations=0),
    ):
        np.testing.assert_array_equal(policy(key, image), image)


def test_affine_without_movement_leaves_the_image(rgb):
    policy = jax.jit(augment.make_augmentation('affine', shift=0.0, degrees=0, zoom=0.0))
    np.testing.assert_allclose(policy(jax.random.key(0), as_floats(rgb)), rgb, rtol=0, atol=1e-3)


def test_affine_equals_scipy_for_the_movement_that_was_drawn(digits):
    """A grid constant of 0 is an image that goes on as zeros."""
    settings = {'shift': 3.0, 'degrees': 40.0, 'zoom': 0.4}
    policy = jax.jit(augment.make_augmentation('affine', **settings))
    for seed in range(6):
        key = jax.random.key(seed)
        shift_key, angle_key, zoom_key = jax.random.split(key, 3)
        shift = jax.random.uniform(shift_key, (2,), minval=-3, maxval=3)
        angle = np.deg2rad(jax.random.uniform(angle_key, minval=-40, maxval=40))
        scale = 1 + float(jax.random.uniform(zoom_key, minval=-0.4, maxval=0.4))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        center = np.array([13.5, 13.5])
        offset = center - turn @ center + np.asarray(shift)
        image = np.float64(digits[1, ..., 0])
        expected = ndimage.affine_transform(image, turn, offset, order=1, mode='grid-constant')
        result = policy(key, as_floats(digits[1]))[..., 0]
        np.testing.assert_allclose(result, expected, atol=0.02)


def test_affine_keeps_most_of_a_small_digit():
    """As in the digits config: 8x8 pixels, values stay in range, the sum changes little."""
    images = jnp.asarray(load_digits().images[:100, ..., None] * (255 / 16), jnp.float32)
    policy = jax.jit(jax.vmap(augment.make_augmentation('affine')))
    moved = np.asarray(policy(jax.random.split(jax.random.key(5), 100), images))
    assert moved.min() >= 0 and moved.max() <= 255
    ratio = moved.sum(axis=(1, 2, 3)) / np.asarray(images).sum(axis=(1, 2, 3))
    assert 0.85 < ratio.mean() < 1.05 and np.all(ratio > 0.5)


@pytest.mark.parametrize(
    ('name', 'settings', 'message'),
    [
        ('randaugment', {}, "'randaugment'; it must be one of 'none', 'rand_augment', 'affine'"),
        ('rand_augment', {'shift': 1.0}, "no setting 'shift'; its settings: operations, magnitude"),
        ('rand_augment', {'operations': -1}, 'operations is -1; it must be a whole number, at least 0'),
        ('rand_augment', {'operations': 1.5}, 'operations is 1.5; it must be a whole number'),
        ('rand_augment', {'operations': True}, 'operations is True; it must be a whole number'),
        ('rand_augment', {'operations': '2'}, "operations is '2'; it must be a whole number"),
        ('rand_augment', {'magnitude': 0}, 'magnitude is 0; it must be a whole number, at least 1'),
        ('rand_augment', {'magnitude': 31}, r'magnitude is 31; it must be in 1\.\.30'),
        ('rand_augment', {'magnitude': 3, 'bins': 1}, 'bins is 1; it must be a whole number, at least 2'),
        ('rand_augment', {'random_magnitude': 1}, 'random_magnitude is 1; it must be True or'),
        ('affine', {'shift': -1.0}, 'shift is -1.0; it must be a finite number, at least 0'),
        ('affine', {'degrees': float('nan')}, 'degrees is nan; it must be a finite number'),
        ('affine', {'zoom': 1.0}, r'zoom is 1.0; it must be in \[0, 1\)'),
        ('none', {'shift': 1.0}, "'none' has no setting 'shift'; its settings: none"),
        ('affine', {'magnitude': 3}, "no setting 'magnitude'; its settings: shift, degrees, zoom"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        augment.make_augmentation(name, **settings)


@pytest.mark.parametrize('shape', [(8, 8), (8, 8, 2), (1, 8, 8, 3)])
@pytest.mark.parametrize('name', ['rand_augment', 'affine'])
def test_bad_images_are_refused(name, shape):
    policy = augment.make_augmentation(name)
    with pytest.raises(ValueError, match=r'it must be float32 \(H, W, C\)'):
        policy(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ValueError, match='image is uint8'):
        policy(jax.random.key(0), jnp.zeros((8, 8, 1), jnp.uint8))
