"""What the launch scripts would run, in what order, and what a failing step does; worker.sh really runs."""

import json
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / 'scripts'
POD = ('bash', str(SCRIPTS / 'launch_tpu_pod.sh'))
SLURM = ('bash', str(SCRIPTS / 'launch_slurm.sbatch'))
TPU = ('--name=mine', '--zone=z1', '--type=v4-16', '--runtime=r', '--hosts=2', '--poll=0')
ARGUMENTS = ('--config=mnist_28:1', '--workdir=gs://b/run', "--config.data.source=npz:it's my folder")
AGAIN = 75
NODES, REQUESTS = 'tpu-vm list', 'queued-resources list'
needs_linux = pytest.mark.skipif(sys.platform != 'linux', reason='the hosts of a run have /proc and setsid')

# Takes the place of gcloud and of Slurm's programs: records how it was called, and gives the next of the
# answers to the first pattern that fits. `ssh` and `scp` reach folders, one for each host, if there are any.
STAND_IN = """#!{python} -IS
import json, os, pathlib, re, shutil, subprocess, sys
folder = pathlib.Path(os.environ['STAND_IN'])
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / 'calls', 'a') as calls:
    print(json.dumps([words, {{k: v for k, v in os.environ.items() if k.startswith('JAX_')}}]), file=calls)
worker = [word[9:] for word in words if word.startswith('--worker=')]
hosts = sorted(folder.glob('host*'))
if hosts and worker:
    for host in hosts if worker == ['all'] else hosts[int(worker[0]):][:1]:
        if 'scp' in words:
            shutil.copy(words[5], host / words[6].partition(':')[2])
        else:
            line = [word[10:] for word in words if word.startswith('--command=')][0]
            os.environ['HOST'] = host.name
            done = subprocess.run(['bash', '-c', line], cwd=host)
            if done.returncode:
                sys.exit(done.returncode)
    sys.exit()
for pattern, replies in json.loads((folder / 'answers').read_text()).items():
    if re.search(pattern, ' '.join(words)):
        count = folder / re.sub('[^a-z]', '_', pattern)
        number = len(count.read_text()) if count.exists() else 0
        count.write_text('x' * (number + 1))
        text, status = replies[min(number, len(replies) - 1)]
        if text:
            print(text)
        sys.exit(status)
"""


class Launcher:
    """Scripts with stand-ins on PATH."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / 'bin'
        self.bin.mkdir()
        for name in ('gcloud', 'srun', 'scontrol', 'squeue'):
            self.program(self.bin / name, STAND_IN.format(python=sys.executable))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'DPP_', 'JAX_'))},
            'STAND_IN': str(folder),
            'PATH': f'{self.bin}:{os.environ["PATH"]}',
        }
        self.answer()

    @staticmethod
    def program(path, text):
        path.write_text(text, encoding='utf-8')
        path.chmod(0o755)

    def answer(self, **replies):
        """Set what stand-ins answer: pattern → texts, or (text, status)."""
        made = {
            pattern: [(reply, 0) if isinstance(reply, str) else reply for reply in found]
            for pattern, found in replies.items()
        }
        (self.folder / 'answers').write_text(json.dumps(made), encoding='utf-8')

    def run(self, *words, status=0, **changes):
        """Run a script; what it wrote on the standard error is in `said`."""
        done = subprocess.run(
            words, env=self.environment | changes, capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        self.said = done.stderr
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def recorded(self):
        path = self.folder / 'calls'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self):
        """What was called, without questions for the state."""
        calls = [words for words, _ in self.recorded()]
        return [words for words in calls if 'list' not in words and 'state' not in ' '.join(words[5:])]

    def steps(self):
        return [step_of(words) for words in self.calls()]


def step_of(words):
    """Name what a call of gcloud does."""
    line = ' '.join(words)
    found = re.search(r'worker\.sh (start|follow|stop|install)', line)
    if found:
        assert (f'--worker={0 if found[1] == "follow" else "all"}') in words
        return found[1]
    return f'{words[3]} {words[4]}'


def replies(nodes=('', 'mine\tREADY'), requests=('',), state=('ended 0',), **others):
    """Answers of gcloud for a TPU that is to come, and a run that ends well."""
    nodes = [text if '\t' in text else 'another\tREADY\n' + text for text in nodes]
    return others | {NODES: nodes, REQUESTS: requests, 'worker.sh state': state}


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


FRESH = ['queued-resources create', 'tpu-vm scp', 'install', 'start', 'follow']


def test_all_steps_run_once_and_in_order(launcher):
    launcher.answer(**replies(requests=('', 'mine\tPROVISIONING'), nodes=('', '', 'mine\tREADY')))
    launcher.run(*POD, 'all', *TPU, '--spot', '--create-flag=--network=my net', '--', *ARGUMENTS)
    assert launcher.steps() == FRESH
    create, _, _, start, _ = launcher.calls()
    assert {'--spot', '--network=my net', '--zone=z1', '--accelerator-type=v4-16'} <= {*create}
    command = shlex.split(start[-1].removeprefix('--command='))
    assert command[3:] == ['.venv/bin/dpp-jax', '--distributed=auto', '--hosts=2', *ARGUMENTS]
    assert 'COSTS MONEY until' in launcher.said and 'delete --name=mine --zone=z1' in launcher.said


@pytest.mark.parametrize('failing', range(4))
def test_nothing_follows_a_failing_step_and_nothing_is_deleted(launcher, failing):
    step = ['resources create', ' scp ', 'worker.sh install', 'worker.sh start'][failing]
    launcher.answer(**replies(**{step: [('', 7)]}))
    launcher.run(*POD, 'all', *TPU, '--delete-when-done', '--', *ARGUMENTS, status=7)
    assert launcher.steps() == FRESH[: failing + 1]
    name = ['queue', 'copy', 'install', 'run'][failing]
    assert f'{name} ended with status 7' in launcher.said and 'COSTS MONEY' in launcher.said


def test_a_state_that_cannot_be_read_makes_and_deletes_nothing(launcher):
    launcher.answer(**{NODES: [('', 3)]})
    launcher.run(*POD, 'all', *TPU, '--', *ARGUMENTS, status=3)
    launcher.answer(**{NODES: [''], REQUESTS: [('', 3)]})
    launcher.run(*POD, 'all', *TPU, '--', *ARGUMENTS, status=3)
    launcher.run(*POD, 'delete', *TPU, '--yes', status=3)
    assert launcher.calls() == []


def test_a_dry_run_prints_what_a_run_runs(launcher):
    dry = launcher.run(*POD, 'all', *TPU, '--dry-run', '--', *ARGUMENTS)
    assert launcher.recorded() == []
    launcher.answer(**replies())
    launcher.run(*POD, 'all', *TPU, '--', *ARGUMENTS)
    printed = [shlex.split(line) for line in dry.splitlines() if line.startswith('gcloud')]
    printed = [words for words in printed if 'list' not in words]
    run = launcher.calls()
    printed[1][5] = run[1][5]  # the archive, in a folder of its own
    assert printed == run
    for command in ('create', 'status', 'stop', 'delete', 'wait', 'follow'):
        assert 'gcloud compute tpus' in launcher.run(*POD, command, *TPU, '--dry-run')
    assert len(launcher.calls()) == len(run)


def test_everything_missing_is_told_at_once_and_nothing_is_made(launcher):
    launcher.run(*POD, 'all', '--hosts=two', '--spot', 'x', '--', '--private=/disk', status=2)
    words = ('--name is missing', '--zone is missing', '--type is missing', '--runtime is missing')
    words += ("--hosts is 'two'", 'x is not an option', '--config is missing', "--workdir is ''")
    for word in (*words, "--private is '/disk'", 'nothing was done'):
        assert word in launcher.said
    launcher.run(*POD, 'all', *TPU, '--', '--config=my/own.py:1', '--workdir=runs/x', status=2)
    assert "--config is 'my/own.py:1'" in launcher.said and "--workdir is 'runs/x'" in launcher.said
    launcher.run(*POD, 'al', *TPU, status=2)
    assert launcher.recorded() == []
    assert 'NOTHING ELSE DOES' in launcher.run(*POD)


@pytest.mark.parametrize('request_is', ['SUSPENDED', 'ACTIVE', 'FAILED'])
def test_a_preempted_tpu_is_replaced_and_the_run_goes_on(launcher, request_is):
    launcher.answer(
        **replies(
            nodes=('', 'mine\tREADY', *['mine\tPREEMPTED'] * 3, 'mine\tREADY'),
            requests=('', 'mine\tSUSPENDING', f'mine\t{request_is}'),
            state=[('', 255), 'ended 0'],  # the host is gone
        )
    )
    launcher.run(*POD, 'all', *TPU, '--spot', '--delete-when-done', '--', *ARGUMENTS)
    assert launcher.steps() == [*FRESH, 'queued-resources delete', *FRESH, 'queued-resources delete']
    assert '--force' in launcher.calls()[5] and '--quiet' in launcher.calls()[5]
    assert 'COSTS MONEY' not in launcher.said


def test_a_run_that_stopped_is_started_again_where_it_is_as_often_as_allowed(launcher):
    launcher.answer(**replies(nodes=['mine\tREADY'], state=['none', f'ended {AGAIN}', 'ended 137']))
    again = [*FRESH[1:]]
    launcher.run(*POD, 'resume', *TPU, '--restarts=2', '--', *ARGUMENTS, status=AGAIN)
    assert launcher.steps() == again * 3
    assert '--restarts=2 are used up' in launcher.said


def test_an_error_of_the_program_ends_the_launcher(launcher):
    launcher.answer(**replies(state=['ended 1']))
    launcher.run(*POD, 'all', *TPU, '--delete-when-done', '--', *ARGUMENTS, status=1)
    assert launcher.steps() == FRESH


def test_a_run_in_progress_is_only_followed_also_after_a_lost_connection(launcher):
    states = ['running', 'running', ('', 255), 'running', 'ended 0']
    launcher.answer(**replies(nodes=['mine\tREADY'], state=states, **{'sh follow': [('', 255)]}))
    launcher.run(*POD, 'resume', *TPU, '--', *ARGUMENTS)
    assert launcher.steps() == ['follow'] * 4
    lines = [words[-1].split()[-1] for words in launcher.calls()]
    assert lines == ['+1', '20', '20', '20']


def test_delete_asks_unless_told_and_knows_how_the_tpu_was_made(launcher):
    launcher.answer(**replies(requests=['mine\tACTIVE']))
    launcher.run(*POD, 'delete', *TPU)
    launcher.answer(**replies(requests=['mine2\tACTIVE']))
    launcher.run(*POD, 'delete', *TPU, '--yes')
    queued, made = launcher.calls()
    assert queued[3:5] == ['queued-resources', 'delete'] and '--quiet' not in queued
    assert made[3:5] == ['tpu-vm', 'delete'] and '--quiet' in made


@needs_linux
def test_on_real_hosts_arguments_arrive_whole_and_a_stopped_run_goes_on(launcher, tmp_path):
    """Two folders are the hosts; only gcloud, pip and dpp-jax are stand-ins."""
    launcher.answer(**{NODES: ['mine\tREADY'], REQUESTS: ['']})
    program = """#!/usr/bin/env bash
        printf '%s\\n' "$JAX_COORDINATOR_PORT" "$@" >> ../arguments
        [ $HOST = host1 ] || echo 'step 1 of 2'
        [ -e ../second ] || { touch ../second; echo 'Stopped. Run the same command to continue.' >&2; exit; }
        echo 'Everything is done'"""
    for number in range(2):
        programs = tmp_path / f'host{number}' / 'dpp_jax' / '.venv' / 'bin'
        programs.mkdir(parents=True)
        (programs / 'activate').touch()
        launcher.program(programs / 'python', f'#!/bin/sh\necho "$@" >> {tmp_path}/host{number}/pip')
        launcher.program(programs / 'dpp-jax', program)
        launcher.program(launcher.bin / 'python3.13', f'#!/bin/sh\nexec {sys.executable} "$@"')
    shown = launcher.run(*POD, 'all', *TPU, '--port=8476', '--', *ARGUMENTS)
    assert shown.splitlines().count('step 1 of 2') == 2 and shown.count('Everything is done') == 1
    assert launcher.steps() == FRESH[1:] * 2
    for number in range(2):
        host = tmp_path / f'host{number}'
        arguments = (host / 'arguments').read_text().splitlines()
        assert arguments == ['8476', '--distributed=auto', '--hosts=2', *ARGUMENTS] * 2
        assert '--editable .[tpu]' in (host / 'pip').read_text()
        copied = {
            path.name for path in (host / 'dpp_jax').iterdir() if not path.name.startswith(('run.', '.'))
        }
        assert {'dpp_jax', 'configs', 'scripts', 'setup.py'} <= copied and not copied & {
            'runs',
            'data',
            'tests',
        }
        assert (host / 'dpp_jax' / 'run.log').stat().st_mode & 0o77 == 0
        assert (host / 'dpp_jax' / 'run.previous.log').exists()


def in_slurm(launcher, *arguments, status=0, **changes):
    changes = {'SLURM_NTASKS': '4', 'SLURM_JOB_ID': '9', 'SLURM_SUBMIT_DIR': str(ROOT)} | changes
    return launcher.run(*SLURM, *arguments, status=status, **changes)


def test_slurm_runs_one_task_on_each_node_with_all_its_gpus(launcher):
    in_slurm(launcher, *ARGUMENTS, SLURM_GPUS_ON_NODE='4', DPP_VENV='/none')
    ((words, environment),) = launcher.recorded()
    assert words[0] == 'srun' and {'--ntasks-per-node=1', '--kill-on-bad-exit=0'} <= {*words}
    command = words[words.index('bash') :]
    assert command[1:] == [
        'scripts/worker.sh',
        'run',
        'dpp-jax',
        '--distributed=auto',
        '--hosts=4',
        *ARGUMENTS,
    ]
    assert environment == {'JAX_LOCAL_DEVICE_IDS': '0,1,2,3'}
    printed = in_slurm(launcher, '--dry-run', *ARGUMENTS, DPP_VENV='/none')
    assert shlex.split(printed.splitlines()[0]) == words and len(launcher.recorded()) == 1
    assert '--hosts=$SLURM_NTASKS' in shlex.split(launcher.run(*SLURM, '--dry-run', *ARGUMENTS))


@pytest.mark.parametrize(
    ('ended', 'state', 'restarts', 'is_requeued'),
    [
        (0, 'RUNNING', '0', False),
        (1, 'RUNNING', '0', False),
        (AGAIN, 'RUNNING', '0', True),
        (137, 'RUNNING', '49', True),
        (AGAIN, 'RUNNING', '50', False),
        (AGAIN, 'CANCELLED', '0', False),
        (AGAIN, 'PREEMPTED', '0', False),  # Slurm does
    ],
)
def test_slurm_requeues_what_goes_on_and_nothing_else(launcher, ended, state, restarts, is_requeued):
    launcher.answer(srun=[('', ended)], squeue=[state])
    in_slurm(launcher, *ARGUMENTS, status=ended, SLURM_RESTART_COUNT=restarts)
    requeue = ['scontrol', 'requeue', '9']
    assert (requeue in launcher.calls()) == is_requeued
    assert ('before its end' in launcher.said) == (ended not in (0, 1))


def test_slurm_tells_everything_that_is_missing(launcher, tmp_path):
    in_slurm(launcher, '--a', status=2, SLURM_SUBMIT_DIR=str(tmp_path), DPP_RESTARTS='many')
    for word in (
        'root of a checkout',
        '--config is missing',
        '--workdir is missing',
        "DPP_RESTARTS is 'many'",
    ):
        assert word in launcher.said
    assert launcher.recorded() == []


def start(*command, **options):
    """Start a program in a process group of its own."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


SAVES = """trap 'sleep 0.3; echo saved; echo "Stopped. Run the same command to continue."; exit 0' TERM
echo begins; while :; do sleep 0.05; done"""


@pytest.mark.parametrize('to_group', [False, True])
def test_sigterm_reaches_the_program_which_saves_before_all_ends(to_group):
    """`srun` signals all processes of a task, Kubernetes the first."""
    process = start('bash', str(SCRIPTS / 'worker.sh'), 'run', 'bash', '-c', SAVES)
    assert process.stdout.readline() == 'begins\n'
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert 'saved' in said and process.returncode == AGAIN


def test_a_task_that_slurm_asks_to_stop_saves_and_the_job_is_requeued(launcher):
    assert '#SBATCH --signal=TERM@' in Path(SLURM[1]).read_text(encoding='utf-8')  # not B:, the script alone
    # As Slurm's: SIGTERM ends srun at once, and is sent to the tasks by another way.
    launcher.program(launcher.bin / 'srun', '#!/bin/sh\nshift 3; "$@" & echo $! > "$STAND_IN/task"; wait $!')
    launcher.program(launcher.bin / 'dpp-jax', f'#!/usr/bin/env bash\n{SAVES}')
    launcher.answer(squeue=['RUNNING'])
    slurm = {'SLURM_NTASKS': '1', 'SLURM_JOB_ID': '9', 'SLURM_SUBMIT_DIR': str(ROOT)}
    changes = slurm | {'DPP_VENV': str(launcher.folder)}
    process = start(*SLURM, *ARGUMENTS, env=launcher.environment | changes)
    assert process.stdout.readline() == 'begins\n'
    process.send_signal(signal.SIGTERM)
    os.kill(int((launcher.folder / 'task').read_text()), signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert 'saved' in said and process.returncode == AGAIN
    assert ['scontrol', 'requeue', '9'] in launcher.calls()


@pytest.mark.parametrize(
    ('program', 'status'),
    [
        ('echo done', 0),
        ('echo "Stopped. Run the same command to continue." >&2', AGAIN),
        ('echo "process 0 is gone. Run the same command to continue."; exit 1', AGAIN),
        ('echo "Run the same command"; seq 60', 0),  # of an earlier matter
        ('echo "dpp-jax: --hosts is 2"; exit 1', 1),
        ('kill -KILL $$', 137),
    ],
)
def test_a_stopped_run_is_told_from_a_finished_and_a_failed_one(program, status):
    process = start('bash', str(SCRIPTS / 'worker.sh'), 'run', 'bash', '-c', program)
    process.communicate(timeout=20)
    assert process.returncode == status


@pytest.mark.parametrize('raised', ['preemption.Interrupted(15)', 'ValueError("no")', 'SystemExit(0)'])
def test_dpp_jax_says_itself_that_it_goes_on(raised):
    """The words that worker.sh looks for are those of the program, at both of its exits."""
    code = f"""
from dpp_jax.training import preemption
from dpp_jax import command_line
with command_line.errors_in_one_line():
    raise {raised}
"""
    process = start('bash', str(SCRIPTS / 'worker.sh'), 'run', sys.executable, '-c', code, cwd=ROOT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == {'p': AGAIN, 'V': 1, 'S': 0}[raised[0]], said


def test_dpp_jax_ended_before_its_run_goes_on():
    code = """
import os
from dpp_jax.training import preemption
preemption.leave_at_once()
os.kill(os.getpid(), 15)"""
    process = start('bash', str(SCRIPTS / 'worker.sh'), 'run', sys.executable, '-c', code, cwd=ROOT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == AGAIN and 'before the run began' in said


@needs_linux
def test_a_run_in_the_background_is_followed_stopped_and_started_again(tmp_path):
    (tmp_path / 'scripts').mkdir()
    shutil.copy(SCRIPTS / 'worker.sh', tmp_path / 'scripts')

    def worker(*words, status=0):
        command = ['bash', str(tmp_path / 'scripts' / 'worker.sh'), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == status, done.stderr
        return done.stdout.strip()

    assert worker('state') == 'none'
    worker('follow', status=1)
    worker('start', 'bash', '-c', SAVES)
    assert worker('state') == 'running'
    worker('idle', status=1)
    follower = start('bash', str(tmp_path / 'scripts' / 'worker.sh'), 'follow')
    while 'begins' not in (tmp_path / 'run.log').read_text(encoding='utf-8'):
        time.sleep(0.02)
    worker('stop')
    assert worker('state') == f'ended {AGAIN}'
    said, _ = follower.communicate(timeout=20)
    assert 'saved' in said and follower.returncode == AGAIN
    worker('idle')
    worker('start', 'bash', '-c', 'sleep 0.2; echo second')
    assert worker('follow') == 'second'
    assert worker('state') == 'ended 0'
    worker('start', 'bash', '-c', 'kill -KILL $PPID')
    while worker('state') == 'running':
        time.sleep(0.02)
    assert worker('state') == 'ended 137'


def test_the_jobset_starts_a_valid_command_in_a_pod_for_each_host(tmp_path):
    jobset = yaml.safe_load((SCRIPTS / 'gke_jobset.yaml').read_text(encoding='utf-8'))
    policy = jobset['spec']['failurePolicy']
    assert jobset['kind'] == 'JobSet' and policy['maxRestarts'] > 0
    (job,) = (found['template']['spec'] for found in jobset['spec']['replicatedJobs'])
    # An error that would come again ends all: 1 does, "to be continued" does not.
    (rule,) = job['podFailurePolicy']['rules']
    assert rule['action'] == 'FailJob' and rule['onExitCodes']['operator'] == 'NotIn'
    assert 75 in rule['onExitCodes']['values'] and 1 not in rule['onExitCodes']['values']
    assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
    assert job['parallelism'] == job['completions'] and job['completionMode'] == 'Indexed'
    assert job['backoffLimit'] == 0 and job['template']['spec']['restartPolicy'] == 'Never'
    (container,) = job['template']['spec']['containers']
    shell, script, *command = container['command']
    assert (shell, script, command[:2]) == ('bash', '/dpp_jax/scripts/worker.sh', ['run', 'dpp-jax'])
    assert f'--hosts={job["parallelism"]}' in command
    ports = {entry['value'] for entry in container['env'] if entry['name'] == 'JAX_COORDINATOR_PORT'}
    assert ports == {str(port['containerPort']) for port in container['ports']}
    check_command_line(command[2:])


def check_command_line(arguments):
    """Read a command line as dpp-jax does."""
    code = 'import sys; from dpp_jax import command_line; command_line.parse(sys.argv)'
    done = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_shellcheck_finds_nothing():
    files = [*SCRIPTS.glob('*.sh'), *SCRIPTS.glob('*.sbatch'), ROOT / '.ci' / 'run']
    assert len(files) >= 6
    program = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    if program is None:
        pytest.skip('shellcheck is missing; the extra [test] installs it')
    done = subprocess.run([program, '--external-sources', *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
