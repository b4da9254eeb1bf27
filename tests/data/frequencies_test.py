"""The cosine transform of images: orthonormal, exact, the lowest frequencies first."""

import numpy as np
import pytest
from scipy import fft

from dpp_jax.data.frequencies import Frequencies


def all_of(shape, average_down=1):
    values = np.prod(shape) // average_down**2
    return Frequencies(image_shape=shape, average_down=average_down, count=int(values))


def random_images(shape, n=7):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


@pytest.mark.parametrize('shape', [(8, 8, 1), (4, 6, 3)], ids=str)
def test_all_frequencies_are_the_orthonormal_dct_and_give_the_images_back(shape):
    images = random_images(shape)
    found = all_of(shape).coefficients(images)
    expected = fft.dctn(images / 255.0, axes=(1, 2, 3), norm='ortho').reshape(len(images), -1)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-6)
    np.testing.assert_array_equal(all_of(shape).images(found), images)


def test_the_first_frequencies_are_the_lowest_ones_and_of_colors_gray_has_most():
    """A slow wave in gray is there; a fast one, and a fast one in color, is not."""
    few = Frequencies(image_shape=(8, 8, 3), average_down=1, count=12)
    position = np.pi * (2 * np.arange(8) + 1) / 16
    slow, fast = (127.5 * np.cos(k * position)[:, None, None] * np.ones((1, 8, 3)) for k in (1, 6))
    colored = 127.5 * np.cos(3 * position)[:, None, None] * np.ones((1, 8, 1)) * np.array([1.0, 0.0, -1.0])
    energies = np.square(few.coefficients(np.stack([slow, fast, colored]))).sum(axis=1)
    np.testing.assert_allclose(energies, [(slow**2).sum() / 255**2, 0, 0], atol=1e-5)


def test_blocks_are_averaged_before_and_filled_smoothly_after():
    flat = np.repeat(np.repeat(random_images((4, 4, 1)), 2, axis=1), 2, axis=2)
    small, large = all_of((4, 4, 1)), all_of((8, 8, 1), 2)
    np.testing.assert_allclose(large.coefficients(flat), small.coefficients(flat[:, ::2, ::2]), atol=1e-6)
    even = np.full((1, 8, 8, 1), 77, np.uint8)
    np.testing.assert_array_equal(large.images(large.coefficients(even)), even)


def test_an_image_has_the_same_bits_among_any_others():
    """So that who else is in a sample moves nobody's contribution."""
    images = random_images((14, 14, 1), 50)
    some = Frequencies(image_shape=(14, 14, 1), average_down=1, count=30)
    together = some.coefficients(images)
    np.testing.assert_array_equal(
        np.concatenate([some.coefficients(image[None]) for image in images]), together
    )
    of_groups = some.coefficients(images.reshape((10, 5, 14, 14, 1)))
    np.testing.assert_array_equal(of_groups.reshape((50, 30)), together)
    assert some.coefficients(images[:0]).shape == (0, 30)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'average_down': 3}, 'average_down is 3; it must divide the size of images, 8 x 8'),
        (
            {'count': 17, 'average_down': 2},
            'frequencies is 17; it must be at most 16, the values of an image',
        ),
    ],
)
def test_frequencies_that_there_are_not_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        Frequencies(**{'image_shape': (8, 8, 1), 'average_down': 1, 'count': 4} | change)
