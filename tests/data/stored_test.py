"""Images in files are indexed as an array is, and only what is asked for is read."""

import numpy as np
import pytest

from dpp_jax.data import resize
from dpp_jax.data.images import check_images
from dpp_jax.data.stored import StoredImages

ARRAY = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), np.uint8)


@pytest.fixture
def stored():
    """The images of ARRAY, and a list of the numbers that were read."""
    read = []

    def rows(numbers):
        read.append(numbers.tolist())
        return ARRAY[numbers]

    return StoredImages(rows, ARRAY.shape), read


@pytest.mark.parametrize(
    'index',
    [
        0,
        -1,
        slice(2, 7, 2),
        slice(None, None, -1),
        slice(4, 4),
        np.array([5, 0, 0, 5]),
        np.array([[3, -9], [8, 3]]),
        np.zeros((0,), int),
        [1, 2],
        ARRAY[:, 0, 0, 0] > 99,
    ],
    ids=str,
)
def test_an_index_gives_what_it_gives_of_an_array(stored, index):
    images, _ = stored
    found = images[index]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, ARRAY[index])
    found[...] = 0  # it is the caller's own
    np.testing.assert_array_equal(images[index], ARRAY[index])


@pytest.mark.parametrize('wrong', [9, -10, np.array([0, 9]), np.array([0.5]), 'a'])
def test_what_is_no_row_is_refused(stored, wrong):
    with pytest.raises(IndexError, match='the index of stored images'):
        stored[0][wrong]


def test_each_row_is_read_once_and_no_other_is(stored):
    images, read = stored
    images[np.array([7, 0, 0, 0, 2])]
    assert read == [[0, 2, 7]]


def test_they_are_described_like_an_array_and_do_not_become_one(stored):
    images, read = stored
    for name in ('shape', 'dtype', 'ndim', 'size', 'nbytes'):
        assert getattr(images, name) == getattr(ARRAY, name)
    assert len(images) == 9
    assert check_images(images, name='toys', image_shape=(4, 6, 3)) is images
    with pytest.raises(TypeError, match="9 images .* stay in files.*in_memory to 'yes'"):
        np.asarray(images)
    assert not read


@pytest.mark.parametrize('resized', [resize.nearest, resize.average_pool])
def test_resizing_waits_until_rows_are_read(stored, resized):
    images, read = stored
    small, whole = resized(images, 2), resized(ARRAY, 2)
    assert not read and small.shape == whole.shape and small.dtype == whole.dtype
    np.testing.assert_array_equal(small[np.array([4, 1])], whole[[4, 1]])
    assert read == [[1, 4]]
