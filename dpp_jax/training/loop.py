"""One loop for both trainings: restore, step, log, checkpoint, stop when asked."""

from collections.abc import Callable
import math
import time
from typing import Any

import jax
import numpy as np

from dpp_jax.training import checkpoint, devices, progress, stopping
from dpp_jax.training.state import TrainState

PyTree = Any
# (state on devices, step number) → (state, metrics on devices)
Step = Callable[[PyTree, int], tuple[PyTree, dict]]


class Diverged(ArithmeticError):
    """The weights or the loss are not finite any more."""


def train(
    step: Step,
    state: TrainState,
    *,
    total_steps: int,
    store: checkpoint.TrainingStore,
    name: str,
    write: Callable[[int, dict[str, float]], None],
    log_every_steps: int,
    checkpoint_every_seconds: float,
) -> TrainState:
    """Run `step` until `total_steps`, from the newest checkpoint in `store` if there is one.

    Args:
        step: called with the replicated state and the number of the step (0, 1, ...), which
            decides the batch and all randomness: a resumed run repeats an uninterrupted one.
        state: to start from, on the host.
        total_steps: at which the training is complete.
        store: where the state is kept.
        name: for the progress bar.
        write: takes a step's number and its metrics, as floats.
        log_every_steps: how often metrics are fetched from the device.
        checkpoint_every_seconds: how often the state is saved.

    Returns:
        the final state, on the host.

    Raises:
        stopping.Interrupted: after SIGTERM or Ctrl-C, with the state saved.
        Diverged: weights or loss are not finite; such a state is never saved.
    """
    restored = store.restore(state)
    state = state if restored is None else restored
    start = int(state.step)
    state = devices.replicate(state)
    saved_at = time.monotonic()
    pending = None  # metrics are fetched one interval late, when the device has long moved on
    previous = None
    with stopping.deferred() as stop, progress.bar(total_steps, name, 'step', start) as bar:
        for number in range(start, total_steps):
            state, metrics = step(state, number)
            # At most two steps in flight: the bar tells the truth and a stop request is soon met.
            jax.block_until_ready(previous)
            previous = metrics
            bar.update()
            if (number + 1) % log_every_steps == 0:
                _write_metrics(pending, write, store, name)
                pending = (number + 1, metrics)
            if stop:
                _save(store, state, name)
                raise stopping.Interrupted(stop[0], f'{name} stopped after step {number + 1}, saved')
            if time.monotonic() - saved_at > checkpoint_every_seconds:
                _save(store, state, name)
                saved_at = time.monotonic()
        _write_metrics(pending, write, store, name)
    _save(store, state, name)
    return devices.first(state)


def _save(store: checkpoint.TrainingStore, state: PyTree, name: str) -> None:
    """Checkpoint a replicated state, if it is worth going on from."""
    host_state = devices.first(state)
    step = int(host_state.step)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host_state.params)):
        raise _diverged(name, 'weights', step, store)
    store.save(step, host_state)


def _write_metrics(pending, write, store: checkpoint.TrainingStore, name: str) -> None:
    """Fetch and write the metrics of an earlier step."""
    if pending is None:
        return
    number, metrics = pending
    values = {key: float(value) for key, value in devices.first(metrics).items()}
    # Not on the screen: a loss of private images carries no noise, and terminals are logged.
    write(number, values)
    if not math.isfinite(values['loss']):
        raise _diverged(name, 'loss', number, store)


def _diverged(name: str, what: str, step: int, store: checkpoint.TrainingStore) -> Diverged:
    """The error that says where things went wrong and what is left."""
    good = store.latest_step()
    kept = 'there is no checkpoint before it' if good is None else (
        f'the last good checkpoint is that of step {good} in {store.folder}'
    )
    return Diverged(
        f'{name} is lost: its {what} is not finite at step {step}; {kept}. The same settings lead '
        f'there again: take a lower config.{name}.learning_rate in another --workdir'
    )
