"""Stop requests: Ctrl-C and SIGTERM end a run between two of its steps, and SIGTERM soon.

How it goes: a program calls `leave_at_once` before anything else, and `wait_for_steps` as soon as there is
work to lose. From then on a request sets a flag and does nothing else. Every stage looks at the flag between
two of its steps: `check` does so, and every progress bar calls it. A loop that saves first does it within
`deferred`.

No signal handler of a program raises an exception. It would be raised in whatever runs at that moment: in a
library that takes it for an error of its own, or in the garbage collector, which loses it.

Imports no other package, so that a program can call it before it waits for theirs.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import threading

GRACE_SECONDS = 25.0  # whoever sends SIGTERM usually sends SIGKILL after 30
_PATIENCE_SECONDS = 0.5  # of people, before they are told why a run goes on
_STOPS = (signal.SIGINT, signal.SIGTERM)

# What is done before the process is ended in the middle of a step: (line, exit status) → None.
before_end: Callable[[str, int], object] = lambda line, code: None
_requests: list[int] = []  # numbers of the signals that asked this process to stop, and are not answered
_is_deferred = False
_end_begun = threading.Lock()


class Interrupted(BaseException):
    """The run was asked to stop; what is saved goes on from there. Like KeyboardInterrupt, no Exception."""

    def __init__(self, signal_number: int, message: str = 'Stopped'):
        super().__init__(message)
        self.signal_number = signal_number


def check() -> None:
    """Raise Interrupted if the run was asked to stop. For the time between two steps.

    Does nothing within `deferred`, and in other threads than the main one, which would not end by it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if _requests and is_main and not _is_deferred:
        raise Interrupted(_requests[0])


def requested() -> int | None:
    """Return the number of the signal that asked the run to stop, if one did."""
    return _requests[0] if _requests else None


def request(number: int) -> None:
    """Ask the run to stop, as if the signal of this number had come to this process."""
    _requests.append(number)


def is_deferred() -> bool:
    """Whether a loop answers requests itself, see `deferred`."""
    return _is_deferred


@contextlib.contextmanager
def deferred(*, raises_at_end: bool = True) -> Iterator[list[int]]:
    """Yield a list that receives a signal's number when the run is asked to stop; nothing else happens.

    For a loop that looks at the list between two steps and saves before it raises Interrupted; a request
    after its last look is raised at the end. A second Ctrl-C stops at once. Outside a program (see
    `wait_for_steps`) this holds inside the context only.

    Args:
        raises_at_end: whether that is so; not where several processes must stop together.
    """
    global _is_deferred
    previous = {}
    if signal.getsignal(signal.SIGTERM) is not _request:
        try:
            previous = {number: signal.signal(number, _request_or_interrupt) for number in _STOPS}
        except ValueError:  # not in the main thread: signals go elsewhere
            pass
    _is_deferred = True
    try:
        yield _requests
    finally:
        _is_deferred = False
        unanswered = _requests[:]
        if previous:
            _requests.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if unanswered and raises_at_end:
        raise Interrupted(unanswered[0])


def leave_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process at once, with a line: for programs with nothing to lose yet."""
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background jobs ignore Ctrl-C
            signal.signal(number, _leave)


def wait_for_steps(grace_seconds: float = GRACE_SECONDS) -> None:
    """Let requests wait for the end of a step, in programs that called `leave_at_once`; else do nothing.

    A second Ctrl-C ends the process at once, and SIGTERM ends it after `grace_seconds`. Then the step in
    progress is lost, and is done again from the last checkpoint. Python calls its handlers between two of its
    own instructions. A compilation or a long step on the device is none, so a thread waits for the signals
    themselves.
    """
    taken = [number for number in _STOPS if signal.getsignal(number) is _leave]
    if not taken:
        return
    for number in taken:
        signal.signal(number, _request)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, grace_seconds), daemon=True).start()


def _leave(number: int, frame: object) -> None:
    """A handler: end the process."""
    del frame
    _end('Stopped before the run began. Run the same command to start it.', number)


def _request(number: int, frame: object) -> None:
    """A handler: set the flag."""
    del frame
    request(number)


def _request_or_interrupt(number: int, frame: object) -> None:
    """A handler: set the flag, and interrupt by a second Ctrl-C."""
    if number == signal.SIGINT and number in _requests:
        raise KeyboardInterrupt
    _request(number, frame)


def _watch(reader: int, grace_seconds: float) -> None:
    """Answer the signals whose numbers come from `reader`, while the main thread may not be able to."""
    seen = set()
    while True:
        for number in os.read(reader, 1):
            if number == signal.SIGINT and number in seen:
                _end_in_step(number)
            elif number == signal.SIGINT:
                line = 'Stopping after this step. Press Ctrl-C again to stop at once.'
                _later(_PATIENCE_SECONDS, _tell, line)
            elif number == signal.SIGTERM and number not in seen:
                _later(grace_seconds, _end_in_step, number)
            seen.add(number)


def _later(seconds: float, function: Callable, *arguments: object) -> None:
    """Call a function after some time, unless the process has ended by then."""
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


def _end_in_step(number: int) -> None:
    _end('Stopped during a step. Run the same command to continue from what is saved.', number)


def _end(line: str, number: int) -> None:
    """End the process with a line and without Python's farewell; files appear whole or not at all.

    Not by an exception: a library that is being imported may turn one into an error of its own.
    """
    if _end_begun.acquire(blocking=False):
        _tell(line)
        code = 0 if number == signal.SIGTERM else 128 + number
        before_end(line, code)
        os._exit(code)


def _tell(line: str) -> None:
    """Write to the terminal, whatever Python is doing with its own streams."""
    try:
        os.write(2, f'\n{line}\n'.encode())
    except OSError:  # nobody listens any more
        pass
