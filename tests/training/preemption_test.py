"""Stop requests: never lost, whatever runs when they come, and told in a line."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dpp_jax.training import preemption, progress

# A program as `main` is one; `steps` is what it does.
PROGRAM = """
import gc, os, signal, sys, time
from dpp_jax.training import preemption
preemption.leave_at_once()
from dpp_jax.training import progress
preemption.wait_for_steps(grace_seconds={grace})
def ask(number):
    os.kill(os.getpid(), number)
try:
{steps}
    print('lost')
except preemption.Interrupted as stopped:
    print('in order')
    sys.exit(0 if stopped.signal_number == signal.SIGTERM else 130)
"""
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 0)]


def run(steps, number, grace=60.0):
    """What a program with these steps says, and how it ends; `number` is the signal that it is asked by."""
    text = PROGRAM.format(steps=textwrap.indent(textwrap.dedent(steps), '    '), grace=grace)
    return subprocess.run(
        [sys.executable, '-c', text.replace('NUMBER', str(int(number)))],
        # pytest itself may run where Ctrl-C is ignored, as jobs in the background do
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=60,
    )


PLACES = {
    'between two lines': 'ask(NUMBER)',
    'in the garbage collector, which loses exceptions': """
        gc.callbacks.append(lambda phase, _: phase == 'start' and ask(NUMBER))
        gc.collect()
        gc.callbacks.clear()
    """,
    'while an object is deleted, which loses them too': """
        class Deleted:
            def __del__(self):
                ask(NUMBER)
        Deleted()
    """,
    'in a library that takes every exception for its own': """
        try:
            ask(NUMBER)
        except BaseException:
            pass
    """,
}


@pytest.mark.parametrize('number, code', SIGNALS)
@pytest.mark.parametrize('place', PLACES)
def test_a_request_is_answered_at_the_end_of_the_step(place, number, code):
    step = textwrap.indent(textwrap.dedent(PLACES[place]).strip(), '    ')
    steps = f"with progress.bar(9, 'name', 'step') as bar:\n{step}\n    print('whole step')\n    bar.update()"
    result = run(steps, number)
    assert (result.returncode, result.stdout) == (code, 'whole step\nin order\n'), result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('number, code', SIGNALS)
def test_a_program_that_has_nothing_to_lose_ends_at_once(number, code):
    text = (
        'from dpp_jax.training import preemption as p\np.leave_at_once()\nimport os\nos.kill(os.getpid(), {})'
    )
    result = subprocess.run(
        [sys.executable, '-c', text.format(int(number))],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
    )
    assert result.returncode == code
    assert result.stderr.split('\n') == [
        '', 'Stopped before the run began. Run the same command to start it.', '',
    ]  # fmt: skip


@pytest.mark.parametrize(
    'asked, grace, code',
    [('ask(NUMBER); time.sleep(0.7); ask(NUMBER)', 60.0, 130), ('ask(15)', 0.2, 0)],
    ids=['a second Ctrl-C', 'SIGTERM, after its time'],
)
def test_a_step_that_takes_too_long_is_left(asked, grace, code):
    begun = time.monotonic()
    result = run(f'{asked}\ntime.sleep(50)', signal.SIGINT, grace)
    assert result.returncode == code and result.stdout == '' and time.monotonic() - begun < 30
    assert 'Stopped during a step. Run the same command to continue' in result.stderr
    assert ('Press Ctrl-C again to stop at once' in result.stderr) == (code == 130)


def test_a_loop_that_saves_first_is_asked_by_its_list():
    steps = """
    with preemption.deferred() as stop, progress.bar(2, 'name', 'step') as bar:
        ask(NUMBER)
        bar.update()
        print('saved', list(stop))
    """
    result = run(steps, signal.SIGINT)
    assert (result.returncode, result.stdout) == (130, f'saved [{int(signal.SIGINT)}]\nin order\n')


def test_ctrl_c_that_the_shell_ignores_stays_ignored():
    text = 'from dpp_jax.training import preemption as p\np.leave_at_once()\np.wait_for_steps()\n'
    result = subprocess.run(
        [sys.executable, '-c', text + 'import os\nos.kill(os.getpid(), 2)\np.check()\nprint("goes on")'],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
    )
    assert result.stdout == 'goes on\n', result.stderr


def test_in_a_library_a_request_belongs_to_its_context():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preemption.Interrupted):
        with preemption.deferred() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop == [signal.SIGTERM]
            preemption.check()
    assert signal.getsignal(signal.SIGTERM) is before
    preemption.check()
    preemption.wait_for_steps()  # of a program only
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_bar_of_every_stage_stops_a_run(monkeypatch):
    bar = progress.bar(3, 'name', 'step')
    bar.update()
    monkeypatch.setattr(preemption, '_requests', [signal.SIGTERM])
    with bar, pytest.raises(preemption.Interrupted):
        bar.update()
