"""DP-SGD steps: sensitivity at the worst gradients, noise once for any devices, padding."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpp_jax.privacy.clipping import Grid, clipped_gradient_sum
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib

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
    mechanism = GaussianMechanism(
        name='dp_sgd', noise_multiplier=SIGMA, sampling_probability=0.5, sensitivity=CLIP
    )
    return steps.make_dp_step(
        loss,
        optimizer,
        mechanism,
        NoiseKey(identifier='test', keys=jax.random.split(jax.random.key(5), 4)),
        expected_batch_size=EXPECTED_SIZE,
        rows=24,
        microbatch=microbatch,
        ema_decay=0.9,
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
            (state, metrics), _ = step(step_number, state, devices.deal(batch), used)
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


def test_noise_is_added_once_by_all_devices_together(take, statistics):
    """The update of an empty batch is noise of std σ C / expected size, fresh in every step."""
    std = SIGMA * CLIP / EXPECTED_SIZE
    states = [take(batch_of(digits(2), ['plain', 'nan'], []), number)[0] for number in range(8)]
    for state in states:  # replicas that drew different noise would drift apart
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:1].repeat(len(x), 0)), state)
    noises = np.stack([flat(state) for state in states], 1)
    statistics.assert_normal(noises, std)
    unused = [state.params.tree()['unused'] for state in states]
    for name in ('a', 'b'):
        statistics.assert_normal(np.stack([leaves[name][0] for leaves in unused]), std)
    columns = [leaves[name][0] for leaves in unused for name in ('a', 'b')]
    statistics.assert_unrelated(np.stack(columns, 1) / std)


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
            clipped_gradient_sum,
            loss,
            params,
            grid=Grid(clip_norm=1.0, rows=24),
            microbatch=4,
            microbatches=6,
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
        GaussianMechanism, '_add_noise', lambda self, total, key: jax.tree.map(jnp.ones_like, total)
    )
    take = stepper(linear_loss, 2, 4, optax.adam(0.1))
    one, metrics = take(batch_of(digits(18), ['plain', 'tiny', 'huge'] * 6))
    other, other_metrics = take(batch_of(digits(5, seed=6), ['nan', 'huge'] + ['plain'] * 3))
    assert metrics['batch_size'] == 18 and other_metrics['batch_size'] == 5
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.abs(flat(one)).min() > 0
