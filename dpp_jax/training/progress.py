"""Progress bars with the time left. Between two steps they also stop a run that was asked to stop."""

from collections.abc import Callable, Iterator
import contextlib
from pathlib import Path
import sys
import time

from tqdm import tqdm

from dpp_jax import files
from dpp_jax.training import hosts, preemption

_COMPILING = 'compiling …'
LINE_SECONDS = 30.0  # between two lines in a log file
_NOTE_SECONDS = 5.0  # between two notes of what is in progress
# What a note holds.
NOTE_FORM = {'name': str, 'done': int, 'total': int, 'unit': str, 'seconds_left?': float, 'time': float}
_note: list[Path] = []  # where it goes, if anywhere


@contextlib.contextmanager
def noted(path: Path) -> Iterator[None]:
    """Let bars note every few seconds in a JSON file what is in progress; the file is gone at the end.

    It tells how long steps on private images take: `path` must lie in private/.
    """
    _note.append(path)
    try:
        yield
    finally:
        _note.remove(path)
        path.unlink(missing_ok=True)


def bar(
    total: int, name: str, unit: str, initial: int = 0, *, compiles: bool = True, meets: bool = True
) -> 'Bar':
    """Make a bar on the terminal; in a log file, a whole line every half minute, and none of what is quick.

    Its `update` raises `preemption.Interrupted` if the run was asked to stop: no stage can forget it. Of
    several processes, all take the same steps; they meet at each, stop after the same one, and process 0
    alone shows the bar.

    Args:
        total: steps at the end.
        name: what is in progress.
        unit: of a step.
        initial: steps done before.
        compiles: whether the first step waits for the compiler. The bar says so, and that step does not count
            for the time left.
        meets: whether all processes take the same steps; else each has as many as it has, and hears of a
            request to stop where they meet next.
    """
    is_terminal = sys.stderr.isatty()
    interval = 0.2 if is_terminal else 1.0
    shown = (Bar if is_terminal else Lines)(
        total=total,
        desc=f'{name:<12}',
        unit=unit,
        initial=initial,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        dynamic_ncols=True,
        leave=is_terminal,
        smoothing=0.1,
        postfix=_COMPILING if compiles else None,
        disable=not hosts.is_first(),
    )
    shown.meets = meets
    return shown


@contextlib.contextmanager
def counting(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function (done, total) that shows a bar, made at its first call.

    For work that does not know of bars, and of which each process has its own.
    """
    shown: list[Bar] = []

    def count(done: int, total: int) -> None:
        if not shown:
            shown.append(bar(total, name, unit, compiles=False, meets=False))
        shown[0].update(done - shown[0].n)

    try:
        yield count
    finally:
        for each in shown:
            each.close()


class Bar(tqdm):
    """A bar whose rate is that of the steps after the first one."""

    meets = True
    _first_end = None  # (time, steps done) when the first step ended
    _noted = 0.0  # when this was noted last

    def update(self, n: float = 1) -> bool | None:
        """Advance by `n`, meet the other processes, raise Interrupted if the run was asked to stop."""
        is_first = self._first_end is None and n
        if self.disable:
            self._first_end = self._first_end or n and (0.0, n)
            shown = None
        else:
            shown = self._end_first(n) if is_first else super().update(n)
            self._take_note()
        if not preemption.is_deferred() and (self.meets or hosts.count() == 1):
            hosts.check('the next step', hosts.PATIENT_SECONDS if is_first else None)
        return shown

    def _name(self) -> str:
        """What is in progress; tqdm adds a colon to it."""
        return self.desc.removesuffix(': ').strip()

    def _take_note(self) -> None:
        """Note what is in progress, if it is time and somebody asked for it."""
        if not _note or time.monotonic() < self._noted + _NOTE_SECONDS:
            return
        self._noted = time.monotonic()
        told = {
            'name': self._name(),
            'done': int(self.n),
            'total': int(self.total),
            'unit': self.unit,
            'time': time.time(),
        }
        rate = self.format_dict['rate']
        if rate and self._first_end and self.n > self._first_end[1]:
            told['seconds_left'] = (self.total - self.n) / rate
        files.write_json(_note[-1], told, mode=0o600)

    def _end_first(self, n: float) -> bool:
        """Advance by the first step: the rate is measured from here."""
        self.n += n
        self.last_print_n, self.last_print_t = self.n, self._time()
        self._first_end = self.last_print_t, self.n
        if self.postfix == _COMPILING:
            self.postfix = None
        self.refresh()
        return True

    @property
    def format_dict(self) -> dict:
        """What is shown; a rate of 0 appears as unknown."""
        shown = super().format_dict
        if shown['rate'] is None:
            since, first = self._first_end or (0, self.n)
            shown['rate'] = (self.n - first) / max(self._time() - since, 1e-9)
        return shown


class Lines(Bar):
    """The same for a log file: whole lines, without carriage returns.

    The first comes after `LINE_SECONDS`, the last at the end of a bar that had others: none of what is quick.
    """

    _last = None  # when the last line was written; at first, when the bar was made
    _told = False  # whether there was one

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if it is time: tqdm calls this whenever a bar would change."""
        now = self._time()
        if self._last is None:
            self._last = now
        elif msg is None and now - self._last >= LINE_SECONDS:
            self._last, self._told = now, True
            self._write(self.line())

    def close(self) -> None:
        """End the bar."""
        if self._told and not self.disable:
            self._write(f'{self._done()}, took {_clock(self._time() - self.start_t)}')
        super().close()

    def line(self) -> str:
        """Return what is in progress, as 'finetune: 40 of 113 steps, 2.3 steps/s, 0:31 left'."""
        parts, rate = [self._done()], self.format_dict['rate']
        if self.postfix:
            parts.append(self.postfix)
        if rate:
            parts.append(
                f'{rate:,.1f} {plural(self.unit)}/s' if rate >= 1 else f'{1 / rate:.1f} s/{self.unit}'
            )
            parts.append(f'{_clock((self.total - self.n) / rate)} left')
        return ', '.join(parts)

    def _done(self) -> str:
        return f'{self._name()}: {int(self.n):,} of {int(self.total):,} {plural(self.unit)}'

    def _write(self, line: str) -> None:
        """Write a whole line at once: other processes and threads may write there too."""
        self.fp.write(f'{line}\n')
        self.fp.flush()


def plural(unit: str) -> str:
    """Return 'steps' of 'step', 'queries' of 'query'."""
    return f'{unit[:-1]}ies' if unit.endswith('y') else f'{unit}s'


def _clock(seconds: float) -> str:
    """Return a time as '0:31' or '1:02:03'."""
    return Bar.format_interval(round(seconds)).removeprefix('0')
