"""Progress bars with the time left."""

import sys

from tqdm import tqdm


def bar(total: int, name: str, unit: str, initial: int = 0) -> tqdm:
    """Make a bar on the terminal; in a log file, a line every half minute instead of a flood."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc=f'{name:<12}',
        unit=unit,
        initial=initial,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        dynamic_ncols=True,
        smoothing=0.1,
    )
