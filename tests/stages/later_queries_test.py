"""Class moments and frequencies in a run: asked once, planned, recorded, and trained on."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpp_jax import build, library, pipeline, settings
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.data.generator import Generator
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.privacy.budget import CENTRAL_QUERY, FREQUENCY, MOMENTS
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages import plan as plan_stage
from dpp_jax.stages import pretrain
from dpp_jax.training import checkpoint, steps

STEPS = {
    'pretrain__epochs': 2,
    'pretrain__moments_steps': 4,
    'pretrain__frequency_steps': 3,
    'pretrain__schedule': 'cosine',
}


@pytest.fixture(scope='module')
def config(tiny_config):
    return tiny_config(
        moments__enabled=True,
        moments__frequencies=10,
        moments__clip_norm=1.0,
        moments__noise_multiplier=0.5,
        frequency__enabled=True,
        frequency__features=200,
        frequency__noise_multiplier=1.0,
        pretrain__generator_steps=100,
        dp__epsilon=20.0,
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
    arrays = [*workdir.of_queries.values(), workdir.generator]
    model = sorted(path for path in workdir.model('pretrain').rglob('*') if path.is_file())
    found = {path.name: dict(np.load(path)) for path in arrays}
    return found | {'model': [path.read_bytes() for path in model]}, workdir.ledger.read_text()


def test_the_ledger_has_what_the_plan_says_and_the_statement_names_it(config, run, gate):
    found = gate(config, run)
    recorded = ledger_lib.Ledger(run.ledger).entries
    assert [entry.mechanism for entry in recorded] == 2 * [CENTRAL_QUERY] + [MOMENTS, FREQUENCY]
    figures = json.loads(run.plan.read_text())
    for entry, name, sigma in ((recorded[-2], MOMENTS, 0.5), (recorded[-1], FREQUENCY, 1.0)):
        identifier = Keys(run.keys, config.seed).of_mechanism(name, found.ledger).noise.identifier
        assert entry == found.plan.budget.of(name).mechanism.entry(0, identifier)
        assert entry.sensitivity == 1.0 and entry.noise_multiplier == sigma
        assert figures[f'{name}_count'] == 1 and figures[f'epsilon_{name}'] > 0
    assert found.plan.budget.spent() <= config.dp.epsilon
    rows = json.loads(run.statement.read_text())['mechanisms']
    assert [row['mechanism'] for row in rows] == [CENTRAL_QUERY, MOMENTS, FREQUENCY]
    text = run.statement_text.read_text()
    assert 'class moments (query)' in text and 'random frequencies (query)' in text


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


def test_mean_features_are_near_those_of_the_private_images_and_the_generator_near_them(config, run):
    private, query = build.images(config, 'train'), build.frequency_query(config)
    found, noise = artefacts.frequency(run), query.noise(1.0, len(private.labels) / 10)
    generator, weights = build.generator(config), artefacts.generator(run)

    def means(images, labels):
        features = np.asarray(query.embed(images.reshape(len(images), -1).astype(np.float32) / 255))
        return np.stack([features[labels == label].mean(axis=0) for label in range(10)])

    real = means(private.images, private.labels)
    sizes = np.bincount(private.labels)[:, None] / (len(private.labels) / 10)  # counts are public: not exact
    assert np.std(found - sizes * real) == pytest.approx(noise, rel=0.1)
    labels = np.repeat(np.arange(10), 200)
    drawn = means(generator.draw(weights, labels, 1, 0), labels)
    fresh = means(generator.draw(generator.init(jax.random.key(0)), labels, 1, 0), labels)
    distances = [np.linalg.norm(each - real, axis=1).mean() for each in (drawn, fresh)]
    assert distances[0] < 0.6 * distances[1]


def test_a_run_without_them_has_the_same_central_images_and_the_plan_of_earlier_versions(
    config, run, tiny_config, tmp_path
):
    plain = tiny_config(**STEPS | {'pretrain__moments_steps': 0, 'pretrain__frequency_steps': 0})
    pipeline.run(plain, tmp_path, 'central')
    workdir = WorkDir(tmp_path)
    for name, array in artefacts.central_images(workdir).items():
        np.testing.assert_array_equal(array, artefacts.central_images(run)[name])
    figures = json.loads(workdir.plan.read_text())
    assert not any('moments' in name or 'frequency' in name for name in figures)
    assert not workdir.moments.exists() and not workdir.frequency.exists()
    lines = run.ledger.read_text().splitlines()
    assert workdir.ledger.read_text().splitlines() == lines[:2]


@pytest.mark.parametrize(
    ('module', 'name', 'call', 'last'),
    [
        (ledger_lib.Ledger, 'append', 3, 'moments'),
        (Keys, 'bind_release', 2, 'moments'),
        (ledger_lib.Ledger, 'append', 4, 'frequency'),
        (Keys, 'bind_release', 3, 'frequency'),
    ],
    ids=['before the entry', 'before the release', 'before the last entry', 'before the last release'],
)
def test_a_query_that_was_stopped_is_asked_again_with_the_same_answer(
    config, run, tmp_path, monkeypatch, module, name, call, last
):
    """And the queries before it are not."""
    stopped(config, tmp_path, 'central', monkeypatch, module, name, call)
    workdir = WorkDir(tmp_path)
    assert workdir.central_images.exists() and workdir.moments.exists() == (last == 'frequency')
    assert not workdir.frequency.exists()
    with monkeypatch.context() as patches:
        patches.setattr('dpp_jax.stages.central.run', None)
        if last == 'frequency':
            patches.setattr('dpp_jax.stages.central.moments.run', None)
        pipeline.run(config, tmp_path, 'central')
    for expected, found in ((run.moments, workdir.moments), (run.frequency, workdir.frequency)):
        for name, array in np.load(expected).items():
            np.testing.assert_array_equal(array, np.load(found)[name])
    assert workdir.ledger.read_text() == run.ledger.read_text()


def test_pretraining_that_was_stopped_in_any_phase_ends_like_an_uninterrupted_one(
    config, asked, run, tmp_path, monkeypatch
):
    shutil.copytree(asked, tmp_path, dirs_exist_ok=True)
    config.loop.checkpoint_every_seconds = 0.0
    stopped(config, tmp_path, 'pretrain', monkeypatch, pretrain, 'epoch_stream', 2)
    stopped(config, tmp_path, 'pretrain', monkeypatch, ClassMoments, 'draw', 3)
    stopped(config, tmp_path, 'pretrain', monkeypatch, Generator, 'draw', 2)
    config.loop.checkpoint_every_seconds = 1000.0
    latest, _ = checkpoint.latest_training(WorkDir(tmp_path).checkpoints('pretrain'))
    assert latest > 8 == 2 * 2 + 4  # in the third phase
    pipeline.run(config, tmp_path, 'pretrain')
    found, expected = files_of(WorkDir(tmp_path)), files_of(run)
    for name in ('central_images.npz', 'moments.npz', 'frequency.npz', 'generator.npz'):
        for key, array in expected[0][name].items():
            np.testing.assert_array_equal(found[0][name][key], array)
    assert found[0]['model'] == expected[0]['model'] and found[1] == expected[1]


@pytest.mark.parametrize(('name', 'array'), [('moments', 'means'), ('frequency', 'embedding')])
def test_damaged_answers_are_refused_before_pretraining(config, asked, tmp_path, name, array):
    shutil.copytree(asked, tmp_path, dirs_exist_ok=True)
    path = getattr(WorkDir(tmp_path), name)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {array: 2 * arrays[array]})
    with pytest.raises(ValueError, match=f'{name}.npz is not what this run released'):
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


def test_the_plan_tells_the_noise_of_frequencies_and_warns_where_they_are_lost_in_it(tiny_config, tiny_model):
    def told(sigma, steps=3):
        config = tiny_config(frequency__enabled=True, frequency__noise_multiplier=sigma)
        config.pretrain.frequency_steps = steps
        made = build.plan(config, tiny_model)
        (line,) = (text for text in plan_stage.text(config, made).splitlines() if text[:11] == 'frequencies')
        return line, [text for text in plan_stage.warnings_of(config, made) if 'frequency.' in text]

    line, warnings = told(20.0)
    assert f'10,000 random features; noise of {20 / 143.7:.2g} in every direction' in line and not warnings
    _, (warning,) = told(100.0)
    assert 'hardly more than noise' in warning and 'frequency.noise_multiplier=43' in warning
    _, (warning,) = told(20.0, steps=0)
    assert 'no training uses the answer: pretrain.frequency_steps is 0' in warning


@pytest.fixture(scope='module')
def around(tiny_config, tmp_path_factory):
    """A finished run whose denoiser is around the class moments."""
    config = tiny_config(
        moments__enabled=True,
        moments__frequencies=10,
        moments__clip_norm=1.0,
        moments__noise_multiplier=0.5,
        model__around='moments',
        dp__epsilon=20.0,
        finetune__snapshots=1,
        **{name: STEPS[name] for name in ('pretrain__epochs', 'pretrain__moments_steps')},
    )
    root = tmp_path_factory.mktemp('around')
    for stage in ('central', 'pretrain', 'finetune', 'generate'):
        pipeline.run(config, root, stage)
    return config, WorkDir(root)


def test_what_moments_are_changes_what_is_denoised(around):
    config, workdir = around
    model, gaussians = build.model(config), build.gaussians(config, workdir)
    weights = artefacts.weights(workdir, 'finetune', model.shapes())['ema_params']
    x = jax.random.normal(jax.random.key(0), (10, *model.image_shape))
    denoised = model.denoiser(weights, gaussians)(x, jax.numpy.full(10, 3.0), jax.numpy.arange(10))
    off = model.denoiser(weights, model.stand_in())(x, jax.numpy.full(10, 3.0), jax.numpy.arange(10))
    assert np.isfinite(denoised).all() and np.abs(denoised - off).mean() > 0.05
    assert workdir.over_finetuning.exists()


def test_a_released_model_around_moments_draws_images_of_their_classes_from_release_alone(around, tmp_path):
    config, workdir = around
    shutil.copytree(workdir.release, tmp_path / 'release')
    images, labels = library.load(tmp_path / 'release').sample(200, seed=3)
    means = build.gaussians(config, workdir).means[:-1]
    away = images.reshape(200, 1, -1) / 127.5 - 1 - means
    nearest = np.square(away).mean(-1).argmin(1)
    assert (nearest == labels).mean() > 0.2  # 0.1 by chance; the network has hardly learned


def test_without_its_moments_a_model_is_not_loaded_and_what_can_restore_them_is_not_deleted(around, tmp_path):
    config, workdir = around
    shutil.copytree(workdir.root, tmp_path, dirs_exist_ok=True)
    copy = WorkDir(tmp_path)
    copy.moments.unlink()
    with pytest.raises(FileNotFoundError, match='moments'):
        library.load(tmp_path)
    with pytest.raises(ValueError, match='clean deleted nothing'):
        pipeline.run(config, tmp_path, 'clean')
    assert copy.keys.exists()


def test_both_trainings_are_given_the_released_moments(around, monkeypatch, tmp_path):
    config, workdir = around
    shutil.copytree(workdir.root, tmp_path, dirs_exist_ok=True)
    given = []
    for name in ('make_pretrain_step', 'make_dp_step'):
        monkeypatch.setattr(steps, name, _noting(getattr(steps, name), given))
    for training in ('pretrain', 'finetune'):
        shutil.rmtree(tmp_path / 'release/model' / training)
        shutil.rmtree(tmp_path / 'private/resume' / training)
        pipeline.run(config, tmp_path, training)
    wanted = build.gaussians(config, workdir)
    assert len(given) > 4
    for found in given:
        jax.tree.map(
            lambda one, all_of_them: np.testing.assert_array_equal(one, all_of_them[0]), wanted, found
        )


def _noting(make, given):
    """Make steps that also note what the denoiser is around."""

    def noting(*args, **settings):
        step = make(*args, **settings)

        def noted(*of_step):
            given.extend(jax.device_get(part['gaussians']) for part in of_step if isinstance(part, dict))
            return step(*of_step)

        return noted

    return noting


def test_a_model_around_moments_is_no_pytorch_model(around):
    config, workdir = around
    with pytest.raises(ValueError, match='model.around'):
        pipeline.run(config, workdir.root, 'export')


def test_a_denoiser_around_moments_needs_them(tiny_config):
    with pytest.raises(ValueError, match=r'model\.around.*moments\.enabled is False'):
        settings.check(tiny_config(model__around='moments'))
