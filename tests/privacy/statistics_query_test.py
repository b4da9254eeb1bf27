"""Queries as stage `central` asks them: sensitivity at the worst images, noise, and what reaches release/."""

import jax
import jax.flatten_util
import numpy as np
import pytest
from scipy import stats

from dpp_jax import build
from dpp_jax.configs import camelyon_32, celeba_32, default, fmnist_28, mnist_28
from dpp_jax.data.images import Images
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages import central
from dpp_jax.training import devices

# (settings of the query; the extra images that attain the bound)
QUERIES = {
    'mean': (dict(pixel_center=0.0), ['white']),
    'mean_centered': (dict(pixel_center=0.5), ['white', 'black']),
    'mean_off_center': (dict(pixel_center=0.3), ['white']),
    'mean_clipped': (dict(pixel_center=0.5, clip_norm=2.0), ['white', 'black', 'random', 'copy']),
    'mean_with_counts': (dict(pixel_center=0.5, class_counts='noisy'), ['white', 'black']),
    'mode': (dict(kind='mode', bins=2), ['white', 'black', 'random', 'copy']),
    'mode_16': (dict(kind='mode', bins=16), ['white', 'black', 'random', 'copy']),
}


def query_config(**settings):
    """Two queries of everybody, on images whose odd size rounds up: 8x8x3 values."""
    config = default.get_config('1')
    config.seed = 1
    config.data.update(image_size=15, channels=3, classes=3)
    config.query.update(sampling_probability=1.0, queries=2, post_process=False)
    config.query.update(settings)
    return config


class NoModel:
    """Has no parameters, which a plan would count."""

    def shapes(self):
        return {}


def planned(config):
    """The queries of a run's budget."""
    return build.plan(config, NoModel(), noise={DP_SGD: 1.0}).budget.of(CENTRAL_QUERY)


def private_set(n, seed=0, shape=(15, 15, 3)):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape)).astype(np.uint8)
    images[1], images[2], images[3] = 0, 255, images[0]
    return images, rng.integers(0, 3, n).astype(np.int32)


@pytest.fixture
def ask(tmp_path_factory, monkeypatch):
    """(config, images, labels, answer) → the released images, each query's exact total, the ledger.

    `answer` takes the place of the noise: the total that a query hands to its mechanism → what the
    query goes on with. Without one, the mechanism adds its noise.
    """

    def run(config, images, labels, answer=None):
        config.data.train_images = min(len(images), config.data.train_images)
        workdir, totals = WorkDir(tmp_path_factory.mktemp('run')), []
        ledger = Ledger(workdir.ledger)

        def add_noise(self, total, key):
            numbers = jax.flatten_util.ravel_pytree(total)[0]
            jax.debug.callback(lambda numbers: totals.append(np.float64(numbers)), numbers)
            return answer(total)

        def run_stage():
            keys, private = Keys(workdir.keys, config.seed), Images(images=images, labels=labels)
            first = config, workdir, keys, ledger, private, lambda: None
            asked = {'query': build.query(config), 'releases': planned(config), 'unit': build.unit(config)}
            central.run(*first, **asked)

        if answer is None:
            run_stage()
        else:
            monkeypatch.setattr(GaussianMechanism, '_add_noise', add_noise)
            with devices.limited_to(1):  # each would tell the total
                run_stage()
            jax.effects_barrier()
        with np.load(workdir.central_images) as data:
            return data['images'], totals, ledger.entries

    return run


@pytest.mark.parametrize(('settings', 'worst'), QUERIES.values(), ids=QUERIES)
def test_one_image_changes_a_query_by_its_sensitivity_at_most(ask, settings, worst):
    """Add one image in the middle, of any class; for the worst images the bound is attained."""
    config = query_config(**settings)
    images, labels = private_set(9)
    _, (less, _), _ = ask(config, images, labels, answer=lambda total: total)
    extras = {
        'white': np.full_like(images[:1], 255),
        'black': np.zeros_like(images[:1]),
        'random': private_set(9, seed=1)[0][8:],
        'copy': images[5:6],
    }
    for label, (name, extra) in enumerate(extras.items()):
        neighbor = np.insert(images, [4], extra, 0), np.insert(labels, 4, label % 3)
        _, (more, _), entries = ask(config, *neighbor, answer=lambda total: total)
        change, bound = np.linalg.norm(more - less), entries[0].sensitivity
        assert change <= bound * (1 + 1e-6)
        assert (change > bound * (1 - 2e-5)) == (name in worst)


@pytest.mark.parametrize(('settings', 'worst'), QUERIES.values(), ids=QUERIES)
def test_nothing_but_the_noisy_total_reaches_the_release(ask, settings, worst):
    """If queries of two sets had the same noisy totals, they would release the same images."""
    del worst
    config = query_config(**settings)

    def answer(total):
        leaves, tree = jax.tree.flatten(total)
        rng = np.random.default_rng(5)
        return tree.unflatten([rng.normal(0, 3, x.shape).astype(np.float32) for x in leaves])

    one, totals, _ = ask(config, *private_set(9), answer)
    images, labels = private_set(9, seed=3)
    other, other_totals, _ = ask(config, images, np.minimum(labels, 1), answer)
    assert np.linalg.norm(totals[0] - other_totals[0]) > 1
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one)) > 1


def test_a_class_sum_is_divided_by_the_public_class_size(ask):
    """q N / classes = 40, of a class with twice as many images in the sample, and of an empty one."""
    config = query_config(sampling_probability=0.5, downsample=1)
    images, labels = np.zeros((240, 15, 15, 3), np.uint8), np.ones(240, np.int32)
    images[:] = np.arange(45).reshape(15, 3)
    released, totals, _ = ask(config, images, labels, answer=lambda total: total)
    taken = totals[0].reshape(3, -1)[1].max() * 255 / 44
    assert taken == pytest.approx(np.round(taken), abs=1e-2) and taken != 120
    expected = np.clip(np.arange(45).reshape(15, 3) * taken / 40, 0, 255)
    assert np.abs(released[1] - expected).max() <= 1
    assert released[0].max() == 0


@pytest.mark.parametrize(
    ('module', 'sensitivity', 'noise_multiplier', 'probability'),
    [
        (mnist_28, 14.0, 5.0, 0.1),  # sqrt(1 · 14 · 14)
        (fmnist_28, 14.0, 5.0, 0.1),
        (celeba_32, 27.712812921102035, 10.0, 0.0657),  # sqrt(3 · 16 · 16)
        (camelyon_32, 27.712812921102035, 10.0, 0.04),
    ],
)
def test_queries_of_the_paper(module, sensitivity, noise_multiplier, probability):
    config = module.get_config()
    entry = planned(config).mechanism.entry(0, 'r')
    assert entry.sensitivity == pytest.approx(sensitivity, rel=1e-12)
    assert (entry.noise_multiplier, entry.sampling_probability) == (noise_multiplier, probability)
    config.query.pixel_center = 0.5
    assert planned(config).mechanism.sensitivity == pytest.approx(sensitivity / 2)
    config.query.kind = 'mode'  # knows no center
    assert planned(config).mechanism.sensitivity == pytest.approx(sensitivity)


def small_images(value, n):
    return np.full((n, 14, 14, 1), value, np.uint8)


def draw_many(config, batch, mask, *, expected_size, number, seed):
    """Central images of one query with other noise each time: (number, classes, ...)."""
    noise_key = NoiseKey(identifier='test', keys=jax.random.split(jax.random.key(seed), 4))
    release = build.query(config).noisy(planned(config).mechanism, noise_key, expected_size, len(mask))
    draw = jax.vmap(release.program, in_axes=(None, None, None, 0))
    return np.asarray(jax.jit(draw)(batch, mask, noise_key.keys, np.arange(number, dtype=np.int32)))


def test_mean_query_of_mnist_has_the_noise_of_the_paper(statistics):
    """σ Δ / n_c = 5 · 14 / 600, also for an empty sample."""
    nobody = {'images': small_images(255, 60), 'labels': np.zeros(60, np.int32)}
    draws = draw_many(
        mnist_28.get_config(), nobody, np.zeros(60, bool), expected_size=6000.0, number=300, seed=3
    )
    statistics.assert_normal(draws, 0.11666666666666667)
    statistics.assert_unrelated(np.moveaxis(draws, 1, -1).reshape(-1, 10) / 0.11666666666666667)


def test_mode_query_has_noise_of_sigma_times_sensitivity_in_every_bin(statistics):
    """Where white leads by 20 images it wins with probability Φ(20 / (√2 σ Δ)), σ Δ = 14."""
    config = mnist_28.get_config()
    config.data.classes = 3
    config.query.update(kind='mode', noise_multiplier=1.0)
    images = np.concatenate([small_images(255, 20), small_images(0, 20), small_images(255, 5)])
    labels = np.repeat([1, 2, 0], [20, 20, 5]).astype(np.int32)
    mask = labels > 0  # of class 0 there is nobody
    batch = {'images': images, 'labels': labels}
    white = draw_many(config, batch, mask, expected_size=40.0, number=1500, seed=4)
    assert set(np.unique(white)) == {0, 1}
    for label, lead in enumerate((0, 20, -20)):
        chance = stats.norm.cdf(lead / (2**0.5 * 14))
        statistics.assert_plausible(stats.binom(white[:, label].size, chance), white[:, label].sum())


def test_released_central_images_carry_that_noise_independent_in_every_query(ask, statistics):
    """σ Δ / n_c = 0.1 of the pixels' range, which a clip at five of it does not touch."""
    config = query_config(queries=60, pixel_center=0.5, downsample=1, noise_multiplier=4.0)
    config.data.update(image_size=32, channels=1)
    n = 1920  # n_c = 640, Δ = √(32 · 32) / 2
    images = np.empty((n, 32, 32, 1), np.uint8)
    images[::2], images[1::2] = 127, 128
    released, _, _ = ask(config, images, np.arange(n, dtype=np.int32) % 3)
    # Whole gray levels, rounded down.
    z = (released.reshape(60, -1) + 0.5 - 127.5) / np.hypot(25.5, 12**-0.5)
    statistics.assert_plausible(stats.chi2(z.size), np.sum(z**2))
    statistics.assert_unrelated(z.T)
