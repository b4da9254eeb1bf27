"""Run dpp-jax in several processes on this machine, over loopback: for trying out and for tests.

    python scripts/launch_local.py --processes=2 --devices=4 -- --config=digits_8:10 --workdir=runs/digits

Each process simulates so many devices, and has its share of the cores. Every line of output begins with the
number of its process. If a
process fails, the others end by themselves; whatever is left some time after that is killed. Ctrl-C and
SIGTERM go to all processes.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

_FLAG = '--xla_force_host_platform_device_count'


def main() -> int:
    """Start the processes and wait for their end; return the worst exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--processes', type=int, default=2, help='how many processes, at least 1')
    parser.add_argument('--devices', type=int, default=1, help='devices of each process, at least 1')
    parser.add_argument(
        '--grace', type=float, default=150, help='seconds that others have to end after one failed'
    )
    parser.add_argument('arguments', nargs='*', help='of dpp-jax, after --')
    options, more = parser.parse_known_args()  # the -- may be left out
    if options.processes < 1 or options.devices < 1:
        parser.error('--processes and --devices must be at least 1')
    processes = start(options.arguments + more, options.processes, options.devices)
    print(f'processes: {" ".join(str(process.pid) for process in processes)}', flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    readers = [
        threading.Thread(target=_pass_on, args=(number, process.stdout))
        for number, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    statuses = wait(processes, options.grace)
    for reader in readers:
        reader.join()
    return max(128 - status if status < 0 else status for status in statuses)


def start(
    arguments: list[str], processes: int, devices: int | None, folders: list | None = None, **options
) -> list[subprocess.Popen]:
    """Start dpp-jax so many times, as one run, with output in a pipe each.

    Args:
        arguments: of dpp-jax.
        processes: how many.
        devices: simulated CPU devices of each; None: as the program chooses.
        folders: that each works in; None: in this one.
        options: of `subprocess.Popen`.
    """
    port = _free_port()
    environment = dict(options.pop('env', os.environ))
    if devices is not None:
        environment['JAX_NUM_CPU_DEVICES'] = str(devices)
        flags = re.sub(f'{_FLAG}=\\S*', '', environment.get('XLA_FLAGS', ''))  # it would override the above
        environment['XLA_FLAGS'] = flags.strip()
    command = [sys.executable, '-m', 'dpp_jax.main', *arguments]
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'stdin': subprocess.DEVNULL} | options
    others = lambda number: [f'--distributed=127.0.0.1:{port},{processes},{number}'] if processes > 1 else []
    places = folders or [options.pop('cwd', None)] * processes
    found = [
        subprocess.Popen([*command, *others(number)], env=environment, cwd=folder, **options)
        for number, folder in enumerate(places)
    ]
    if hasattr(os, 'sched_setaffinity') and processes > 1:  # Linux
        cores = sorted(os.sched_getaffinity(0))
        for number, process in enumerate(found):
            # As hosts do, each has cores of its own, if there are enough.
            with contextlib.suppress(ProcessLookupError):  # it ended by a mistake
                os.sched_setaffinity(process.pid, cores[number::processes] or cores)
    return found


def wait(processes: list[subprocess.Popen], grace: float) -> list[int]:
    """Wait for the processes; kill what is left `grace` seconds after one failed. Returns exit statuses."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        failed = [number for number, process in enumerate(processes) if process.returncode not in (None, 0)]
        if failed and failed_at is None:
            failed_at = time.monotonic()
            told = f'[{failed[0]}] ended with {processes[failed[0]].returncode}'
            print(f'{told}; the others notice within --host_timeout', flush=True)
        if failed_at is not None and time.monotonic() - failed_at > grace:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.returncode for process in processes]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def _pass_on(number: int, stream) -> None:
    """Print the lines of a process after its number; of a bar, its last state."""
    for line in stream:
        text = line.decode(errors='replace').rstrip('\r\n').rpartition('\r')[2]
        print(f'[{number}] {text}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
