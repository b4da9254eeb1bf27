"""Private images select among classifiers: once, with noise, within the budget, and the same after a kill."""

import json
import shutil

import numpy as np
import pytest

from dpp_jax import build, pipeline
from dpp_jax.privacy.budget import SELECTION
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir


@pytest.fixture(scope='module')
def config(quick_config):
    changed = quick_config(evaluate__selection='private_noisy', evaluate__seeds=2)
    changed.evaluate.update(fid=False, real_images=False)
    return changed


@pytest.fixture(scope='module')
def generated(config, tmp_path_factory):
    """A run up to its synthetic images."""
    root = tmp_path_factory.mktemp('selection')
    for stage in ('central', 'pretrain', 'finetune', 'generate'):
        pipeline.run(config, root, stage)
    return WorkDir(root)


@pytest.fixture(scope='module')
def evaluated(config, generated, tmp_path_factory):
    """The same, evaluated."""
    root = tmp_path_factory.mktemp('selection') / 'run'
    shutil.copytree(generated.root, root)
    pipeline.run(config, root, 'evaluate')
    pipeline.run(config, root, 'report')
    return WorkDir(root)


def copy(workdir, path):
    shutil.copytree(workdir.root, path, dirs_exist_ok=True)
    return WorkDir(path)


def candidates(config):
    return build.selection(config).candidates


def test_it_is_one_release_within_the_budget_that_ledger_plan_and_statement_name(config, evaluated):
    (entry,) = [e for e in Ledger(evaluated.ledger).entries if e.mechanism == SELECTION]
    assert entry.sampling_probability == 1 and entry.sensitivity == np.sqrt(candidates(config)) / 2
    statement = json.loads(evaluated.statement.read_text())
    row = statement['mechanisms'][-1]
    assert row['mechanism'] == SELECTION and row['count'] == 1 and row['epsilon']['rdp'] <= 0.02 * 10
    assert statement['epsilon'] <= statement['budget'] == 10
    assert 'selection among classifiers' in evaluated.statement_text.read_text()
    plan = json.loads(evaluated.plan.read_text())
    assert (
        plan['epsilon_total'] == statement['epsilon'] and plan['epsilon_selection'] == row['epsilon']['rdp']
    )
    assert plan['selection_noise_multiplier'] == entry.noise_multiplier


def test_what_is_released_are_noisy_scores_and_they_alone_choose(config, evaluated):
    trainings = artefacts.selection(evaluated)['trainings']
    names = [('logistic', 0), ('mlp', 0), ('mlp', 1)]  # nothing of the first is random
    assert [(part['classifier'], part['seed']) for part in trainings] == names
    assert sum(len(part['scores']) for part in trainings) == candidates(config)
    results = json.loads(evaluated.evaluation.read_text())
    selected = [name for kind in config.evaluate.classifiers for name in results['selected'][kind]]
    assert selected == [part['candidates'][int(np.argmax(part['scores']))] for part in trainings]
    query, noises = build.selection(config), []
    for part in trainings:
        known = np.load(evaluated.candidates / f'{part["classifier"]}_{part["seed"]}.npz')
        noises += list(np.array(part['scores']) - (known['sums'] / query.units + 0.5))
        best = int(np.argmax(part['scores']))
        matrix, kind = known['confusions'][best], part['classifier']
        accuracy = results['accuracy_of_seeds'][kind][part['seed']]
        assert accuracy == np.trace(matrix) / matrix.sum()
    plan = json.loads(evaluated.plan.read_text())
    scale = plan['selection_noise_multiplier'] * plan['selection_sensitivity'] / query.units
    assert 0.3 * scale < np.std(noises) < 3 * scale
    for kind, of_seeds in results['accuracy_of_seeds'].items():
        assert results['accuracy'][kind] == np.mean(of_seeds)
        matrix = np.array(results['confusion'][kind])
        assert matrix.sum() == len(of_seeds) * 360
        np.testing.assert_allclose(results['accuracy_of_class'][kind], np.diag(matrix) / matrix.sum(axis=1))
    spread = np.std(results['accuracy_of_seeds']['mlp'], ddof=1)
    assert results['accuracy_spread'] == {'mlp': pytest.approx(spread)}
    text = evaluated.report_text.read_text()
    assert 'over 2 seeds' in text and 'noisy scores of private images' in text


class Killed(Exception):
    pass


def kill(*_):
    raise Killed


def test_a_kill_between_ledger_and_file_changes_no_bit(config, generated, evaluated, tmp_path, monkeypatch):
    workdir = copy(generated, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, 'save_selection', kill)
        with pytest.raises(Killed):
            pipeline.run(config, workdir.root, 'evaluate')
    assert Ledger(workdir.ledger).count(SELECTION) == 1 and not workdir.selection.exists()
    assert not workdir.evaluation.exists()
    shutil.rmtree(workdir.candidates)  # they are trained again, to the same bits
    pipeline.run(config, workdir.root, 'all')
    assert workdir.selection.read_bytes() == evaluated.selection.read_bytes()
    assert json.loads(workdir.evaluation.read_text()) == json.loads(evaluated.evaluation.read_text())
    assert workdir.ledger.read_bytes() == evaluated.ledger.read_bytes()


def test_a_lost_file_comes_back_and_what_differs_is_refused(config, evaluated, tmp_path, capsys):
    workdir = copy(evaluated, tmp_path)
    released = workdir.selection.read_bytes()
    workdir.selection.unlink()
    pipeline.run(config, workdir.root, 'all')
    assert workdir.selection.read_bytes() == released
    capsys.readouterr()
    pipeline.run(config, workdir.root, 'all')
    assert 'Everything is done' in capsys.readouterr().out
    # Another sum under the same noise would be a second release.
    workdir.selection.unlink()
    path = workdir.candidates / 'mlp_0.npz'
    known = dict(np.load(path))
    np.savez(path, **known | {'sums': known['sums'] + 1})
    with pytest.raises(ValueError, match='the new output of selection differs'):
        pipeline.run(config, workdir.root, 'evaluate')
    assert not workdir.selection.exists()
    changed = json.loads(released)
    changed['trainings'][0]['scores'][0] += 0.1
    workdir.selection.write_text(json.dumps(changed))
    workdir.evaluation.unlink()
    with pytest.raises(ValueError, match='selection.json is not what this run released'):
        pipeline.run(config, workdir.root, 'evaluate')


@pytest.mark.parametrize(
    'name, value',
    [
        ('selection', 'synthetic'), ('selection_share', 0.03), ('classifiers', ('mlp',)), ('seeds', 1),
        ('candidates', 1), ('epochs', 3), ('learning_rate', 0.1),
    ],
)  # fmt: skip
def test_settings_that_decide_it_are_fixed_with_the_plan(config, generated, name, value):
    changed = config.copy_and_resolve_references()
    changed.evaluate[name] = value
    with pytest.raises(ValueError, match=f'belongs to another config .*\n  config.evaluate.{name}: '):
        pipeline.run(changed, generated.root, 'evaluate')


def test_other_settings_of_evaluation_stay_free(config, evaluated, tmp_path):
    workdir, changed = copy(evaluated, tmp_path), config.copy_and_resolve_references()
    changed.evaluate.real_images = True
    pipeline.run(changed, workdir.root, 'evaluate')
    assert workdir.selection.read_bytes() == evaluated.selection.read_bytes()


def test_other_synthetic_images_get_no_second_selection(config, evaluated, tmp_path):
    workdir, changed = copy(evaluated, tmp_path), config.copy_and_resolve_references()
    shutil.rmtree(workdir.synthetic)
    changed.generate.sampler.steps = 3
    pipeline.run(changed, workdir.root, 'all')
    results = json.loads(workdir.evaluation.read_text())
    assert 'is the selection among classifiers of other synthetic images' in results['classifiers_left_out']
    assert workdir.selection.read_bytes() == evaluated.selection.read_bytes()


def test_a_run_that_began_without_it_does_not_get_it(copied_run):
    config, workdir = copied_run
    changed = config.copy_and_resolve_references()
    changed.evaluate.selection = 'private_noisy'
    with pytest.raises(ValueError, match='config.evaluate.selection: synthetic there, private_noisy now'):
        pipeline.run(changed, workdir.root, 'evaluate')


def test_a_folder_of_an_earlier_version_is_done_as_it_is(copied_run, capsys):
    """It has none of the settings, neither in its config nor in what its scores are of, nor in its plan."""
    config, workdir = copied_run
    new = ('seeds', 'selection', 'selection_share', 'candidates')
    for path in (workdir.config, workdir.own_config):
        known = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in known.items() if k not in [f'evaluate.{n}' for n in new]})
        )
    plan = json.loads(workdir.plan.read_text())
    workdir.plan.write_text(json.dumps({k: v for k, v in plan.items() if 'selection' not in k}))
    assert not any(
        f'evaluate.{name}' in json.loads(workdir.evaluation.read_text())['of']['settings'] for name in new
    )
    before = {path: path.read_bytes() for path in workdir.release.rglob('*') if path.is_file()}
    pipeline.run(config, workdir.root, 'all')
    assert 'Everything is done' in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in workdir.release.rglob('*') if path.is_file()}
