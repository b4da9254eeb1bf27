"""Class moments in a run: asked once after the central images, planned, recorded, and trained on."""

import json
import shutil

import numpy as np
import pytest

from dpp_jax import build, pipeline
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.privacy.budget import CENTRAL_QUERY, MOMENTS
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages import plan as plan_stage
from dpp_jax.stages import pretrain
from dpp_jax.training import checkpoint

STEPS = {'pretrain__epochs': 2, 'pretrain__moments_steps': 4}


@pytest.fixture(scope='module')
def config(tiny_config):
    return tiny_config(
        moments__enabled=True,
        moments__frequencies=10,
        moments__clip_norm=1.0,
        moments__noise_multiplier=0.5,
        **STEPS,
    )


@pytest.fixture(scope='module')
def asked(config, tmp_path_factory):
    """The folder of a run whose queries are answered."""
    root = tmp_path_factory.mktemp('asked')
    pipeline.run(config, root, 'central')
    return root


@pytest.fixture(scope='module')
def run(config, asked, tmp_path_factory):
    """A run until its pre-training is done."""
    root = tmp_path_factory.mktemp('run')
    shutil.copytree(asked, root, dirs_exist_ok=True)
    pipeline.run(config, root, 'pretrain')
    return WorkDir(root)


class Stop(Exception):
    pass


def stopped(config, root, stage, monkeypatch, module, name, call):
    """Run a stage until `name` of `module` is called for the so-manyth time."""
    original, calls = getattr(module, name), [0]

    def wrapper(*arguments, **settings):
        calls[0] += 1
        if calls[0] == call:
            raise Stop
        return original(*arguments, **settings)

    with monkeypatch.context() as patches, pytest.raises(Stop):
        patches.setattr(module, name, wrapper)
        pipeline.run(config, root, stage)


def files_of(workdir):
    """What pre-training starts from and what it makes."""
    arrays = [workdir.central_images, workdir.moments]
    model = sorted(path for path in workdir.model('pretrain').rglob('*') if path.is_file())
    found = {path.name: dict(np.load(path)) for path in arrays}
    return found | {'model': [path.read_bytes() for path in model]}, workdir.ledger.read_text()


def test_the_ledger_has_what_the_plan_says_and_the_statement_names_it(config, run, gate):
    found = gate(config, run)
    recorded = ledger_lib.Ledger(run.ledger).entries
    assert [entry.mechanism for entry in recorded] == 2 * [CENTRAL_QUERY] + [MOMENTS]
    identifier = Keys(run.keys, config.seed).of_mechanism(MOMENTS, found.ledger).noise.identifier
    assert recorded[-1] == found.plan.budget.of(MOMENTS).mechanism.entry(0, identifier)
    assert recorded[-1].sensitivity == 1.0 and recorded[-1].noise_multiplier == 0.5
    figures = json.loads(run.plan.read_text())
    assert figures['moments_count'] == 1 and figures['epsilon_moments'] > 0
    assert found.plan.budget.spent() <= config.dp.epsilon
    rows = json.loads(run.statement.read_text())['mechanisms']
    assert [row['mechanism'] for row in rows] == [CENTRAL_QUERY, MOMENTS]
    assert 'class moments (query)' in run.statement_text.read_text()


def test_what_is_released_is_near_the_moments_of_the_private_images(config, run):
    """Nearer with less noise, as far as noise goes (tests/data/class_moments_test.py)."""
    private, frequencies = build.images(config, 'train'), build.frequencies(config)
    found = artefacts.moments(run)
    vectors = frequencies.coefficients(private.images)
    for label in range(10):
        own = vectors[private.labels == label]
        shift = np.linalg.norm(found.means[label] - own.mean(axis=0))
        assert shift < 0.2 < np.sqrt(np.trace(np.cov(own.T)))
        covariance = found.factors[label] @ found.factors[label].T
        assert 0.3 < np.trace(covariance) / np.trace(np.cov(own.T)) < 1.1


def test_a_run_without_them_has_the_same_central_images_and_the_plan_of_earlier_versions(
    config, run, tiny_config, tmp_path
):
    plain = tiny_config(**STEPS | {'pretrain__moments_steps': 0})
    pipeline.run(plain, tmp_path, 'central')
    workdir = WorkDir(tmp_path)
    for name, array in artefacts.central_images(workdir).items():
        np.testing.assert_array_equal(array, artefacts.central_images(run)[name])
    assert not any('moments' in name for name in json.loads(workdir.plan.read_text()))
    assert not workdir.moments.exists()
    lines = run.ledger.read_text().splitlines()
    assert workdir.ledger.read_text().splitlines() == lines[:2]


@pytest.mark.parametrize(
    ('module', 'name', 'call'),
    [(ledger_lib.Ledger, 'append', 3), (Keys, 'bind_release', 2)],
    ids=['before the entry', 'before the release'],
)
def test_a_query_that_was_stopped_is_asked_again_with_the_same_answer(
    config, run, tmp_path, monkeypatch, module, name, call
):
    """And the query before it is not."""
    stopped(config, tmp_path, 'central', monkeypatch, module, name, call)
    workdir = WorkDir(tmp_path)
    assert workdir.central_images.exists() and not workdir.moments.exists()
    with monkeypatch.context() as patches:
        patches.setattr('dpp_jax.stages.central.run', None)
        pipeline.run(config, tmp_path, 'central')
    for name, array in np.load(run.moments).items():
        np.testing.assert_array_equal(array, np.load(workdir.moments)[name])
    assert workdir.ledger.read_text() == run.ledger.read_text()


def test_pretraining_that_was_stopped_in_any_phase_ends_like_an_uninterrupted_one(
    config, asked, run, tmp_path, monkeypatch
):
    shutil.copytree(asked, tmp_path, dirs_exist_ok=True)
    config.loop.checkpoint_every_seconds = 0.0
    stopped(config, tmp_path, 'pretrain', monkeypatch, pretrain, 'epoch_stream', 2)
    stopped(config, tmp_path, 'pretrain', monkeypatch, ClassMoments, 'draw', 3)
    config.loop.checkpoint_every_seconds = 1000.0
    latest, _ = checkpoint.latest_training(WorkDir(tmp_path).checkpoints('pretrain'))
    assert latest > 4 == 2 * 2  # in the second phase
    pipeline.run(config, tmp_path, 'pretrain')
    found, expected = files_of(WorkDir(tmp_path)), files_of(run)
    for name in ('central_images.npz', 'moments.npz'):
        for key, array in expected[0][name].items():
            np.testing.assert_array_equal(found[0][name][key], array)
    assert found[0]['model'] == expected[0]['model'] and found[1] == expected[1]


def test_damaged_moments_are_refused_before_pretraining(config, asked, tmp_path):
    shutil.copytree(asked, tmp_path, dirs_exist_ok=True)
    workdir = WorkDir(tmp_path)
    arrays = dict(np.load(workdir.moments))
    np.savez(workdir.moments, **arrays | {'means': 2 * arrays['means']})
    with pytest.raises(ValueError, match='moments.npz is not what this run released'):
        pipeline.run(config, tmp_path, 'pretrain')


def test_the_plan_tells_what_stands_out_and_warns_where_nothing_can(tiny_config, tiny_model):
    def told(sigma):
        config = tiny_config(moments__enabled=True, moments__frequencies=16, moments__noise_multiplier=sigma)
        config.pretrain.moments_steps = 3
        made = build.plan(config, tiny_model)
        warnings = [text for text in plan_stage.warnings_of(config, made) if 'class moments' in text]
        lines = plan_stage.text(config, made).splitlines()
        (line,) = (line for line in lines if line.startswith('class moments  16 '))
        return line, warnings

    # 2 τ √k, τ = σ B² / (√2 √0.8 n_c)
    edge = 2 * 0.5 * 2.5**2 / (1.6**0.5 * 143.7) * 4
    line, warnings = told(0.5)
    assert f'16 frequencies; eigenvalues above {edge:.2g} stand out' in line and 'at most 6.25' in line
    assert not warnings
    _, (warning,) = told(20.0)
    assert 'hardly an eigenvalue' in warning and 'moments.noise_multiplier=' in warning
