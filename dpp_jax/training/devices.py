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

from dpp_jax.training import hosts

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
    """Use only the first `number` devices of this process inside, and no other process."""
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
    """Return the number of devices in use, of all processes."""
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
        ValueError: numbers have 64 bits where no type is said, or processes have other numbers of devices.
    """
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise ValueError(
            f'this run has {jax.device_count()} devices in {jax.process_count()} processes, '
            f'{jax.local_device_count()} of them here; each process must have as many'
        )
    if jax.config.jax_enable_x64:  # the program `dpp-jax` turns it off by itself
        raise ValueError('JAX_ENABLE_X64 is on; it must be off: a DP-SGD step is made of 32-bit numbers')


def connect() -> None:
    """Let the devices of several processes find each other, while nobody has anything else to do.

    On CPUs they have 30 seconds for that. Later one process may compile for longer than another.
    """
    if jax.process_count() > 1:
        add = parallel(lambda ones: jax.lax.psum(ones, AXIS), in_axes=(0,))
        jax.block_until_ready(add(np.ones(len(local()))))


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
    if not jax.tree.leaves(tree):
        return tree  # with several processes, pmap must return something (JAX 0.10)
    # Through the mapping call itself: another placement of the same values would compile again.
    copy = parallel(lambda leaves, _: leaves, in_axes=(None, 0))
    return copy(tree, np.zeros(len(local())))


def first(tree: PyTree) -> PyTree:
    """Return what the first device holds, as NumPy arrays (waits for the computation)."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0], tree)


def deal(batch: PyTree) -> PyTree:
    """Deal rows (n, ...), n divisible by the devices → this process's part (local, n / D, ...)."""
    start = 0 if _limit else jax.process_index() * len(local())
    part = slice(start, start + len(local()))
    return jax.tree.map(lambda rows: np.ascontiguousarray(_dealt(rows, count())[part]), batch)


def deal_own(batch: PyTree, team: int = 1) -> PyTree:
    """Deal rows that this process alone has to teams of `team` neighboring devices, which share each row.

    Row i goes to team i mod T, T = L / team, of the L devices of this process.

    Args:
        batch: leaves (n, ...), n divisible by T.
        team: divides L.

    Returns:
        leaves (L, n / T, ...).
    """
    teams = len(local()) // team
    return jax.tree.map(lambda rows: np.repeat(_dealt(rows, teams), team, axis=0), batch)


def _dealt(rows: np.ndarray, number: int) -> np.ndarray:
    """Put row i to device i mod `number`: (n, ...) → (number, n / number, ...)."""
    rows = np.asarray(rows)
    return np.moveaxis(rows.reshape((rows.shape[0] // number, number) + rows.shape[1:]), 1, 0)


def collect(rows: jax.Array) -> np.ndarray:
    """Undo `deal`: (local, n / D, ...) in each process → (n, ...), in all."""
    rows = np.asarray(rows)
    if not _limit:
        rows = hosts.gather(rows).reshape((-1,) + rows.shape[1:])
    return np.moveaxis(rows, 0, 1).reshape((-1,) + rows.shape[2:])
