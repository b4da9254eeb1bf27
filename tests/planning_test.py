"""`--stage=plan` is where a user hears everything at once, before anything is spent or written."""

import time

import numpy as np
import pytest

from dpp_jax import build, pipeline, planning
from dpp_jax.data import sources


@pytest.fixture
def refused(tiny_config, tmp_path, capsys):
    """A function (settings) → what a plan with problems prints, and the lines of its error."""

    def plan(**changes):
        with pytest.raises(ValueError) as error:
            pipeline.run(tiny_config(**changes), tmp_path / 'run', 'plan')
        assert not (tmp_path / 'run').exists()
        return capsys.readouterr().out, str(error.value).splitlines()

    return plan


def save(folder, *, size=8, train=60, test=20, classes=10):
    folder.mkdir()
    for split, count in (('train', train), ('test', test)):
        images = np.zeros((count, size, size, 1), np.uint8)
        np.savez(folder / f'{split}.npz', images=images, labels=np.arange(count) % classes)
    return f'npz:{folder}'


@pytest.mark.parametrize('source', ['npz:{}/nothing', 'idx:{}/nothing', 'npz:{}', 'tfds:no_such_set'])
def test_without_its_images_a_plan_is_a_draft_that_says_what_is_missing(refused, tmp_path, source):
    (tmp_path / 'picture.png').write_bytes(b'')
    told, (problem,) = refused(data__source=source.format(tmp_path))
    assert 'DRAFT: nothing has run.' in told.splitlines() and 'NOT FOUND' in told
    assert 'Privacy statement of this plan' not in told and 'No privacy statement' in told
    assert problem.startswith('config.data.source') and source.format(tmp_path).partition(':')[2] in problem


@pytest.mark.parametrize(
    'kept, settings, text',
    [
        ({'size': 16}, {}, 'config.data.image_size is 8, data.average_down is 1'),
        ({'train': 70}, {}, 'config.data.train_images is 60; it must be 70'),
        ({'classes': 12}, {}, 'config.data.classes is 10; it must be at least 12'),
        ({}, {'data__average_down': 2}, 'have the shape .8, 8, 1..'),
    ],
)
def test_a_source_that_the_config_does_not_fit_is_told_from_its_headers(
    refused, tmp_path, monkeypatch, kept, settings, text
):
    source = save(tmp_path / 'data', **kept)
    monkeypatch.setattr(sources, 'load', None)
    changes = {'data__source': source, 'data__train_images': 60, 'finetune__batch_size': 20} | settings
    told, problems = refused(**changes)
    assert np.count_nonzero([text.replace('.8, 8, 1.', '(8, 8, 1)') in line for line in problems]) == 1
    assert 'NOT FOUND' not in told


def test_settings_source_and_folder_are_told_together(refused, tmp_path):
    _, problems = refused(dp__delta=2.0, finetune__batch_size=0, data__source=f'npz:{tmp_path}/nothing')
    assert [line.split()[0] for line in problems] == [
        'config.dp.delta',
        'config.finetune.batch_size',
        'config.data.source:',
    ]


def test_another_config_and_missing_images_are_told_together(copied_run, tiny_config):
    _, workdir = copied_run
    with pytest.raises(ValueError, match=r'(?s)nothing/train.npz.*belongs to another config'):
        pipeline.run(tiny_config(data__source='npz:nothing'), workdir.root, 'plan')


def test_what_would_be_spent_is_planned_also_where_it_is_too_much(refused):
    _, (problem,) = refused(dp__epsilon=0.01)
    assert 'the query alone spends' in problem


def test_a_source_that_does_not_answer_is_not_waited_for(tiny_config, refused, monkeypatch):
    monkeypatch.setattr(planning, '_PATIENCE', 0.2)
    monkeypatch.setattr(build, 'source_problems', lambda config, processes: time.sleep(20))
    start = time.monotonic()
    _, (problem,) = refused(data__source='tfds:mnist')
    assert "config.data.source is 'tfds:mnist', which did not answer within 0.2 s" in problem
    assert time.monotonic() - start < 15


def test_a_plan_makes_nothing_and_draws_where_the_folder_is_there(tiny_config, tmp_path, capsys):
    pipeline.run(tiny_config(), tmp_path / 'new', 'plan')
    assert not (tmp_path / 'new').exists() and 'plan makes nothing' in capsys.readouterr().out
    pipeline.run(tiny_config(), tmp_path, 'plan')
    assert str(tmp_path / 'plan.png') in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['plan.png']


def test_a_plan_is_a_draft_until_all_has_run(copied_run, capsys):
    config, workdir = copied_run
    pipeline.run(config, workdir.root, 'plan')
    told = capsys.readouterr().out
    assert 'DRAFT' not in told and 'time left      none, without evaluation' in told.splitlines()
    for path in (workdir.model('finetune'), workdir.private / 'resume', workdir.statement):
        path.rename(path.with_name('aside_' + path.name))
    for path in workdir.root.rglob('ledger.jsonl'):
        path.write_text(''.join(path.read_text().splitlines(True)[:3]))
    pipeline.run(config, workdir.root, 'plan')
    assert 'DRAFT: 3 of 25 releases were made.' in capsys.readouterr().out.splitlines()


def test_what_the_evaluation_will_leave_out_is_told(refused, tmp_path):
    sizes = {'data__classes': 1, 'data__train_images': 61, 'finetune__batch_size': 20, 'generate__images': 2}
    told, _ = refused(data__source=save(tmp_path / 'data', classes=1), **sizes)
    assert 'Evaluation will leave this out: config.data.classes is 1' in told


def arrays(**changes):
    rng = np.random.default_rng(0)
    found = {'images': rng.integers(0, 256, (60, 8, 8, 1), np.uint8), 'labels': np.arange(60) % 10}
    return found | {'writer': np.arange(60) // 2} | changes


@pytest.mark.parametrize(
    'changes, settings, text',
    [
        ({'images': np.zeros((60, 8, 8, 1), np.float32)}, {}, 'images are float32 .* they must be uint8'),
        ({'labels': np.arange(60) % 10 - 1}, {}, 'the labels go from -1'),
        ({}, {'data.groups': 'person'}, "config.data.groups is 'person'; it must be an array"),
        ({'writer': np.arange(60) / 2}, {}, 'the groups are float64'),
        ({'writer': np.arange(50)}, {}, r'they must be integers of shape \(60,\)'),
        ({}, {'data.train_groups': 60}, 'config.data.train_groups is 60; it must be 30'),
    ],
)
def test_what_a_run_would_refuse_in_the_arrays_is_told_by_plan(
    tiny_config, tmp_path, monkeypatch, capsys, changes, settings, text
):
    for split in ('train', 'test'):
        np.savez(tmp_path / f'{split}.npz', **arrays(**changes))
    monkeypatch.setattr(sources, 'load', None)
    config = tiny_config(data__source=f'npz:{tmp_path}', data__train_images=60, finetune__batch_size=20)
    config.data.update(groups='writer', train_groups=30)
    config.dp.update(unit='group', images_per_group=2)
    config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match=text):
        pipeline.run(config, tmp_path / 'run', 'plan')


def test_class_moments_that_no_training_uses_are_warned_of(quick_config, tmp_path, capsys):
    config = quick_config(moments__enabled=True, moments__frequencies=4)
    pipeline.run(config, tmp_path / 'run', 'plan')
    assert 'no training uses the answer: pretrain.moments_steps is 0' in capsys.readouterr().out
