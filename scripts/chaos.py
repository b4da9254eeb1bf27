"""Kill the program at random moments, restart it, and compare with a run that was left alone.

    python scripts/chaos.py --kills=50 --workdir=runs/chaos
    python scripts/chaos.py --processes=4 --kills=20 --stops=10 --workdir=runs/chaos

Every process works on the digits with a small network, compiled as users' programs are (XLA's default
level), and without a seed. Each process is killed by SIGKILL, and started again, until the run is
complete; then the next run begins, until there were enough kills. There are two kinds, in turns:

  - with keys: the run left alone draws its keys, and this one is given a copy before it starts. It is killed
    at random moments of all stages. If it lost its keys, it would draw others.
  - without: it draws its own, and is killed as soon as each of them is there. A key, once drawn, must
    never change or disappear. Afterwards a run that is given these keys is left alone.

With --processes, every run has several processes over loopback. SIGKILL hits one of them, by chance, and the
others must end by themselves, in time, each with one line. SIGTERM hits one, and all must save and end well.

Weights, images, ledger, scores and keys of every run must be those of the run that was left alone with the
same keys, bit for bit, and the ledger must name one randomness per mechanism.
"""

import argparse
from collections import Counter
from collections.abc import Callable
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'scripts'))
import launch_local  # noqa: E402

HOST_TIMEOUT = 8.0  # seconds; restarts are what takes time here
STAGES = ('central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report')
# Small, so that fifty restarts take minutes; checkpoints as often as the loop can.
SETTINGS = {
    'model.width': 8,
    'model.multipliers': '(1,)',
    'model.attention_resolutions': '(8,)',
    'query.queries': 2,
    'pretrain.epochs': 60,
    'pretrain.draws': 1,
    'pretrain.batch_size': 16,
    'finetune.epochs': 2.0,
    'finetune.batch_size': 64,
    'finetune.draws': 2,
    'finetune.microbatch': 4,
    'generate.images': 200,
    'generate.batch_size': 20,
    'generate.sampler.steps': 4,
    'evaluate.epochs': 2,
    'evaluate.feature_epochs': 1,
    'evaluate.classifiers': '("logistic", "mlp")',
    'loop.checkpoint_every_seconds': 0.2,
}
_PARTS = 7  # that draw keys: query, pre-training, fine-tuning, images, features, two classifiers
_TODO = 'runs  '  # how the line begins in which the program names the stages that it will run
NEW_KEY = 'new key'  # an event like the begin of a stage


class Process:
    """The program on one work directory, in one process or in several, and the stage that it is in."""

    def __init__(self, workdir: Path, settings: dict, environment: dict[str, str], processes: int = 1):
        self._workdir, self._keys_before = workdir, keys_of(workdir)
        arguments = ['--config=configs/digits_8.py:10', f'--workdir={workdir}', '--stage=all']
        arguments += [f'--config.{name}={value}' for name, value in settings.items()]
        if processes > 1:
            arguments += [f'--host_timeout={HOST_TIMEOUT}', f'--hosts={processes}']
        options = {'cwd': ROOT, 'env': {**os.environ, **environment}}
        # None: as many devices as there are cores.
        self.all = launch_local.start(arguments, processes, 1 if processes > 1 else None, **options)
        self._outputs: list[list[str]] = [[] for _ in self.all]
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(self.all, self._outputs)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def _process(self) -> subprocess.Popen:
        """The one that has the work directory."""
        return self.all[0]

    @property
    def _lines(self) -> list[str]:
        return self._outputs[0]

    @staticmethod
    def _read(process: subprocess.Popen, lines: list[str]) -> None:
        for line in process.stdout:
            lines.append(line.decode(errors='replace'))

    def output(self, number: int = 0) -> str:
        return ''.join(self._outputs[number])

    def stage(self) -> str | None:
        """The stage in progress; None while the program starts, or when it ended."""
        if self._process.poll() is not None:
            return None
        todo = [line for line in self._lines if line.startswith(_TODO)]
        if not todo:
            return None
        done = {line.split(':')[0] for line in self._lines if ': done in' in line}
        names = [name.strip() for name in todo[0].removeprefix(_TODO).split(',')]
        return next((name for name in names if name not in done), None)

    def met(self, event: str) -> bool:
        """Whether the stage `event` began or is over, or, for NEW_KEY, this process drew a key."""
        if event == NEW_KEY:
            return keys_of(self._workdir).keys() > self._keys_before.keys()
        return self.stage() in STAGES[STAGES.index(event) :]

    def running(self) -> bool:
        return self._process.poll() is None

    def end(self, number: int | None = None, victim: int = 0) -> int:
        """Send a signal, if any, to one process, wait for all, and return the exit code of that one."""
        if number is not None:
            self.all[victim].send_signal(number)
        for process in self.all:
            process.wait()
        for reader in self._readers:
            reader.join()
        return self.all[victim].returncode


def wrong_end(process: Process, number: int, victim: int, seconds: float) -> list[str]:
    """What is wrong with the end of several processes, one of which got a signal.

    Args:
        process: all of them, ended.
        number: of the signal.
        victim: which one got it.
        seconds: that the others took to end.
    """
    wrong = [f'{seconds:.0f} s until all ended'] if seconds > 2 * HOST_TIMEOUT + 30 else []
    for other, each in enumerate(process.all):
        text = process.output(other)
        if number == signal.SIGKILL and other != victim and text.count('dpp-jax:') != 1:
            wrong.append(f'process {other} said {text.count("dpp-jax:")} lines')
        if 'stack trace' in text or 'Traceback' in text:
            wrong.append(f'process {other} showed a trace')
        if number == signal.SIGTERM and each.returncode:
            wrong.append(f'process {other} ended with {each.returncode}')
    return [f'{what} after signal {number} to process {victim}:\n{process.output(0)}' for what in wrong]


def run_to_the_end(workdir: Path, settings: dict, environment: dict[str, str], processes: int = 1) -> None:
    """Run the program without disturbing it; raises if it fails."""
    process = Process(workdir, settings, environment, processes)
    code = process.end()
    if code:
        raise RuntimeError(f'the program ended with {code}:\n{process.output()}')


def give_keys(source: Path, workdir: Path) -> None:
    """Begin the work directory of a run that draws no keys, but has those of the run in `source`."""
    (workdir / 'private').mkdir(mode=0o700, parents=True)
    shutil.copy(source / 'private' / 'keys.json', workdir / 'private')


def keys_of(workdir: Path) -> dict[str, dict]:
    """Part → its keys, as far as they are drawn."""
    path = workdir / 'private' / 'keys.json'
    parts = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    return {
        part: {name: keys[name] for name in ('identifier', 'sampling', 'noise')}
        for part, keys in parts.items()
        if not part.startswith('_')
    }


def randomness_of(workdir: Path) -> dict[str, set[str]]:
    """Mechanism → the names of the keys that the ledger's releases were made with."""
    found: dict[str, set[str]] = {}
    for line in (workdir / 'release' / 'ledger.jsonl').read_text(encoding='utf-8').splitlines():
        entry = json.loads(line)
        found.setdefault(entry['mechanism'], set()).add(entry['randomness'])
    return found


def wrong_keys(workdir: Path, seen: list[dict[str, dict]]) -> list[str]:
    """What is wrong with the keys of a run, of which those in `seen` were there after its kills."""
    last = keys_of(workdir)
    wrong = [
        f'keys of {part} changed or were lost'
        for keys in seen
        for part in keys
        if last.get(part) != keys[part]
    ]
    for mechanism, names in randomness_of(workdir).items():
        if names != {last.get(mechanism, {}).get('identifier')}:
            wrong.append(f'the ledger names {sorted(names)} for {mechanism}')
    return sorted(set(wrong))


def kill_after(process: Process, event: str, seconds: float) -> str | None:
    """Kill `process` `seconds` after `event`, see `Process.met`.

    Returns:
        the stage in which it died, 'start' before the first, or None if it ended by itself.
    """
    while process.running() and not process.met(event):
        time.sleep(0.005)
    time.sleep(seconds)
    if not process.running():
        return None
    died_in = process.stage() or 'start'
    return died_in if process.end(signal.SIGKILL) == -signal.SIGKILL else None


def final_state(workdir: Path) -> dict[str, object]:
    """What a run must end with: arrays and texts by their names."""
    release, private = workdir / 'release', workdir / 'private'
    found: dict[str, object] = {}
    for path in release.rglob('*.npz'):
        with np.load(path) as data:
            found |= {f'{path.name}/{name}': data[name] for name in data}
    for part in (release / 'model').iterdir():
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(part.absolute())
        found |= {f'{part.name}{path}': np.asarray(leaf) for path, leaf in _leaves(tree)}
    texts = [release / 'ledger.jsonl', release / 'privacy_statement.md', release / 'plan.json']
    texts += [private / name for name in ('keys.json', 'evaluation.json', 'report.txt')]
    # The page names files by their folder, the only thing that differs between two runs.
    found |= {path.name: path.read_text(encoding='utf-8').replace(str(workdir), '') for path in texts}
    litter = [p for p in workdir.rglob('*') if p.name.startswith(('.new_', '.parts_'))]
    return found | {'litter': sorted(str(path) for path in litter)}


def _leaves(tree, prefix: str = ''):
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f'{prefix}/{name}')


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not np.array_equal(one[name], other[name])
    )


def survive(
    workdir: Path,
    choose: Callable[[], tuple[str, float] | None],
    settings: dict,
    environment: dict[str, str],
    after_kill: Callable[[], None] = lambda: None,
) -> Counter:
    """Run to the end through the kills that `choose` asks for: (event, seconds), None for no more."""
    deaths: Counter = Counter()
    while True:
        kill = choose()
        if kill is None:
            run_to_the_end(workdir, settings, environment)
            return deaths
        process = Process(workdir, settings, environment)
        died_in = kill_after(process, *kill)
        if died_in is None:
            if code := process.end():
                raise RuntimeError(f'the program ended with {code}:\n{process.output()}')
            return deaths
        deaths[died_in] += 1
        after_kill()


def killed_with_keys(
    root: Path, reference: Path, chance: random.Random, environment: dict[str, str]
) -> tuple[Counter, list[str]]:
    """A run with the keys of `reference`: its deaths, and what is not as in the reference."""
    kills = iter(_moments(chance))
    give_keys(reference, root)
    deaths = survive(root, lambda: next(kills, None), SETTINGS, environment)
    wrong = wrong_keys(root, [keys_of(reference)])
    return deaths, wrong + differences(final_state(root), final_state(reference))


def killed_without_keys(
    root: Path, chance: random.Random, environment: dict[str, str]
) -> tuple[Counter, list[str]]:
    """A run that draws its keys: its deaths, and what is wrong with it or not as in a run left alone."""
    again, seen = root.with_name(root.name + '_left_alone'), []
    # A process gets beyond what killed the last one: its key is there.
    kills = iter([(NEW_KEY, chance.uniform(0, 0.05)) for _ in range(_PARTS)])
    deaths = survive(
        root, lambda: next(kills, None), SETTINGS, environment, lambda: seen.append(keys_of(root))
    )
    give_keys(root, again)
    run_to_the_end(again, SETTINGS, environment)
    return deaths, wrong_keys(root, seen) + differences(final_state(root), final_state(again))


def disturbed_together(
    root: Path,
    reference: Path,
    chance: random.Random,
    environment: dict[str, str],
    processes: int,
    left: Counter,
) -> tuple[Counter, list[str]]:
    """A run of several processes with the keys of `reference`, of which one after the other gets a signal.

    Args:
        root, reference, chance, environment: as of `killed_with_keys`.
        processes: how many.
        left: signal → how many are still to be sent; counted down.

    Returns:
        stage and signal → how often, and what is wrong.
    """
    give_keys(reference, root)
    disturbed: Counter = Counter()
    wrong: list[str] = []
    for stage, longest in [(stage, longest) for stage in STAGES[:5] for longest in (0.5, 5.0)]:
        if not left.total():
            break
        process = Process(root, SETTINGS, environment, processes)
        while process.running() and not process.met(stage):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, longest))
        stopped_in = process.stage()
        if stopped_in is None:  # it ended by itself
            if code := process.end():
                raise RuntimeError(f'the program ended with {code}:\n{process.output()}')
            break
        number, victim = chance.choice(list(left.elements())), chance.randrange(processes)
        start = time.monotonic()
        code = process.end(number, victim)
        if code != -signal.SIGKILL if number == signal.SIGKILL else 'report: done' in process.output():
            break  # it came too late
        wrong += wrong_end(process, number, victim, time.monotonic() - start)
        left[number] -= 1
        disturbed[f'{signal.Signals(number).name} in {stopped_in}, process {victim}'] += 1
    run_to_the_end(root, SETTINGS, environment, processes)
    wrong += wrong_keys(root, [keys_of(reference)])
    return disturbed, wrong + differences(final_state(root), final_state(reference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--kills', type=int, default=50, help='at least so many')
    parser.add_argument('--processes', type=int, default=1, help='of each run')
    parser.add_argument('--stops', type=int, default=10, help='SIGTERMs, with --processes')
    parser.add_argument('--workdir', type=Path, default=Path('runs/chaos'), help='must be empty')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--json', type=Path, help='write the result to this file')
    arguments = parser.parse_args()
    if arguments.workdir.exists() and any(arguments.workdir.iterdir()):
        sys.exit(f'--workdir is {arguments.workdir}; it must be empty or not exist')
    chance = random.Random(arguments.seed)
    environment = {'JAX_PLATFORMS': 'cpu'}
    reference = arguments.workdir.absolute() / 'left_alone'
    start = time.monotonic()
    run_to_the_end(reference, SETTINGS, environment, arguments.processes)
    print(f'A run left alone took {time.monotonic() - start:.0f} s.', flush=True)
    deaths: Counter = Counter()
    wrong: list[str] = []
    runs = 0
    left = Counter({signal.SIGKILL: arguments.kills, signal.SIGTERM: arguments.stops})
    together = arguments.processes > 1
    while left.total() if together else deaths.total() < arguments.kills or runs < 2:  # both kinds
        runs += 1
        workdir = arguments.workdir.absolute() / f'killed_{runs}'
        if together:
            died, found = disturbed_together(
                workdir, reference, chance, environment, arguments.processes, left
            )
        elif runs % 2:
            died, found = killed_without_keys(workdir, chance, environment)
        else:
            died, found = killed_with_keys(workdir, reference, chance, environment)
        deaths += died
        wrong += [f'run {runs}: {name}' for name in found]
        print(
            f'run {runs}: {deaths.total()} kills so far, {len(found)} differences, '
            f'{time.monotonic() - start:.0f} s',
            flush=True,
        )
    result = {
        'kills': deaths.total(),
        'runs': runs,
        'processes': arguments.processes,
        'without_keys': 0 if together else (runs + 1) // 2,
        'by_stage': dict(deaths),
        'wrong': wrong,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    sys.exit(bool(wrong))


def _moments(chance: random.Random) -> list[tuple[str, float]]:
    """Two kills per stage, one soon after its start and one anywhere in its first seconds."""
    return [(stage, chance.uniform(0, longest)) for stage in STAGES for longest in (0.5, 5.0)]


if __name__ == '__main__':
    main()
