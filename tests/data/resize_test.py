"""Resizing against the PyTorch implementation's vectors and against its definition."""

from pathlib import Path

import numpy as np
import pytest

from dpp_jax.data import resize

GOLDEN = Path(__file__).parents[1] / 'golden' / 'central_images.npz'


@pytest.fixture(scope='module', params=['gray_28', 'rgb_32'])
def golden(request) -> dict[str, np.ndarray]:
    """What PyTorch computes: (N, H, W, C) by name."""
    with np.load(GOLDEN) as data:
        names = ('full', 'nearest_half', 'noisy_half', 'bilinear_up', 'uint8')
        return {name: np.moveaxis(data[f'{request.param}/{name}'], 1, -1) for name in names}


def test_nearest_equals_pytorch(golden):
    np.testing.assert_array_equal(resize.nearest(golden['full'], 2), golden['nearest_half'])


def test_nearest_keeps_the_first_pixel_of_an_incomplete_block():
    images = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(resize.nearest(images, 3)[0, ..., 0], [[0, 3], [15, 18]])


def test_bilinear_is_within_one_gray_level_of_pytorch(golden):
    """After x 255 and truncation; at least 99.9 % of the pixels are equal."""
    size = golden['full'].shape[1:3]
    result = resize.bilinear(np.clip(golden['noisy_half'], 0, 1), size)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, golden['bilinear_up'], rtol=0, atol=1e-6)
    difference = np.abs((result * 255).astype(np.uint8) - golden['uint8'].astype(np.int32))
    assert difference.max() <= 1
    assert np.mean(difference == 0) >= 0.999


def test_bilinear_interpolates_between_centers_and_goes_on_beyond_the_outermost():
    images = np.array([0, 1, 3], np.float32).reshape(1, 3, 1, 1)
    result = resize.bilinear(images, (6, 1))[0, :, 0, 0]
    np.testing.assert_allclose(result, [0, 0.25, 0.75, 1.5, 2.5, 3], atol=1e-6)


def test_bilinear_to_the_same_size_changes_nothing():
    images = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize.bilinear(images, (5, 7)), images)


@pytest.mark.parametrize('factor', [1, 2, 3, 6])
def test_average_pool_is_the_mean_of_each_block_with_halves_rounded_up(factor):
    images = np.random.default_rng(1).integers(0, 256, (4, 6, 12, 3), np.uint8)
    result = resize.average_pool(images, factor)
    assert result.shape == (4, 6 // factor, 12 // factor, 3) and result.dtype == np.uint8
    for row in range(6 // factor):
        for column in range(12 // factor):
            top, left = row * factor, column * factor
            block = images[:, top : top + factor, left : left + factor].astype(np.float64)
            np.testing.assert_array_equal(result[:, row, column], np.floor(block.mean((1, 2)) + 0.5))


def test_average_pool_does_not_overflow():
    white = np.full((1, 32, 32, 1), 255, np.uint8)
    assert resize.average_pool(white, 32).item() == 255
