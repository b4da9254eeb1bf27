"""A released model is sampled from in one call."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

import dpp_jax


def test_images_come_with_the_labels_that_are_asked_for(finished_run):
    _, workdir, _ = finished_run
    images, labels = dpp_jax.sample(workdir.root, 12, seed=1)
    assert images.shape == (12, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 1
    assert labels.tolist() == [*range(10), 0, 1]
    threes, labels = dpp_jax.sample(workdir.root, 11, labels=[3] * 11, seed=1)
    assert labels.tolist() == [3] * 11
    assert len({image.tobytes() for image in threes}) == 11
    np.testing.assert_array_equal(threes[0], dpp_jax.sample(workdir.root, 1, labels=[3], seed=1)[0][0])


def test_a_seed_repeats_the_images_and_no_seed_does_not(finished_run):
    _, workdir, _ = finished_run
    draws = [dpp_jax.sample(workdir.root, 10, seed=seed)[0].tobytes() for seed in (1, 1, 2, None, None)]
    assert draws[0] == draws[1] and len(set(draws)) == 4


def test_release_alone_is_enough_and_sampler_settings_may_be_others(finished_run, tmp_path):
    _, workdir, _ = finished_run
    shutil.copytree(workdir.release, tmp_path / 'from somebody')
    ours = dpp_jax.sample(workdir.root, 10, seed=1)
    theirs = dpp_jax.sample(tmp_path / 'from somebody', 10, seed=1)
    np.testing.assert_array_equal(ours[0], theirs[0])
    other = dpp_jax.sample(tmp_path / 'from somebody', 10, seed=1, steps=2)
    assert (other[0] != ours[0]).any()


@pytest.mark.parametrize(
    'arguments, text',
    [
        ({'n': 0}, 'n is 0; it must be a whole number, at least 1'),
        ({'n': 2, 'labels': [1]}, r'labels is \[1\]; it must be 2 whole numbers in 0 .. 9'),
        ({'n': 1, 'labels': [10]}, r'labels is \[10\]; it must be 1 whole numbers in 0 .. 9'),
        ({'n': 1, 'labels': [0.5]}, 'labels is'),
        ({'n': 1, 'steps': 0}, 'config.generate.sampler.steps is 0; it must be'),
        ({'n': 1, 'step': 3}, 'step'),
    ],
    ids=repr,
)
def test_what_cannot_be_sampled_is_named(finished_run, arguments, text):
    _, workdir, _ = finished_run
    with pytest.raises(ValueError, match=text):
        dpp_jax.sample(workdir.root, **arguments)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json is not there; workdir must be that of a run'):
        dpp_jax.sample(tmp_path, 1)


def test_the_package_is_imported_without_jax():
    program = 'import sys, dpp_jax; print("jax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['False']
