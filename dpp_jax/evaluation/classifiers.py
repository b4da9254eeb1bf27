"""Classifiers that say what synthetic images are worth: trained on them, tested on real ones.

Which weights to keep is decided on held-out images *of the training set itself*: nothing here takes
a second set of images while it trains, so real test images cannot take part in the selection.
"""

from collections.abc import Callable
import dataclasses
import functools
import warnings

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.exceptions
import sklearn.linear_model

from dpp_jax.evaluation import fid

KINDS = ('cnn', 'mlp', 'logistic')

Progress = Callable[[int, int, str], None]

# Steps in one call of the compiled loop: enough to hide the call, few enough for a progress bar.
_STEPS_PER_CALL = 100
_PREDICT_BATCH = 256
_LOGISTIC_C = (0.001, 0.01, 0.1, 1.0)
_LOGISTIC_ITERATIONS = 300


class Conv3x3(nn.Module):
    """A 3×3 convolution with bias: (N, H, W, C) → (N, H', W', channels).

    `same` pads with zeros and keeps H and W; otherwise each loses 2. Written as nine shifted views
    and one matrix product, because XLA:CPU runs `lax.conv` inside loops some 90 times slower.
    """

    channels: int
    same: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.same:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width, inputs = x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
        shape = (3, 3, inputs, self.channels)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        bias = self.param('bias', nn.initializers.zeros_init(), (self.channels,))
        views = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(views, axis=-1)
        return patches @ kernel.reshape(9 * inputs, self.channels) + bias


class Cnn(nn.Module):
    """The paper's CNN, for images of any size: float32 (N, H, W, C) in [−1, 1] → logits.

    conv 3×3 (32), max-pool 2×2, ReLU, dropout ½, conv 3×3 (64), max-pool 2×2, ReLU, dropout ½,
    conv 3×3 (128), ReLU, dense (`hidden` = 128), ReLU, dense (classes); no padding.

    Where that chain would leave less than one pixel (a side below 18), all three convolutions are
    zero-padded to keep the size, and a pool is left out where a side is below 2.
    """

    classes: int
    hidden: int = 128

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Logits (N, classes), and the values before the last ReLU (N, hidden)."""
        side = min(images.shape[1:3])
        same = ((side - 2) // 2 - 2) // 2 - 2 < 1
        dropout = functools.partial(nn.Dropout, 0.5, deterministic=not train)
        x = nn.relu(_max_pool(Conv3x3(32, same, name='conv_1')(images)))
        x = dropout(name='dropout_1')(x)
        x = nn.relu(_max_pool(Conv3x3(64, same, name='conv_2')(x)))
        x = dropout(name='dropout_2')(x)
        x = nn.relu(Conv3x3(128, same, name='conv_3')(x))
        hidden = nn.Dense(self.hidden, name='dense_1')(x.reshape(x.shape[0], -1))
        return nn.Dense(self.classes, name='dense_2')(nn.relu(hidden)), hidden


class Mlp(nn.Module):
    """One hidden layer: dense (256), ReLU, dropout ½, dense (classes).

    The dropout is the CNN's: a few thousand synthetic images are soon learnt by heart.
    """

    classes: int
    hidden: int = 256

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Logits (N, classes), and the values before the ReLU (N, hidden)."""
        hidden = nn.Dense(self.hidden, name='dense_1')(images.reshape(images.shape[0], -1))
        x = nn.Dropout(0.5, deterministic=not train, name='dropout_1')(nn.relu(hidden))
        return nn.Dense(self.classes, name='dense_2')(x), hidden


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        kind: one of `KINDS`.
        classes: number of classes.
        image_shape: (H, W, C) of the images that it was trained on.
        held_out_accuracy: in [0, 1], on the held-out share of the images it was trained on.
        selected: what the held-out images chose, e.g. 'epoch 7 of 50' or 'C = 0.01'.
    """

    kind: str
    classes: int
    image_shape: tuple[int, int, int]
    held_out_accuracy: float
    selected: str
    _predict: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes, int32 (N,), of uint8 images (N, H, W, C) of the trained size."""
        return self._predict(fid.check_images(images, self.image_shape)).astype(np.int32)


def train_classifier(
    kind: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    epochs: int = 50,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    ema_decay: float = 0.9999,
    held_out: float = 0.1,
    progress: Progress | None = None,
) -> Classifier:
    """Trains a classifier and keeps what does best on a held-out share of its own images.

    The networks are trained as the paper does (Adam 3e-4, batch 64, 50 epochs, averaged weights);
    after every epoch the averaged weights are tried on the held-out images. Logistic regression
    takes the same arguments, does without those of the network's training (epochs, batch_size,
    learning_rate, ema_decay), and selects its regularisation instead of the epoch.

    Args:
        kind: 'cnn', 'mlp' or 'logistic'.
        images: uint8 (N, H, W, C).
        labels: integers (N,) in [0, classes), at least two of every class.
        classes: number of classes, ≥ 2.
        key: typed jax.random key; the same key gives the same classifier on the same hardware.
        epochs: passes over the images that are not held out.
        batch_size: images per step; a larger number than there are images means all of them.
        learning_rate: of Adam.
        ema_decay: of the averaged weights, in [0, 1); min(ema_decay, (1 + n) / (10 + n)) is used
            after n steps.
        held_out: share of each class to hold out, in (0, 1); at least one image of each.
        progress: called with (done, total, note), done and total in steps (in fits for logistic).

    Raises:
        ValueError: a value outside what is given above.
    """
    if kind not in KINDS:
        raise ValueError(f'kind is {kind!r}; it must be one of {", ".join(KINDS)}')
    if kind == 'logistic':
        return _train_logistic(images, labels, classes, key, held_out, progress)
    network = Cnn(classes) if kind == 'cnn' else Mlp(classes)
    params, held_out_accuracy, best_epoch = train_network(
        network, images, labels, key=key, epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, ema_decay=ema_decay, held_out=held_out, progress=progress,
    )  # fmt: skip
    selected = f'epoch {best_epoch} of {epochs}'
    return Classifier(
        kind, classes, tuple(np.shape(images)[1:]), held_out_accuracy, selected,
        lambda batch: apply_network(network, params, batch)[0].argmax(axis=1),
    )  # fmt: skip


def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images, uint8 (N, H, W, C), that get their label, integers (N,); in [0, 1]."""
    return fid.label_accuracy(classifier.predict(images), labels)


def train_network(
    network: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    key: jax.Array,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float,
    held_out: float,
    progress: Progress | None = None,
) -> tuple[dict, float, int]:
    """The trainer behind both networks and the feature network; arguments of `train_classifier`.

    Args:
        network: a module with `classes` whose call gives (logits, anything).

    Returns:
        The averaged weights of the best epoch (of equals, the last), their accuracy on the
        held-out images, and that epoch, counted from 1.
    """
    _check_training_settings(epochs, batch_size, learning_rate, ema_decay)
    images, labels = fid.check_labelled(images, labels, network.classes)
    rng = _numpy_rng(key)
    train_rows, held_rows = _split(labels, network.classes, held_out, rng)
    train_images = jnp.asarray(images[train_rows])
    train_labels = jnp.asarray(labels[train_rows], jnp.int32)

    init_key, dropout_key = jax.random.split(key)
    params = _initial_params(network, init_key, images.shape[1:])
    optimizer = optax.scale_by_adam().init(params)
    state = _TrainState(params, optimizer, average=params, step=jnp.zeros((), jnp.int32))
    best_params, best_accuracy, best_epoch = None, -1.0, 0
    note, done = f'epoch 1/{epochs}', 0
    for epoch in range(1, epochs + 1):
        calls = _epoch_batches(len(train_rows), batch_size, rng)
        total = epochs * sum(len(rows) for rows, _ in calls)
        for rows, mask in calls:
            state = _train_steps(
                network, state, train_images, train_labels, rows, mask, dropout_key,
                learning_rate, ema_decay,
            )  # fmt: skip
            done += len(rows)
            if progress is not None:
                jax.block_until_ready(state.step)  # or the bar would run ahead of the work
                progress(done, total, note)
        predicted = apply_network(network, state.average, images[held_rows])[0].argmax(axis=1)
        epoch_accuracy = fid.label_accuracy(predicted, labels[held_rows])
        if epoch_accuracy >= best_accuracy:
            best_params, best_accuracy, best_epoch = state.average, epoch_accuracy, epoch
        note = f'epoch {min(epoch + 1, epochs)}/{epochs}, held-out accuracy {epoch_accuracy:.3f}'
    if progress is not None:
        progress(done, total, f'best held-out accuracy {best_accuracy:.3f} (epoch {best_epoch})')
    return best_params, best_accuracy, best_epoch


def apply_network(
    network: nn.Module, params: dict, images: np.ndarray, batch_size: int = _PREDICT_BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Both outputs of a network for uint8 images (N, H, W, C), N ≥ 1, in batches of one shape."""
    logits, hidden = [], []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = batch_size - len(batch)
        padded = np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0)))
        outputs = jax.device_get(_apply(network, params, padded))
        logits.append(outputs[0][: len(batch)])
        hidden.append(outputs[1][: len(batch)])
    return np.concatenate(logits), np.concatenate(hidden)


class _TrainState(flax.struct.PyTreeNode):
    """What a step changes: weights, Adam's moments, averaged weights, steps done."""

    params: dict
    optimizer: optax.OptState
    average: dict
    step: jax.Array


def _max_pool(x: jax.Array) -> jax.Array:
    """2×2 max-pool, stride 2, an odd last row or column dropped; nothing on a side below 2."""
    batch, height, width, channels = x.shape
    if min(height, width) < 2:
        return x
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    # A reshape and a maximum: their gradient is much faster on a CPU than that of reduce_window.
    return x.reshape(batch, height, 2, width, 2, channels).max(axis=(2, 4))


def _to_float(images):
    """uint8 → float32 in [−1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


@functools.partial(jax.jit, static_argnames=('network', 'image_shape'))
def _initial_params(network, key, image_shape):
    """Random weights for images of the shape (H, W, C)."""
    return network.init(key, jnp.zeros((1, *image_shape)))['params']


@functools.partial(jax.jit, static_argnames='network')
def _train_steps(
    network, state, images, labels, rows, mask, dropout_key, learning_rate, ema_decay
) -> _TrainState:
    """As many steps as `rows` and `mask`, (steps, batch), have; the mask leaves out padding."""

    def one_step(state: _TrainState, batch):
        batch_rows, batch_mask = batch
        x = _to_float(images[batch_rows])
        step_key = jax.random.fold_in(dropout_key, state.step)

        def loss_fn(params):
            logits, _ = network.apply({'params': params}, x, True, rngs={'dropout': step_key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch_rows])
            return jnp.sum(losses * batch_mask) / jnp.maximum(jnp.sum(batch_mask), 1.0)

        updates, optimizer = optax.scale_by_adam().update(jax.grad(loss_fn)(state.params), state.optimizer)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        n = state.step + 1
        decay = jnp.minimum(ema_decay, (1.0 + n) / (10.0 + n))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
        return _TrainState(params, optimizer, average, n), None

    return jax.lax.scan(one_step, state, (rows, mask))[0]


@functools.partial(jax.jit, static_argnames='network')
def _apply(network, params, images):
    """Both outputs of the network, without dropout, for uint8 images of one batch."""
    return network.apply({'params': params}, _to_float(images))


def _epoch_batches(count: int, batch_size: int, rng: np.random.Generator) -> list[tuple]:
    """One epoch in a new order, as (rows int32, mask float32) of shape (steps, batch) per call.

    Every image comes once. The images are spread evenly over equal calls, so that all have one
    shape and no step is left with a handful of images; shorter steps are padded under the mask.
    """
    batch_size = min(batch_size, count)
    steps = -(-count // batch_size)
    calls = -(-steps // _STEPS_PER_CALL)
    steps_per_call = -(-steps // calls)
    rows = np.zeros((calls * steps_per_call, batch_size), np.int32)
    mask = np.zeros(rows.shape, np.float32)
    for step, part in enumerate(np.array_split(rng.permutation(count), len(rows))):
        rows[step, : part.size] = part
        mask[step, : part.size] = 1
    return list(zip(np.split(rows, calls), np.split(mask, calls)))


def _split(labels, classes: int, held_out: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: the same share of every class, at least one of each."""
    if not 0 < held_out < 1:
        raise ValueError(f'held_out is {held_out}; it must be in (0, 1)')
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < 2:
        raise ValueError(
            f'labels has {counts.min()} image of class {counts.argmin()}; holding out a share of '
            'each class needs at least 2'
        )
    held = []
    for label in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        number = min(max(round(held_out * rows.size), 1), rows.size - 1)
        held.append(rows[:number])
    held_rows = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(labels.size), held_rows), held_rows


def _numpy_rng(key: jax.Array) -> np.random.Generator:
    """Numpy's generator for the order of the images, a function of the jax key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _check_training_settings(epochs, batch_size, learning_rate, ema_decay) -> None:
    """Raises ValueError for numbers with which nothing could be trained."""
    for name, value in {'epochs': epochs, 'batch_size': batch_size}.items():
        if value < 1 or value != int(value):
            raise ValueError(f'{name} is {value}; it must be a whole number of at least 1')
    if not 0 < learning_rate < np.inf:
        raise ValueError(f'learning_rate is {learning_rate}; it must be above 0 and finite')
    if not 0 <= ema_decay < 1:
        raise ValueError(f'ema_decay is {ema_decay}; it must be in [0, 1)')


def _train_logistic(images, labels, classes, key, held_out, progress) -> Classifier:
    """Scikit-learn's logistic regression, its C chosen on the held-out images."""
    images, labels = fid.check_labelled(images, labels, classes)
    train_rows, held_rows = _split(labels, classes, held_out, _numpy_rng(key))

    def flat(batch):
        return _to_float(batch).reshape(len(batch), -1)

    train_pixels, held_pixels = flat(images[train_rows]), flat(images[held_rows])
    best, best_accuracy = None, -1.0
    for done, c in enumerate(_LOGISTIC_C, start=1):
        model = sklearn.linear_model.LogisticRegression(C=c, max_iter=_LOGISTIC_ITERATIONS)
        with warnings.catch_warnings():
            # A fit that stops early is one more candidate; the held-out images judge it.
            warnings.simplefilter('ignore', sklearn.exceptions.ConvergenceWarning)
            model.fit(train_pixels, labels[train_rows])
        model_accuracy = fid.label_accuracy(model.predict(held_pixels), labels[held_rows])
        if model_accuracy > best_accuracy:
            best, best_accuracy = model, model_accuracy
        if progress is not None:
            progress(done, len(_LOGISTIC_C), f'C = {c:g}, held-out accuracy {model_accuracy:.3f}')
    return Classifier(
        'logistic', classes, images.shape[1:], best_accuracy, f'C = {best.C:g}',
        lambda batch: best.predict(flat(batch)),
    )  # fmt: skip
