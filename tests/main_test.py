"""Stop requests to a real process while it starts and while it compiles."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Runs the program, and sends it a SIGTERM when it begins to import a module.
SIGTERM_AT_IMPORT = """
import os, runpy, signal, sys

module = sys.argv.pop(1)

class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder)
runpy.run_module('dpp_jax.main', run_name='__main__')
"""


def start(program, workdir, *settings):
    command = [sys.executable, *program, '--config=configs/digits_8.py:10']
    return subprocess.Popen(
        [*command, f'--workdir={workdir}', *settings], cwd=ROOT, text=True,
        env={**os.environ, 'XLA_FLAGS': ''}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize('module', ['jax', 'orbax.checkpoint'])
def test_sigterm_during_imports_exits_with_0_and_writes_nothing(tmp_path, module):
    process = start(['-c', SIGTERM_AT_IMPORT, module], tmp_path / 'run')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert 'Stopped before the run began' in output
    assert not (tmp_path / 'run').exists()


def test_sigterm_as_soon_as_it_can_be_caught(tmp_path):
    """Before that there is only Python's own start."""
    process = start(['-m', 'dpp_jax.main'], tmp_path / 'run')
    while not catches_sigterm(process.pid):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert 'Stopped before the run began' in output
    assert not (tmp_path / 'run').exists()


def catches_sigterm(pid):
    status = Path(f'/proc/{pid}/status')
    if not status.exists():
        pytest.skip('the system has no /proc to tell which signals a process catches')
    (line,) = [line for line in status.read_text().splitlines() if line.startswith('SigCgt')]
    return int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1


def test_sigterm_between_two_stages_exits_with_0_soon(tmp_path):
    """Pre-training's first programs are being compiled: JAX does not survive a tidy end then."""
    settings = ('--config.model.width=8', '--config.query.queries=2')
    process = start(['-m', 'dpp_jax.main'], tmp_path, *settings)
    seen = []
    while not any('central: done' in line for line in seen):
        seen.append(process.stdout.readline())
        assert seen[-1], ''.join(seen)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert 'goes on from there' in output
    assert time.monotonic() - asked < 30
    assert (tmp_path / 'release' / 'central_images.npz').exists()
