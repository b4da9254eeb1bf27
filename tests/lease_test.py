"""A lease: one process at a time, without a lock; the dead are followed, the living are not disturbed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dpp_jax import lease, object_store

HOLD = """
import runpy, sys, time
runpy.run_path('tests/bucket.py')
from dpp_jax import files, lease
lease._SETTLE = 0.0
with lease.held(files.path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(store, monkeypatch):
    """Of a lease, in seconds that fit a test."""
    monkeypatch.setattr(lease, 'EVERY', 0.05)
    monkeypatch.setattr(lease, 'DEAD_AFTER', 0.6)
    monkeypatch.setattr(lease, '_LOOK_AGAIN', 0.05)
    return store / '.lock'


def elsewhere(path, **changes):
    """Make a lease that a process on another machine wrote."""
    with lease.held(path):
        found = lease.Lease(path)._read()
    found |= {'owner': 'other', 'host': 'far', 'pid': 7, 'process': 'another-machine pid 7 9'} | changes
    object_store.write(path, json.dumps(found).encode())
    return found


def test_it_is_renewed_and_given_back(path):
    with lease.held(path):
        beats = []
        until = time.monotonic() + 5
        while len(beats) < 3 and time.monotonic() < until:
            found = lease.Lease(path)._read()
            beats += [found['beat']] if found['beat'] not in beats else []
        assert beats == sorted(beats) and len(beats) == 3
        assert found['pid'] == os.getpid() and object_store.size(path) == 512
        lease.check()
    assert not path.exists()


def test_a_living_process_of_this_machine_is_named(path):
    with lease.held(path):
        with pytest.raises(
            lease.InUse, match=rf'process {os.getpid()} on .* renewed .* ago. Wait for it, or'
        ):
            with lease.held(path):
                pass
        lease.check()


def test_one_of_another_machine_is_watched_and_named_when_it_gives_a_sign_of_life(path):
    found = elsewhere(path, dead_after=30.0)
    beat = threading.Timer(0.2, lambda: object_store.write(path, json.dumps(found | {'beat': 99}).encode()))
    beat.start()
    with pytest.raises(lease.InUse, match='process 7 on far works there and renewed .* just now'):
        with lease.held(path):
            pass
    beat.join()
    assert json.loads(path.read_bytes())['owner'] == 'other'


def test_one_that_gives_none_for_the_time_that_it_said_is_followed(path, capsys, monkeypatch):
    """Measured by this process's own clock where the store tells no times."""
    elsewhere(path, dead_after=0.5)
    monkeypatch.setattr(lease, '_time', lambda path: 0.0)
    start = time.monotonic()
    with lease.held(path):
        assert time.monotonic() - start >= 0.5
        lease.check()
    assert (
        'belongs to process 7 on far, renewed some time ago. Looking for up to 0 s' in capsys.readouterr().out
    )


def test_an_old_one_is_followed_after_a_beat_by_the_clock_of_the_store(path, monkeypatch):
    """However wrong the clock of this machine is: two times of the store are compared."""
    elsewhere(path, dead_after=300.0)
    monkeypatch.setattr(lease, '_time', lambda found: 1000.0 if found == path else 1301.0)
    monkeypatch.setattr(time, 'time', lambda: 0.0)
    start = time.monotonic()
    with lease.held(path):
        assert 1.5 * lease.EVERY <= time.monotonic() - start < 10
        lease.check()


def test_a_living_one_whose_clock_is_behind_is_not_followed(path, monkeypatch):
    """A mounted bucket may tell the time of the machine that wrote."""
    found = elsewhere(path, dead_after=300.0)
    monkeypatch.setattr(lease, 'EVERY', 1.0)
    monkeypatch.setattr(lease, '_time', lambda found: 1000.0 if found == path else 9000.0)
    said = json.dumps(found | {'beat': 99}).encode()
    beat = threading.Timer(0.2, lambda: object_store.write(path, said))
    beat.start()
    with pytest.raises(lease.InUse, match='process 7 on far works there'):
        with lease.held(path):
            pass
    beat.join()


def test_a_process_of_this_machine_that_was_killed_is_followed_at_once(path, monkeypatch):
    monkeypatch.setattr(lease, 'DEAD_AFTER', 300.0)
    command = [sys.executable, '-c', HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(lease.InUse, match=f'process {process.pid} on '):
            with lease.held(path):
                pass
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    start = time.monotonic()
    with lease.held(path):
        assert time.monotonic() - start < 10


def test_of_two_that_start_at_once_one_works(path, monkeypatch):
    monkeypatch.setattr(lease, '_SETTLE', 0.3)
    results = []

    def work():
        try:
            lease.Lease(path).take()
            results.append('works')
        except lease.InUse:
            results.append('refused')

    threads = [threading.Thread(target=work) for _ in range(2)]
    monkeypatch.setattr(lease.Lease, '_read', first_sees_nothing(lease.Lease._read, threading.Barrier(2)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ['refused', 'works']


def test_of_two_one_works_also_if_the_other_is_slow_between_look_and_write(path, monkeypatch):
    """The quick one has settled by then: it must find out before the slow one begins."""
    for name, seconds in (('_QUICK', 0.1), ('EVERY', 0.5), ('_LOOK_AGAIN', 0.5)):
        monkeypatch.setattr(lease, name, seconds)
    slow, looked, goes_on = lease.Lease(path), threading.Event(), threading.Event()
    write = slow._write

    def write_late():
        looked.set()
        goes_on.wait(5)
        write()

    monkeypatch.setattr(slow, '_write', write_late)
    results = []

    def work():
        try:
            slow.take()
            results.append('works')
        except lease.InUse:
            results.append('refused')

    thread = threading.Thread(target=work)
    thread.start()
    assert looked.wait(5)
    quick = lease.Lease(path)
    quick.take()
    time.sleep(0.15)
    goes_on.set()
    thread.join()
    # As a rule the slow one works. A beat of the quick one just then would take the lease back.
    assert results == (['works'] if quick._lost else ['refused'])
    for each in (quick, slow):
        each.give_back()
    assert not path.exists()


def first_sees_nothing(read, barrier):
    """`Lease._read`, by which both have looked before one has written."""
    seen = set()

    def look(self):
        if self in seen:
            return read(self)
        seen.add(self)
        found = read(self)
        barrier.wait(5)
        return found

    return look


def test_who_lost_it_does_not_go_on_nor_renew_nor_remove_it(path):
    with lease.held(path):
        found = lease.Lease(path)._read() | {'owner': 'other', 'host': 'far', 'pid': 7}
        object_store.write(path, json.dumps(found).encode())
        time.sleep(0.3)
        with pytest.raises(lease.Lost, match='took over the lease .* .process 7 on far.. This process stops'):
            lease.check()
    assert json.loads(path.read_bytes())['owner'] == 'other'
    path.unlink()
    with lease.held(path):
        path.unlink()  # by hand
        time.sleep(0.2)
        with pytest.raises(lease.Lost):
            lease.check()


def test_a_store_that_fails_for_a_moment_does_not_matter_and_for_long_it_does(path, monkeypatch):
    with lease.held(path):
        read, fails = lease.Lease._read, [True]
        monkeypatch.setattr(lease.Lease, '_read', lambda self: 1 / 0 if fails else read(self))
        time.sleep(0.15)
        lease.check()
        fails.clear()
        time.sleep(0.2)
        lease.check()
        fails.append(True)
        time.sleep(0.5)
        with pytest.raises(lease.Lost, match='could not be read for'):
            lease.check()


@pytest.mark.parametrize('content', [b'', b'[]', b'{"owner": 3}'])
def test_what_is_no_lease_holds_nobody_off(path, content):
    object_store.write(path, content)
    with lease.held(path):
        lease.check()
