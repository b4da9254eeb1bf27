"""Stop requests: SIGTERM and Ctrl-C end a run in order, and SIGTERM soon.

Imports no other package, so that a program can call it before it waits for theirs.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading

GRACE_SECONDS = 25.0  # whoever sends SIGTERM usually sends SIGKILL after 30


class Interrupted(BaseException):
    """The run was asked to stop; what is saved goes on from there. Like KeyboardInterrupt, no Exception."""

    def __init__(self, signal_number: int, message: str = 'Stopped'):
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """Yield a list that receives a signal's number when the run is asked to stop; nothing else happens.

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


def leave_on_sigterm() -> None:
    """Let SIGTERM end the process with 0 at once: for programs that have nothing to save yet.

    Not by an exception: a library that is being imported may turn one into an error of its own.
    """

    def leave(number, frame):
        del number, frame
        os.write(2, b'\nStopped before the run began. Run the same command to start it.\n')
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)


def stop_on_sigterm(grace_seconds: float = GRACE_SECONDS) -> None:
    """Let SIGTERM raise Interrupted, and end the process with 0 after `grace_seconds`.

    Python answers a signal between two of its own instructions. A compilation or a long step on the
    device is none, so a thread that waits for the signal itself keeps the promise in that case: then
    the step in progress is lost, and is done again from the last checkpoint.
    """

    def interrupt(number, frame):
        del frame
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, grace_seconds), daemon=True).start()


def _watch(reader: int, grace_seconds: float) -> None:
    """End the process `grace_seconds` after the first SIGTERM, unless it ended before."""
    while signal.SIGTERM not in os.read(reader, 1):
        pass
    threading.Event().wait(grace_seconds)
    print(
        '\nStopped during a step. Run the same command to continue from the last checkpoint.',
        file=sys.stderr,
        flush=True,
    )
    os._exit(0)
