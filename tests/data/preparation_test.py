"""Images of any size become squares, gray or RGB."""

import numpy as np
from PIL import Image
import pytest

from dpp_jax.data.preparation import Preparation, prepare, prepare_array, prepare_arrays


def made(array, **settings):
    return prepare(Image.fromarray(array), Preparation(**{'channels': 1, 'fit': 'crop'} | settings))


@pytest.mark.parametrize('shape', [(6, 12), (12, 6), (7, 12), (13, 6)], ids=str)
def test_a_crop_is_the_square_in_the_center(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    np.testing.assert_array_equal(
        made(image, image_size=side)[..., 0], image[top : top + side, left : left + side]
    )


@pytest.mark.parametrize('shape', [(6, 12), (12, 6), (7, 12)], ids=str)
def test_a_padded_image_is_whole_with_black_around_it(shape):
    image = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    found = made(image, image_size=12, fit='pad')[..., 0]
    np.testing.assert_array_equal(found[found.any(axis=1)][:, found.any(axis=0)], image)
    rows = np.flatnonzero(found.any(axis=1))
    assert abs(rows[0] - (11 - rows[-1])) <= 1


def test_area_is_the_mean_of_the_pixels_below():
    image = np.random.default_rng(0).integers(0, 256, (12, 12), np.uint8)
    found = made(image, image_size=4)[..., 0]
    np.testing.assert_allclose(found, image.reshape(4, 3, 4, 3).mean((1, 3)), atol=1)
    enlarged = made(image, image_size=24)[..., 0]
    np.testing.assert_array_equal(enlarged, image.repeat(2, 0).repeat(2, 1))
    assert (made(image, image_size=4, resize='lanczos')[..., 0] != found).any()


def test_gray_and_color_are_turned_into_each_other():
    gray = np.random.default_rng(0).integers(0, 256, (5, 5), np.uint8)
    rgb = made(gray, image_size=5, channels=3)
    np.testing.assert_array_equal(rgb, np.dstack([gray] * 3))
    np.testing.assert_array_equal(made(rgb, image_size=5)[..., 0], gray)
    red = np.zeros((5, 5, 3), np.uint8)
    red[..., 0] = 255
    assert (made(red, image_size=5) == 76).all()  # 0.299 x 255


def test_arrays_become_what_images_become():
    images = np.random.default_rng(0).integers(0, 256, (3, 10, 8, 3), np.uint8)
    wanted = Preparation(image_size=4, channels=1, fit='crop')
    found = prepare_arrays(images, wanted)
    assert found.shape == (3, 4, 4, 1) and found.dtype == np.uint8
    for each, image in zip(found, images):
        np.testing.assert_array_equal(each, prepare(Image.fromarray(image), wanted))
        np.testing.assert_array_equal(each, prepare_array(image, wanted))
    fits = np.zeros((3, 4, 4, 1), np.uint8)
    assert prepare_arrays(fits, wanted) is fits
    with pytest.raises(ValueError, match=r'float64 of shape \(4, 4, 1\)'):
        prepare_array(np.zeros((4, 4, 1)), wanted)


def test_settings_are_named():
    for name, value in (('fit', 'stretch'), ('resize', 'cubic'), ('validation', 'test')):
        with pytest.raises(ValueError, match=f"config.data.{name} is '{value}'; it must be"):
            Preparation(**{name: value})
    with pytest.raises(ValueError, match='config.data.channels is not set'):
        Preparation(image_size=8, fit='pad').target()
    assert Preparation(fit='crop').shape((None, None, 3)) == (None, None, 3)
    assert Preparation(fit='crop', image_size=8, channels=1).shape((30, 20, 3)) == (8, 8, 1)
    assert Preparation(image_size=8, channels=1).shape((30, 20, 3)) == (30, 20, 3)
