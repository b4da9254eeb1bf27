"""The pipeline from beginning to end."""

import copy
import errno
import json
import re
import shutil
import signal

import jax
import numpy as np
from PIL import Image
import pytest

from dpp_jax import files, pipeline
from dpp_jax.privacy import accounting
from dpp_jax.privacy import budget as budget_lib
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.stages import generate
from dpp_jax.training import checkpoint, loop, preemption, progress

STEPS = 23  # of the tiny config's fine-tuning


@pytest.fixture(scope='module')
def run(finished_run):
    return finished_run[:2]


def test_every_stage_is_done_and_a_second_run_computes_nothing(run, gate, compilations, capsys):
    config, workdir = run
    assert all(gate(config, workdir).done.values())
    before = compilations.count
    pipeline.run(config, workdir.root, 'all')
    assert compilations.count == before
    assert 'Everything is done' in capsys.readouterr().out


def test_ledger_recomputes_the_epsilon_of_the_plan(run):
    config, workdir = run
    ledger = ledger_lib.Ledger(workdir.ledger)
    planned = json.loads(workdir.plan.read_text())
    assert ledger.count('central_query') == config.query.queries
    assert ledger.count('dp_sgd') == planned['steps']
    spent = epsilon(ledger, config.dp.delta)
    assert spent == pytest.approx(planned['epsilon_total'], rel=1e-6)
    assert spent <= config.dp.epsilon


def epsilon(ledger, delta, accountant='rdp'):
    return accounting.epsilon(budget_lib.total_event(budget_lib.group(ledger.entries)), delta, accountant)


def test_synthetic_images_are_balanced_uint8_with_their_pictures(run):
    config, workdir = run
    synthetic = artefacts.SyntheticImages(workdir, flatten(config.to_dict()))
    assert set(synthetic.paths) == {'images', 'classifier_images'}
    for path in synthetic.paths.values():
        with np.load(path) as data:
            images, labels = data['images'], data['labels']
        assert images.shape == (40, 8, 8, 1) and images.dtype == np.uint8
        assert np.all(np.bincount(labels, minlength=10) == 4)
        assert images.std() > 1
        assert Image.open(path.with_suffix('.png')).size[0] > 100
    tree = sorted((workdir.synthetic / 'png').rglob('*.png'))
    assert len(tree) == 40
    with np.load(synthetic.paths['images']) as data:
        number = int(tree[-1].stem)
        np.testing.assert_array_equal(np.asarray(Image.open(tree[-1])), data['images'][number, ..., 0])
        assert data['labels'][number] == int(tree[-1].parent.name)


def test_what_looks_at_private_images_lies_in_private(run):
    _, workdir = run
    private = {str(p.relative_to(workdir.private)) for p in workdir.private.rglob('*')}
    assert {'evaluation.json', 'report.html', 'keys.json', 'metrics/finetune'} <= private
    text = ''.join(p.read_text() for p in workdir.release.glob('*.json*'))
    settings = ('evaluate.fid', '"fid_of_class"')
    assert 'fid' not in re.sub('|'.join(settings), '', text) and '"loss"' not in text
    keys = json.loads(workdir.keys.read_text())
    assert not any(keys[part]['noise'] in text for part in keys if not part.startswith('_'))
    results = json.loads(workdir.evaluation.read_text())
    assert set(results['accuracy']) == {'logistic', 'mlp'} and results['fid'] > 0
    report = workdir.report_text.read_text()
    assert 'small CNN' in report and 'NOT PRIVATE' in report and 'δ = 0.0001' in report


def test_metrics_are_tensorboard_events(run):
    from tensorflow.python.summary.summary_iterator import summary_iterator

    _, workdir = run
    paths = workdir.metrics('finetune').glob('events*')
    events = [event for path in paths for event in summary_iterator(str(path))]
    tags = {value.tag for event in events for value in event.summary.value}
    assert {'loss', 'gradient_norm', 'clipped_share', 'batch_size'} <= tags


def final_files(workdir):
    """Bytes or arrays of everything that a run must end with."""
    with np.load(workdir.synthetic / 'images.npz') as data:
        images = data['images']
    return images, workdir.ledger.read_text()


def test_a_run_stopped_anywhere_ends_like_an_uninterrupted_one(run, tiny_config, tmp_path, monkeypatch):
    """Stopped in the query, in fine-tuning and between two batches of images."""
    config, reference = run
    root = WorkDir(tmp_path)

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
    with pytest.raises(
        ValueError, match='--stage=generate needs the output of --stage=central, which is missing'
    ):
        pipeline.run(tiny_config(), tmp_path, 'generate')


def test_lost_keys_are_refused_because_new_ones_would_spend_twice(tiny_config, tmp_path):
    config = tiny_config()
    config.seed = None
    workdir = WorkDir(tmp_path)
    pipeline.run(config, tmp_path, 'central')
    images = workdir.central_images
    with np.load(images) as data:
        first = data['images']
    ledger = workdir.ledger.read_text()
    images.unlink()
    pipeline.run(config, tmp_path, 'central')  # with its keys it makes the same release again
    with np.load(images) as data:
        np.testing.assert_array_equal(data['images'], first)
    images.unlink()
    workdir.keys.unlink()
    with pytest.raises(ValueError, match='spend its budget a second time'):
        pipeline.run(config, tmp_path, 'central')
    assert workdir.ledger.read_text() == ledger


def ledger_of(workdir):
    return workdir.ledger.read_text() if workdir.ledger.exists() else ''


@pytest.mark.parametrize('place', ['release/model/pretrain', 'release/model/finetune', 'resume'])
def test_a_checkpoint_of_another_network_is_refused_before_the_query(run, tiny_config, tmp_path, place):
    """Also one of a later stage: by then the query would have been paid for."""
    _, reference = run
    source = reference.root / place
    if place == 'resume':
        place = 'private/resume/finetune'
        source = reference.root / place
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(source.absolute())
    config = tiny_config(model__blocks=2)
    stage = 'central' if place.endswith('model/finetune') else 'all'
    with pytest.raises(ValueError, match='another network'):
        pipeline.run(config, tmp_path, stage)
    assert not ledger_of(WorkDir(tmp_path))


def copy_of(workdir, folder):
    """The work directory of another run, to be tampered with."""
    shutil.copytree(workdir.root, folder, dirs_exist_ok=True)
    return WorkDir(folder)


@pytest.mark.parametrize(
    'tamper, text',
    [
        (lambda w: both(w, lambda path: path.unlink()), 'has 0 entries of central_query, but 2 releases'),
        (
            lambda w: both(w, lambda path: edit(path, without_last_line)),
            f'has {STEPS - 1} entries of dp_sgd, but the privacy statement counts {STEPS} releases',
        ),
        (
            lambda w: edit(w.own_ledger, without_last_line),
            'private/ledger.jsonl does not begin with the entries of .*release/ledger.jsonl',
        ),
        (
            lambda w: edit(w.released_ledger, without_last_line),
            f'release/ledger.jsonl has {STEPS - 1} entries of dp_sgd, .* delete it .* written again',
        ),
        *(
            (
                lambda w, name=name: edit(
                    getattr(w, name), lambda t: t.replace('1.0, "sens', '0.9, "sens', 1)
                ),
                'line 1 of .*not a ledger entry',
            )
            for name in ('own_ledger', 'released_ledger')
        ),
        (lambda w: edit_plan(w, noise_multiplier=0.4), 'noise_multiplier = 0.4, which spends'),
        (lambda w: edit_plan(w, noise_multiplier=20.0), 'which the plan does not have'),
        (lambda w: edit_plan(w, steps=99), f'steps = 99; this config gives {STEPS}'),
        (lambda w: edit_plan(w, delta=1e-3), 'delta = 0.001; this config gives 0.0001'),
        (
            lambda w: edit(w.plan, lambda t: t.replace('"steps"', '"step"')),
            'not a valid plan .it has no steps',
        ),
    ],
    ids=[
        'deleted',
        'cut',
        'cut in private',
        'cut in release',
        'edited',
        'edited in release',
        'less noise',
        'more noise',
        'more steps',
        'larger delta',
        'no steps',
    ],
)
def test_a_ledger_or_plan_that_no_longer_fits_is_refused(run, tmp_path, tamper, text):
    config, reference = run
    workdir = copy_of(reference, tmp_path)
    tamper(workdir)
    before = {path for path in tmp_path.rglob('*')}
    for stage in ('plan', 'all', 'clean'):  # where everything is done, too
        with pytest.raises(ValueError, match=text):
            pipeline.run(config, tmp_path, stage)
    assert {path for path in tmp_path.rglob('*')} - before <= {tmp_path / '.lock'}


def both(workdir, change):
    for path in (workdir.own_ledger, workdir.released_ledger):
        change(path)


def without_last_line(text):
    return ''.join(text.splitlines(True)[:-1])


def edit(path, change):
    old = path.read_text()
    path.write_text(change(old))
    assert path.read_text() != old


def edit_plan(workdir, **changes):
    edit(workdir.plan, lambda text: json.dumps({**json.loads(text), **changes}))


def test_a_plan_is_shown_beside_a_run_that_works(run, gate, tmp_path, monkeypatch):
    """Whenever a checkpoint is looked for, another process took one more step, and recorded it before."""
    config, reference = run
    workdir = copy_of(reference, tmp_path)
    shutil.rmtree(workdir.model('finetune'))
    workdir.statement.unlink()  # it covers all steps
    workdir.released_ledger.unlink()
    lines, latest, steps = workdir.ledger.read_text().splitlines(True), checkpoint.latest_training, [10]

    def look(folder):
        step, saved = latest(folder)
        if folder != workdir.checkpoints('finetune'):
            return step, saved
        steps[0] += 1
        workdir.own_ledger.write_text(''.join(lines[: config.query.queries + steps[0]]))
        return steps[0], saved

    monkeypatch.setattr(checkpoint, 'latest_training', look)
    found = gate(config, workdir)
    assert not found.done['finetune'] and 10 < steps[0] == found.ledger.count('dp_sgd') < STEPS


def test_report_is_made_again_when_the_evaluation_is_newer(run, gate, tmp_path):
    config, reference = run
    workdir = copy_of(reference, tmp_path)
    results = json.loads(workdir.evaluation.read_text())
    files.write_json(workdir.evaluation, {**results, 'fid': 123.4})
    assert not gate(config, workdir).done['report']
    pipeline.run(config, tmp_path, 'all')
    assert '123.40' in workdir.report_text.read_text()


@pytest.mark.parametrize('stage', ['central', 'finetune'])
def test_nothing_is_released_before_its_statement(run, tmp_path, stage, monkeypatch):
    """A crash right after the release must not leave a statement that knows nothing of it."""
    config, reference = run
    workdir = copy_of(reference, tmp_path)
    workdir.statement.unlink()
    workdir.statement_text.unlink()
    if stage == 'central':
        workdir.central_images.unlink()
    else:
        shutil.rmtree(workdir.model('finetune'))
    counts, write_npz, save_model = [], files.write_npz, checkpoint.save_model

    def look(save):
        def then_save(path, *arguments, **named):
            statement = json.loads(workdir.statement.read_text())
            counts.append([row['count'] for row in statement['mechanisms']])
            save(path, *arguments, **named)

        return then_save

    monkeypatch.setattr(files, 'write_npz', look(write_npz))
    monkeypatch.setattr(checkpoint, 'save_model', look(save_model))
    pipeline.run(config, tmp_path, stage)
    assert counts == [[config.query.queries, STEPS]]


def test_statement_says_what_was_spent_and_that_a_seeded_run_is_not_private(run):
    config, workdir = run
    statement = json.loads(workdir.statement.read_text())
    ledger = ledger_lib.Ledger(workdir.ledger)
    assert statement['epsilon'] == pytest.approx(epsilon(ledger, 1e-4)) and statement['delta'] == 1e-4
    assert statement['epsilon_by_accountant']['pld'] == pytest.approx(epsilon(ledger, 1e-4, 'pld'))
    query, steps = statement['mechanisms']
    assert (query['count'], query['noise_multiplier'], query['sensitivity']) == (2, 4.0, 2.8)
    assert (steps['count'], steps['sampling_probability']) == (STEPS, pytest.approx(1 / STEPS))
    assert statement['private'] is False
    assert set(statement['code_of_stages']) == {'central', 'pretrain', 'finetune', 'generate'}
    text = workdir.statement_text.read_text()
    assert 'THIS RUN IS NOT PRIVATE' in text and 'zero-out' in text and 'By replace one' in text


# --- Pre-training again with other settings


def test_pretraining_may_change_until_dp_sgd_begins(quick_config, tmp_path, capsys, gate):
    """Post-processing: the same central images, nothing of the old one in the new one, nothing spent."""
    first, second = quick_config(), quick_config(pretrain__epochs=6, pretrain__learning_rate=0.5)
    for stage in ('central', 'pretrain'):
        pipeline.run(first, tmp_path, stage)
    workdir = WorkDir(tmp_path)
    before = {path: path.read_bytes() for path in (workdir.central_images, workdir.ledger, workdir.keys)}
    old_metrics = [path.name for path in workdir.metrics('pretrain').iterdir()]
    capsys.readouterr()
    pipeline.run(second, tmp_path, 'plan')
    assert 'would run      pretrain, finetune' in capsys.readouterr().out
    assert workdir.model('pretrain').exists(), 'plan moves nothing'
    pipeline.run(second, tmp_path, 'pretrain')
    told = capsys.readouterr().out
    assert 'Pre-training begins again' in told and 'config.pretrain.epochs: 4 there, 6 now' in told
    assert {path: path.read_bytes() for path in before} == before
    aside = workdir.private / 'earlier' / 'pretrain_1'
    assert [path.name for path in (aside / 'metrics').iterdir()] == old_metrics
    assert (aside / 'model').exists() and (aside / 'resume').exists()
    plan, steps = json.loads(workdir.plan.read_text()), 12
    assert plan['pretrain_steps'] == checkpoint.latest_training(workdir.checkpoints('pretrain'))[0] == steps
    assert json.loads(workdir.config.read_text())['pretrain.epochs'] == 6
    with pytest.raises(ValueError, match='belongs to another config'):
        pipeline.run(quick_config(pretrain__enabled=False), tmp_path, 'all')
    pipeline.run(second, tmp_path, 'finetune')
    assert gate(second, workdir).done['finetune']


def test_where_dp_sgd_began_pretraining_is_fixed(run, tmp_path):
    """By whatever tells it: the ledger, a checkpoint, or the model."""
    config, reference = run
    workdir = copy_of(reference, tmp_path)
    changed = copy.deepcopy(config)
    changed.pretrain.epochs = 6

    def refused():
        with pytest.raises(ValueError, match='config.pretrain.epochs: 4 there, 6 now'):
            pipeline.run(changed, tmp_path, 'pretrain')

    refused()
    shutil.rmtree(workdir.model('finetune'))
    refused()
    shutil.rmtree(workdir.private / 'resume')
    refused()


def test_a_pretraining_that_diverges_says_that_the_same_folder_goes_on(quick_config, tmp_path, monkeypatch):
    pipeline.run(quick_config(), tmp_path, 'central')
    monkeypatch.setattr(np, 'isfinite', lambda leaf: np.zeros(1, bool))
    with pytest.raises(loop.Diverged, match='give the same command, with the same --workdir') as told:
        pipeline.run(quick_config(pretrain__epochs=1), tmp_path, 'pretrain')
    assert 'config.pretrain.learning_rate' in str(told.value) and 'another --workdir' not in str(told.value)


def test_other_private_images_are_refused_when_a_run_goes_on(quick_config, tmp_path):
    rng = np.random.default_rng(0)
    images = {'images': rng.integers(0, 256, (60, 8, 8, 1), np.uint8), 'labels': np.arange(60) % 10}
    folder = tmp_path / 'data'
    folder.mkdir()
    for split in ('train', 'test'):
        np.savez(folder / f'{split}.npz', **images)
    config = quick_config(data__source=f'npz:{folder}', data__train_images=60)
    config.finetune.batch_size = 20
    pipeline.run(config, tmp_path / 'run', 'central')
    spent = ledger_of(WorkDir(tmp_path / 'run'))
    images['images'][5, 3, 3, 0] ^= 1
    np.savez(folder / 'train.npz', **images)
    pipeline.run(config, tmp_path / 'run', 'pretrain')  # reads no private image
    with pytest.raises(ValueError, match='fingerprint differs'):
        pipeline.run(config, tmp_path / 'run', 'finetune')
    assert ledger_of(WorkDir(tmp_path / 'run')) == spent


def test_a_plan_is_shown_where_its_picture_cannot_be_written(tiny_config, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(files, 'write_bytes', refuse)
    (tmp_path / 'run').mkdir()
    pipeline.run(tiny_config(), tmp_path / 'run', 'plan')
    told = capsys.readouterr()
    assert 'Privacy statement of this plan' in told.out
    assert f'{tmp_path}/run/plan.png was not drawn' in told.err and 'Read-only' in told.err


def test_a_refused_command_leaves_the_folder_to_the_corrected_one(tiny_config, tmp_path):
    for change in ({'query__noise_multiplier': 0.3}, {'data__train_images': 1400}):
        with pytest.raises(ValueError):
            pipeline.run(tiny_config(**change), tmp_path, 'all')
    pipeline.run(tiny_config(), tmp_path, 'central')


def test_plan_of_a_run_is_the_one_it_follows(run, tiny_config, tmp_path, capsys):
    config, reference = run
    with pytest.raises(ValueError, match='belongs to another config'):
        pipeline.run(tiny_config(finetune__epochs=2), reference.root, 'plan')
    pipeline.run(config, reference.root, 'plan')
    assert 'nothing: everything is done' in capsys.readouterr().out
    workdir = WorkDir(tmp_path)
    workdir.release.mkdir()
    for path in (reference.config, reference.plan):
        shutil.copy(path, workdir.release)
    edit_plan(workdir, noise_multiplier=7.654321)
    pipeline.run(config, tmp_path, 'plan')
    assert '7.6543' in capsys.readouterr().out
    with Image.open(tmp_path / 'plan.png') as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize(
    'change, error, text',
    [
        ({'data__train_images': 1400}, ValueError, 'train_images is 1400; it must be 1437'),
        ({'data__source': 'digitz'}, ValueError, 'digitz'),
        ({'data__source': 'idx:nowhere'}, FileNotFoundError, 'nowhere'),
        (
            {'data__image_size': 16},
            ValueError,
            'must have the shape .16, 16, 1.. The private images of digits',
        ),
        ({'data__classes': 9}, ValueError, r'label.*9'),
    ],
)
def test_bad_data_is_refused_before_any_privacy_is_spent(tiny_config, tmp_path, change, error, text):
    config = tiny_config(**change)
    if config.data.image_size == 16:
        config.model.attention_resolutions = (16,)
    with pytest.raises(error, match=text):
        pipeline.run(config, tmp_path, 'all')
    assert not ledger_of(WorkDir(tmp_path))


def test_what_is_at_once_is_settled_by_a_training_and_not_before(tiny_config, tmp_path):
    """The query alone says nothing about how long the trainings are that follow."""
    pipeline.run(tiny_config(), tmp_path, 'central')
    assert not WorkDir(tmp_path).sizes.exists()


def test_64_bits_are_refused_before_anything_is_made(tiny_config, tmp_path):
    jax.config.update('jax_enable_x64', True)
    try:
        with pytest.raises(ValueError, match='JAX_ENABLE_X64 is on; it must be off'):
            pipeline.run(tiny_config(), tmp_path / 'run', 'all')
    finally:
        jax.config.update('jax_enable_x64', False)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('stage', ['generate', 'evaluate'])
def test_a_stage_stops_where_it_is_asked_to_and_goes_on_later(copied_run, gate, monkeypatch, stage):
    """The trainings look by themselves; of the other stages the progress bars do."""
    config, workdir = copied_run
    lost = {'generate': workdir.synthetic, 'evaluate': workdir.evaluation}[stage]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with monkeypatch.context() as patches, pytest.raises(preemption.Interrupted):

        def asked_to_stop(*arguments, bar=progress.bar, **settings):
            patches.setattr(preemption, '_requests', [signal.SIGTERM])
            return bar(*arguments, **settings)

        patches.setattr(progress, 'bar', asked_to_stop)
        pipeline.run(config, workdir.root, stage)
    assert not gate(config, workdir).done[stage]
    pipeline.run(config, workdir.root, stage)
    assert gate(config, workdir).done[stage]
