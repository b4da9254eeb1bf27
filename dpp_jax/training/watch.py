"""What ends all processes of a run when one is lost or fails, each with one line."""

import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from typing import NoReturn

import jax

from dpp_jax.training import preemption

AGAIN = 'Run the same command to continue from what is saved.'
_START_SECONDS = 600  # for JAX to start on all hosts
FAREWELL = 5.0  # seconds in which the others hear why a process ends


def client():
    """Return JAX's client of the service through which the processes of a run talk; it lives in process 0."""
    # JAX has no public door to its key-value store and to barriers with a time limit; orbax uses this one.
    from jax._src import distributed

    return distributed.global_state.client


class Watch:
    """Looks after the processes of a run, in a thread of its own.

    Every process gives signs of life, which process 0 follows; the others follow process 0. Who is silent for
    too long, or says that it failed, ends all processes, each with a line that names it.
    """

    def __init__(self, timeout: float):
        """`timeout`: seconds without a sign of life after which a process counts as lost."""
        self.timeout = timeout
        self._index, self._count = jax.process_index(), jax.process_count()
        self._is_first = self._index == 0
        # Between two signs of life; process 0 reads those of all.
        self._period = min(0.5 if self._count <= 64 else 2.0, timeout / 8)
        self._beats: dict[str, tuple[str, float]] = {}  # process → its last sign of life, and when it came
        self._heard = time.monotonic()  # when JAX's service answered last
        self._asked = False  # whether process 0 was told of a request to stop
        self._end = threading.Lock()  # taken by who ends this process
        self._ending: int | None = None  # the thread that does, if it is one with work of its own
        self._teller = None if self._is_first else Teller(self._index)

    def start(self) -> None:
        """Start to give signs of life and to look for those of others."""
        service = client()
        service.key_value_set(f'host/{self._index}', platform.node())
        service.wait_at_barrier('hosts are known', int(1000 * _START_SECONDS))
        self._hosts = dict(service.key_value_dir_get('host/'))
        for target in (self._talk, self._listen):
            threading.Thread(target=target, daemon=True).start()

    def name(self, number: int | str) -> str:
        """Name a process for people."""
        return f'process {number} ({self._hosts.get(f"host/{number}", "unknown host")})'

    def _talk(self) -> None:
        """Exchange signs of life by JAX's service."""
        service = client()
        for beat in itertools.count():
            try:
                if self._is_first:
                    service.key_value_set('run/beat', str(beat), allow_overwrite=True)
                    self._look_after(dict(service.key_value_dir_get('process/')))
                else:
                    self._tell_first(service, beat)
                    self._follow(dict(service.key_value_dir_get('run/')))
                self._heard = time.monotonic()
            except jax.errors.JaxRuntimeError:
                pass  # `_listen` waits for the next answer
            time.sleep(self._period)

    def _tell_first(self, service, beat: int) -> None:
        service.key_value_set(f'process/{self._index}/beat', str(beat), allow_overwrite=True)
        signal_number = preemption.requested()
        if signal_number and not self._asked:
            service.key_value_set(f'process/{self._index}/stop', str(signal_number), allow_overwrite=True)
            self._asked = True

    def _look_after(self, said: dict[str, str]) -> None:
        """In process 0: end all if one failed or is silent; hear who asks to stop."""
        now = time.monotonic()
        for number in range(1, self._count):
            failed = said.get(f'process/{number}/failed')
            if failed:
                told = json.loads(failed)
                self._end_all(f'{self.name(number)} ended: {told["line"]}', told['code'])
            if f'process/{number}/stop' in said and not self._asked:
                self._asked = True
                preemption.request(int(said[f'process/{number}/stop']))
            beat = said.get(f'process/{number}/beat', '')
            before, at = self._beats.get(number, ('', now))
            if beat == before and now - at > self.timeout:
                self._end_all(
                    f'{self.name(number)} gave no sign of life for {self.timeout:g} s: it was killed, or it '
                    f'hangs. {AGAIN}',
                    1,
                )
            self._beats[number] = (beat, at if beat == before else now)

    def _follow(self, said: dict[str, str]) -> None:
        """In the others: end if process 0 says so, or is silent."""
        if 'run/end' in said:
            told = json.loads(said['run/end'])
            self._end_here(told['line'], told['code'])
        now, beat = time.monotonic(), said.get('run/beat', '')
        before, at = self._beats.get(0, ('', now))
        if beat == before and now - at > self.timeout:
            self._silent_first()
        self._beats[0] = (beat, at if beat == before else now)

    def _listen(self) -> None:
        """End this process if the service, which lives in process 0, does not answer at all."""
        while True:
            time.sleep(self._period)
            if time.monotonic() - self._heard > self.timeout and not self._is_first:
                self._silent_first()

    def _silent_first(self) -> None:
        self._end_here(
            f'{self.name(0)} gave no sign of life for {self.timeout:g} s: it was killed, or it hangs. '
            f'{AGAIN}',
            1,
        )

    def _end_all(self, line: str, code: int) -> None:
        """In process 0: tell all the reason, and end."""
        self._publish_end(line, code)
        self._end_here(line, code, linger=FAREWELL)

    def _publish_end(self, line: str, code: int) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client().key_value_set('run/end', json.dumps({'line': line, 'code': code}))

    def _publish_failure(self, line: str, code: int) -> None:
        """In the others: tell process 0 why this one ends."""
        told = json.dumps({'line': line, 'code': code})
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client().key_value_set(f'process/{self._index}/failed', told, allow_overwrite=True)

    def _end_here(self, line: str, code: int, linger: float = 0.0) -> NoReturn:
        """End this process with a line."""
        if not self._end.acquire(blocking=False):
            time.sleep(3600)  # somebody else does
        os.write(2, f'\ndpp-jax: process {self._index} stops: {line}\n'.encode())
        time.sleep(linger)
        self._part()
        os._exit(code)

    def end_after(self, line: str) -> NoReturn:
        """End because of what this process noticed; a verdict that comes meanwhile knows more."""
        if self._is_first:
            self._end_all(line, 1)
        self._publish_failure(line, 1)
        time.sleep(FAREWELL + 2 * self._period)
        self._end_here(line, 1)

    def say_failed(self, line: str, code: int) -> None:
        """Let the others end because of an error of this process, which has printed its line."""
        if self._teller:
            self._teller.end()
        if self._ending == threading.get_ident():  # a signal came while this thread says good-bye
            return
        if not self._end.acquire(blocking=False):
            time.sleep(3600)
        self._ending = threading.get_ident()
        if self._is_first:
            self._publish_end(f'{self.name(0)} ended: {line}' if code else line, code)
            self._wait_for_others()
        else:
            self._publish_failure(line, code)
            time.sleep(2 * self._period)
        self._part()

    def give_way(self) -> None:
        """Wait for the end if another thread has said why this process ends."""
        if self._end.locked():
            time.sleep(3600)

    def leave(self) -> None:
        """End this process well."""
        if self._end.acquire(blocking=False):
            if self._is_first:
                self._wait_for_others()
            self._part()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _part(self) -> None:
        """Let process 0 know that this one is gone, and the teller that nothing is wrong."""
        if not self._is_first:
            self._teller.end()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client().key_value_set(f'gone/{self._index}', '')

    def _wait_for_others(self) -> None:
        """In process 0: wait until the others have heard and are gone, for some seconds."""
        until = time.monotonic() + FAREWELL
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() < until and len(client().key_value_dir_get('gone/')) < self._count - 1:
                time.sleep(0.05)
        time.sleep(0.2)  # they end after they said so


class Teller:
    """A small process that prints what this one writes on its standard error, without JAX's last words.

    When process 0 is gone, JAX aborts the others at once, from a thread of its own, with a stack trace of 20
    lines that says nothing of the cause. Nothing in this process can answer an abort.
    """

    _END = b'\0end\n'
    _PROGRAM = r"""
import re, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
line_of_end, is_lost, is_over = sys.argv[1], False, False
lost = re.compile(rb'client\.h:\d+\] Terminating process|JAX distributed service detected fatal')
noise = re.compile(rb'^[EFW]\d{4} .*(coordination_service|client\.h)|^\[Gloo\]')
for line in sys.stdin.buffer:
    if line == b'\0end\n':
        is_over = True
    is_lost = is_lost or bool(lost.search(line))
    if not (is_lost or is_over or noise.search(line)):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
if is_lost and not is_over:
    sys.stderr.buffer.write(line_of_end.encode())
"""

    def __init__(self, own_number: int):
        line = f'dpp-jax: process {own_number} stops: process 0 is gone. {AGAIN}\n'
        reader, self._writer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', self._PROGRAM, line], stdin=reader
        )
        os.close(reader)
        os.dup2(self._writer, 2)

    def end(self) -> None:
        """Print no more than what was written so far."""
        os.write(2, self._END)
