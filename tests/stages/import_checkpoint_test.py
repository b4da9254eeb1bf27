"""A run that begins with a checkpoint of the PyTorch implementation, and the privacy that is declared."""

import argparse
import json
import re
import sys

import jax
import numpy as np
import pytest

from dpp_jax import build, files, library, pipeline, settings, status
from dpp_jax.configs import mnist_28
from dpp_jax.interop import pytorch
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts, composition, statement, statement_text
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.keys import why_not_private
from dpp_jax.stages import import_checkpoint
from dpp_jax.stages import plan as plan_stage
from dpp_jax.training import checkpoint
from dpp_jax.training.state import FlatParams

torch = pytest.importorskip('torch')
STEP = 17


def fresh(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape).astype(np.float32), model.shapes())


@pytest.fixture(scope='module')
def theirs(tiny_model, tmp_path_factory):
    """A checkpoint of the tiny network: its path and its weights."""
    weights = {'params': fresh(tiny_model, 0), 'ema_params': fresh(tiny_model, 1)}
    path = tmp_path_factory.mktemp('theirs') / 'theirs.pth'
    pytorch.write_checkpoint(path, **weights, step=STEP, model=tiny_model)
    return path, weights


@pytest.fixture
def importing(tiny_config, theirs):
    """A function that returns a tiny config which imports that checkpoint."""

    def make(kind='pretrained', **changes):
        return tiny_config(**{'imported__path': str(theirs[0]), 'imported__kind': kind, **changes})

    return make


def rows(workdir):
    told = json.loads(workdir.statement.read_text())
    return {row['mechanism']: row['declared'] for row in told['mechanisms']}


def test_a_pretrained_model_is_fine_tuned_and_sampled_and_its_query_is_declared(
    importing, theirs, tiny_model, tmp_path, capsys
):
    config, workdir = importing(finetune__snapshots=1), WorkDir(tmp_path)
    pipeline.run(config, tmp_path, 'import')
    told = capsys.readouterr().out
    declared = f'You declare: +query.kind = mean, query.noise_multiplier = {config.query.noise_multiplier}, '
    assert re.search(declared, told) and 'imported.noise_multiplier' not in told
    assert rows(workdir) == {'central_query': True}
    assert not workdir.keys.exists() and not workdir.central_images.exists()
    saved = artefacts.weights(workdir, 'pretrain', tiny_model.shapes())
    jax.tree.map(np.testing.assert_array_equal, saved, theirs[1])
    assert status.read(tmp_path)['next'] == 'finetune'
    pipeline.run(config, tmp_path, 'finetune')
    # From the weights, not from their average.
    first = files.read_npz(artefacts.snapshots(workdir)[0], '')['vector']
    np.testing.assert_array_equal(first, FlatParams.of(theirs[1]['params']).vector)
    capsys.readouterr()
    for stage in ('generate', 'report'):
        pipeline.run(config, tmp_path, stage)
    told = capsys.readouterr().out  # the report's table
    assert 'declared: central images (query)' in told
    assert re.search(r'total \(from the ledger\) .*δ = .*, as declared', told)
    ledger = Ledger(workdir.released_ledger)
    assert {(entry.mechanism, entry.declared) for entry in ledger.entries} == {
        ('central_query', True),
        ('dp_sgd', False),
    }
    assert ledger.count('central_query') == config.query.queries
    assert rows(workdir) == {'central_query': True, 'dp_sgd': False}
    for text in (workdir.statement_text, workdir.release_page, workdir.report_page):
        told = text.read_text(encoding='utf-8')
        assert 'declared: central images (query)' in told and 'cannot vouch' in told
        assert 'divides the noisy sums of its query' in told
    for text in (workdir.card, workdir.release_page):
        assert 'imported from a checkpoint' in text.read_text(encoding='utf-8')
    assert 'what the owner of the imported checkpoint declares' in workdir.card.read_text(encoding='utf-8')
    assert str(theirs[0].parent) not in workdir.config.read_text()
    found = status.read(tmp_path)
    assert 'central' not in found['stages'] and found['stages']['import'] == {'state': 'done'}
    assert 'central_query 2 of 2 (declared)' in status.text(found)


def test_a_finetuned_model_is_only_sampled_and_everything_is_declared(
    importing, theirs, tiny_model, tmp_path, capsys
):
    config, workdir = importing('finetuned', imported__noise_multiplier=3.0), WorkDir(tmp_path)
    for stage in ('import', 'generate'):
        pipeline.run(config, tmp_path, stage)
    told = capsys.readouterr().out
    assert f'config.imported.path says {STEP} updates; 23 are declared (finetune.epochs).' in told
    assert 'imported.noise_multiplier = 3.0, finetune.batch_size = ' in told
    # A seed makes nothing here repeatable but the images; files and statement say the same of it.
    assert not json.loads(workdir.statement.read_text())['private']
    saved = artefacts.weights(workdir, 'finetune', tiny_model.shapes())
    jax.tree.map(np.testing.assert_array_equal, saved, theirs[1])
    assert rows(workdir) == {'central_query': True, 'dp_sgd': True}
    assert Ledger(workdir.ledger).count('dp_sgd') == 23
    assert not {'central_query', 'dp_sgd'} & json.loads(workdir.keys.read_text()).keys()
    assert repr(library.load(tmp_path)).endswith(', as declared>')
    assert library.load(tmp_path).privacy.declared == statement_text.DECLARED
    assert 'NOT PRIVATE: the keys of a run' in composition.text(str(tmp_path))
    pipeline.run(config, tmp_path, 'plan')
    told = capsys.readouterr().out
    assert 'would run      evaluate, report' in told
    assert re.search(r'declared: fine-tuning \(DP-SGD\) +3.0000', told) and '\nstep ' not in told
    with pytest.raises(ValueError, match='--stage=finetune is no stage of this run: config.imported.path'):
        pipeline.run(config, tmp_path, 'finetune')


def test_a_model_that_saw_no_private_image_declares_nothing_but_that(importing, tiny_model, tmp_path):
    config, workdir = importing('public'), WorkDir(tmp_path)
    pipeline.run(config, tmp_path, 'import')
    assert workdir.model('pretrain').exists() and statement.exists(workdir)
    told = json.loads(workdir.statement.read_text())
    assert told['epsilon'] == 0 and told['mechanisms'] == []
    assert 'ε = 0.0000' in workdir.statement_text.read_text(encoding='utf-8')
    assert told['declared'] == statement_text.DECLARED_PUBLIC
    assert 'trained without the private images, as declared' in status.text(status.read(tmp_path))
    assert statement_text.DECLARED_PUBLIC in composition.text(str(tmp_path))
    plan = build.plan(config, tiny_model)
    assert [part.mechanism.name for part in plan.budget.releases] == ['dp_sgd']
    assert 'it spends nothing, as declared' in plan_stage.text(config, plan)
    told = plan_stage._statement(config, plan)
    assert told['declared'] == statement_text.DECLARED_PUBLIC
    assert 'If what is declared below is true' in statement_text.markdown(told)
    assert not told['mechanisms'][0]['declared']


def test_a_ledger_that_is_lost_with_its_statement_is_missed(importing, tmp_path):
    config, workdir = importing(), WorkDir(tmp_path)
    pipeline.run(config, tmp_path, 'import')
    for path in (workdir.own_ledger, workdir.released_ledger, workdir.statement, workdir.statement_text):
        path.unlink()
    with pytest.raises(ValueError, match='has 0 entries of central_query, but 2 releases were made'):
        pipeline.run(config, tmp_path, 'finetune')
    # Nor does the condition of the statement depend on it.
    plan = build.plan(config, build.model(config))
    told = statement.of_ledger(workdir, Ledger(tmp_path / 'none'), plan.budget, kind='pretrained')
    assert told['declared'] == statement_text.DECLARED


class Killed(BaseException):
    """The process is gone: nothing catches this."""


def content(workdir):
    """Bytes of what a run leaves in release/, without the versions of the code."""
    return {path: (workdir.release / path).read_bytes() for path in ('ledger.jsonl', 'digests.json')} | {
        'statement': json.loads(workdir.statement.read_text())['mechanisms'],
        'weights': [path.read_bytes() for path in sorted(workdir.model('pretrain').rglob('0.0'))],
    }


def test_an_import_that_is_killed_anywhere_ends_like_an_undisturbed_one(
    importing, tiny_model, theirs, tmp_path, monkeypatch
):
    config, workdir = importing(), WorkDir(tmp_path / 'killed')
    pipeline.run(config, tmp_path / 'whole', 'import')

    def die(*_, **__):
        raise Killed

    def die_in_the_middle(ledger, entries, extend=Ledger.extend):
        extend(ledger, list(entries)[:1])
        raise Killed

    for module, name, death in (
        (WorkDir, 'record', die),
        (Ledger, 'extend', die_in_the_middle),
        (statement, 'write', die),
        (checkpoint, 'save_model', die),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, death)
            pipeline.run(config, workdir.root, 'import')
        assert not workdir.model('pretrain').exists()
    # Not another checkpoint in its place: what was noted is of this one.
    other = tmp_path / 'other.pth'
    pytorch.write_checkpoint(
        other, params=fresh(tiny_model, 2), ema_params=fresh(tiny_model, 2), step=0, model=tiny_model
    )
    kept = theirs[0].read_bytes()
    theirs[0].write_bytes(other.read_bytes())
    try:
        with pytest.raises(ValueError, match='whose weights are not those that .* was begun with'):
            pipeline.run(config, workdir.root, 'import')
    finally:
        theirs[0].write_bytes(kept)
    pipeline.run(config, workdir.root, 'import')
    assert content(workdir) == content(WorkDir(tmp_path / 'whole'))
    theirs[0].rename(theirs[0].with_name('moved'))
    try:
        pipeline.run(config, workdir.root, 'import')  # done: the file is not needed any more
    finally:
        theirs[0].with_name('moved').rename(theirs[0])


def test_stages_that_it_takes_the_place_of_do_not_run_and_later_ones_wait(importing, tiny_config, tmp_path):
    for stage in ('central', 'pretrain'):
        with pytest.raises(ValueError, match=f'--stage={stage} is no stage of this run'):
            pipeline.run(importing(), tmp_path, stage)
    with pytest.raises(ValueError, match='--stage=finetune needs the output of --stage=import'):
        pipeline.run(importing(), tmp_path, 'finetune')
    with pytest.raises(ValueError, match="config.imported.path is ''; it must name a checkpoint"):
        pipeline.run(tiny_config(), tmp_path, 'import')


def test_a_folder_that_was_begun_without_it_is_refused(importing, tiny_config, tmp_path):
    workdir = WorkDir(tmp_path)
    with workdir.opened():
        workdir.record(flatten(tiny_config().to_dict()))
    for stage in ('import', 'all'):
        with pytest.raises(ValueError, match='config.imported.kind:  there, pretrained now'):
            pipeline.run(importing(), tmp_path, stage)
    assert not workdir.model('pretrain').exists()


@pytest.mark.parametrize(
    'kind, changes, told',
    [
        (
            'pretrained',
            {'query__noise_multiplier': 0.3},
            'config.dp.epsilon is 10; it must be above 30.* declared',
        ),
        (
            'finetuned',
            {'imported__noise_multiplier': 0.3},
            'config.imported.noise_multiplier is 0.3: with it',
        ),
    ],
)
def test_what_is_declared_beyond_the_budget_is_refused_before_anything_is_written(
    importing, tmp_path, kind, changes, told
):
    with pytest.raises(ValueError, match=told):
        pipeline.run(importing(kind, **changes), tmp_path, 'import')
    assert not [path for path in (tmp_path / 'release').rglob('*') if path.is_file()]


def pickled(path, weights, model):
    named = {name: torch.tensor(a) for name, a in pytorch.params_to_pytorch(weights['params'], model).items()}
    torch.save({'model': named, 'more': argparse.Namespace(a=1)}, path)


def without_average(path, weights, model):
    named = {name: torch.tensor(a) for name, a in pytorch.params_to_pytorch(weights['params'], model).items()}
    torch.save({'model': named, 'ema': {'decay': 0.9}, 'step': 1}, path)


def not_finite(path, weights, model):
    params = jax.tree.map(np.copy, weights['params'])
    params['conv_in']['bias'][0] = np.nan
    pytorch.write_checkpoint(path, params=params, ema_params=params, step=1, model=model)


@pytest.mark.parametrize(
    'write, told',
    [
        (lambda *_: None, 'which is no file'),
        (lambda path, *_: path.write_bytes(b'no checkpoint'), 'is no file of torch.save'),
        (pickled, 'would run code when it is read.*--config.import.trust=True'),
        (without_average, "'ema' has no list 'shadow_params'"),
        (not_finite, 'has weights that are not finite'),
    ],
    ids=['missing', 'another kind', 'code', 'no average', 'not finite'],
)
def test_a_file_that_cannot_be_imported_is_refused_before_a_folder_is_made(
    importing, theirs, tiny_model, tmp_path, write, told
):
    config = importing()
    config.imported.path = str(tmp_path / 'bad.pth')
    write(tmp_path / 'bad.pth', theirs[1], tiny_model)
    with pytest.raises((ValueError, FileNotFoundError), match=f'^config.imported.path.*{told}'):
        pipeline.run(config, tmp_path / 'run', 'import')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('suffix', pytorch.SUFFIXES)
def test_a_file_that_says_that_it_is_not_private_serves_runs_with_a_seed_alone(
    importing, theirs, tiny_model, tmp_path, suffix
):
    path, note = tmp_path / f'ours{suffix}', f'{files.NOT_PRIVATE}: {why_not_private(1)}'
    pytorch.write_checkpoint(path, **theirs[1], step=1, model=tiny_model, note=note)
    config = importing(imported__path=str(path), seed=None)
    with pytest.raises(ValueError, match='^config.imported.path: .*ours.* "NOT PRIVATE: .*config.seed = 1'):
        import_checkpoint.read(config, tiny_model)
    config.seed = 2
    assert import_checkpoint.read(config, tiny_model)['note'] == note


def test_more_updates_than_are_declared_are_refused(importing, tiny_model):
    config = importing('finetuned', imported__noise_multiplier=3.0, finetune__epochs=0.5)
    with pytest.raises(ValueError, match='finetune.epochs is 0.5, .* it must be at least .*') as refused:
        import_checkpoint.read(config, tiny_model)
    config.finetune.epochs = float(re.search('at least ([0-9.]+)', str(refused.value))[1])
    assert build.plan(config, tiny_model).budget.count('dp_sgd') == STEP
    import_checkpoint.read(config, tiny_model)


def test_a_checkpoint_of_another_network_and_a_missing_library_are_told(importing, monkeypatch):
    config = importing(model__width=16)
    with pytest.raises(ValueError, match='config.imported.path: .*has shape .* do not belong|do not belong'):
        import_checkpoint.read(config, build.model(config))
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match=r'config.imported.path: .*pip install .dpp_jax\[pytorch\]'):
        import_checkpoint.read(config, build.model(config))


@pytest.mark.parametrize(
    'changes, told',
    [
        (
            {'imported__kind': ''},
            "imported.kind is ''; it must be 'public' .* or 'pretrained' .* or 'finetuned'",
        ),
        ({'imported__path': ''}, "imported.kind is 'pretrained'; it must be '', because imported.path is ''"),
        ({'pretrain__enabled': False}, "'public' or 'finetuned', because pretrain.enabled is False"),
        ({'imported__kind': 'finetuned'}, 'imported.noise_multiplier is not set; it must be the noise'),
        ({'imported__noise_multiplier': 2.0}, 'imported.noise_multiplier is 2.0; it must be left out'),
        ({'query__epsilon_share': 0.1}, 'query.epsilon_share is 0.1; it must be not set'),
        (
            {'generate__class_counts': 'query', 'query__class_counts': 'noisy'},
            'no query releases counts here',
        ),
        (
            {'generate__moments_share': 0.3, 'moments__enabled': True},
            '(?s)moments.enabled is True; .*\nconfig.generate.moments_share is 0.3; it must be 0, because '
            'imported.path has a model',
        ),
        (
            {
                'dp__unit': 'group',
                'dp__images_per_group': 2,
                'data__groups': 'owner',
                'data__train_groups': 20,
            },
            "dp.unit is 'group'; it must be 'image', because imported.kind is 'pretrained'",
        ),
        (
            {'imported__path': 'gs://bucket/theirs.pth'},
            "imported.path is 'gs://bucket/theirs.pth'; it must be the path of a file on this machine",
        ),
        ({'export__path': 'ours.bin'}, "export.path is 'ours.bin'; it must be a path that ends in .pth or"),
    ],
)
def test_what_is_declared_must_be_said_and_only_where_it_is_used(importing, changes, told):
    with pytest.raises(ValueError, match=told):
        settings.check(importing(**changes))


def test_what_is_declared_is_never_derived_from_the_images(importing):
    unset = ('query.noise_multiplier', 'query.downsample', 'finetune.epochs')
    with pytest.raises(ValueError, match='config.query.noise_multiplier is not set; .*declares') as refused:
        settings.check(importing(), unset)
    assert 'downsample' not in str(refused.value) and 'finetune' not in str(refused.value)
    settings.check(importing('public'), unset)


def test_the_checkpoint_of_the_pytorch_code_goes_in_and_out_unchanged(golden_file, tmp_path):
    source = golden_file('mnist_28_nf16.pth')
    config = mnist_28.get_config('1')
    config.model.width = 16
    config.imported.update(path=str(source), kind='pretrained')
    config.finetune.epochs = 1.0  # sooner planned
    pipeline.run(config, tmp_path / 'run', 'import')
    for name in ('first.pth', 'second.safetensors'):
        config.export.path = str(tmp_path / name)
        pipeline.run(config, tmp_path / 'run', 'export')
    model = build.model(config)
    original, again = (torch.load(path, weights_only=True) for path in (source, tmp_path / 'first.pth'))
    assert list(again) == list(original) and list(again['model']) == list(original['model'])
    averages = [checkpoint['ema']['shadow_params'] for checkpoint in (original, again)]
    for old, new in [*zip(original['model'].values(), again['model'].values()), *zip(*averages, strict=True)]:
        assert old.dtype == new.dtype and torch.equal(old, new)
    assert again['step'] == original['step'] == again['ema']['num_updates']
    found = [pytorch.read_checkpoint(path, model) for path in (source, tmp_path / 'second.safetensors')]
    jax.tree.map(np.testing.assert_array_equal, *found)
