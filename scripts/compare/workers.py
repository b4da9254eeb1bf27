"""Processes that do one kind of work each, on command: what speed and memory are measured with.

A process of its own shows its own memory, can be stopped at a limit, and keeps one framework's threads away
from the other's. The parent asks the processes in turns; only one computes at a time.
"""

from collections.abc import Callable
import ctypes
import gc
import multiprocessing
import os
from pathlib import Path
import time
from typing import Any

_POLL_SECONDS = 0.05


class Failed(Exception):
    """A process did not get through; the message says why, in a line."""


class Worker:
    """A process that builds a call and then makes it whenever it is asked to.

    Args:
        build: (*arguments) → a call without arguments; a function of a module, run in the process. The
            first call is made at once.
        arguments: of `build`; they are pickled.
        environment: of the process.
        build_seconds: limit for building and the first call.
        call_seconds: limit for every other call.
        memory_bytes: limit of the process's memory (Linux).

    Raises:
        Failed: an error in the process, or a limit was passed.
    """

    def __init__(
        self,
        build: Callable[..., Callable],
        arguments: tuple,
        *,
        environment: dict[str, str],
        build_seconds: float,
        call_seconds: float,
        memory_bytes: float,
    ):
        self._call_seconds, self._memory_bytes = call_seconds, memory_bytes
        context = multiprocessing.get_context('spawn')
        self._connection, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, build, arguments, environment), daemon=True
        )
        self._process.start()
        there.close()
        try:
            self.build_seconds = self._receive(build_seconds)
        except Failed:
            self.close()
            raise

    def call(self) -> tuple[float, int | None]:
        """Make one call: its seconds, and the most memory during it, beside that of loaded modules."""
        self._connection.send('call')
        return self._receive(self._call_seconds)

    def close(self) -> None:
        self._connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _receive(self, limit: float) -> Any:
        start = time.monotonic()
        while not self._connection.poll(_POLL_SECONDS):
            if not self._process.is_alive():
                raise Failed(f'the process ended with code {self._process.exitcode}')
            if time.monotonic() - start > limit:
                raise Failed(f'took more than {limit:g} s')
            if (resident_bytes('VmRSS', self._process.pid) or 0) > self._memory_bytes:
                raise Failed(f'out of memory: more than {self._memory_bytes / 2**30:.1f} GiB')
        try:
            is_fine, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Failed(f'the process ended ({type(error).__name__})') from None
        if not is_fine:
            raise Failed(answer)
        return answer


def _serve(connection, build: Callable, arguments: tuple, environment: dict[str, str]) -> None:
    """Build, call once, then call on every message, in a new process."""
    os.environ.update(environment)
    try:
        start = time.perf_counter()
        call, memory = build(*arguments)
        call()
        connection.send((True, time.perf_counter() - start))
        while True:
            connection.recv()
            memory.begin()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            connection.send((True, (seconds, memory.most())))
    except (EOFError, BrokenPipeError):  # the parent has no more questions
        return
    except BaseException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        connection.send((False, f'{type(error).__name__}: {" ".join(lines)[:300]}'))


class HostMemory:
    """The most memory of this process while it works, beside what it has where this object is made."""

    def __init__(self):
        gc.collect()
        self._loaded = resident_bytes('VmRSS')

    def begin(self) -> None:
        if self._loaded is not None:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed belongs to nobody
            Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')  # forget the most there has been

    def most(self) -> int | None:
        return None if self._loaded is None else max(0, resident_bytes('VmHWM') - self._loaded)


class DeviceMemory:
    """The same of an accelerator, as its framework's allocator says."""

    def __init__(self, most: Callable[[], int | None], begin: Callable[[], None] = lambda: None):
        self.most, self.begin = most, begin


def resident_bytes(kind: str, pid: int | str = 'self') -> int | None:
    """Of a process: VmRSS is now, VmHWM the most there has been; None where nobody says (not Linux)."""
    try:
        lines = Path(f'/proc/{pid}/status').read_text(encoding='utf-8').splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(kind)), None)


def available_bytes() -> float:
    """Memory that programs may still take on this machine."""
    try:
        lines = Path('/proc/meminfo').read_text(encoding='utf-8').splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return 8.0 * 2**30
