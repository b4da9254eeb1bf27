"""One loop for both trainings: restore, step, log, checkpoint, stop when asked."""

from collections.abc import Callable, Iterator
import contextlib
import math
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from dpp_jax import files
from dpp_jax.training import checkpoint, devices, hosts, preemption, progress, tensorboard
from dpp_jax.training.state import TrainState

PyTree = Any
# (state on devices, step number) → (state, metrics on devices)
Step = Callable[[PyTree, int], tuple[PyTree, dict]]
_MEETING_SECONDS, _MOST_STEPS = 1.0, 100  # between two meetings of several processes
_SAVE = 'save'  # what process 0 says to the others at a step, or the number of a signal
_COUNTS = {'non_finite'}  # metrics that are added up between two writings; of others the last counts


class Diverged(ArithmeticError):
    """The weights are not finite any more, or the loss of images that are released."""


@contextlib.contextmanager
def outputs(checkpoints: Path, metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the arguments `store` and `write` of `train`: in process 0, folders; in others, nothing."""
    if not hosts.is_first():
        yield {'store': None, 'write': None}
        return
    with checkpoint.TrainingStore(checkpoints) as store, tensorboard.writer(metrics) as write:
        yield {'store': store, 'write': write}


def train(
    step: Step,
    state: TrainState,
    *,
    total_steps: int,
    store: checkpoint.TrainingStore | None,
    name: str,
    write: Callable[[int, dict[str, float]], None] | None,
    log_every_steps: int,
    checkpoint_every_seconds: float,
    is_loss_public: bool = False,
    advice: str = '',
) -> TrainState:
    """Run `step` until `total_steps`, from the newest checkpoint in `store` if there is one.

    Of several processes, all start from the state of process 0, and meet about once a second: there process 0
    says whether to stop or to wait for a checkpoint.

    Args:
        step: called with the replicated state and the number of the step (0, 1, ...), which
            decides the batch and all randomness: a resumed run repeats an uninterrupted one.
        state: to start from, on the host.
        total_steps: at which the training is complete.
        store: where the state is kept; None: process 0 keeps it.
        name: for the progress bar.
        write: takes a step's number and its metrics, as floats; None as of `store`.
        log_every_steps: how often metrics are fetched from the device.
        checkpoint_every_seconds: how often the state is saved.
        is_loss_public: whether a loss that is not finite ends the training. The loss of private images must
            not: it carries no noise, and whether something is released is a release.
        advice: what to do besides lowering the learning rate if the training diverges.

    Returns:
        the final state, on the host.

    Raises:
        preemption.Interrupted: after SIGTERM or Ctrl-C, with the state saved.
        Diverged: the weights, or a public loss, are not finite; such a state is never saved, nor a later one.
    """
    state = _from_first(lambda: store.restore(state), state)
    start = int(state.step)
    state = devices.replicate(state)
    saved_at = time.monotonic()
    record = _Record(
        write, log_every_steps, is_loss_public, lambda *told: _diverged(name, *told, store, advice)
    )
    previous, meetings = None, _Meetings(name, start)
    with (
        preemption.deferred(raises_at_end=hosts.count() == 1) as stop,
        progress.bar(total_steps, name, 'step', start) as bar,
    ):
        for number in range(start, total_steps):
            state, metrics = step(state, number)
            # At most two steps in flight: the bar tells the truth and a stop request is soon met.
            jax.block_until_ready(previous)
            previous = metrics
            if store:
                record.add(number + 1, metrics)
            bar.update()
            is_late = time.monotonic() - saved_at > checkpoint_every_seconds
            word = meetings.after(number, str(stop[0]) if stop else _SAVE if is_late else '')
            if word:
                _save(store, state, record)
                saved_at = time.monotonic()
            if word not in ('', _SAVE):
                raise preemption.Interrupted(
                    int(word), f'{name} stopped after step {number + 1}; its state is saved'
                )
        _save(store, state, record)
    return devices.first(state)


def _from_first(restore: Callable[[], TrainState | None], state: TrainState) -> TrainState:
    """Return what process 0 restores, or its fresh state: of the same weights all go on."""
    if hosts.count() == 1:
        restored = restore()
        return state if restored is None else restored

    def found():
        restored = restore()
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state if restored is None else restored)]

    return jax.tree.unflatten(jax.tree.structure(state), hosts.from_first(found))


class _Meetings:
    """After which steps processes meet; process 0 decides, by the time that steps take."""

    def __init__(self, name: str, start: int):
        self._name, self._start, self._next = name, start, start
        self._last = start, 0.0  # the last meeting: its step, and when it was

    def after(self, number: int, word: str) -> str:
        """Return what process 0 has to say after step `number`, or nothing if there is no meeting.

        Args:
            number: of the step.
            word: of this process.
        """
        if hosts.count() == 1:
            return word
        if number < self._next:
            return ''
        seconds = (time.monotonic() - self._last[1]) / max(1, number - self._last[0])
        steps = (
            1
            if number == self._start
            else max(1, min(_MOST_STEPS, int(_MEETING_SECONDS / max(seconds, 1e-6))))
        )
        # The first step waits for the compiler, which may have more to do in one process.
        limit = hosts.PATIENT_SECONDS if number == self._start else None
        word, steps = hosts.meet(f'step {number + 1} of {self._name}', f'{word},{steps}', limit)[0].split(',')
        self._next, self._last = number + int(steps), (number, time.monotonic())
        return word


class _Record:
    """Metrics on their way from the device to the disk: every step's is looked at."""

    def __init__(
        self, write: Callable, every: int, is_loss_public: bool, diverged: Callable[[str, int], Exception]
    ):
        """`diverged` makes the error of what is not finite ('loss is') at a step."""
        self._write, self._every, self._is_loss_public = write, every, is_loss_public
        self.diverged = diverged
        self._waiting = {}  # number of a step → its metrics, on the devices

    def add(self, number: int, metrics: dict) -> None:
        """Take the metrics of a step; write those of the last interval but one.

        One interval late, when the device has long moved on, nobody waits for it.
        """
        self._waiting[number] = metrics
        if number % self._every == 0:
            self._write_until(number - self._every)

    def flush(self) -> None:
        """Write all that waits."""
        if self._waiting:
            newest = max(self._waiting)
            self._write_until(newest - newest % self._every)
            self._write_until(newest)

    def _write_until(self, last: int) -> None:
        """Write one line for the waiting steps until number `last`."""
        numbers = [number for number in self._waiting if number <= last]
        fetched = {number: devices.first(self._waiting.pop(number)) for number in numbers}
        if not fetched:
            return
        values = {key: float(value) for key, value in fetched[numbers[-1]].items()}
        for key in values.keys() & _COUNTS:
            values[key] = float(sum(metrics[key] for metrics in fetched.values()))
        # Not on the screen: a loss of private images carries no noise, and terminals are logged.
        self._write(numbers[-1], values)
        for number, metrics in fetched.items():
            if self._is_loss_public and not math.isfinite(metrics['loss']):
                raise self.diverged('loss is', number)


def _save(store: checkpoint.TrainingStore | None, state: PyTree, record: _Record) -> None:
    """Checkpoint a replicated state, if it is worth going on from; the other processes wait for process 0.

    Raises:
        ValueError: processes have other weights: they added other noise, or compute otherwise.
    """
    host_state = devices.first(state)
    if hosts.count() > 1:
        hosts.agree('weights', {'SHA-256': files.digest(jax.tree.leaves(host_state.params))})

    def save():
        record.flush()
        step = int(host_state.step)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host_state.params)):
            raise record.diverged('weights are', step)
        store.save(step, host_state)

    hosts.at_first(save)


def _diverged(name: str, what: str, step: int, store: checkpoint.TrainingStore, advice: str) -> Diverged:
    """Make the error that says where things went wrong and what is left."""
    good = store.latest_step()
    kept = (
        'There is no earlier checkpoint'
        if good is None
        else f'The last good checkpoint is that of step {good} in {store.folder}'
    )
    return Diverged(
        f'{name} failed: the {what} not finite at step {step}. {kept}. Lower '
        f'config.{name}.learning_rate{advice}'
    )
