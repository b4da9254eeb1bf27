"""One loop for both trainings: restore, step, log, checkpoint, stop when asked."""

from collections.abc import Callable
import contextlib
import signal
import time
from typing import Any

import jax

from dpp_jax.training import checkpoint, devices, progress
from dpp_jax.training.state import TrainState

PyTree = Any
# (state on devices, step number) → (state, metrics on devices)
Step = Callable[[PyTree, int], tuple[PyTree, dict]]


class Interrupted(Exception):
    """The run was asked to stop, and everything is saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


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
        Interrupted: after SIGTERM or Ctrl-C, with the state saved.
    """
    restored = store.restore(state)
    state = state if restored is None else restored
    start = int(state.step)
    state = devices.replicate(state)
    saved_at = time.monotonic()
    pending = None  # metrics are fetched one interval late, when the device has long moved on
    previous = None
    with _stop_requests() as stop, progress.bar(total_steps, name, 'step', start) as bar:
        for number in range(start, total_steps):
            state, metrics = step(state, number)
            # At most two steps in flight: the bar tells the truth and a stop request is soon met.
            jax.block_until_ready(previous)
            previous = metrics
            bar.update()
            if (number + 1) % log_every_steps == 0:
                _write_metrics(pending, write)
                pending = (number + 1, metrics)
            if stop:
                _save(store, state)
                raise Interrupted(stop[0], f'{name} stopped after step {number + 1}, saved')
            if time.monotonic() - saved_at > checkpoint_every_seconds:
                _save(store, state)
                saved_at = time.monotonic()
        _write_metrics(pending, write)
    _save(store, state)
    return devices.first(state)


def _save(store: checkpoint.TrainingStore, state: PyTree) -> None:
    """Checkpoint a replicated state."""
    host_state = devices.first(state)
    store.save(int(host_state.step), host_state)


def _write_metrics(pending, write) -> None:
    """Fetch and write the metrics of an earlier step."""
    if pending is None:
        return
    number, metrics = pending
    # Not on the screen: a loss of private images carries no noise, and terminals are logged.
    write(number, {key: float(value) for key, value in devices.first(metrics).items()})


@contextlib.contextmanager
def _stop_requests():
    """A list that receives the signal's number when the run is asked to stop.

    A second Ctrl-C stops at once.
    """
    requests = []

    def request(number, frame):
        del frame
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    try:
        previous = {n: signal.signal(n, request) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals go elsewhere
        previous = {}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
