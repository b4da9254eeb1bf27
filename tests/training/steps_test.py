"""The two steps: independent of devices, padding and microbatches; noise once; DP-SGD as written."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from dpp_jax import build
from dpp_jax.data import augment
from dpp_jax.diffusion import winograd
from dpp_jax.privacy.clipping import Grid, Team, clipped_gradient_sum, clipped_sum
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.privacy.shares import Share
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib

SGD = optax.sgd(1.0)


@pytest.fixture(scope='module')
def digits():
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    return images[:60], labels[:60].astype(np.int32)


@pytest.fixture(scope='module')
def params(tiny_model):
    return tiny_model.init(jax.random.key(3))


@pytest.fixture(scope='module')
def small(quick_model):
    """A model and parameters that compile soon: for what no network changes."""
    return quick_model, quick_model.init(jax.random.key(0))


def noise_key(seed=5):
    return NoiseKey(identifier='test', keys=jax.random.split(jax.random.key(seed), 4))


def make_mechanism(sigma=1.0, clip_norm=0.5):
    return GaussianMechanism(
        name='dp_sgd', noise_multiplier=sigma, sampling_probability=0.5, sensitivity=clip_norm
    )


def dp_step(
    tiny_model,
    *,
    sigma=1.0,
    clip_norm=0.5,
    microbatch=4,
    optimizer=SGD,
    draws=2,
    at_once=None,
    rows=32,
    capacity=None,
    team=1,
):
    return steps.make_dp_step(
        tiny_model.example_loss(draws=draws, label_dropout=0.1, draws_at_once=at_once, shares=team),
        optimizer,
        make_mechanism(sigma, clip_norm),
        noise_key(),
        expected_batch_size=20.0,
        rows=rows,
        microbatch=microbatch,
        ema_decay=0.9,
        capacity=capacity,
        devices_per_image=team,
    )


def take(step, params, digits, indices, *, number, microbatch, capacity=32, optimizer=SGD, team=1):
    """One step from `params` on the first `number` devices; the update and the metrics."""
    batch = steps.make_batch(*digits, np.asarray(indices, int), capacity)
    state = devices.replicate(state_lib.create(params, optimizer))
    used = steps.used_microbatches(len(indices), microbatch, team)
    (new, metrics), entry = step(0, state, devices.deal_own(batch, team), used)
    assert entry == step.mechanism.entry(0, 'test')
    new, metrics = devices.first(new), devices.first(metrics)
    return jax.tree.map(np.subtract, new.params.tree(), params), metrics, new


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope='module')
def by_devices(small, digits):
    """The same logical batch of 19 on 1, 2 and 8 devices with other microbatches, parts and padding."""
    updates = {}
    for number, microbatch, capacity, at_once in ((1, 8, 24, 1), (2, 4, 24, 2), (8, 2, 48, None)):
        with devices.limited_to(number):
            step = dp_step(small[0], clip_norm=2.0, microbatch=microbatch, at_once=at_once, rows=capacity)
            updates[number] = take(
                step,
                small[1],
                digits,
                range(3, 22),
                number=number,
                microbatch=microbatch,
                capacity=capacity,
            )
    return updates


def test_devices_microbatches_and_padding_do_not_change_the_update(by_devices):
    one = flat(by_devices[1][0])
    for number in (2, 8):
        other = flat(by_devices[number][0])
        assert np.linalg.norm(other - one) < 1e-5 * np.linalg.norm(one)
        for name, value in by_devices[1][1].items():
            np.testing.assert_allclose(by_devices[number][1][name], value, rtol=1e-4)
    assert by_devices[8][1]['batch_size'] == 19 and 0.1 < by_devices[8][1]['clipped_share'] < 0.9


@pytest.mark.parametrize('number, microbatch, rows', [(1, 4, 8), (2, 2, 4)])
def test_more_images_than_the_public_size_of_a_batch_take_the_same_step_in_parts(
    by_devices, small, digits, number, microbatch, rows
):
    with devices.limited_to(number):
        step = dp_step(small[0], clip_norm=2.0, microbatch=microbatch, rows=rows)
        found = take(
            step, small[1], digits, range(3, 22), number=number, microbatch=microbatch, capacity=rows
        )
    one, other = flat(by_devices[1][0]), flat(found[0])
    assert np.linalg.norm(other - one) < 1e-5 * np.linalg.norm(one)
    assert found[1]['batch_size'] == 19


def take_in_shares(step, params, digits, indices, *, processes, number, microbatch, capacity, rows):
    """One step as by so many processes with `number` devices each: every one has its own images alone."""
    parts, used = [], set()
    with devices.limited_to(number):
        for index in range(processes):
            share, own = Share(index, processes), slice(index, None, processes)
            batch = steps.make_batch(
                digits[0][own], digits[1][own], indices, capacity, share=share, rows=rows
            )
            parts.append(devices.deal_own(batch))
            used.add(int(steps.used_microbatches(share.largest(indices), microbatch)))
    (microbatches,) = used
    state = devices.replicate(state_lib.create(params, SGD))
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    (new, metrics), _ = step(0, state, batch, np.int32(microbatches))
    return flat(jax.tree.map(np.subtract, devices.first(new).params.tree(), params)), devices.first(metrics)


@pytest.mark.parametrize(
    ('processes', 'number', 'microbatch', 'rows'), [(4, 2, 4, 24), (2, 4, 8, 4)], ids=str
)
def test_processes_with_their_own_images_take_the_step_of_one(
    by_devices, small, digits, processes, number, microbatch, rows
):
    """Also with room for fewer rows than there are, and less than a microbatch."""
    capacity = microbatch * number
    step = dp_step(small[0], clip_norm=2.0, microbatch=microbatch, rows=rows, capacity=processes * capacity)
    update, metrics = take_in_shares(
        step,
        small[1],
        digits,
        np.arange(3, 22),
        processes=processes,
        number=number,
        microbatch=microbatch,
        capacity=capacity,
        rows=rows,
    )
    one = flat(by_devices[1][0])
    assert np.linalg.norm(update - one) < 1e-5 * np.linalg.norm(one)
    assert metrics['batch_size'] == 19


def test_a_process_without_a_row_and_one_with_all_take_the_step_of_one(small, digits):
    model, params = small
    indices = np.arange(1, 60, 4)  # all of the second of four processes
    step = dp_step(model, clip_norm=2.0, microbatch=4, rows=24, capacity=32)
    with devices.limited_to(8):
        expected = flat(take(step, params, digits, indices, number=8, microbatch=4)[0])
    update, metrics = take_in_shares(
        step, params, digits, indices, processes=4, number=2, microbatch=4, capacity=8, rows=24
    )
    assert np.linalg.norm(update - expected) < 1e-5 * np.linalg.norm(expected)
    assert metrics['batch_size'] == 15


def test_the_average_is_part_of_the_state(by_devices, small):
    """First update: decay min(0.9, 2 / 11), as the PyTorch code warms it up."""
    update, _, new = by_devices[1]
    expected = jax.tree.map(lambda p, u: p + (1 - 2 / 11) * u, small[1], update)
    np.testing.assert_allclose(flat(new.ema_params), flat(expected), rtol=1e-4, atol=1e-6)
    assert new.step == 1


@pytest.fixture(scope='module')
def eight_device_step(tiny_model):
    return dp_step(tiny_model, microbatch=2, sigma=3.0)


def test_update_is_the_clipped_sum_plus_the_same_noise(eight_device_step, tiny_model, params, digits):
    """Against a plain loop over examples, with the noise taken from the empty batch."""
    indices = np.arange(3, 12)
    update, metrics, _ = take(eight_device_step, params, digits, indices, number=8, microbatch=2)
    noise, _, _ = take(eight_device_step, params, digits, [], number=8, microbatch=2)
    loss = tiny_model.example_loss(draws=2, label_dropout=0.1)
    _, draw_key = jax.random.split(jax.random.fold_in(noise_key().keys[0], 0))
    gradient = jax.jit(jax.grad(loss))
    total, norms = 0.0, []
    for i in indices:
        image = digits[0][i].astype(np.float32) / 127.5 - 1
        key = jax.random.fold_in(draw_key, i)  # an image's draws depend on nobody else
        g = flat(gradient(params, image, digits[1][i], key)).astype(np.float64)
        norms.append(np.linalg.norm(g))
        total = total + g * min(1, 0.5 / norms[-1])
    expected = -total / 20.0
    got = flat(update) - flat(noise)
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)
    assert metrics['gradient_norm'] == pytest.approx(np.mean(norms), rel=1e-4)


def test_batch_size_changes_recompile_nothing(eight_device_step, params, digits, compilations):
    state, numbers = devices.replicate(state_lib.create(params, SGD)), itertools.count()

    def run(state, n):
        batch = devices.deal(steps.make_batch(*digits, np.arange(n), 32))
        used = steps.used_microbatches(n, 2)
        (state, _), _ = eight_device_step(next(numbers), state, batch, used)
        return state

    state = run(run(state, 7), 3)
    before = compilations.count
    for n in (0, 1, 13, 32):
        state = run(state, n)
    jax.block_until_ready(state)
    assert compilations.count == before


def test_pretraining_is_the_gradient_of_the_mean_loss(small, digits):
    model, params = small
    loss = model.example_loss(draws=2, label_dropout=0.1)
    plain = augment.make_augmentation('none')
    updates = []
    # Of a device's rows: 20 in parts of 7; 10, most of them without an image, in parts of 4.
    for number, capacity, at_once in ((1, 10, 7), (8, 40, 4)):
        with devices.limited_to(number):
            step = steps.make_pretrain_step(
                model.drawing(draws=2, label_dropout=0.1),
                model.errors,
                SGD,
                augment=plain,
                ema_decay=0.9,
                images_at_once=at_once,
            )
            batch = devices.deal(steps.make_batch(*digits, np.arange(10), capacity))
            state = devices.replicate(state_lib.create(params, SGD))
            new, metrics = step(state, batch, jax.random.key(2))
            updates.append(flat(devices.first(new).params) - flat(params))
            assert np.isfinite(devices.first(metrics)['loss'])
    assert np.linalg.norm(updates[1] - updates[0]) < 1e-5 * np.linalg.norm(updates[0])

    step_key = jax.random.fold_in(jax.random.key(2), 0)
    gradient = jax.jit(jax.grad(loss))
    total = 0.0
    for i in range(10):
        _, key = jax.random.split(jax.random.fold_in(step_key, i))
        total += flat(gradient(params, digits[0][i] / np.float32(127.5) - 1, digits[1][i], key))
    expected = -total / 10
    assert np.linalg.norm(updates[0] - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize('size', [1, 2, 12, 25])
@pytest.mark.parametrize('at_once', [None, 1, 4, 7, 30])
def test_equal_parts_are_few_and_no_row_is_lost_or_counts_twice(size, at_once):
    rows = {'mask': jnp.arange(size) % 3 != 1, 'image': jnp.arange(size)}
    padded, number = steps._in_equal_parts(rows, at_once)
    assert padded['mask'].size % number == 0 and padded['mask'].size // number <= (at_once or size)
    assert number == -(-size // (at_once or size))
    for name in rows:
        np.testing.assert_array_equal(padded[name][:size], rows[name])
    assert not padded['mask'][size:].any()


@pytest.mark.parametrize('number', [1, 2, 8])
@pytest.mark.parametrize('microbatch', [1, 2, 3])
def test_no_real_row_lies_behind_the_microbatches_that_are_visited(number, microbatch):
    """One that did would count or not by who else is in the batch: no sensitivity would bound that."""
    with devices.limited_to(number):
        capacity = 3 * microbatch * number
        for rows in range(2 * capacity):
            batch = {'mask': np.arange(-(-max(rows, 1) // capacity) * capacity) < rows}
            visited = steps.used_microbatches(rows, microbatch) * microbatch
            assert devices.deal(batch)['mask'][:, :visited].sum() == rows
            assert visited <= batch['mask'].size // number


def test_clip_bound_holds_with_a_bfloat16_network(tiny_config):
    """Activations are bfloat16; master weights, gradients, norms and the clipped sum are float32."""
    model = build.model(tiny_config(model__dtype='bfloat16', model__attention_resolutions=()))
    loss = model.example_loss(draws=2, label_dropout=0.1)
    image = jnp.full((1, 8, 8, 1), 1.0)
    grid = Grid(clip_norm=1e-3, rows=1)

    @jax.jit
    def clipped(params):
        gradient = jax.vmap(jax.grad(loss), (None, 0, 0, 0))(
            params, image, jnp.zeros(1, jnp.int32), jax.random.split(jax.random.key(1), 1)
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}
        return clipped_sum(gradient, jnp.ones(1, bool), grid)

    fresh = model.init(jax.random.key(0))
    for scale in (1.0, 30.0):  # larger weights: gradients of many orders of magnitude in one network
        units, norms = clipped(jax.tree.map(lambda leaf, scale=scale: scale * leaf, fresh))
        total = jax.tree.map(grid.decode, units)
        length = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(total)))
        assert norms[0] > 1e-3 and 0.9999e-3 < length <= 1e-3


def library_convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.float64(leaf) if leaf.dtype == np.float32 else np.asarray(leaf), tree)


def test_the_fast_sum_of_clipped_gradients_equals_a_plain_one_in_float64(tiny_config, digits, monkeypatch):
    """Own convolution, draws in parts, images in microbatches; and the library's, one image at a time."""
    monkeypatch.setattr(winograd, '_is_small', lambda kernel: False)  # as it is for usual widths
    levels = {'model__multipliers': (1, 2), 'model__attention_resolutions': ()}  # one attention is left
    fast = build.model(tiny_config(**levels))
    plain = build.model(tiny_config(**levels, model__dtype='float64'))
    rng = np.random.default_rng(4)
    params = jax.tree.map(  # the first weights of some layers are zero: their inputs' gradients would be
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32),
        fast.init(jax.random.key(4)),
    )
    images, labels = digits[0][:6].astype(np.float32) / 127.5 - 1, digits[1][:6]
    keys = jax.random.split(jax.random.key(6), 6)
    draws = {'draws': 4, 'label_dropout': 0.3}
    drawn = jax.jit(jax.vmap(fast.drawing(**draws)))(labels, keys)

    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(winograd, 'conv3x3', library_convolution)
        gradient = jax.jit(jax.grad(lambda params, *of_image: plain.errors(params, *of_image).mean()))
        gradients = np.stack(
            [
                flat(gradient(*in_float64((params, image, jax.tree.map(lambda leaf: leaf[i], drawn)))))
                for i, image in enumerate(images)
            ]
        )
    assert gradients.dtype == np.float64
    norms = np.linalg.norm(gradients, axis=1)
    clip_norm = float(np.median(norms))  # half of them are clipped
    grid = Grid(clip_norm=clip_norm, rows=6)
    expected = np.minimum(1, grid.bound / norms) @ gradients

    loss = fast.example_loss(**draws, draws_at_once=2)
    units, _ = jax.jit(
        lambda params, examples: clipped_gradient_sum(
            lambda params, example: loss(params.tree(), *example),  # as the step does it
            params, examples, np.ones(6, bool), grid=grid, microbatch=3, microbatches=2,
        )
    )(state_lib.FlatParams.of(params), (images, labels, keys))  # fmt: skip
    total = flat(jax.tree.map(grid.decode, units))
    assert np.linalg.norm(total - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    'expected, size, broken, has_loss',
    [
        (20.0, 1, 1, False),  # one bad image, alone in its Poisson sample
        (20.0, 11, 11, False),
        (1.0, 2, 2, False),
        (20.0, 11, 10, True),
        (20.0, 0, 0, True),
    ],
)
def test_no_number_of_broken_examples_breaks_the_weights(expected, size, broken, has_loss):
    """Images with label 1 have a loss that is not finite: they count as zero, and are counted."""
    images = np.zeros((12, 1, 1, 1), np.uint8), np.where(np.arange(12) < broken, 1, 0)
    with devices.limited_to(1):
        step = steps.make_dp_step(
            lambda params, image, label, key: jnp.where(label == 1, jnp.nan, 1.0) * jnp.sum(params['w']),
            SGD,
            make_mechanism(clip_norm=1.0),
            noise_key(),
            expected_batch_size=expected,
            rows=12,
            microbatch=4,
            ema_decay=0.9,
        )
        params, indices = {'w': np.ones(3, np.float32)}, np.arange(size)
        _, metrics, new = take(step, params, images, indices, number=1, microbatch=4, capacity=12)
    assert metrics['non_finite'] == broken and metrics['batch_size'] == size
    assert np.isfinite(metrics['loss']) == has_loss
    assert np.isfinite(new.params.vector).all()


def group_step(model, params, digits, members, indices, microbatch=1, draws=2, team=1):
    """One step on groups without noise, of which the learning rate is one: minus the sum over 20 images."""
    step = dp_step(model, sigma=1e-9, microbatch=microbatch, rows=8, draws=draws, team=team)
    batch = steps.make_batch(*digits, np.asarray(indices, int), 8, members)
    state = devices.replicate(state_lib.create(params, SGD))
    used = steps.used_microbatches(len(indices), microbatch, team)
    (new, metrics), _ = step(0, state, devices.deal_own(batch, team), used)
    return flat(jax.tree.map(np.subtract, devices.first(new).params.tree(), params)), devices.first(metrics)


def test_a_groups_gradient_is_the_sum_of_its_images_gradients_clipped_as_a_whole(small, digits):
    model, params = small
    members = np.array([[3, 4, 40], [5, -1, -1], [6, 7, -1], [8, 9, 10]])
    loss = model.example_loss(draws=2, label_dropout=0.1)
    _, draw_key = jax.random.split(jax.random.fold_in(noise_key().keys[0], 0))
    gradient = jax.jit(jax.grad(loss))
    total, norms = 0.0, []
    for row in members[[0, 1, 2]]:
        of_images = [
            flat(
                gradient(
                    params,
                    digits[0][i] / np.float32(127.5) - 1,
                    digits[1][i],
                    jax.random.fold_in(draw_key, i),
                )
            ).astype(np.float64)
            for i in row[row >= 0]
        ]
        norms.append(np.linalg.norm(sum(of_images)))
        total = total + sum(of_images) * min(1, 0.5 / norms[-1])
    assert max(norms) > 0.5  # somebody is clipped
    for number, microbatch in ((1, 4), (8, 1)):
        with devices.limited_to(number):
            update, metrics = group_step(model, params, digits, members, [0, 1, 2], microbatch)
        np.testing.assert_allclose(update, -total / 20, atol=1e-4 * np.linalg.norm(total / 20))
        assert metrics['batch_size'] == 3 and metrics['gradient_norm'] == pytest.approx(
            np.mean(norms), rel=1e-4
        )


def test_one_group_changes_the_sum_by_the_clip_norm_at_most_whatever_it_holds(small, digits):
    """Many images, of which each alone would be clipped."""
    members = np.array([np.arange(12), np.r_[20:23, -np.ones(9, int)]])
    model, params = small[0], jax.tree.map(lambda leaf: 3 * leaf, small[1])
    with devices.limited_to(1):
        alone, with_it = (
            group_step(model, params, digits, members, who, 2)[0].astype(np.float64) * 20
            for who in ([1], [0, 1])
        )
    assert 0.49 < np.linalg.norm(with_it - alone) <= 0.5


def test_groups_of_one_image_take_the_step_of_images(small, digits):
    with devices.limited_to(1):
        updates = [
            group_step(*small, digits, members, [3, 5, 9], 2)[0] for members in (None, np.arange(60)[:, None])
        ]
    # Another program rounds otherwise.
    np.testing.assert_allclose(*updates, rtol=1e-6, atol=1e-6 * np.linalg.norm(updates[0]))


@pytest.fixture(scope='module')
def unshared(small, digits):
    """The step of 19 images with 8 draws each, of one device for an image."""
    step = dp_step(small[0], clip_norm=2.0, microbatch=2, draws=8, at_once=3)
    return take(step, small[1], digits, range(3, 22), number=8, microbatch=2)


@pytest.mark.parametrize(
    'team, microbatch, rows, at_once',
    [
        (2, 3, 24, 2),
        (4, 2, 20, None),
        (8, 4, 20, 1),
        (4, 2, 8, None),  # more images than anybody expected
    ],
)
def test_devices_that_share_the_draws_of_an_image_take_the_same_step(
    unshared, small, digits, team, microbatch, rows, at_once
):
    step = dp_step(
        small[0], clip_norm=2.0, microbatch=microbatch, draws=8, at_once=at_once, rows=rows, team=team
    )
    settings = dict(number=8, microbatch=microbatch, capacity=rows, team=team)
    found, metrics, _ = take(step, small[1], digits, range(3, 22), **settings)
    one = flat(unshared[0])
    assert np.linalg.norm(flat(found) - one) < 1e-5 * np.linalg.norm(one)
    assert 0.1 < metrics['clipped_share'] < 0.9 and metrics['batch_size'] == 19
    for name, value in unshared[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4)


@pytest.mark.parametrize('team', [2, 4])
def test_devices_may_share_groups(small, digits, team):
    members = np.array([[3, 4, 40], [5, -1, -1], [6, 7, -1], [8, 9, 10]])
    one, other = (
        group_step(*small, digits, members, [0, 1, 2], microbatch=size, draws=4, team=size)
        for size in (1, team)
    )
    np.testing.assert_allclose(other[0], one[0], atol=1e-5 * np.linalg.norm(one[0]))
    assert other[1]['batch_size'] == 3 and other[1]['gradient_norm'] == pytest.approx(one[1]['gradient_norm'])


@pytest.fixture(scope='module')
def crafted():
    """A function (table (13 examples, 8 shares, P)) → the sum, without noise, of examples, and its metrics.

    The gradient of an example's share is its row in the table: the example's own gradient is their mean.
    """

    def make(table, team):
        step = steps.make_dp_step(
            lambda params, image, label, key, share=0: jnp.vdot(
                params['w'], jnp.asarray(table).reshape(13, team, -1, table.shape[-1]).mean(2)[label, share]
            ),
            SGD,
            make_mechanism(sigma=1e-9, clip_norm=1.0),
            noise_key(),
            expected_batch_size=1.0,
            rows=16,
            microbatch=2,
            ema_decay=0.9,
            devices_per_image=team,
        )
        images = np.zeros((13, 1, 1, 1), np.uint8), np.arange(13)
        params = {'w': np.zeros(table.shape[-1], np.float32)}

        def total(indices):
            update, metrics, _ = take(
                step, params, images, indices, number=8, microbatch=2, capacity=16, team=team
            )
            return -np.float64(flat(update)), metrics

        return total

    return make


@pytest.mark.parametrize('team', [2, 4, 8])
def test_an_example_that_devices_share_moves_the_sum_by_the_clip_norm_at_most(crafted, team):
    """Whatever its parts are: long on one device alone, or on all in directions that cancel or add up."""
    rng = np.random.default_rng(team)
    table = np.zeros((13, 8, 11), np.float32)  # 11 numbers are no whole slices
    table[:7] = rng.standard_normal((7, 8, 11))
    table[7, 3, 10] = 1e12
    table[8] = 1e8 * rng.standard_normal((8, 11))
    table[9, ::2], table[9, 1::2] = 1e6, -1e6 + 0.5
    table[10] = 1e-3
    table[11, 5, 0] = np.nan
    table[12, 0, 4] = np.inf
    total = crafted(table, team)
    base, _ = total(range(7))
    for example in range(7, 13):
        more, metrics = total([*range(7), example])
        own = table[example].astype(np.float64).mean(0)
        expected = own * min(1, 1 / np.linalg.norm(own)) if example < 11 else np.zeros(11)
        assert np.linalg.norm(more - base) <= 1
        np.testing.assert_allclose(more - base, expected, atol=3e-5)
        assert metrics['non_finite'] == (example >= 11) and metrics['batch_size'] == 8
        assert np.isfinite(metrics['loss'])


@pytest.mark.parametrize('team', [2, 8])
def test_an_empty_batch_of_shared_images_is_a_step_without_a_sum(crafted, team):
    total, metrics = crafted(np.ones((13, 8, 11), np.float32), team)([])
    assert np.abs(total).max() < 1e-7 and metrics['batch_size'] == 0


def test_a_team_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ValueError, match='a team has 3 devices; it must divide their number, 8'):
        devices.parallel(Team(axis=devices.AXIS, size=3).sum, in_axes=(0,))(np.ones(8))
