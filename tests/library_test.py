"""A released model is sampled from in one call."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import dpp_jax
from dpp_jax.training import devices


@pytest.fixture(scope='module')
def model(finished_run):
    return dpp_jax.load(finished_run[1].root)


def test_images_come_with_the_labels_that_are_asked_for(model):
    images, labels = model.sample(12, seed=1)
    assert images.shape == (12, *model.image_shape) == (12, 8, 8, 1)
    assert images.dtype == np.uint8 and images.std() > 1
    assert labels.tolist() == [*range(10), 0, 1] and labels.dtype == np.int32
    threes, labels = model.sample(11, [3] * 11, seed=1)
    assert labels.tolist() == [3] * 11
    assert len({image.tobytes() for image in threes}) == 11
    for same in (3, '3', ['3'] * 11):
        np.testing.assert_array_equal(model.sample(11, same, seed=1)[0], threes)


def test_a_seed_repeats_the_images_and_no_seed_does_not(model):
    draws = [model.sample(10, seed=seed)[0].tobytes() for seed in (1, 1, 2, None, None)]
    assert draws[0] == draws[1] and len(set(draws)) == 4


def test_a_second_call_of_equal_size_compiles_nothing(model, compilations):
    model.sample(10, seed=1)
    before = compilations.count
    model.sample(10, seed=2)
    model.sample(10, 4)
    assert compilations.count == before


def test_release_alone_is_enough_and_the_sampler_may_be_another(finished_run, model, tmp_path):
    _, workdir, _ = finished_run
    shutil.copytree(workdir.release, tmp_path / 'from somebody')
    theirs = dpp_jax.load(tmp_path / 'from somebody')
    images, _ = model.sample(10, seed=1)
    np.testing.assert_array_equal(images, theirs.sample(10, seed=1)[0])
    fewer, ddim = (theirs.sample(10, seed=1, sampler=other)[0] for other in ({'steps': 2}, 'ddim'))
    assert (fewer != images).any() and (ddim != images).any() and (ddim != fewer).any()


def test_the_model_tells_what_it_is(finished_run, model):
    config, workdir, _ = finished_run
    assert model.classes == tuple('0123456789')
    privacy = model.privacy
    assert 0 < privacy.epsilon <= config.dp.epsilon and privacy.delta == config.dp.delta
    assert privacy.unit == 'image' and not privacy.is_private  # the run has a seed
    assert privacy.text == workdir.statement_text.read_text(encoding='utf-8')
    assert '8x8x1, 10 classes, ε = ' in repr(model)


@pytest.mark.parametrize(
    'arguments, text',
    [
        ({'n': 0}, 'n is 0; it must be a whole number, at least 1'),
        ({'n': 2, 'labels': [1]}, r'labels is \[1\]; it must be 2 whole numbers in 0 .. 9, or names'),
        ({'n': 1, 'labels': [10]}, r'labels is \[10\]; it must be 1 whole numbers in 0 .. 9'),
        ({'n': 1, 'labels': ['ten']}, "labels is .*'ten'"),
        ({'n': 1, 'labels': [0.5]}, 'labels is'),
        ({'n': 1, 'sampler': {'steps': 0}}, 'config.generate.sampler.steps is 0; it must be'),
        (
            {'n': 1, 'sampler': {'step': 3}},
            "sampler has 'step', which is no setting of it; it has guidance",
        ),
        ({'n': 1, 'sampler': 'euler'}, "config.generate.sampler.name is 'euler'; it must be"),
    ],
    ids=repr,
)
def test_what_cannot_be_sampled_is_named(model, arguments, text):
    with pytest.raises(ValueError, match=text):
        model.sample(**arguments)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json is not there; workdir must be that of a run'):
        dpp_jax.load(tmp_path)


def test_a_program_runs_what_the_command_line_runs(finished_run, tmp_path, capsys):
    """The same settings from Python; a finished run has nothing left to do."""
    config, workdir, _ = finished_run
    shutil.copytree(workdir.root, tmp_path, dirs_exist_ok=True)
    dpp_jax.synthesize(config, tmp_path)
    assert 'Everything is done' in capsys.readouterr().out
    with pytest.raises(ValueError, match="stage is 'everything'; it must be one of plan, import, central"):
        dpp_jax.synthesize(config, tmp_path, 'everything')


def test_settings_are_those_of_the_command_line():
    config = dpp_jax.config('digits_8', 3, **{'finetune.epochs': 2, 'model.multipliers': (1,)})
    assert config.dp.epsilon == 3 and config.finetune.epochs == 2 and config.model.multipliers == (1,)
    for name, changes, reason in (
        ('digits_9', {}, 'did you mean digits_8'),
        ('digits_8', {'fintune.epochs': 2}, 'did you mean config.finetune.epochs'),
        ('digits_8', {'finetune': 2}, 'config.finetune is a group'),
    ):
        with pytest.raises(ValueError, match=reason):
            dpp_jax.config(name, 3, **changes)


@pytest.mark.parametrize('number, after', [(signal.SIGINT, 'stopped after step')])
def test_an_interrupted_run_raises_as_python_does_and_goes_on(
    quick_config, tmp_path, monkeypatch, number, after
):
    config, taken = quick_config(finetune__epochs=0.5), []
    original = devices.deal_own

    def deal(*arguments):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(devices, 'deal_own', deal)
    with pytest.raises(KeyboardInterrupt, match=after):
        dpp_jax.synthesize(config, tmp_path, 'central') or dpp_jax.synthesize(config, tmp_path, 'pretrain')
        dpp_jax.synthesize(config, tmp_path, 'finetune')
    dpp_jax.synthesize(config, tmp_path, 'finetune')
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / 'release' / 'model' / 'finetune').is_dir()


def test_the_package_is_imported_without_jax():
    program = 'import sys, dpp_jax; print("jax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['False']
