"""The command line: what a real process answers to mistakes, to disks and to stop requests."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Runs the program, and sends it a signal when it begins to import a module.
STOP_AT_IMPORT = """
import os, runpy, signal, sys

module, number = sys.argv.pop(1), int(sys.argv.pop(1))

class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder)
runpy.run_module('dpp_jax.main', run_name='__main__')
"""


def start(program, workdir, *settings):
    command = [sys.executable, *program, '--config=configs/digits_8.py:10']
    return subprocess.Popen(
        [*command, f'--workdir={workdir}', *settings],
        cwd=ROOT,
        text=True,
        env={**os.environ, 'XLA_FLAGS': ''},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # The suite itself may run where Ctrl-C is ignored, as jobs in the background do.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize(
    'module, number, code',
    [
        ('ml_collections', signal.SIGTERM, 0),
        ('jax', signal.SIGTERM, 0),
        ('jax', signal.SIGINT, 130),
        ('orbax.checkpoint', signal.SIGINT, 130),
    ],
)
def test_a_stop_request_during_imports_is_answered_in_a_line(tmp_path, module, number, code):
    process = start(['-c', STOP_AT_IMPORT, module, str(int(number))], tmp_path / 'run')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert output == '\nStopped before the run began. Run the same command to start it.\n'
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
    assert (
        'Run the same command to continue' in output
    )  # where it was; on a busy machine, where it last saved
    assert time.monotonic() - asked < 30
    assert (tmp_path / 'release' / 'central_images.npz').exists()


def program(*arguments, before=(), **variables):
    """Run the command line in a process of its own; after the words of `before`."""
    flags = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'  # compiles sooner
    environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', **variables}
    return subprocess.run(
        [*before, sys.executable, '-m', 'dpp_jax.main', *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors='replace',
        timeout=300,
    )


def test_command_line_plans_without_touching_a_work_directory(tmp_path):
    result = program(
        '--config=configs/mnist_28.py:1',
        f'--workdir={tmp_path}/run',
        '--stage=plan',
        '--config.finetune.epochs=20',
    )
    assert result.returncode == 1 and 'config.data.source: tfds:mnist is not prepared' in last_line(result)
    assert '300 steps' in result.stdout and 'ε = 1,' in result.stdout
    assert result.stdout.startswith('DRAFT: nothing has run') and not (tmp_path / 'run').exists()
    assert 'differentially private' not in result.stdout  # without images there is nothing to state


def test_command_line_errors_are_told_in_a_line(tmp_path):
    """Those of the flags: tests/command_line_test.py. This one is found by what runs after them."""
    result = program(f'--workdir={tmp_path}/run', '--config=configs/digits_8.py:-1')
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith('dpp-jax: ') and 'config.dp.epsilon is -1.0' in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'variable, value', [('JAX_PLATFORMS', 'cuda'), ('JAX_PLATFORMS', 'foo'), ('JAX_ENABLE_X64', 'maybe')]
)
def test_an_environment_that_jax_does_not_take_is_told_in_a_line(tmp_path, variable, value):
    result = program('--config=digits_8:1', f'--workdir={tmp_path}/run', '--stage=plan', **{variable: value})
    (line,) = result.stderr.strip().splitlines()
    assert f'{variable}={value}' in line and 'JAX_PLATFORMS=cpu works' in line
    assert result.returncode == 1 and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('variables', [{'LC_ALL': 'C', 'PYTHONUTF8': '0'}, {'PYTHONIOENCODING': 'latin-1'}])
def test_what_an_output_cannot_show_is_replaced(tmp_path, variables):
    result = program('--config=digits_8:3', f'--workdir={tmp_path}/run', '--stage=plan', **variables)
    assert result.returncode == 0, result.stderr
    assert '? = 3,' in result.stdout and not result.stderr


def test_the_console_script_lists_its_flags_and_stages(tmp_path):
    """What pip makes of the entry point: another module than the one that defines the flags."""
    script = tmp_path / 'dpp-jax'
    script.write_text('from dpp_jax.main import entry_point\nentry_point()\n')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(script), '--helpshort']
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    for word in ('--config', '--workdir', '--stage', 'plan', 'finetune', 'clean'):
        assert word in told


def test_a_config_of_the_user_runs_from_any_folder(tmp_path):
    (tmp_path / 'mine.py').write_text(
        'from dpp_jax.configs import digits_8\n\n\n'
        'def get_config(epsilon):\n'
        '    config = digits_8.get_config(epsilon)\n'
        "    config.name = 'mine'\n"
        '    return config\n'
    )
    command = [sys.executable, '-m', 'dpp_jax.main', '--config=mine.py:3', '--workdir=run', '--stage=plan']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'ε = 3,' in result.stdout


def on_a_file_system(folder, mounting, *arguments):
    """Run the program where `mounting`, a shell command, was done; skipped where nobody may mount."""
    folder.mkdir(exist_ok=True)
    shell = ['unshare', '--map-root-user', '--mount', 'sh', '-c', f'{mounting} && exec "$@"', 'sh']
    try:
        subprocess.run([*shell, 'true'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'this user may not mount a file system here ({error})')
    return program(*arguments, before=shell)


def last_line(result):
    """Of what the program told of an error, which must be all that it told."""
    lines = [line for line in result.stderr.split('\n') if line and 'it/s' not in line]
    told = [line for line in lines if not line.startswith(('central', 'pretrain', 'finetune'))]
    assert len(told) == 1 and told[0].startswith('dpp-jax: '), result.stderr
    return told[0]


def test_a_full_disk_is_told_in_a_line(tmp_path):
    """It is full when pre-training saves: orbax's threads fail in the background."""
    folder = tmp_path / 'small'
    result = on_a_file_system(
        folder,
        f'mount -t tmpfs -o size=300k tmpfs {folder}',
        '--config=configs/digits_8.py:10',
        f'--workdir={folder}/run',
        '--config.model.width=8',
        '--config.model.multipliers=(1,)',
        '--config.model.attention_resolutions=(8,)',
        '--config.query.queries=2',
        '--config.pretrain.epochs=1',
        '--config.pretrain.draws=1',
        '--config.pretrain.augmentation=none',
        '--config.loop.images_at_once=4',
    )
    assert result.returncode == 1, result.stderr
    assert 'central: done' in result.stdout and 'pretrain: done' not in result.stdout
    line = last_line(result)
    assert f'{folder}/run/private/resume/pretrain (no space left on the device)' in line
    assert 'run the same command to continue' in line


@pytest.mark.parametrize('stage', ['plan', 'all'])
def test_a_folder_that_can_only_be_read_is_planned_and_else_refused(tmp_path, stage):
    folder = tmp_path / 'run'
    result = on_a_file_system(
        folder,
        f'mount -t tmpfs -o ro tmpfs {folder}',
        '--config=configs/digits_8.py:10',
        f'--workdir={folder}',
        f'--stage={stage}',
    )
    assert result.returncode == (0 if stage == 'plan' else 1), result.stderr
    assert ('Privacy statement of this plan' in result.stdout) == (stage == 'plan')
    expected = 'plan.png was not drawn' if stage == 'plan' else f'--workdir={folder} cannot be written'
    assert expected in last_line(result)


TOO_LITTLE_MEMORY = """
import jax
from dpp_jax import main
from dpp_jax import pipeline

def run(*arguments, **named):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes')

pipeline.run = run
main.entry_point()
"""


def test_too_little_memory_is_told_with_the_setting_that_helps(tmp_path):
    process = start(['-c', TOO_LITTLE_MEMORY], tmp_path / 'run')
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert '--config.loop.images_at_once' in output.splitlines()[-1] and 'Traceback' not in output
