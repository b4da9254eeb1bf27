"""How work is spread over devices. The only module that calls pmap.

Arrays that belong to the devices have a leading axis of the local devices. Row i of a batch goes to
device i mod D, so that the real rows of a padded batch are spread evenly.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any
AXIS = 'devices'
_MOST_OF_A_CPU = 16  # devices: each holds the weights, their average and the optimizer's state
# XLA ends a process whose CPU devices wait for each other for 40 seconds. A DP-SGD step takes minutes, and
# on a busy machine one core may be that much slower.
_PATIENCE = {
    'xla_cpu_collective_call_warn_stuck_timeout_seconds': 3600,
    'xla_cpu_collective_call_terminate_timeout_seconds': 7 * 24 * 3600,
}
_CPU_QUOTA = Path('/sys/fs/cgroup/cpu.max')
_limit: int | None = None


@contextlib.contextmanager
def limited_to(number: int) -> Iterator[None]:
    """Use only the first `number` local devices inside (one process)."""
    global _limit
    if not 1 <= number <= jax.local_device_count():
        raise ValueError(f'number of devices is {number}; it must be in [1, {jax.local_device_count()}]')
    previous, _limit = _limit, number
    try:
        yield
    finally:
        _limit = previous


def local() -> list[jax.Device]:
    """Return the devices of this process that are in use."""
    return jax.local_devices()[:_limit]


def parallel(function: Callable, *, in_axes: Sequence[int | None], donate: Sequence[int] = ()) -> Callable:
    """Run `function` on every device at once, jitted, under the named axis AXIS.

    Args:
        function: positional arguments only.
        in_axes: per argument 0 (has a device axis) or None (the same on every device).
        donate: positions of arguments whose memory the result may reuse.
    """
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=tuple(in_axes),
        donate_argnums=tuple(donate),
        devices=local() if _limit else None,
    )


def count() -> int:
    """Devices in use, of all processes."""
    return len(local()) if _limit else jax.device_count()


def cache_folder() -> Path:
    """Return the folder for what can be made again. It must hold nothing private."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dpp_jax'


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless it was told where.

    Programs hold no data: images, weights and keys are their arguments.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'programs'))


def in_32_bits() -> None:
    """Let numbers have 32 bits where no type is said, whatever JAX_ENABLE_X64 says."""
    jax.config.update('jax_enable_x64', False)


def check() -> None:
    """Refuse what a run cannot work with.

    Raises:
        ValueError: there are several processes, or numbers have 64 bits where no type is said.
    """
    if jax.process_count() > 1:
        raise ValueError(f'this run has {jax.process_count()} processes; it must have one, with all devices')
    if jax.config.jax_enable_x64:  # the program `dpp-jax` turns it off by itself
        raise ValueError('JAX_ENABLE_X64 is on; it must be off: a DP-SGD step is made of 32-bit numbers')


def one_per_core() -> None:
    """Make a device of each CPU core, at most 16, before JAX starts. A GPU or a TPU does not notice.

    A device that works on images of its own waits for no other until the step ends: with two cores
    1.1 times as fast as both of them on every operation. JAX_NUM_CPU_DEVICES or XLA_FLAGS
    (--xla_force_host_platform_device_count) of the user's stay in force.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if 'xla_force_host_platform_device_count' not in flags and jax.config.jax_num_cpu_devices < 0:
        jax.config.update('jax_num_cpu_devices', min(cores(), _MOST_OF_A_CPU))
    for name, seconds in _PATIENCE.items():
        if name not in flags:
            flags += f' --{name}={seconds}'
    os.environ['XLA_FLAGS'] = flags.strip()


def cores() -> int:
    """CPU cores that this process may use: those that it may run on, and no more than its quota (Linux)."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text(encoding='utf-8').split()
        return max(1, min(found, int(quota) // int(period)))
    except (OSError, ValueError):  # no such system, or no quota ("max")
        return found


def kind() -> str:
    """Name what runs the programs: another kind has other speeds and another rounding."""
    name = local()[0].device_kind
    if jax.default_backend() == 'cpu':
        name += f', {cores()} cores in {len(local())} devices'
    return f'{name}, jax {jax.__version__}'


def replicate(tree: PyTree) -> PyTree:
    """Copy every leaf to each local device, with a leading device axis."""
    # Through the mapping call itself: another placement of the same values would compile again.
    copy = parallel(lambda leaves, _: leaves, in_axes=(None, 0))
    return copy(tree, np.zeros(len(local())))


def first(tree: PyTree) -> PyTree:
    """Return what the first device holds, as NumPy arrays (waits for the computation)."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0], tree)


def deal(batch: PyTree) -> PyTree:
    """Deal rows (n, ...), n divisible by the devices → this process's part (local, n / D, ...)."""
    start = jax.process_index() * len(local())
    part = slice(start, start + len(local()))

    def split(rows):
        rows = np.asarray(rows)
        dealt = rows.reshape((rows.shape[0] // count(), count()) + rows.shape[1:])
        return np.ascontiguousarray(np.moveaxis(dealt, 1, 0)[part])

    return jax.tree.map(split, batch)


def deal_to_teams(batch: PyTree, size: int) -> PyTree:
    """Deal rows to teams of `size` neighboring devices: each device of a team has the same rows.

    Row i goes to team i mod T, T = D / size. A team lies within one process. With teams of one it is `deal`.

    Args:
        batch: leaves (n, ...), n divisible by T.
        size: divides the devices of every process.

    Returns:
        this process's part, leaves (local, n / T, ...).
    """
    if size == 1:
        return deal(batch)
    own_teams, teams = len(local()) // size, count() // size
    start = jax.process_index() * own_teams

    def split(rows):
        rows = np.asarray(rows)
        dealt = rows.reshape((rows.shape[0] // teams, teams) + rows.shape[1:])
        return np.repeat(np.moveaxis(dealt, 1, 0)[start : start + own_teams], size, axis=0)

    return jax.tree.map(split, batch)


def collect(rows: jax.Array) -> np.ndarray:
    """Undo `deal` within one process: (D, n / D, ...) → (n, ...)."""
    rows = np.asarray(rows)
    return np.moveaxis(rows, 0, 1).reshape((-1,) + rows.shape[2:])
