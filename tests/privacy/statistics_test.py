"""What the guarantee rests on, tested so that a small error fails: noise, sensitivity, sampling.

Seeds are fixed, so every run sees the same draws. If they were not, every check here would fail a
correct program with a probability below FALSE_ALARM. The samples are so large that noise of 2 % less
or a sampling probability 1 % off do fail.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from configs import camelyon_32, celeba_32, default, fmnist_28, mnist_28
from dpp_jax.privacy import poisson
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism, clipped_gradient_sum
from dpp_jax.stages import central, workdir as workdir_lib
from dpp_jax.training import devices, state as state_lib, steps

FALSE_ALARM = 1e-6
KEY = 0x0123456789ABCDEF0123456789ABCDEF


def assert_plausible(distribution, value, tests=1):
    """`value`, the most extreme of `tests`, is in neither tail of `distribution`."""
    value = np.asarray(value)
    tails = np.minimum(distribution.cdf(value), distribution.sf(value))
    assert 2 * tests * tails.min() > FALSE_ALARM


def assert_normal(values, std):
    """`values` are like independent draws from N(0, std²)."""
    z = np.ravel(values).astype(np.float64) / std
    assert stats.kstest(z, 'norm').pvalue > FALSE_ALARM
    # Sees errors of the scale half as large as the other test does.
    assert_plausible(stats.chi2(z.size), np.sum(z**2))


def assert_unrelated(columns):
    """No two columns, of mean 0 and variance 1, are correlated: not one pair, nor all a little."""
    rows, count = columns.shape
    products = columns.T.astype(np.float64) @ columns / np.sqrt(rows)
    z = products[np.triu_indices(count, 1)]
    assert_plausible(stats.norm, z, tests=z.size)
    assert_plausible(stats.chi2(z.size), np.sum(z**2))


# --- Noise of the mechanism


@pytest.fixture(scope='module')
def noise():
    """Noise of σ·Δ = 6 in 20,000 steps: leaves (20000, ...)."""
    mechanism = GaussianMechanism('test', 3.0, 0.1, 2.0, 'r')
    total = {'kernel': jnp.zeros((3, 3, 2, 4)), 'bias': jnp.zeros(8), 'scale': jnp.zeros(())}

    def draw(step):
        return mechanism.privatise(total, jax.random.fold_in(jax.random.key(7), step))

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(np.arange(20000)))


def test_noise_of_every_parameter_is_normal_with_std_sigma_times_sensitivity(noise):
    for leaf in noise.values():
        assert_normal(leaf, 6.0)
        columns = leaf.reshape(len(leaf), -1) / 6.0
        assert stats.kstest(columns, 'norm', axis=0).pvalue.min() * columns.shape[1] > FALSE_ALARM


def test_noise_is_independent_between_parameters(noise):
    assert_unrelated(np.concatenate([x.reshape(len(x), -1) for x in noise.values()], 1) / 6.0)


def test_noise_is_independent_between_steps_and_the_same_if_repeated():
    mechanism = GaussianMechanism('test', 3.0, 0.1, 2.0, 'r')
    draw = jax.jit(mechanism.privatise)
    key = jax.random.key(8)
    noises = [draw(jnp.zeros(30000), jax.random.fold_in(key, step)) for step in range(30)]
    assert_unrelated(np.stack(noises, 1) / 6.0)
    np.testing.assert_array_equal(draw(jnp.zeros(30000), jax.random.fold_in(key, 4)), noises[4])


def test_noise_does_not_depend_on_the_total():
    draw = jax.jit(GaussianMechanism('test', 3.0, 0.1, 2.0, 'r').privatise)
    alone = draw(jnp.zeros(1000), jax.random.key(9))
    total = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 100
    np.testing.assert_allclose(draw(total, jax.random.key(9)) - total, alone, atol=1e-4)


# --- Queries: sensitivity, noise, and what reaches the release


# (settings of the query; the extra images that attain the bound)
QUERIES = {
    'mean': (dict(pixel_center=0.0), ['white']),
    'mean_centred': (dict(pixel_center=0.5), ['white', 'black']),
    'mean_off_centre': (dict(pixel_center=0.7), ['black']),
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
        folder = workdir_lib.WorkDir(tmp_path_factory.mktemp('run'))
        ledger = Ledger(folder.release / 'ledger.jsonl')
        totals = []

        def privatise(self, total, key):
            totals.append(np.float64(jax.flatten_util.ravel_pytree(total)[0]))
            return answer(total)

        if answer is None:
            central.run(config, folder, ledger, images, labels)
        else:
            monkeypatch.setattr(GaussianMechanism, 'privatise', privatise)
            with jax.disable_jit():  # totals are numbers then
                central.run(config, folder, ledger, images, labels)
        with np.load(folder.release / 'central_images.npz') as data:
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
        neighbour = np.insert(images, [4], extra, 0), np.insert(labels, 4, label % 3)
        _, (more, _), entries = ask(config, *neighbour, answer=lambda total: total)
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
    assert taken == pytest.approx(np.round(taken), abs=1e-3) and taken != 120
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
    entry = central.make_mechanism(config, 'r').entry(0)
    assert entry.sensitivity == pytest.approx(sensitivity, rel=1e-12)
    assert (entry.noise_multiplier, entry.sampling_probability) == (noise_multiplier, probability)
    config.query.pixel_center = 0.5
    assert central.make_mechanism(config, 'r').sensitivity == pytest.approx(sensitivity / 2)
    config.query.kind = 'mode'  # knows no centre
    assert central.make_mechanism(config, 'r').sensitivity == pytest.approx(sensitivity)


def small_images(value, n):
    return np.full((n, 14, 14, 1), value, np.uint8)


def test_mean_query_of_mnist_has_the_noise_of_the_paper():
    """σ Δ / n_c = 5 · 14 / 600, also for an empty sample."""
    mechanism = central.make_mechanism(mnist_28.get_config(), 'r')
    query = functools.partial(
        central.mean_query, mechanism=mechanism, classes=10, center=0.0, class_size=600.0
    )
    nobody = small_images(255, 60), np.zeros(60, np.int32), np.zeros(60, bool)
    keys = jax.random.split(jax.random.key(3), 300)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: query(*nobody, key)))(keys))
    assert_normal(draws, 0.11666666666666667)
    assert_unrelated(np.moveaxis(draws, 1, -1).reshape(-1, 10) / 0.11666666666666667)


def test_mode_query_has_noise_of_sigma_times_sensitivity_in_every_bin():
    """Where white leads by 20 images it wins with probability Φ(20 / (√2 σ Δ)), σ Δ = 14."""
    config = mnist_28.get_config()
    config.query.update(kind='mode', noise_multiplier=1.0)
    query = functools.partial(
        central.mode_query, mechanism=central.make_mechanism(config, 'r'), classes=3, bins=2
    )
    images = np.concatenate([small_images(255, 20), small_images(0, 20), small_images(255, 5)])
    labels = np.repeat([1, 2, 0], [20, 20, 5]).astype(np.int32)
    mask = labels > 0  # of class 0 there is nobody
    keys = jax.random.split(jax.random.key(4), 1500)
    white = np.asarray(jax.jit(jax.vmap(lambda key: query(images, labels, mask, key)))(keys))
    assert set(np.unique(white)) == {0, 1}
    for label, lead in enumerate((0, 20, -20)):
        chance = stats.norm.cdf(lead / (2**0.5 * 14))
        assert_plausible(stats.binom(white[:, label].size, chance), white[:, label].sum())


def test_released_central_images_carry_that_noise_independent_in_every_query(ask):
    """σ Δ / n_c = 0.1 of the pixels' range, which a clip at five of it does not touch."""
    config = query_config(queries=60, pixel_center=0.5, downsample=1, noise_multiplier=4.0)
    config.data.update(image_size=32, channels=1)
    n = 1920  # n_c = 640, Δ = √(32 · 32) / 2
    images = np.empty((n, 32, 32, 1), np.uint8)
    images[::2], images[1::2] = 127, 128
    released, _, _ = ask(config, images, np.arange(n, dtype=np.int32) % 3)
    # Whole grey levels, rounded down.
    z = (released.reshape(60, -1) + 0.5 - 127.5) / np.hypot(25.5, 12**-0.5)
    assert_plausible(stats.chi2(z.size), np.sum(z**2))
    assert_unrelated(z.T)


# --- DP-SGD steps: sensitivity, noise once, padding


CLIP, SIGMA, EXPECTED_SIZE = 0.5, 3.0, 20.0
# What an image's gradient is multiplied by, chosen by its label.
SIZES = {'plain': 1.0, 'tiny': 1e-3, 'huge': 1e12, 'overflow': 1e25, 'nan': np.nan, 'inf': np.inf}
LABELS = {name: number for number, name in enumerate(SIZES)}
PARAMS = {
    'kernel': np.zeros((4, 4, 1), np.float32),
    'bias': np.zeros((), np.float32),
    'unused': {'a': np.zeros(50000, np.float32), 'b': np.zeros(50000, np.float32)},
}


def linear_loss(params, image, label, key):
    """Its gradient is known: the image, times a size. It has no random draws."""
    del key
    size = jnp.array(list(SIZES.values()), jnp.float32)[label]
    return size * (jnp.sum(params['kernel'] * image) + params['bias'])


def make_step(loss, optimizer, microbatch):
    mechanism = GaussianMechanism('dp_sgd', SIGMA, 0.5, CLIP, 'test')
    return steps.make_dp_step(
        loss, optimizer, mechanism,
        expected_batch_size=EXPECTED_SIZE, microbatch=microbatch, ema_decay=0.9,
    )


def stepper(loss, number, microbatch, optimizer=optax.sgd(1.0)):
    """(batch, step number) → (state on every device, metrics), on `number` devices."""
    with devices.limited_to(number):
        step = make_step(loss, optimizer, microbatch)
    start = state_lib.create(PARAMS, optimizer)

    def take(batch, step_number=0):
        with devices.limited_to(number):
            state = start.replace(step=np.int32(step_number))
            state = jax.tree.map(lambda x: np.stack([x] * number), state)
            used = steps.used_microbatches(int(batch['mask'].sum()), microbatch)
            state, metrics = step(state, devices.deal(batch), used, jax.random.key(5))
        return jax.tree.map(np.asarray, state), devices.first(metrics)

    return take


@pytest.fixture(scope='module', params=[(1, 8), (2, 4), (8, 1)], ids='{0[0]}_devices'.format)
def take(request):
    """One step with the linear loss, on 1, 2 or 8 devices, several microbatches on each."""
    return stepper(linear_loss, *request.param)


def batch_of(images, names, indices=None, capacity=24):
    labels = np.array([LABELS[name] for name in names], np.int32)
    indices = np.arange(len(names)) if indices is None else np.asarray(indices, int)
    return steps.make_batch(images, labels, indices, capacity)


def digits(n, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 1)).astype(np.uint8)


def flat(state):
    """What the first device's parameters are, and so what they changed by: they start from zero."""
    return np.concatenate([leaf[0].ravel() for leaf in jax.tree.leaves(state.params)])


def test_one_image_changes_the_update_by_the_clip_norm_at_most(take):
    """In the middle of the set, so that every later image meets another microbatch and device."""
    images, names = digits(18), ['plain', 'tiny', 'huge'] * 6
    less = flat(take(batch_of(images, names))[0])
    for name in SIZES:
        for extra in (digits(1, seed=3), images[2:3], np.full_like(images[:1], 255)):
            more = batch_of(np.insert(images, [9], extra, 0), [*names[:9], name, *names[9:]])
            change = np.linalg.norm(np.float64(flat(take(more)[0])) - less) * EXPECTED_SIZE
            if name in ('plain', 'huge'):  # their norm is above the bound, which they attain
                assert change == pytest.approx(CLIP, rel=1e-4)
            else:
                assert change < (0.01 if name == 'tiny' else 1e-5)


def test_noise_is_added_once_by_all_devices_together(take):
    """The update of an empty batch is noise of std σ C / expected size, fresh in every step."""
    std = SIGMA * CLIP / EXPECTED_SIZE
    states = [take(batch_of(digits(2), ['plain', 'nan'], []), number)[0] for number in range(8)]
    for state in states:  # replicas that drew different noise would drift apart
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:1].repeat(len(x), 0)), state)
    noises = np.stack([flat(state) for state in states], 1)
    assert_normal(noises, std)
    for name in ('a', 'b'):
        assert_normal(np.stack([state.params['unused'][name][0] for state in states]), std)
    columns = [state.params['unused'][name][0] for state in states for name in ('a', 'b')]
    assert_unrelated(np.stack(columns, 1) / std)


def test_what_padding_rows_hold_changes_no_bit_of_state_or_metrics(take):
    batch = batch_of(digits(19), ['plain', 'tiny', 'huge'] * 6 + ['nan'], np.arange(18))
    padding = ~batch['mask']
    expected = take(batch)
    for name in SIZES:
        batch['label'][padding] = LABELS[name]
        batch['image'][padding] = 255
        jax.tree.map(np.testing.assert_array_equal, take(batch), expected)


def test_padding_anywhere_with_anything_changes_no_bit_of_the_sum():
    rng = np.random.default_rng(4)
    params = {'w': rng.normal(size=(3, 4)).astype(np.float32), 'b': np.ones(3, np.float32)}
    examples = rng.normal(size=(24, 4)).astype(np.float32)
    mask = rng.random(24) < 0.6

    def loss(params, x):
        return jnp.sum(jnp.tanh(params['w'] @ x + params['b']) ** 2 * x[0])

    run = jax.jit(
        functools.partial(
            clipped_gradient_sum, loss, params, clip_norm=1.0, microbatch=4, microbatches=6
        )
    )
    expected = run(examples, mask)
    assert np.isfinite(jax.flatten_util.ravel_pytree(expected)[0]).all()
    for value in (np.nan, np.inf, -np.inf, 1e30, 0.0):
        examples[~mask] = value
        jax.tree.map(np.testing.assert_array_equal, run(examples, mask), expected)


def test_who_else_is_in_the_batch_does_not_change_an_images_own_draws():
    """With a loss that is random in every image: one image more still changes one gradient."""

    def random_loss(params, image, label, key):
        return linear_loss(params, image * jax.random.normal(key, image.shape), label, key)

    take = stepper(random_loss, 2, 4)
    images, names = digits(20), ['plain'] * 20
    less, more = (
        np.float64(flat(take(batch_of(images, names, indices))[0]))
        for indices in ([1, 3, 4, 10, 15], [1, 3, 4, 7, 10, 15])
    )
    assert np.linalg.norm(more - less) * EXPECTED_SIZE == pytest.approx(CLIP, rel=1e-4)


def test_nothing_but_the_noisy_sum_reaches_the_state(monkeypatch):
    """Not the number of images either: with the same noisy sum two batches give the same state."""
    monkeypatch.setattr(
        GaussianMechanism, 'privatise', lambda self, total, key: jax.tree.map(jnp.ones_like, total)
    )
    take = stepper(linear_loss, 2, 4, optax.adam(0.1))
    one, metrics = take(batch_of(digits(18), ['plain', 'tiny', 'huge'] * 6))
    other, other_metrics = take(batch_of(digits(5, seed=6), ['nan', 'huge'] + ['plain'] * 3))
    assert metrics['batch_size'] == 18 and other_metrics['batch_size'] == 5
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.abs(flat(one)).min() > 0


# --- Poisson sampling


def inclusions(sampler, batches):
    """(batches, size) bool: who is in which batch."""
    included = np.zeros((len(batches), sampler.size), bool)
    for row, batch in zip(included, batches):
        row[sampler.indices(batch)] = True
    return included


@pytest.mark.parametrize('q', [1 / 15, 0.3])
def test_every_example_is_included_with_probability_q_in_every_batch(q):
    size, batches = 2000, 6000
    included = inclusions(poisson.PoissonSampler(size, q, KEY), range(batches))
    assert_plausible(stats.binom(included.size, q), included.sum())
    for axis in (0, 1):  # every example, and the size of every batch: neither too even nor too uneven
        counts, n = included.sum(axis), included.shape[axis]
        assert_plausible(stats.binom(n, q), counts, tests=counts.size)
        spread = np.sum((counts - n * q) ** 2) / (n * q * (1 - q))
        assert_plausible(stats.chi2(counts.size), spread)


def test_inclusions_are_independent_between_examples_batches_and_keys():
    sampler = poisson.PoissonSampler(500, 0.5, KEY)
    assert_unrelated(2.0 * inclusions(sampler, range(5000)) - 1)  # examples
    keys = (KEY, KEY ^ 1, KEY ^ (1 << 64), KEY ^ (1 << 127))
    samplers = [poisson.PoissonSampler(20000, 0.5, key) for key in keys]
    batches = np.concatenate([inclusions(sampler, range(100)) for sampler in samplers])
    assert_unrelated(2.0 * batches.T - 1)


def test_no_batch_is_another_one_shifted():
    """As it would be if the streams of two batches or keys overlapped."""
    size = 20000
    samplers = [poisson.PoissonSampler(size, 0.5, key) for key in (KEY, KEY ^ 1)]
    rows = np.concatenate([2.0 * inclusions(sampler, range(6)) - 1 for sampler in samplers])
    spectra = np.fft.rfft(rows)
    for i in range(len(rows)):
        for j in range(i, len(rows)):
            z = np.fft.irfft(spectra[i] * spectra[j].conj(), size) / np.sqrt(size)
            assert_plausible(stats.norm, z[i == j :], tests=100 * size)


def visited(indices, microbatch, capacity):
    """The images that the step's microbatches meet on this host's devices, in any order."""
    numbers = np.arange(500)
    batch = devices.deal(steps.make_batch(digits(500), numbers, indices, capacity))
    rows = microbatch * steps.used_microbatches(len(indices), microbatch)
    return batch['label'][:, :rows][batch['mask'][:, :rows]]


@pytest.mark.parametrize(
    ('number', 'microbatch', 'capacity'), [(1, 1, 8), (1, 64, 64), (2, 4, 16), (8, 3, 24), (8, 2, 160)]
)
def test_a_batch_is_the_same_for_any_devices_microbatch_and_padding(number, microbatch, capacity):
    """Nobody is left out or met twice, also if a batch is far larger than expected."""
    sampler = poisson.PoissonSampler(500, 0.25, KEY)
    with devices.limited_to(number):
        for indices in (*map(sampler.indices, range(20)), np.arange(500), np.arange(0)):
            met = visited(indices, microbatch, capacity)
            np.testing.assert_array_equal(np.sort(met), indices)


def test_hosts_meet_parts_of_one_batch(monkeypatch):
    """Two hosts of four devices: together every image of the batch once."""
    sampler = poisson.PoissonSampler(500, 0.25, KEY)
    monkeypatch.setattr(devices, 'local', lambda: jax.local_devices()[:4])
    monkeypatch.setattr(devices, 'count', lambda: 8)
    for number in range(20):
        parts = []
        for host in range(2):
            monkeypatch.setattr(jax, 'process_index', lambda: host)
            parts.append(visited(sampler.indices(number), 4, 160))
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), sampler.indices(number))
        assert min(map(len, parts)) > 0.4 * len(sampler.indices(number))
