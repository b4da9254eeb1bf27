"""Files that lost a part are made again; what is whole is kept."""

import numpy as np
import pytest

from dpp_jax.run import folder as workdir_lib
from dpp_jax.stages import generate


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
def test_a_damaged_set_of_images_is_not_done(tiny_config, tmp_path, images, damage, capsys):
    config, workdir = tiny_config(), workdir_lib.WorkDir(tmp_path)
    (path,) = generate.files(config, workdir).values()
    assert not generate.is_done(config, workdir)
    workdir_lib.write_npz(path, images=images, labels=np.arange(60) % 10)
    assert generate.is_done(config, workdir)
    assert capsys.readouterr().out == ''
    path.write_bytes(damage(path.read_bytes()))
    assert not generate.is_done(config, workdir)
    assert f'{path} is damaged' in capsys.readouterr().out


@pytest.mark.parametrize('damage', DAMAGES)
def test_parts_are_read_until_the_first_that_is_damaged(tmp_path, images, damage):
    for first in (0, 20, 40):
        workdir_lib.write_npz(tmp_path / f'{first:010d}.npz', images=images[first : first + 20])
    np.testing.assert_array_equal(np.concatenate(generate._read_parts(tmp_path)), images)
    path = tmp_path / f'{20:010d}.npz'
    path.write_bytes(damage(path.read_bytes()))
    (part,) = generate._read_parts(tmp_path)
    np.testing.assert_array_equal(part, images[:20])


def test_parts_are_read_until_the_first_that_is_missing(tmp_path, images):
    for first in (0, 40):
        workdir_lib.write_npz(tmp_path / f'{first:010d}.npz', images=images[first : first + 20])
    assert sum(map(len, generate._read_parts(tmp_path))) == 20
    assert generate._read_parts(tmp_path / 'nowhere') == []


def test_images_that_were_only_begun_belong_to_their_settings(tiny_config, tmp_path):
    """Otherwise their parts would be mixed with those of other settings."""
    workdir = workdir_lib.WorkDir(tmp_path)
    generate.check(tiny_config(), workdir)
    generate._record(tiny_config(), workdir)
    generate.check(tiny_config(generate__batch_size=3), workdir)
    with pytest.raises(ValueError, match='or begun, with other settings:\n  config.generate.sampler.steps'):
        generate.check(tiny_config(generate__sampler__steps=7), workdir)
