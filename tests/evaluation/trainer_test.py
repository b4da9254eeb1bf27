"""The trainer of the networks: its step, its epochs, its settings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from dpp_jax.evaluation import networks, residual, trainer


@pytest.fixture(name='digits', scope='module')
def _digits():
    data = load_digits()
    return (data.images[..., None] * 255 / 16).astype(np.uint8), data.target


def train(images, labels, *, seed=0, progress=None, **settings):
    return trainer.train(
        networks.Mlp(10),
        images,
        labels,
        key=jax.random.key(seed),
        settings=trainer.Settings(**settings),
        progress=progress,
    )


def test_training_step_is_adam_with_a_warmed_up_average(digits):
    images, labels = jnp.asarray(digits[0]), jnp.asarray(digits[1], jnp.int32)
    network, key = networks.Mlp(10), jax.random.key(0)
    adam = optax.adam(1e-2)
    state = trainer._initial_state(network, key, (8, 8, 1), 1e-2)
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], np.float32)
    result = trainer._train_steps(network, state, images, labels, rows, mask, key, 1e-2, 0.15)

    params = average = state.weights.params
    opt_state = adam.init(params)
    for n, (batch, batch_mask) in enumerate(zip(rows, mask)):

        def loss_fn(params):
            logits, _ = network.apply(
                {'params': params}, images[batch] / 127.5 - 1.0, True,
                rngs={'dropout': jax.random.fold_in(key, n)},
            )  # fmt: skip
            log_p = jax.nn.log_softmax(logits)[np.arange(4), labels[batch]]
            return -log_p[batch_mask == 1].mean()

        updates, opt_state = adam.update(jax.grad(loss_fn)(params), opt_state)
        params = optax.apply_updates(params, updates)
        decay = min(0.15, (2 + n) / (11 + n))  # 2/11 > 0.15: capped from the first step on
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    assert int(result.weights.step) == 3
    for ours, theirs in ((result.weights.params, params), (result.weights.ema_params, average)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    # With a decay near 1 the warm-up rules: after one step the average is 2/11 old, 9/11 new.
    first = trainer._train_steps(network, state, images, labels, rows[:1], mask[:1], key, 1e-2, 0.9999)
    three = state.weights.params, first.weights.params, first.weights.ema_params
    for old, new, mean in zip(*map(jax.tree.leaves, three)):
        np.testing.assert_allclose(mean, (2 * old + 9 * new) / 11, atol=1e-6)

    # Rows under the mask do not matter.
    rows[2, 2:] = 99
    other = trainer._train_steps(network, state, images, labels, rows, mask, key, 1e-2, 0.15)
    jax.tree.map(np.testing.assert_array_equal, other.weights.params, result.weights.params)


@pytest.mark.parametrize(
    ('count', 'batch_size'), [(10, 3), (3, 10), (1, 1), (64, 64), (1000, 2), (4500, 7), (513, 5)]
)
def test_an_epoch_has_every_image_once_in_calls_of_one_shape(count, batch_size):
    calls = trainer._epoch_batches(count, batch_size, np.random.default_rng(0))
    assert len({rows.shape for rows, _ in calls}) == 1
    assert all(rows.shape == mask.shape and len(rows) <= 100 for rows, mask in calls)
    assert calls[0][0].shape[1] == min(batch_size, count)
    used = np.concatenate([rows[mask == 1] for rows, mask in calls])
    np.testing.assert_array_equal(np.sort(used), np.arange(count))
    other = trainer._epoch_batches(count, batch_size, np.random.default_rng(0))
    np.testing.assert_array_equal(calls[0][0], other[0][0])


@pytest.mark.parametrize(('count', 'batch_size'), [(10, 3), (3, 10), (64, 64), (1000, 2), (4500, 7)])
def test_as_in_pytorch_all_batches_of_an_epoch_but_the_last_are_full(count, batch_size):
    calls = trainer._epoch_batches(count, batch_size, np.random.default_rng(0), is_even=False)
    assert all(rows.shape == mask.shape and len(rows) <= 100 for rows, mask in calls)
    sizes = np.concatenate([mask.sum(axis=1) for _, mask in calls])
    assert len(sizes) == -(-count // batch_size)
    assert (sizes[:-1] == batch_size).all() and 0 < sizes[-1] <= batch_size and sizes.sum() == count
    used = np.concatenate([rows[mask == 1] for rows, mask in calls])
    np.testing.assert_array_equal(np.sort(used), np.arange(count))


def test_nothing_is_compiled_after_the_first_epoch(digits):
    images, labels = digits
    compiled = []

    def progress(done, total, note):
        compiled.append((trainer._train_steps._cache_size(), trainer._program.cache_info().misses))

    trainer._train_steps.clear_cache()
    trainer._program.cache_clear()
    # 451 images and batches of 4: each epoch is two calls.
    train(images[:500], labels[:500], batch_size=4, epochs=3, progress=progress)
    assert compiled[:2] == [(0, 0), (1, 0)]
    assert len(compiled) == 1 + 3 * 2 + 1
    assert set(compiled[3:]) == {(1, 1)}
    # Nor by another training with images of the same size.
    train(images[:500], labels[:500], batch_size=4, seed=1, learning_rate=1e-3, epochs=1)
    assert trainer._train_steps._cache_size() == 1


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('epochs', 0), ('epochs', 1.5), ('batch_size', 0), ('learning_rate', 0.0),
        ('learning_rate', float('nan')), ('ema_decay', 1.0), ('ema_decay', -0.1), ('epochs', float('inf')),
        ('held_out', 0.0), ('held_out', 1.0), ('candidates', 0), ('candidates', 2.5),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name} is {value}'):
        trainer.Settings(**{name: value})


@pytest.mark.parametrize(
    'epochs, candidates, judged',
    [(3, None, [1, 2, 3]), (50, 10, list(range(5, 51, 5))), (3, 10, [1, 2, 3]), (7, 2, [4, 7]), (9, 1, [9])],
)
def test_judged_epochs_are_spaced_equally_and_end_with_the_last(epochs, candidates, judged):
    assert trainer.Settings(epochs=epochs, candidates=candidates).judged_epochs == judged


class Normalized(nn.Module):
    """One dense layer behind a batch normalization."""

    classes: int

    @nn.compact
    def __call__(self, images, train=False, mask=None):
        x = residual._norm(train, mask)(images, 'norm').reshape(len(images), -1)
        return nn.Dense(self.classes, name='dense')(x), x


def test_statistics_of_batches_are_those_of_their_images_and_are_averaged_as_weights_are(digits):
    images, labels = jnp.asarray(digits[0]), jnp.asarray(digits[1], jnp.int32)
    network, key = Normalized(10), jax.random.key(0)
    state = trainer._initial_state(network, key, (8, 8, 1), 1e-2)
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], np.float32)
    result = trainer._train_steps(network, state, images, labels, rows, mask, key, 1e-2, 0.9999)
    mean = average = 0.0
    for n, (batch, batch_mask) in enumerate(zip(rows, mask), start=1):
        own = trainer.to_float(np.asarray(images)[batch[batch_mask == 1]]).mean()
        mean = 0.9 * mean + 0.1 * own
        decay = (1 + n) / (10 + n)
        average = decay * average + (1 - decay) * mean
    found = [statistics['norm']['mean'] for statistics in (result.statistics, result.ema_statistics)]
    np.testing.assert_allclose(np.ravel(found), [mean, average], rtol=1e-4)
    # What a judge is given are the averages, with which images get results of their own.
    seen = []
    trainer.fit(
        network, digits[0][:64], digits[1][:64], key=key, rng=np.random.default_rng(0),
        settings=trainer.Settings(epochs=1), judge=lambda epoch, averages: seen.append(averages) or '',
    )  # fmt: skip
    both, alone = (
        trainer.apply(network, seen[0].params, digits[0][:size], statistics=seen[0].statistics)[0][0]
        for size in (2, 1)
    )
    np.testing.assert_allclose(both, alone, rtol=1e-5, atol=1e-5)
