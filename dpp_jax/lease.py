"""A lease in place of a lock, where a file system has none: one process at a time works in a folder.

The lease is an object that its owner writes again and again. Whoever finds one that does not change any more
takes it over. No clock of one machine decides alone: a reader asks the store how old the object is, and
always watches the owner's counter for longer than a beat: a mounted bucket may tell times of the writers.

A lease cannot be as strict as a lock: a process that stood still may write once more before it looks. So an
owner looks before each line of the ledger, and before what it writes or removes (`check`); and two processes
of a run that both hold its keys draw the same batches and the same noise. A write that was on its way all the
time may put back an older ledger: the owner writes its longer one again (`files.Log`).
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import secrets
import socket
import threading
import time
from typing import Any

from dpp_jax import object_store

EVERY = 30.0  # seconds between two beats
DEAD_AFTER = 300.0  # seconds without a beat
_SETTLE = 2.0  # seconds, until of two that start at once both see who wrote last
_QUICK = 2.0  # seconds from a look to the end of a write, at most `_SETTLE`: who is slower waits longer
_LOOK_AGAIN = 5.0  # seconds for which a look at the lease is good
_SIZE = 512  # bytes, always: a store that remembers an old size reads no part
_FORM = {'owner': str, 'host': str, 'pid': int, 'process': str, 'beat': int, 'dead_after': float}
_held: list['Lease'] = []  # by this process


class InUse(PermissionError):
    """Another process holds the lease; the message names it."""


class Lost(OSError):
    """Another process took the lease over, or it could not be renewed in time."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lease `path`, renewed by a thread, until the context ends.

    Raises:
        InUse: another process holds it. A killed one on this machine is known to be dead at once; others are
            when they have not renewed it for the time that they said, which is waited for.
    """
    lease = Lease(path)
    lease.take()
    _held.append(lease)
    try:
        yield
    finally:
        _held.remove(lease)
        lease.give_back()


def check() -> None:
    """Raise `Lost` unless this process still holds its leases. Before each line of the ledger; quick."""
    for lease in _held:
        lease.check()


def is_held() -> bool:
    """Whether this process holds a lease, and all that it holds are its own as of now."""
    return bool(_held) and all(lease.is_own() for lease in _held)


class Lease:
    """One lease: how it is taken, renewed, looked at and given back."""

    def __init__(self, path: Path):
        self.path = path
        self._owner = secrets.token_hex(8)
        self._beat = 0
        self._lost = ''
        self._confirmed = _now()  # when this process last saw that the lease is its own
        self._looked = _now()  # when it last began to read what is there
        self._lock = threading.Lock()  # of beats and looks of this process
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> None:
        """Wait until no other process holds it, and write it; see `held`."""
        found = self._read()
        if found:
            self._wait_for_the_dead(found)
        self._write()
        # Whoever wrote in between has settled by now, and looks again at its next beat at the latest.
        is_quick = _now() - self._looked <= _QUICK
        time.sleep(_SETTLE if is_quick else EVERY + _LOOK_AGAIN)
        found = self._read()
        if found is None or found['owner'] != self._owner:
            raise InUse(f'another process began at the same time ({_words(found)}). Let one of them work')
        self._confirmed = _now()
        self._thread.start()

    def check(self) -> None:
        """Look whether the lease is still this process's own; raises `Lost`."""
        with self._lock:
            if not self._lost and _now() - self._confirmed > _LOOK_AGAIN:
                self._look()
        if self._lost:
            raise Lost(
                f'{self._lost}. This process stops: only one may work in a folder. What it released is in '
                'the ledger; run the same command when the other one has ended'
            )

    def is_own(self) -> bool:
        """Whether the store says, now, that the lease is this process's own."""
        with self._lock:
            return not self._lost and self._look()

    def give_back(self) -> None:
        """End the renewal and remove the lease, if it is still this process's own."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(Exception):  # it would only live on for some minutes
            found = self._read()
            if found and found['owner'] == self._owner:
                self.path.unlink()

    def _renew(self) -> None:
        while not self._end.wait(EVERY) and not self._lost:
            with self._lock:
                if self._look():
                    with contextlib.suppress(Exception):  # the next beat may succeed
                        self._write()

    def _look(self) -> bool:
        """Read the lease; whether it is this process's own."""
        try:
            found = self._read()
        except Exception as error:  # whatever the store's library raises
            silent = _now() - self._confirmed
            if silent > DEAD_AFTER / 2:  # soon others may take it for dead
                self._lost = f'the lease {self.path} could not be read for {silent:.0f} s ({error})'
            return False
        if found is None or found['owner'] != self._owner:
            self._lost = f'another process took over the lease {self.path} ({_words(found)})'
            return False
        self._confirmed = _now()
        return True

    def _wait_for_the_dead(self, found: dict[str, Any]) -> None:
        """Return when the owner is dead; raises `InUse` as soon as it gives a sign of life."""
        if _is_killed_here(found):
            return
        age = self._age()
        alive = (
            f'{_words(found)} works there and renewed {self.path} {{}}. Wait for it, or stop it. Of a killed '
            f'one this is known {found["dead_after"]:.0f} s after its last sign of life'
        )
        if _is_here(found):  # and not killed
            raise InUse(alive.format(_ago(age)))
        # A beat is always waited for: by another machine's clock a living owner may look old.
        left = max(1.5 * EVERY, found['dead_after'] - (age or 0.0))
        print(
            f'{self.path} belongs to {_words(found)}, renewed {_ago(age)}. Looking for up to '
            f'{left:.0f} s whether that process is alive',
            flush=True,
        )
        until = _now() + left
        while _now() < until:
            time.sleep(min(_LOOK_AGAIN, max(0.0, until - _now())))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise InUse(alive.format('just now'))

    def _age(self) -> float | None:
        """Return how old the lease is, in seconds, by the store's times; None if it tells none."""
        probe = self.path.with_name(f'{object_store.UNFINISHED}{self._owner}')
        object_store.write(probe, b'Asks for the time of the store.\n')
        try:
            times = [_time(path) for path in (self.path, probe)]
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)
        return max(0.0, times[1] - times[0]) if all(times) else None

    def _read(self) -> dict[str, Any] | None:
        """Return what the lease says; None if nobody holds it, or what is there is no lease."""
        self._looked = _now()
        for again in (True, True, False):
            try:
                found = json.loads(self.path.read_bytes())
                if all(isinstance(found[name], kind) for name, kind in _FORM.items()):
                    return found
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError):
                pass
            if again:  # a mount may show an object before it is whole
                time.sleep(0.1)
        return None

    def _write(self) -> None:
        self._beat += 1
        said = {
            'owner': self._owner,
            'host': socket.gethostname()[:64],
            'pid': os.getpid(),
            'process': f'{_machine()} {os.getpid()} {_started(os.getpid())}',
            'beat': self._beat,
            'dead_after': DEAD_AFTER,
        }
        object_store.write(self.path, json.dumps(said).ljust(_SIZE - 1).encode() + b'\n')


def _words(found: dict[str, Any] | None) -> str:
    return f'process {found["pid"]} on {found["host"]}' if found else 'unknown'


def _ago(age: float | None) -> str:
    return 'some time ago' if age is None else f'{age:.0f} s ago'


def _time(path: Path) -> float:
    """Return when an object was written, in seconds, as the store tells; 0 if it does not."""
    found = path.stat()
    return float(getattr(found, 'mtime', None) or getattr(found, 'st_mtime', 0.0))


def _now() -> float:
    """Return seconds of a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


def _machine() -> str:
    """Return a name of this start of this machine, and of the process numbers that are seen here."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return 'unknown'


def _started(pid: int) -> str | None:
    """Return when a process of this machine started, in ticks; None if there is none, or a dead one."""
    try:
        *_, after = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')
    except (OSError, ValueError):
        return None
    fields = after.split()
    return None if fields[0] in 'ZX' else fields[19]


def _is_here(found: dict[str, Any]) -> bool:
    """Whether the owner runs, or ran, on this machine."""
    return found['process'].rsplit(' ', 2)[0] == _machine() != 'unknown'


def _is_killed_here(found: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and is not there any more."""
    return _is_here(found) and str(_started(found['pid'])) != found['process'].rsplit(' ', 1)[1]
