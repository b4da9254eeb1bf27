"""The classifiers on real handwritten digits, and what their trainer promises."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dpp_jax.evaluation import classifiers


@pytest.fixture(name='digits', scope='module')
def _digits():
    """Train images, train labels, test images, test labels."""
    data = load_digits()
    images = (data.images[..., None] * 255 / 16).astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    return split[0], split[2], split[1], split[3]


def train(kind, images, labels, seed=0, **settings):
    settings = {'epochs': 3, 'classes': 10} | settings
    return classifiers.train_classifier(kind, images, labels, key=jax.random.key(seed), **settings)


@pytest.mark.parametrize('kind', classifiers.KINDS)
def test_digits_are_learnt(digits, kind):
    images, labels, test_images, test_labels = digits
    classifier = train(kind, images, labels, epochs=12, learning_rate=2e-3)
    assert classifiers.accuracy(classifier, test_images, test_labels) > 0.93
    assert classifier.held_out_accuracy > 0.9
    predicted = classifier.predict(test_images)
    assert predicted.shape == test_labels.shape and predicted.dtype == np.int32


@pytest.mark.parametrize('kind', classifiers.KINDS)
def test_same_key_same_classifier(digits, kind):
    images, labels, test_images, _ = digits
    one, two = (train(kind, images, labels, seed=3) for _ in range(2))
    assert one.held_out_accuracy == two.held_out_accuracy
    np.testing.assert_array_equal(one.predict(test_images), two.predict(test_images))


def test_another_key_is_another_classifier(digits):
    images, labels, test_images, _ = digits
    one, two = (train('mlp', images, labels, seed=seed) for seed in (0, 1))
    assert (one.predict(test_images) != two.predict(test_images)).any()


def test_selection_sees_nothing_but_the_training_images(digits):
    assert set(inspect.signature(classifiers.train_classifier).parameters) == {
        'kind', 'images', 'labels', 'classes', 'key', 'epochs', 'batch_size', 'learning_rate',
        'ema_decay', 'held_out', 'progress',
    }  # fmt: skip
    # Images whose labels are all wrong: high held-out accuracy, hardly a right answer on real ones.
    images, labels, test_images, test_labels = digits
    for kind in ('mlp', 'logistic'):
        classifier = train(kind, images, (labels + 1) % 10, epochs=8, learning_rate=2e-3)
        assert classifier.held_out_accuracy > 0.85
        assert classifiers.accuracy(classifier, test_images, test_labels) < 0.1


def test_the_best_epoch_is_kept(digits):
    images, labels, _, _ = digits
    notes = []
    # A learning rate that makes the accuracy jump up and down.
    classifier = train(
        'mlp', images, labels, epochs=12, learning_rate=0.3, ema_decay=0.0,
        progress=lambda done, total, note: notes.append(note),
    )  # fmt: skip
    # The note of an epoch tells the accuracy after the epoch before it.
    seen = [float(note.split()[-1]) for note in notes if note.startswith('epoch') and ',' in note]
    assert len(seen) == 11 and max(seen) > min(seen)
    kept = int(re.fullmatch(r'epoch (\d+) of 12', classifier.selected).group(1))
    if kept <= 11:
        assert round(classifier.held_out_accuracy, 3) == seen[kept - 1] == max(seen)
    assert round(classifier.held_out_accuracy, 3) >= max(seen)
    # The weights kept are the ones that had this accuracy.
    rng = classifiers._numpy_rng(jax.random.key(0))
    _, held = classifiers._split(labels, 10, 0.1, rng)
    assert classifiers.accuracy(classifier, images[held], labels[held]) == pytest.approx(
        classifier.held_out_accuracy
    )


def test_split_is_stratified_and_complete():
    labels = np.repeat(np.arange(4), [2, 10, 51, 100])
    train_rows, held_rows = classifiers._split(labels, 4, 0.1, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.r_[train_rows, held_rows]), np.arange(labels.size))
    np.testing.assert_array_equal(np.bincount(labels[held_rows]), [1, 1, 5, 10])
    _, held_rows = classifiers._split(labels, 4, 0.9, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(labels[held_rows]), [1, 9, 46, 90])


def parameter_count(network, shape):
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))['params']
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)), params


def test_cnn_at_28_is_the_papers():
    convolutions = (9 * 1 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    dense = (3 * 3 * 128 + 1) * 128 + (128 + 1) * 10
    count, _ = parameter_count(classifiers.Cnn(10), (28, 28, 1))
    assert count == convolutions + dense == 241_546


class PlainCnn(nn.Module):
    """The paper's CNN as one would write it with the library's layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (3, 3), padding='VALID', name='conv_1')(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.Conv(64, (3, 3), padding='VALID', name='conv_2')(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(nn.Conv(128, (3, 3), padding='VALID', name='conv_3')(x))
        x = nn.relu(nn.Dense(128, name='dense_1')(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name='dense_2')(x)


def test_cnn_computes_what_library_layers_compute():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    params = classifiers._initial_params(classifiers.Cnn(10), jax.random.key(0), (28, 28, 1))
    logits, _ = classifiers.apply_network(classifiers.Cnn(10), params, images, batch_size=2)
    expected = jax.jit(PlainCnn().apply)({'params': params}, images / np.float32(127.5) - 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('shape', 'last_pixels'),
    [
        ((28, 28, 1), 9), ((32, 32, 3), 16), ((18, 18, 1), 1), ((18, 28, 1), 3),  # no padding
        ((17, 17, 1), 16), ((14, 14, 1), 9), ((8, 8, 1), 4), ((28, 8, 3), 14),  # padding
        ((3, 3, 1), 1), ((1, 1, 1), 1), ((1, 6, 1), 6),  # pools left out
    ],
)  # fmt: skip
def test_cnn_fits_any_size(shape, last_pixels):
    network = classifiers.Cnn(5)
    _, params = parameter_count(network, shape)
    assert params['dense_1']['kernel'].shape == (last_pixels * 128, 128)
    images = jnp.zeros((2, *shape))
    logits, hidden = jax.eval_shape(lambda p: network.apply({'params': p}, images), params)
    assert logits.shape == (2, 5) and hidden.shape == (2, 128)


def test_training_step_is_adam_with_a_warmed_up_average(digits):
    images, labels = jnp.asarray(digits[0]), jnp.asarray(digits[1], jnp.int32)
    network, key = classifiers.Mlp(10), jax.random.key(0)
    params = classifiers._initial_params(network, key, (8, 8, 1))
    adam = optax.adam(1e-2)
    state = classifiers._TrainState(
        params, optax.scale_by_adam().init(params), params, jnp.zeros((), jnp.int32)
    )
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], np.float32)
    result = classifiers._train_steps(network, state, images, labels, rows, mask, key, 1e-2, 0.15)

    average, opt_state = params, adam.init(params)
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
    assert int(result.step) == 3
    for ours, theirs in ((result.params, params), (result.average, average)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    # With a decay near 1 the warm-up rules: after one step the average is 2/11 old, 9/11 new.
    first = classifiers._train_steps(network, state, images, labels, rows[:1], mask[:1], key, 1e-2, 0.9999)
    for old, new, mean in zip(*map(jax.tree.leaves, (state.params, first.params, first.average))):
        np.testing.assert_allclose(mean, (2 * old + 9 * new) / 11, atol=1e-6)

    # Rows under the mask do not matter.
    rows[2, 2:] = 99
    other = classifiers._train_steps(network, state, images, labels, rows, mask, key, 1e-2, 0.15)
    jax.tree.map(np.testing.assert_array_equal, other.params, result.params)


@pytest.mark.parametrize(
    ('count', 'batch_size'), [(10, 3), (3, 10), (1, 1), (64, 64), (1000, 2), (4500, 7), (513, 5)]
)
def test_an_epoch_has_every_image_once_in_calls_of_one_shape(count, batch_size):
    calls = classifiers._epoch_batches(count, batch_size, np.random.default_rng(0))
    assert len({rows.shape for rows, _ in calls}) == 1
    assert all(rows.shape == mask.shape and len(rows) <= 100 for rows, mask in calls)
    assert calls[0][0].shape[1] == min(batch_size, count)
    used = np.concatenate([rows[mask == 1] for rows, mask in calls])
    np.testing.assert_array_equal(np.sort(used), np.arange(count))
    other = classifiers._epoch_batches(count, batch_size, np.random.default_rng(0))
    np.testing.assert_array_equal(calls[0][0], other[0][0])


def test_nothing_is_compiled_after_the_first_epoch(digits):
    images, labels, _, _ = digits
    compiled = []

    def progress(done, total, note):
        compiled.append((classifiers._train_steps._cache_size(), classifiers._apply._cache_size()))

    classifiers._train_steps.clear_cache()
    classifiers._apply.clear_cache()
    # 451 images and batches of 4: each epoch is two calls.
    train('mlp', images[:500], labels[:500], batch_size=4, epochs=3, progress=progress)
    assert compiled[0] == (1, 0)
    assert len(compiled) == 3 * 2 + 1
    assert set(compiled[2:]) == {(1, 1)}
    # Nor by another classifier of the same kind and size.
    train('mlp', images[:500], labels[:500], batch_size=4, seed=1, learning_rate=1e-3, epochs=1)
    assert classifiers._train_steps._cache_size() == 1


@pytest.mark.parametrize('kind', ['mlp', 'logistic'])
def test_progress_rises_to_its_total(digits, kind):
    images, labels, _, _ = digits
    calls = []
    train(kind, images, labels, epochs=2, batch_size=8, progress=lambda *args: calls.append(args))
    done, totals, notes = zip(*calls)
    assert list(done) == sorted(done) and done[0] > 0
    assert set(totals) == {done[-1]}
    assert 'held-out accuracy' in notes[-1]


def test_batch_larger_than_the_set(digits):
    images, labels, _, _ = digits
    classifier = train('mlp', images[:60], labels[:60], batch_size=5000, epochs=2)
    assert classifier.predict(images[:5]).shape == (5,)


def test_two_classes_and_colour():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 100, (60, 4, 5, 3)).astype(np.uint8)
    images[labels == 1, ..., 2] += 100
    for kind in classifiers.KINDS:
        classifier = train(kind, images, labels, classes=2, epochs=40, learning_rate=3e-3)
        assert classifiers.accuracy(classifier, images, labels) > 0.9, kind


LABELS = np.arange(20, dtype=np.int32) % 4
IMAGES = np.zeros((20, 4, 4, 1), np.uint8)


@pytest.mark.parametrize('kind', ['cnn', 'logistic'])
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'labels': LABELS + 1}, r'from 1 to 4; they must lie in \[0, 4\)'),
        ({'labels': LABELS - 1}, 'from -1 to 2'),
        ({'labels': np.where(LABELS == 2, 3, LABELS)}, r'no image of class \[2\]'),
        ({'labels': LABELS * 1.0}, 'labels is float64'),
        ({'labels': LABELS[:5]}, 'labels is int32 of shape'),
        ({'images': IMAGES / 255}, 'images is float64'),
        ({'images': IMAGES[..., 0]}, 'images is uint8 of shape'),
        ({'images': IMAGES[:0], 'labels': LABELS[:0]}, 'at least one image'),
        ({'images': IMAGES[:7], 'labels': LABELS[:7]}, '1 image of class 3; holding out'),
        ({'held_out': 0.0}, 'held_out is 0.0'),
        ({'held_out': 1.0}, 'held_out is 1.0'),
        ({'classes': 1}, 'classes is 1'),
    ],
)
def test_bad_images_are_refused(kind, changes, message):
    arguments = {'images': IMAGES, 'labels': LABELS, 'classes': 4} | changes
    with pytest.raises(ValueError, match=message):
        train(kind, **arguments)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('epochs', 0), ('epochs', 1.5), ('batch_size', 0), ('learning_rate', 0.0),
        ('learning_rate', float('nan')), ('ema_decay', 1.0), ('ema_decay', -0.1),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name} is {value}'):
        train('mlp', IMAGES, LABELS, classes=4, **{name: value})


def test_unknown_kind_and_foreign_images_are_refused(digits):
    images, labels, _, _ = digits
    with pytest.raises(ValueError, match="kind is 'forest'; it must be one of cnn, mlp, logistic"):
        train('forest', images, labels)
    classifier = train('logistic', images[:200], labels[:200])
    with pytest.raises(ValueError, match=r'\(4, 4, 1\).*must be \(8, 8, 1\)'):
        classifier.predict(IMAGES)
