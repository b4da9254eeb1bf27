"""The program from the command line, and the pipeline from beginning to end."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from dpp_jax import pipeline
from dpp_jax.privacy import accounting
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.stages import finetune, generate, workdir as workdir_lib
from dpp_jax.training import loop

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def run(tiny_config, tmp_path_factory):
    """A whole run with every kind of output."""
    config = tiny_config(generate__png_tree=True, generate__separate_classifier_images=True)
    config.generate.classifier_sampler.update(name='ddim', steps=3)
    root = tmp_path_factory.mktemp('run')
    pipeline.run(config, root, 'all')
    return config, workdir_lib.WorkDir(root)


def test_every_stage_is_done_and_a_second_run_computes_nothing(run, compilations, capsys):
    config, workdir = run
    assert all(pipeline.done(config, workdir).values())
    before = compilations.count
    pipeline.run(config, workdir.root, 'all')
    assert compilations.count == before
    assert 'Everything is done' in capsys.readouterr().out


def test_ledger_recomputes_the_epsilon_of_the_plan(run):
    config, workdir = run
    ledger = ledger_lib.Ledger(workdir.release / 'ledger.jsonl')
    planned = json.loads((workdir.release / 'plan.json').read_text())
    assert ledger.count('central_query') == config.query.queries
    assert ledger.count('dp_sgd') == planned['steps']
    spent = accounting.epsilon(ledger.event(), config.dp.delta, 'rdp')
    assert spent == pytest.approx(planned['epsilon_total'], rel=1e-6)
    assert spent <= config.dp.epsilon


def test_synthetic_images_are_balanced_uint8_with_their_pictures(run):
    config, workdir = run
    for path in generate.files(config, workdir).values():
        with np.load(path) as data:
            images, labels = data['images'], data['labels']
        assert images.shape == (40, 8, 8, 1) and images.dtype == np.uint8
        assert np.all(np.bincount(labels, minlength=10) == 4)
        assert images.std() > 1
        assert Image.open(path.with_suffix('.png')).size[0] > 100
    tree = sorted((workdir.release / 'synthetic' / 'png').rglob('*.png'))
    assert len(tree) == 40
    with np.load(generate.files(config, workdir)['images']) as data:
        number = int(tree[-1].stem)
        np.testing.assert_array_equal(np.asarray(Image.open(tree[-1])), data['images'][number, ..., 0])
        assert data['labels'][number] == int(tree[-1].parent.name)


def test_what_looks_at_private_images_lies_in_private(run):
    _, workdir = run
    private = {str(p.relative_to(workdir.private)) for p in workdir.private.rglob('*')}
    assert {'evaluation.json', 'report.html', 'keys.json', 'metrics/finetune'} <= private
    text = ''.join(p.read_text() for p in workdir.release.glob('*.json*'))
    assert 'fid' not in text.replace('evaluate.fid', '') and '"loss"' not in text
    keys = json.loads((workdir.private / 'keys.json').read_text())
    assert not any(keys[part]['noise'] in text for part in keys if part != '_note')
    results = json.loads((workdir.private / 'evaluation.json').read_text())
    assert set(results['accuracy']) == {'logistic', 'mlp'} and results['fid'] > 0
    report = (workdir.private / 'report.txt').read_text()
    assert 'small CNN' in report and 'NOT PRIVATE' in report and 'δ = 0.0001' in report


def test_metrics_are_tensorboard_events(run):
    from tensorflow.python.summary.summary_iterator import summary_iterator

    _, workdir = run
    (path,) = (workdir.private / 'metrics' / 'finetune').glob('events*')
    tags = {value.tag for event in summary_iterator(str(path)) for value in event.summary.value}
    assert {'loss', 'gradient_norm', 'clipped_share', 'batch_size'} <= tags


def final_files(workdir):
    """Bytes or arrays of everything that a run must end with."""
    with np.load(workdir.release / 'synthetic' / 'images.npz') as data:
        images = data['images']
    ledger = (workdir.release / 'ledger.jsonl').read_text()
    return images, ledger


def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(
    run, tiny_config, tmp_path, monkeypatch
):
    """Stopped in the query, in fine-tuning and between two batches of images."""
    config, reference = run
    root = workdir_lib.WorkDir(tmp_path)

    class Stop(Exception):
        pass

    def stop_at_call(module, name, call):
        original, calls = getattr(module, name), [0]

        def wrapper(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                raise Stop
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)
        with pytest.raises(Stop):
            pipeline.run(config, tmp_path, 'all')
        monkeypatch.setattr(module, name, original)

    stop_at_call(ledger_lib.Ledger, 'append', 2)
    config.loop.checkpoint_every_seconds = 0.0
    stop_at_call(ledger_lib.Ledger, 'append', 3 + 11)
    stop_at_call(generate.devices, 'collect', 2)
    pipeline.run(config, tmp_path, 'generate')
    config.loop.checkpoint_every_seconds = 1000.0
    images, ledger = final_files(root)
    expected_images, expected_ledger = final_files(reference)
    np.testing.assert_array_equal(images, expected_images)
    assert ledger == expected_ledger


def test_a_stage_out_of_order_says_what_is_missing(tiny_config, tmp_path):
    with pytest.raises(ValueError, match='--stage=generate needs what --stage=central writes'):
        pipeline.run(tiny_config(), tmp_path, 'generate')


def test_lost_keys_are_refused_because_new_ones_would_spend_twice(tiny_config, tmp_path):
    config = tiny_config()
    config.seed = None
    workdir = workdir_lib.WorkDir(tmp_path)
    pipeline.run(config, tmp_path, 'central')
    images = workdir.release / 'central_images.npz'
    with np.load(images) as data:
        first = data['images']
    ledger = (workdir.release / 'ledger.jsonl').read_text()
    images.unlink()
    pipeline.run(config, tmp_path, 'central')  # with its keys it makes the same release again
    with np.load(images) as data:
        np.testing.assert_array_equal(data['images'], first)
    images.unlink()
    (workdir.private / 'keys.json').unlink()
    with pytest.raises(ValueError, match='spend its budget a second time'):
        pipeline.run(config, tmp_path, 'central')
    assert (workdir.release / 'ledger.jsonl').read_text() == ledger


def test_a_checkpoint_of_another_network_is_refused_before_a_step_is_taken(
    run, tiny_config, tmp_path
):
    _, reference = run
    config = tiny_config(model__blocks=2)
    workdir = workdir_lib.WorkDir(tmp_path)
    pipeline.run(config, tmp_path, 'central')
    model = workdir.release / 'model'
    model.mkdir()
    (model / 'pretrain').symlink_to((reference.release / 'model' / 'pretrain').absolute())
    with pytest.raises(ValueError, match='another network'):
        pipeline.run(config, tmp_path, 'finetune')
    assert ledger_lib.Ledger(workdir.release / 'ledger.jsonl').count('dp_sgd') == 0
    assert not finetune.is_done(workdir)


@pytest.mark.parametrize(
    'change, error, text',
    [
        ({'data__train_images': 1400}, ValueError, 'train_images is 1400; digits has 1437'),
        ({'data__source': 'digitz'}, ValueError, 'digitz'),
        ({'data__source': 'idx:nowhere'}, FileNotFoundError, 'nowhere'),
        ({'data__image_size': 16}, ValueError, 'data.image_size and data.channels say'),
        ({'data__classes': 9}, ValueError, r'label.*9'),
        ({'data__classes': 11}, ValueError, 'class'),
    ],
)
def test_bad_data_is_refused_before_any_privacy_is_spent(
    tiny_config, tmp_path, change, error, text
):
    config = tiny_config(**change)
    if config.data.image_size == 16:
        config.model.attention_resolutions = (8,)
    with pytest.raises(error, match=text):
        pipeline.run(config, tmp_path, 'all')
    ledger = tmp_path / 'release' / 'ledger.jsonl'
    assert not ledger.exists() or not ledger.read_text()


def program(*arguments):
    """Run the command line in a process of its own, on one device."""
    environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run(
        [sys.executable, '-m', 'dpp_jax.main', *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )


def test_command_line_plans_without_touching_a_work_directory(tmp_path):
    result = program(
        '--config=configs/mnist_28.py:1', f'--workdir={tmp_path}/run', '--stage=plan',
        '--config.finetune.epochs=20',
    )
    assert result.returncode == 0, result.stderr
    assert '300 steps' in result.stdout and 'ε = 1,' in result.stdout
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'arguments, text',
    [
        (['--config=configs/digits_8.py:10', '--config.finetune.epochz=3'], 'Did you mean "epochs"'),
        (['--config=configs/digits_8.py:zero'], "ε after the colon of --config is 'zero'"),
        (['--config=configs/digit_8.py:1'], 'configs/digit_8.py'),
        (['--config=configs/digits_8.py:-1'], 'config.dp.epsilon is -1.0'),
        (['--config=configs/digits_8.py:10', '--stage=training'], 'finetune'),
    ],
)
def test_command_line_errors_name_the_problem_in_a_line(tmp_path, arguments, text):
    result = program(f'--workdir={tmp_path}/run', *arguments)
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith('dpp-jax: ') and text in line
    assert not (tmp_path / 'run').exists()
