"""The trainer of every network that classifies: of the classifiers, and of the features for FID.

How it goes (`fit`): in every epoch, visit the images in a new order, some 100 steps in one compiled loop; a
step is the training's own `apply_gradient`, with Adam and averaged weights. Statistics of batch normalization
are averaged with them. After an epoch, show the averages to a judge. `train` holds out a share of the images
to judge by, and returns the best.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpp_jax.evaluation import held_out
from dpp_jax.training import devices
from dpp_jax.training import state as state_lib

PyTree = Any
Progress = Callable[[int, int, str], None]  # (done, total, note)
STATISTICS = 'batch_stats'  # the collection of Flax that holds those of batch normalization

# Steps in one call of the compiled loop: enough to hide the call, few enough for a progress bar.
_STEPS_PER_CALL = 100
_PREDICT_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train a classifier; the defaults are the paper's.

    Attributes:
        epochs: passes over the images that are not held out; whole, at least 1.
        batch_size: images per step; whole, at least 1; all images, if there are fewer.
        learning_rate: of Adam; above 0.
        ema_decay: of the averaged weights, in [0, 1); after n steps it is min(ema_decay, (1 + n) / (10 + n)).
        held_out: share of each class to hold out, in (0, 1).
        candidates: so many epochs are judged at most, equally spaced, the last among them; whole, at least 1.
            None: every epoch is.
        is_even: whether the steps of an epoch have equal numbers of images, up to one, and at most
            `batch_size`; otherwise all but the last have `batch_size`, as PyTorch's.
    """

    epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 3e-4
    ema_decay: float = 0.9999
    held_out: float = 0.1
    candidates: int | None = None
    is_even: bool = True

    def __post_init__(self):
        """Raise ValueError if nothing could be trained."""
        for name in ('epochs', 'batch_size', 'candidates'):
            value = getattr(self, name)
            if name == 'candidates' and value is None:
                continue
            if not value >= 1 or value % 1:
                raise ValueError(f'{name} is {value}; it must be a whole number, at least 1')
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f'learning_rate is {self.learning_rate}; it must be above 0 and finite')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f'ema_decay is {self.ema_decay}; it must be in [0, 1)')
        if not 0 < self.held_out < 1:
            raise ValueError(f'held_out is {self.held_out}; it must be in (0, 1)')

    @property
    def judged_epochs(self) -> list[int]:
        """Epochs, counted from 1, after which the averages are judged."""
        number = min(self.candidates or self.epochs, self.epochs)
        return [-(-self.epochs * (index + 1) // number) for index in range(number)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Averages:
    """The averages after an epoch, on the devices.

    Attributes:
        params: weights, arrays by name.
        statistics: of batch normalization, likewise; empty for a network without it.
    """

    params: PyTree
    statistics: PyTree


# (epoch, counted from 1, and the averages after it) → a note for the progress bar.
Judge = Callable[[int, Averages], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training keeps.

    Attributes:
        params: the averaged weights of the best epoch (of equals, the last), NumPy arrays by name.
        held_out_accuracy: theirs on the held-out images, in [0, 1].
        epoch: the best epoch, counted from 1.
    """

    params: dict[str, Any]
    held_out_accuracy: float
    epoch: int


def train(
    network: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    key: jax.Array,
    settings: Settings,
    progress: Progress | None = None,
) -> Trained:
    """Train a network, and keep the epoch that does best on a held-out share of its own images.

    Args:
        network: a module without batch normalization as in `networks`: it has `classes`, and its call returns
            (logits, hidden values).
        images: uint8 (N, H, W, C).
        labels: integers (N,) in [0, network.classes), at least two of every class.
        key: typed jax.random key; the same key gives the same weights on the same hardware.
        settings: how to train.
        progress: as of `fit`.

    Raises:
        ValueError: images or labels other than described.
    """
    rng = held_out.random_generator(key)
    chosen, held = held_out.split(images, labels, classes=network.classes, share=settings.held_out, rng=rng)
    best = None

    def judge(epoch: int, averages: Averages) -> str:
        nonlocal best
        logits, _ = apply(network, averages.params, held.images)
        accuracy = held_out.label_accuracy(logits.argmax(axis=1), held.labels)
        if best is None or accuracy >= best.held_out_accuracy:
            best = Trained(params=averages.params, held_out_accuracy=accuracy, epoch=epoch)
        return f'held-out accuracy {accuracy:.3f}'

    fit(
        network, chosen.images, chosen.labels, key=key, rng=rng, settings=settings, judge=judge,
        progress=progress,
    )  # fmt: skip
    return dataclasses.replace(best, params=jax.device_get(best.params))


def fit(
    network: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    key: jax.Array,
    rng: np.random.Generator,
    settings: Settings,
    judge: Judge,
    progress: Progress | None = None,
) -> None:
    """Train a network on all images given, and show a judge the averages after `settings.judged_epochs`.

    Args:
        network: a module as in `networks` or `residual`: it has `classes`, and its call returns (logits,
            hidden values).
        images: uint8 (N, H, W, C), N ≥ 1.
        labels: integers (N,) in [0, network.classes).
        key: typed jax.random key, for initial weights and dropout.
        rng: draws the order of the images.
        settings: how to train.
        judge: is told what there is.
        progress: called with (done, total, note), done and total in steps, before the first step and then
            every hundred steps at most.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    init_key, dropout_key = jax.random.split(key)
    state = _initial_state(network, init_key, images.shape[1:], settings.learning_rate)
    judged, found = set(settings.judged_epochs), ''
    note, done = f'epoch 1/{settings.epochs}', 0
    for epoch in range(1, settings.epochs + 1):
        calls = _epoch_batches(len(images), settings.batch_size, rng, settings.is_even)
        total = settings.epochs * sum(len(batches) for batches, _ in calls)
        if progress is not None and done == 0:
            progress(done, total, note)
        for batches, mask in calls:
            state = _train_steps(
                network, state, images, labels, batches, mask, dropout_key,
                settings.learning_rate, settings.ema_decay,
            )  # fmt: skip
            done += len(batches)
            if progress is not None:
                jax.block_until_ready(state.weights.step)  # or the bar would run ahead of the work
                progress(done, total, note)
        if epoch in judged:
            averages = Averages(params=state.weights.ema_params, statistics=state.ema_statistics)
            found = judge(epoch, averages)
        note = ', '.join(filter(None, [f'epoch {min(epoch + 1, settings.epochs)}/{settings.epochs}', found]))
    if progress is not None:
        progress(done, total, note)


def apply(
    network: nn.Module,
    params: PyTree,
    images: np.ndarray,
    batch_size: int = _PREDICT_BATCH,
    statistics: PyTree | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a network's logits and hidden values, float32 (N, ...), for uint8 images (N, H, W, C), N ≥ 1.

    All devices of this process share the work; `batch_size` images are on one of them at once. `statistics`
    are those of batch normalization, where the network has it.
    """
    variables = {'params': params} | ({STATISTICS: statistics} if statistics else {})
    logits, hidden = [], []
    with devices.limited_to(jax.local_device_count()):
        program = _program(network, devices.count())
        at_once = batch_size * devices.count()
        if len(images) < at_once:  # few of them
            at_once = devices.count() * -(-len(images) // devices.count())
        for start in range(0, len(images), at_once):
            batch = images[start : start + at_once]
            # One shape for all batches: one program.
            padded = np.pad(batch, ((0, at_once - len(batch)), (0, 0), (0, 0), (0, 0)))
            outputs = program(variables, devices.deal(padded))
            logits.append(devices.collect(outputs[0])[: len(batch)])
            hidden.append(devices.collect(outputs[1])[: len(batch)])
    return np.concatenate(logits), np.concatenate(hidden)


@functools.lru_cache(maxsize=16)
def _program(network: nn.Module, number: int) -> Callable:
    """Make (variables, dealt uint8 images) → both outputs of the network, for this many devices."""
    del number  # another number, another program
    return devices.parallel(
        lambda variables, images: network.apply(variables, to_float(images)), in_axes=(None, 0)
    )


def to_float(images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


@flax.struct.dataclass
class State:
    """What a step reads and returns.

    Attributes:
        weights: with their average and Adam's state.
        statistics: of batch normalization, running; empty without it.
        ema_statistics: their average, by the rule of the weights': averaged weights need averaged statistics.
    """

    weights: state_lib.TrainState
    statistics: PyTree
    ema_statistics: PyTree


@functools.partial(jax.jit, static_argnames=('network', 'image_shape'))
def _initial_state(
    network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int], learning_rate: float
) -> State:
    """Step 0 with random weights for images of the shape (H, W, C).

    The weights stay separate arrays, not one vector: there are ten at most in the smaller networks, and the
    loop in which XLA:CPU joins their gradients made the steps of the MLP up to ten times slower.
    """
    variables = network.init(key, jnp.zeros((1, *image_shape)))
    params, statistics = variables['params'], variables.get(STATISTICS, {})
    opt_state = optax.adam(learning_rate).init(params)
    weights = state_lib.TrainState(step=jnp.int32(0), params=params, ema_params=params, opt_state=opt_state)
    return State(weights=weights, statistics=statistics, ema_statistics=statistics)


@functools.partial(jax.jit, static_argnames='network')
def _train_steps(
    network: nn.Module,
    state: State,
    images: jax.Array,
    labels: jax.Array,
    batches: np.ndarray,
    mask: np.ndarray,
    dropout_key: jax.Array,
    learning_rate: float,
    ema_decay: float,
) -> State:
    """Take a step for each of the batches.

    Args:
        images, labels: all that the batches choose from: uint8 (N, H, W, C), int32 (N,).
        batches: rows of them, int32 (steps, batch).
        mask: float32 (steps, batch), 1 for an image and 0 for padding, which counts for nothing.
    """
    optimizer = optax.adam(learning_rate)

    def one_step(state: State, batch: tuple[jax.Array, jax.Array]):
        rows, mask = batch
        dropout = {'dropout': jax.random.fold_in(dropout_key, state.weights.step)}

        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            (logits, _), found = network.apply(
                {'params': params, STATISTICS: state.statistics}, to_float(images[rows]), True, mask,
                rngs=dropout, mutable=[STATISTICS],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1.0), found.get(STATISTICS, {})

        gradient, statistics = jax.grad(loss, has_aux=True)(state.weights.params)
        weights = state_lib.apply_gradient(state.weights, gradient, optimizer, ema_decay)
        average = state_lib.averaged(state.ema_statistics, statistics, weights.step, ema_decay)
        return State(weights=weights, statistics=statistics, ema_statistics=average), None

    return jax.lax.scan(one_step, state, (batches, mask))[0]


def _epoch_batches(
    count: int, batch_size: int, rng: np.random.Generator, is_even: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One epoch in a new order: for each call of `_train_steps` its batches and their mask.

    Every image comes once. Where they are spread evenly, no step is left with a handful of them, and all
    calls have one shape; otherwise the last call may have fewer steps.
    """
    batch_size = min(batch_size, count)
    steps, per_call = -(-count // batch_size), _STEPS_PER_CALL
    order = rng.permutation(count)
    if is_even:
        number = -(-steps // per_call)
        per_call = -(-steps // number)
        steps = number * per_call
        parts = np.array_split(order, steps)
    else:
        parts = np.split(order, range(batch_size, count, batch_size))
    rows = np.zeros((steps, batch_size), np.int32)
    mask = np.zeros(rows.shape, np.float32)
    for step, part in enumerate(parts):
        rows[step, : part.size] = part
        mask[step, : part.size] = 1
    calls = [slice(start, start + per_call) for start in range(0, steps, per_call)]
    return [(rows[call], mask[call]) for call in calls]
