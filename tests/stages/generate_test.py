"""Parts that an interrupted run left: those that are whole are kept."""

import numpy as np
import pytest

from dpp_jax import files
from dpp_jax.stages.generate import sampling


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)


def without_the_end(content):
    return content[:-30]


def zeros_in_the_middle(content):
    """Blocks that never reached the disk: the end, with the table of the archive, is there."""
    half = len(content) // 2
    return content[:half] + bytes(64) + content[half + 64 :]


def all_zeros(content):
    return bytes(len(content))


def nothing(content):
    return b''


DAMAGES = [without_the_end, zeros_in_the_middle, all_zeros, nothing]


@pytest.mark.parametrize('damage', DAMAGES)
def test_parts_are_read_until_the_first_that_is_damaged(tmp_path, images, damage):
    for first in (0, 20, 40):
        files.write_npz(tmp_path / f'{first:010d}.npz', images=images[first : first + 20])
    np.testing.assert_array_equal(np.concatenate(sampling._read_parts(tmp_path)), images)
    path = tmp_path / f'{20:010d}.npz'
    path.write_bytes(damage(path.read_bytes()))
    (part,) = sampling._read_parts(tmp_path)
    np.testing.assert_array_equal(part, images[:20])


def test_parts_are_read_until_the_first_that_is_missing(tmp_path, images):
    for first in (0, 40):
        files.write_npz(tmp_path / f'{first:010d}.npz', images=images[first : first + 20])
    assert sum(map(len, sampling._read_parts(tmp_path))) == 20
    assert sampling._read_parts(tmp_path / 'nowhere') == []
