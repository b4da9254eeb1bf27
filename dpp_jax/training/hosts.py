"""The processes of one run: who they are, what process 0 tells the others, and how all end when one does.

How it goes: every process is started with the same command, and runs the same program. Process 0 alone reads
and writes the work directory; what it read reaches the others by `from_first`. Where all must agree, they
`meet`. A thread in each process looks after the others, so that nobody waits for a process that is gone.

With one process, which is the usual case, all of this does nothing.

What travels here is not encrypted, keys included, and neither is what JAX sends: the hosts of a run must
trust their network.
"""

from collections.abc import Callable, Mapping
import itertools
import json
import os
import platform
import re
import sys
import threading
import time
from typing import Any, NamedTuple

import flax.serialization
import jax
from jax.experimental import multihost_utils
import numpy as np

from dpp_jax.training import preemption, watch

PyTree = Any
TIMEOUT_SECONDS = 60.0  # without a sign of life, or at a meeting
# Where processes may take different times: at a program's first step, which one may have compiled already;
# where each reads its images; and where process 0 does more than others.
PATIENT_SECONDS = 3600.0
_TELL_SECONDS = 5.0  # before people are told why nothing happens
_START_SECONDS = 600  # for all processes to come; cold machines take minutes
_IN_MESSAGE = 2**18  # bytes; more than these travel from device to device
_SLICE = 1.0  # seconds between two looks at signals while the main thread waits

_numbers = itertools.count()  # of messages and meetings: every process counts the same
_sent: list[str] = []  # in process 0, names of what was said and sent since the last meeting, and at it
_is_apart = False  # within `from_first`
_watch: watch.Watch | None = None


class NotTogether(ValueError):
    """The processes of a run did not come together as asked for."""


class Asked(NamedTuple):
    """What --distributed asks for: 'auto', 'none', or all three of the others."""

    how: str
    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None


def asked(text: str) -> Asked:
    """Read --distributed.

    Args:
        text: 'auto', 'none', or '<coordinator>:<port>,<processes>,<index>'.

    Raises:
        NotTogether: it is none of these.
    """
    if text in ('auto', 'none'):
        return Asked(text)
    found = re.fullmatch(r'([^,\s]+:\d+),(\d+),(\d+)', text)
    if found:
        processes, index = int(found[2]), int(found[3])
        if 0 <= index < processes and 0 < int(found[1].rpartition(':')[2]) < 2**16:
            return Asked('explicit', found[1], processes, index)
    raise NotTogether(
        f'--distributed is {text!r}; it must be auto, none, or <coordinator>:<port>,<processes>,<index> with '
        'an index below the number of processes, as in 10.0.0.1:8476,4,0'
    )


def find(how: Asked, *, hosts: int | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
    """Find the other processes of this run, before JAX starts.

    Args:
        how: see `asked`. 'auto' takes what JAX finds (TPU pods, SLURM, GKE, Open MPI); nothing is found
            on a plain machine: then there is one process.
        hosts: how many processes there must be; None: any number.
        timeout: as of `join`.

    Raises:
        NotTogether: they do not come, or are known to be more or fewer.
    """
    expected = how.processes or _processes_of_slurm()
    if how.how != 'none' and expected is not None:
        _check_number(hosts, expected)
    if how.how != 'none':
        _initialize(how, timeout)


def join(*, hosts: int | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
    """Join the processes that were found, when JAX has started.

    Args:
        hosts: as of `find`.
        timeout: seconds without a sign of life after which a process counts as lost; also how long the
            others wait for a late one at a meeting.

    Raises:
        NotTogether: there are more or fewer processes.
    """
    global _watch
    _check_number(hosts, jax.process_count())
    if count() > 1:
        _watch = watch.Watch(timeout)
        _watch.start()
        preemption.before_end = _watch.say_failed


def _check_number(hosts: int | None, found: int) -> None:
    if hosts not in (None, found):
        raise NotTogether(
            f'--hosts is {hosts}, but this run has {found} process(es). Start the command on every host (on '
            'a TPU pod: gcloud … ssh --worker=all), or leave --hosts out'
        )


def _processes_of_slurm() -> int | None:
    """Return how many tasks a Slurm step has, if this process is one of them."""
    names = ('SLURM_JOB_ID', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS')
    return int(os.environ['SLURM_NTASKS']) if all(name in os.environ for name in names) else None


def introduce() -> None:
    """Print which of several processes this is; only the first says more on the standard output."""
    if count() == 1:
        return
    print(
        f'process {index()} of {count()}, {jax.local_device_count()} of {jax.device_count()} devices, '
        f'{platform.node()}',
        flush=True,
    )
    if not is_first():
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')


def _initialize(how: Asked, timeout: float) -> None:
    """Start JAX's distributed runtime, if there is anything to start it with."""
    options = {
        # Over loopback and Ethernet; accelerators have links of their own.
        'jax_cpu_collectives_implementation': 'gloo',
        # Else JAX ends all processes by itself, with a stack trace. `watch` does so with a line.
        'jax_enable_recoverability': True,
        # It would take SIGTERM from `preemption`, which also answers Ctrl-C.
        'jax_enable_preemption_service': False,
    }
    for name, value in options.items():
        if hasattr(jax.config, name):  # another version of JAX may do without
            jax.config.update(name, value)
    patience = {
        'initialization_timeout': _START_SECONDS + 60,  # JAX would abort
        'heartbeat_timeout_seconds': int(3 * timeout) + 60,  # `watch` comes first
    }
    _use_all_gpus_of_a_node()
    if how.how == 'explicit':
        host = how.coordinator.rpartition(':')[0]
        is_local = host in ('localhost', '127.0.0.1')
        patience |= {'coordinator_bind_address': how.coordinator} if is_local else {}
        patience |= {'cluster_detection_method': 'deactivate'}
    who = '' if how.index is None else f' process {how.index} of {how.processes} at {how.coordinator}:'
    error = _in_a_thread(
        lambda: jax.distributed.initialize(how.coordinator, how.processes, how.index, **patience),
        f'waiting,{who} for the other processes of this run, {_START_SECONDS} s at most',
    )
    if how.how == 'auto' and 'coordinator_address should be defined' in str(error):
        return  # nothing was found: a plain machine
    alone = ', or --distributed=none if this is the only process' if how.how == 'auto' else ''
    if isinstance(error, ValueError):
        raise NotTogether(f'--distributed is {how.how}: {error}{alone}') from error
    if 'Failed to start RPC server' in str(error):
        raise NotTogether(
            f'process 0 cannot listen at {how.coordinator or "the port of the coordinator"}: another program '
            'uses the port, or the address is not of this machine. Choose another port'
        ) from error
    if error is not None:
        told = ' '.join(str(error).split())[:300]
        raise NotTogether(
            f'the processes of this run did not find each other within {_START_SECONDS} s ({told}). Start '
            f'the same command on every host, and let the port of the coordinator through the firewall{alone}'
        ) from error


def _in_a_thread(function: Callable[[], object], waiting: str) -> Exception | None:
    """Call a function that may wait long, while this thread answers Ctrl-C and SIGTERM; return its error.

    After some seconds it prints `waiting`.
    """
    errors: list[Exception] = []

    def call():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    start, is_told = time.monotonic(), False
    while thread.is_alive() and time.monotonic() - start < _START_SECONDS:
        thread.join(_SLICE / 4)
        if time.monotonic() - start > _TELL_SECONDS and not is_told:
            print(waiting, flush=True)
            is_told = True
    if thread.is_alive():
        return TimeoutError('some did not come')
    return errors[0] if errors else None


def _use_all_gpus_of_a_node() -> None:
    """Let the only task of a Slurm node have all its GPUs; JAX would give it one of them."""
    tasks = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')  # as '1(x4)'
    gpus = os.environ.get('SLURM_GPUS_ON_NODE', '')
    if tasks.partition('(')[0] == '1' and gpus.isdigit():
        os.environ.setdefault('JAX_LOCAL_DEVICE_IDS', ','.join(map(str, range(int(gpus)))))


def index() -> int:
    """Return the number of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """Return the number of processes in the run."""
    return jax.process_count()


def is_together() -> bool:
    """Whether this process is one of several, which look after each other by now."""
    return _watch is not None


def is_first() -> bool:
    """Whether this process reads and writes the work directory."""
    return index() == 0


def from_first(function: Callable[[], PyTree]) -> PyTree:
    """Call `function` in process 0 alone, and return its result in all.

    The others wait as long as process 0 lives; if the function raises, all processes end.

    Args:
        function: returns None, numbers, texts, NumPy arrays, or dicts and lists of them. Within it,
            `from_first` and `meet` concern process 0 alone.
    """
    global _is_apart
    if _is_alone():
        return function()
    name = f'from_first/{next(_numbers)}'
    if is_first():
        _is_apart = True
        try:
            value = function()
        finally:
            _is_apart = False
        return _send(name, value)
    return _receive(name)


def at_first(function: Callable[[], Any]) -> None:
    """Call `function` in process 0 alone, while the others wait, see `from_first`."""

    def call():
        function()

    from_first(call)


def meet(what: str, word: str = '', limit: float | None = None) -> list[str]:
    """Wait until all processes are here.

    Args:
        what: for the message if one is late, as 'step 3 of finetune'.
        word: what this process has to say.
        limit: seconds to wait for the last one after the first came; None: the timeout of the run.

    Returns:
        The words of all processes, in order, the same everywhere.
    """
    if _is_alone():
        return [word]
    service, name = watch.client(), f'meet/{next(_numbers)}'
    if word:
        service.key_value_set(f'{name}/words/{index()}', word)
    limit = _watch.timeout if limit is None else limit
    try:
        service.wait_at_barrier(name, int(1000 * limit))
    except jax.errors.JaxRuntimeError as error:
        _watch.end_after(_late(str(error), what, limit))
    while _sent:  # all have received it; keys must not lie there for who comes later
        service.key_value_delete(_sent.pop())
    found = dict(service.key_value_dir_get(f'{name}/words/'))
    if found and is_first():
        _sent.append(f'{name}/words/')
    return [found.get(f'{name}/words/{number}', '') for number in range(count())]


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Check that all processes have the same values.

    Args:
        what: for messages, as 'settings'.
        values: by their names; what JSON can hold.

    Raises:
        ValueError: one has others than process 0; the message says which.
    """
    said = [json.loads(word) for word in meet(f'the comparison of {what}', json.dumps(values))]
    found = []
    for number, values_there in enumerate(said):
        for name in sorted(said[0].keys() | values_there.keys()):
            here, there = said[0].get(name, 'missing'), values_there.get(name, 'missing')
            if here != there:
                found.append(f'{name}: {here} in process 0, {there} in process {number}')
    if found:
        more = f'\n  and {len(found) - 10} more' if len(found) > 10 else ''
        raise ValueError(
            f'the {what} of the processes differ:\n  ' + '\n  '.join(found[:10]) + more + '\nStart the same '
            'command, with the same files and the same version of dpp_jax, on every host'
        )


def gather(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, (n, ...) of one shape and dtype in each → (processes, n, ...)."""
    array = np.asarray(array)
    return array[None] if _is_alone() else multihost_utils.process_allgather(array)


def check(what: str, limit: float | None = None) -> None:
    """Raise Interrupted in all processes if the run was asked to stop. They meet, see `meet`.

    Process 0 alone decides, and hears of requests to others: so all stop after the same step.
    """
    if _is_alone():
        preemption.check()
        return
    asked_by = preemption.requested() if is_first() else None
    word = meet(what, str(asked_by or ''), limit)[0]
    if word:
        raise preemption.Interrupted(int(word))


def leave() -> None:
    """Leave a run that ended well: process 0 last, because the others talk through it."""
    if _watch:
        meet('the end', limit=PATIENT_SECONDS)
        _watch.leave()


def fail(line: str, code: int) -> None:
    """Let all processes end, because this one does, with a line that says why."""
    if _watch:
        _watch.say_failed(line, code)


def wait_for_verdict() -> None:
    """Wait until it is known which process was lost: JAX's own error says only that one is."""
    if _watch:
        time.sleep(_watch.timeout + watch.FAREWELL)
        _watch.give_way()


def _is_alone() -> bool:
    return _watch is None or _is_apart


def _late(error: str, what: str, limit: float) -> str:
    """Say who is late, as far as JAX's error does."""
    names = re.findall(r'^\s*(?:/job:jax_worker/replica:0/task:)?(\d+)\s*$', error.partition('Some')[2], re.M)
    if 'timed out' not in error or not names:
        return f'the processes lost each other at {what} ({" ".join(error.split())[:200]}). {watch.AGAIN}'
    return (
        f'process {", ".join(names)} did not come to {what} within {limit:g} s after the first one, and may '
        f'be stuck. {watch.AGAIN}'
    )


def _send(name: str, value: PyTree) -> PyTree:
    """Send a value from process 0 to all."""
    data = flax.serialization.msgpack_serialize({'value': value})
    service = watch.client()
    _sent.append(name)
    if len(data) <= _IN_MESSAGE:
        service.key_value_set_bytes(name, b'\0' + data)
    else:
        service.key_value_set_bytes(name, b'\1' + str(len(data)).encode())
        multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))
    return value


def _receive(name: str) -> PyTree:
    """Receive what process 0 sends, however long it takes."""
    service = watch.client()
    while True:
        try:
            data = service.blocking_key_value_get_bytes(name, int(1000 * _SLICE))
            break
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise
    if data[:1] == b'\1':
        size = int(data[1:])
        data = b'\0' + multihost_utils.broadcast_one_to_all(np.zeros(size, np.uint8)).tobytes()
    return flax.serialization.msgpack_restore(data[1:])['value']
