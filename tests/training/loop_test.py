"""The loop: resume equals the uninterrupted run bit for bit, and stop requests lose nothing."""

import itertools
import os
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpp_jax.training import checkpoint, devices, loop, preemption
from dpp_jax.training import state as state_lib

OPTIMIZER = optax.adam(0.1)


@pytest.fixture(scope='module')
def device_step():
    def step(state, number):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (5,))
        gradient = jax.tree.map(lambda w: w - noise, state.params)
        new = state_lib.apply_gradient(state, gradient, OPTIMIZER, 0.9)
        return new, {'loss': jnp.sum(gradient.vector**2)}

    return devices.parallel(step, in_axes=(0, None), donate=(0,))


def train(folder, device_step, *, total=9, stop_at=None, seconds=1000.0, written=None, **options):
    """Run the loop in `folder`; at step `stop_at` the process receives SIGTERM."""

    def step(state, number):
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return device_step(state, np.int32(number))

    store = checkpoint.TrainingStore(folder)
    try:
        return loop.train(
            step,
            state_lib.create({'w': jnp.arange(5.0)}, OPTIMIZER),
            total_steps=total,
            store=store,
            name='test',
            write=lambda step, values: written is None or written.append((step, values['loss'])),
            log_every_steps=2,
            checkpoint_every_seconds=seconds,
            advice=', as this test says',
            **options,
        )
    finally:
        store.close()


@pytest.fixture(scope='module')
def uninterrupted(device_step, tmp_path_factory):
    return train(tmp_path_factory.mktemp('whole'), device_step)


@pytest.mark.parametrize('stop_at', [0, 3, 8])
def test_a_stopped_run_goes_on_and_ends_the_same_bit_for_bit(stop_at, uninterrupted, device_step, tmp_path):
    with pytest.raises(preemption.Interrupted, match='saved') as stopped:
        train(tmp_path, device_step, stop_at=stop_at)
    assert stopped.value.signal_number == signal.SIGTERM
    final = train(tmp_path, device_step)
    jax.tree.map(np.testing.assert_array_equal, final, uninterrupted)


def test_a_finished_run_takes_no_step(uninterrupted, device_step, tmp_path):
    train(tmp_path, device_step)
    again = train(tmp_path, device_step, stop_at=0)
    jax.tree.map(np.testing.assert_array_equal, again, uninterrupted)


def test_checkpoints_at_every_step_change_nothing(uninterrupted, device_step, tmp_path):
    final = train(tmp_path, device_step, seconds=0.0)
    jax.tree.map(np.testing.assert_array_equal, final, uninterrupted)
    assert len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 2


@pytest.mark.parametrize('seconds, kept', [(5.0, [6, 9]), (1000.0, [9])])
def test_a_clock_that_jumps_changes_neither_the_result_nor_the_checkpoints(
    uninterrupted, device_step, tmp_path, monkeypatch, seconds, kept
):
    """The wall clock, which people and time servers set; the loop's own shows two seconds a step."""
    jumps, ticks = itertools.cycle([1e6, -1e6, 0.0]), itertools.count()
    real_time, clock = time.time, types.SimpleNamespace(**vars(time))
    clock.monotonic = lambda: 2.0 * next(ticks)
    monkeypatch.setattr(time, 'time', lambda: real_time() + next(jumps))
    monkeypatch.setattr(loop, 'time', clock)
    clock.time = time.time
    final = train(tmp_path, device_step, seconds=seconds)
    jax.tree.map(np.testing.assert_array_equal, final, uninterrupted)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == kept


@pytest.mark.parametrize('seconds, good', [(0.0, 'that of step 5 in'), (1000.0, 'no earlier checkpoint')])
def test_a_run_whose_weights_are_lost_stops_and_keeps_the_last_good_checkpoint(
    device_step, tmp_path, seconds, good
):
    lost = devices.parallel(
        lambda state, number: (
            state.replace(
                step=state.step + 1,
                params=jax.tree.map(lambda leaf: jnp.where(number >= 5, jnp.nan, leaf), state.params),
            ),
            {'loss': jnp.where(number >= 5, jnp.nan, 1.0)},
        ),
        in_axes=(0, None),
    )
    written = []
    with pytest.raises(loop.Diverged, match=f'test failed: the .* not finite at step 6.*{good}') as told:
        train(tmp_path, lost, seconds=seconds, written=written, is_loss_public=True)
    assert str(told.value).endswith('Lower config.test.learning_rate, as this test says')
    kept = checkpoint.latest_training(tmp_path)
    assert (kept and kept[0]) == (5 if seconds == 0 else None)


def test_metrics_are_written_with_their_step(device_step, tmp_path):
    written = []
    train(tmp_path, device_step, written=written)
    assert [step for step, _ in written] == [2, 4, 6, 8, 9]
    assert all(np.isfinite(loss) for _, loss in written)


def test_a_lost_loss_is_noticed_before_the_next_checkpoint(tmp_path):
    """Also where the weights stay finite, and where it is between two writings."""
    lost = devices.parallel(
        lambda state, number: (
            state.replace(step=state.step + 1),
            {'loss': jnp.where(number == 6, jnp.nan, 1.0)},
        ),
        in_axes=(0, None),
    )
    with pytest.raises(loop.Diverged, match='loss is not finite at step 7. .* that of step 6 in'):
        train(tmp_path, lost, seconds=0.0, is_loss_public=True)
    assert checkpoint.latest_training(tmp_path)[0] == 6


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_loss_of_private_images_decides_nothing(device_step, uninterrupted, tmp_path, value):
    """It carries no noise: with it alone nobody may tell whether a run ends."""

    def step(state, number):
        state, metrics = device_step(state, number)
        return state, {'loss': jnp.full_like(metrics['loss'], value)}

    written = []
    final = train(tmp_path, step, written=written)
    jax.tree.map(np.testing.assert_array_equal, final, uninterrupted)
    assert len(written) == 5 and not np.isfinite([loss for _, loss in written]).any()


def test_every_step_is_counted_and_a_stop_loses_none(tmp_path):
    counting = devices.parallel(
        lambda state, number: (
            state.replace(step=state.step + 1),
            {'loss': jnp.float32(number), 'non_finite': jnp.where(number % 3 == 0, 1.0, 0.0)},
        ),
        in_axes=(0, None),
    )
    lines = []

    def run(stop_at=None):
        def step(state, number):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return counting(state, np.int32(number))

        with checkpoint.TrainingStore(tmp_path) as store:
            loop.train(
                step, state_lib.create({'w': jnp.zeros(1)}, OPTIMIZER), total_steps=11, store=store,
                name='test', write=lambda number, values: lines.append((number, values)),
                log_every_steps=4, checkpoint_every_seconds=1000.0,
            )  # fmt: skip

    with pytest.raises(preemption.Interrupted):
        run(stop_at=5)
    run()
    assert [number for number, _ in lines] == [4, 6, 8, 11]
    assert sum(values['non_finite'] for _, values in lines) == 4  # numbers 0, 3, 6, 9
    assert [values['loss'] for _, values in lines] == [3, 5, 7, 10]


def test_signal_handlers_are_given_back(device_step, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tmp_path, device_step, total=2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_nothing_recompiles_after_the_first_step_nor_after_a_restore(device_step, tmp_path, compilations):
    train(tmp_path, device_step, total=3)
    counts = []

    class Watch(list):
        def append(self, item):
            counts.append(compilations.count)

    train(tmp_path, device_step, total=12, written=Watch())
    assert len(counts) >= 4 and counts[0] == counts[-1]
