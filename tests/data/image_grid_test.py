"""Grids of images, with names beside their rows."""

import io

import numpy as np
from PIL import Image
import pytest

from dpp_jax.data import image_grid


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


def test_names_stand_beside_their_rows_and_change_no_pixel_of_them(images):
    labels = np.arange(6) % 3
    plain = image_grid.rows_by_class(images, labels, 3, 2)
    named = image_grid.rows_by_class(images, labels, 3, 2, ('cat', '', 'an animal of a very long name'))
    width = named.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(named[:, width:], plain)
    margin, height = named[:, :width], plain.shape[0] / 3
    ink = [(margin[round(i * height) : round((i + 1) * height)] < 128).sum() for i in range(3)]
    assert ink[0] > 20 and ink[1] == 0 and ink[2] > 3 * ink[0]
    assert width < 200  # long names are cut


@pytest.mark.parametrize('channels', [1, 3])
def test_a_picture_with_names_is_a_png_of_as_many_channels(images, channels):
    picture = image_grid.rows_by_class(images[..., :channels], np.zeros(6, int), 1, 6, ['all'])
    assert picture.shape[-1] == channels
    with Image.open(io.BytesIO(image_grid.png(picture))) as found:
        assert found.mode == {1: 'L', 3: 'RGB'}[channels] and found.size == picture.shape[1::-1]
