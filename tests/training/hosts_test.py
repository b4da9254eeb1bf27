"""Processes of a run: what they tell each other, and how all end when one is lost."""

import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpp_jax.training import hosts

TIMEOUT = 5.0
# What every process runs; `act` is of the test.
PROGRAM = f"""
import os, sys, time
from dpp_jax import command_line
from dpp_jax.training import hosts, preemption, progress
import jax, numpy as np
preemption.leave_at_once()
number = int(sys.argv[1].rpartition(',')[2])
hosts.find(hosts.asked(sys.argv[1]), timeout={TIMEOUT})
hosts.join(timeout={TIMEOUT})
hosts.introduce()
def act():
{{act}}
from absl import flags
flags.FLAGS.mark_as_parsed()
preemption.wait_for_steps()
with command_line.errors_in_one_line():
    act()
    hosts.leave()
"""
ACTS = {
    'talk': """
    words = hosts.meet('here', f'word {number}')
    assert words == ['word 0', 'word 1'], words
    small = hosts.from_first(lambda: {'n': number, 'text': 'ε', 'none': None, 'list': [1, 2.5]})
    assert small == {'n': 0, 'text': 'ε', 'none': None, 'list': [1, 2.5]}, small
    large = hosts.from_first(lambda: {'a': np.arange(100_000, dtype=np.float32) + number})
    assert large['a'].dtype == np.float32 and (large['a'] == np.arange(100_000)).all()
    assert hosts.from_first(lambda: hosts.from_first(lambda: hosts.meet('x', 'apart'))) == ['apart']
    assert (hosts.gather(np.array([number, 7])) == [[0, 7], [1, 7]]).all()
    with progress.bar(9, 'own rows', 'row', meets=False) as bar:  # each has as many as it has
        for _ in range(3 + 2 * number):
            bar.update()
    hosts.agree('settings', {'same': 1})
    try:
        hosts.agree('settings', {'same': 1, 'config.seed': number})
    except ValueError as error:
        assert 'config.seed: 0 in process 0, 1 in process 1' in str(error), error
        sys.stderr.write('all as it must be')
    """,
    'late': """
    hosts.meet('the first step')
    if number == 1:
        time.sleep(600)
    hosts.meet('step 2 of finetune')
    """,
    'error': """
    hosts.meet('the first step')
    if number == 1:
        raise ValueError('config.x is 1; it must be 2')
    hosts.meet('step 2 of finetune')
    """,
    'work': """
    work = jax.pmap(lambda x: jax.lax.psum(x, 'd'), axis_name='d')
    for step in range(10_000):
        work(np.ones((jax.local_device_count(), 3))).block_until_ready()
        hosts.check('the next step')
        if step == 2:
            sys.stderr.write('working\\n')
            sys.stderr.flush()
        time.sleep(0.02)
    """,
}


class Pair:
    """Two processes of one run, with one simulated device each."""

    def __init__(self, act, folder):
        with socket.socket() as found:
            found.bind(('127.0.0.1', 0))
            port = found.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
        environment |= {'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(Path(hosts.__file__).parents[2])}
        self._files = [open(folder / f'{number}.txt', 'w+b') for number in range(2)]
        self.both = [
            subprocess.Popen(
                [sys.executable, '-c', PROGRAM.format(act=ACTS[act]), f'127.0.0.1:{port},2,{number}'],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for number, file in enumerate(self._files)
        ]

    def said(self, number):
        return Path(self._files[number].name).read_text(errors='replace')

    def wait_until_both_work(self):
        until = time.monotonic() + 120
        while not all('working' in self.said(number) for number in range(2)):
            assert time.monotonic() < until, self.said(0) + self.said(1)
            time.sleep(0.02)

    def wait(self, seconds=120):
        try:
            return [process.wait(timeout=seconds) for process in self.both]
        finally:
            for process in self.both:
                process.kill()


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """All acts at once: most of their time is spent waiting."""
    names = {'talk': 'talk', 'late': 'late', 'error': 'error', 'kill 0': 'work', 'kill 1': 'work'}
    names |= {'stop 1': 'work', 'hang 1': 'work'}
    found = {name: Pair(act, tmp_path_factory.mktemp('pair')) for name, act in names.items()}
    yield found
    for pair in found.values():
        for process in pair.both:
            process.kill()


def test_values_words_and_arrays_reach_all_and_differences_are_told(pairs):
    assert pairs['talk'].wait() == [0, 0], pairs['talk'].said(0) + pairs['talk'].said(1)
    for number in range(2):
        assert pairs['talk'].said(number).count('all as it must be') == 1
        assert f'process {number} of 2, 1 of 2 devices' in pairs['talk'].said(number)


def assert_one_line(pair, number, *parts):
    until = time.monotonic() + 10  # a line may come after the process ended
    while 'dpp-jax:' not in pair.said(number) and time.monotonic() < until:
        time.sleep(0.05)
    said = pair.said(number)
    lines = [line for line in said.splitlines() if 'dpp-jax:' in line]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), said
    assert 'Traceback' not in said and 'stack trace' not in said, said


def test_who_is_late_at_a_meeting_is_named_and_all_end(pairs):
    assert pairs['late'].wait() == [1, 1]
    for number in range(2):
        assert_one_line(pairs['late'], number, 'process 1 did not come to step 2 of finetune within 5 s')


def test_an_error_of_one_process_ends_all_and_all_say_it(pairs):
    assert pairs['error'].wait() == [1, 1]
    for number in range(2):
        assert_one_line(pairs['error'], number, 'config.x is 1; it must be 2')
    assert 'Run the same command' not in pairs['error'].said(0)  # it would end the same way


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(pairs, victim):
    pair = pairs[f'kill {victim}']
    pair.wait_until_both_work()
    pair.both[victim].kill()
    start = time.monotonic()
    statuses = pair.wait()
    assert time.monotonic() - start < 60 and statuses[1 - victim] not in (0, None)
    assert_one_line(pair, 1 - victim, f'process {1 - victim} stops: process {victim}', 'Run the same command')


def test_a_process_that_hangs_ends_the_other(pairs):
    pair = pairs['hang 1']
    pair.wait_until_both_work()
    pair.both[1].send_signal(signal.SIGSTOP)
    assert pair.both[0].wait(timeout=60) == 1
    assert_one_line(pair, 0, 'process 1', 'gave no sign of life for 5 s')
    pair.both[1].kill()


def test_sigterm_to_one_ends_all_well_after_the_same_step(pairs):
    pair = pairs['stop 1']
    pair.wait_until_both_work()
    pair.both[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)


@pytest.mark.parametrize('text', ['', 'yes', '10.0.0.1,2,0', 'host:99999,2,0', 'host:1,2,2', 'host:1,2'])
def test_other_words_for_distributed_are_refused(text):
    with pytest.raises(hosts.NotTogether, match='--distributed is .* it must be auto, none'):
        hosts.asked(text)


def test_one_process_meets_nobody():
    assert hosts.meet('here', 'word') == ['word'] and hosts.count() == 1 and hosts.is_first()
    value = object()
    assert hosts.from_first(lambda: value) is value
