"""Our results beside those of PyTorch and Opacus, on this machine: numbers, speed, memory, training.

    python scripts/compare_pytorch.py --config=mnist_28:1
    python scripts/compare_pytorch.py --config=mnist_28:1 --checkpoint=theirs.pth
    python scripts/compare_pytorch.py --config=digits_8:10 --quick

It writes comparison.md, comparison.json and comparison.html into --out. Any setting of the config may be
changed, as for the program: --config.finetune.draws=8. `--sections` leaves parts out. On an accelerator,
speed and training run there on both sides; numbers are always compared on the CPU, in float32.

Durations on two quiet cores: mnist_28 about an hour, most of it PyTorch's steps and compilations (the limits
are --call_seconds and --build_seconds); digits_8 20 minutes; --quick some minutes.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import sys
import time
import warnings

if __name__ == '__main__' and __package__ is None:  # as a script: the repository is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# The processes that measure speed need an accelerator's memory, too.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

from absl import flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from dpp_jax import command_line  # noqa: E402
from scripts.compare import pages  # noqa: E402

SECTIONS = ('numbers', 'speed', 'training')
_FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file('config', None, 'As for the program.', flag_values=_FLAGS)
flags.DEFINE_string('checkpoint', None, 'A .pth file of theirs; else random weights.', flag_values=_FLAGS)
flags.DEFINE_bool('quick', False, 'Everything small, in a minute or two.', flag_values=_FLAGS)
flags.DEFINE_list('sections', list(SECTIONS), 'Parts to run.', flag_values=_FLAGS)
flags.DEFINE_string('out', '.', 'Folder of the three files.', flag_values=_FLAGS)
flags.DEFINE_string('training', 'digits_8:10', 'Config of the training.', flag_values=_FLAGS)
flags.DEFINE_integer('seeds', None, 'Trainings on either side: 5, or 2.', flag_values=_FLAGS, lower_bound=1)
flags.DEFINE_float('memory_gib', None, 'Limit of a process; a third of the free.', flag_values=_FLAGS)
flags.DEFINE_float('call_seconds', 60.0, 'Longest call that speed measures.', flag_values=_FLAGS)
flags.DEFINE_float('build_seconds', 900.0, 'Longest compilation.', flag_values=_FLAGS)


class Mistake(Exception):
    """Something in the command or the installation; the message says what to do, in a line."""


def check_installed() -> None:
    """Raise Mistake if PyTorch or Opacus is missing."""
    for name in ('torch', 'opacus'):
        try:
            __import__(name)
        except ImportError as error:
            raise Mistake(
                f"{name} cannot be imported ({error}); install both: pip install -e '.[pytorch]'"
            ) from None


def read_flags(argv: list[str]) -> flags.FlagValues:
    """Parse the command; a config may be named as `mnist_28:1`.

    Raises:
        Mistake: the command cannot be understood.
    """
    if any(argument in ('-h', '--help', '-help') for argument in argv):
        print(f'{__doc__}\n{_FLAGS.main_module_help() or _FLAGS.get_help()}')
        raise SystemExit
    try:
        arguments = [
            f'--config={command_line.find_config(argument.partition("=")[2])}'
            if argument.startswith('--config=')
            else argument
            for argument in argv
        ]
        rest = _FLAGS(arguments)[1:]
        if rest or _FLAGS.config is None:
            raise Mistake('--config is missing' if _FLAGS.config is None else f'what is {rest[0]!r}?')
        if unknown := set(_FLAGS.sections) - set(SECTIONS):
            raise Mistake(f'--sections has {sorted(unknown)}; they may be {", ".join(SECTIONS)}')
    except (flags.Error, command_line.Mistake) as error:
        raise Mistake(str(error)) from None
    return _FLAGS


def compare(chosen: flags.FlagValues) -> dict:
    """Run the sections, write the three files after each, and return the report: what comparison.json holds.

    Keys: about the run, and as far as they ran `numbers` (a list of `numbers.Result`), `speed` (for each kind
    of work its `trials` and `sweep`, lists of `speed.Figure`, and `ratios`), `training` (`outcomes`, `rows`).
    """
    import jax
    import numpy as np
    import torch

    from dpp_jax import build
    from dpp_jax.diffusion import model as model_lib
    from dpp_jax.training import devices

    config, folder = chosen.config, Path(chosen.out)
    devices.one_per_core()
    devices.keep_compiled_programs()
    # In this process results count, not time; speed has processes of its own. Networks are small, and threads
    # that wait for each other on a busy machine take a hundred times as long.
    torch.set_num_threads(1)
    config.model.around = 'none'  # the other side knows nothing of it
    model = build.model(config)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        params = _weights(chosen.checkpoint, model)
        report = {
            'config': config.name,
            'parameters': model_lib.size(params),
            'weights': chosen.checkpoint or 'random, none of them zero',
            'draws': config.finetune.draws,
            'date': datetime.date.today().isoformat(),
            'machine': _machine(),
            'cores': devices.cores(),
            'versions': {name: importlib.metadata.version(name) for name in ('jax', 'torch', 'opacus')},
            'is_quick': chosen.quick,
            'load': 0.0,
            'seconds': {},
        }
        params = jax.tree.map(np.asarray, params)
        if 'numbers' in chosen.sections:
            _timed(report, folder, 'numbers', lambda: _numbers(chosen, model, params))
    if 'speed' in chosen.sections:
        _timed(report, folder, 'speed', lambda: _speed(chosen, model, params))
    if 'training' in chosen.sections:
        _timed(report, folder, 'training', lambda: _training(chosen))
    return report


def _timed(report: dict, folder: Path, section: str, run) -> None:
    """Run a section, and write the report as far as it goes."""
    start = time.perf_counter()
    report[section] = run()
    report['seconds'][section] = round(time.perf_counter() - start, 1)
    report['load'] = max(report['load'], os.getloadavg()[0])
    write(report, folder)  # the next section may take long, or be stopped


def _tell(text: str) -> None:
    print(f'{datetime.datetime.now():%H:%M:%S} {text}', flush=True)


def _weights(checkpoint: str | None, model):
    from dpp_jax.interop import pytorch
    from scripts.compare import numbers

    if checkpoint is None:
        return numbers.random_params(model)
    try:
        return pytorch.read_checkpoint(checkpoint, model)['params']
    except (OSError, ValueError) as error:
        raise Mistake(f'--checkpoint: {error}') from None


def _machine() -> str:
    import torch

    about = Path('/proc/cpuinfo')
    lines = about.read_text(encoding='utf-8').splitlines() if about.exists() else []
    names = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
    host = f'{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores'
    return f'{torch.cuda.get_device_name()}, {host}' if torch.cuda.is_available() else host


def _numbers(chosen: flags.FlagValues, model, params) -> list[dict]:
    import numpy as np

    from dpp_jax import build
    from scripts.compare import numbers

    _tell('numbers')
    count, rng = (4 if chosen.quick else 8), np.random.default_rng(0)
    # Smooth random images in [-1, 1]: more like real ones than noise.
    noise = rng.normal(0, 0.3, (count,) + model.image_shape)
    images = np.tanh(np.cumsum(np.cumsum(noise, 1), 2)).astype(np.float32)
    labels = np.arange(count, dtype=np.int32) % model.classes
    draws = min(chosen.config.finetune.draws, 2 if chosen.quick else 4)
    twins = numbers.Twins(model, params, images, labels, draws)
    plan = build.plan(_by_rdp(chosen.config), model)
    found = numbers.check(
        twins,
        steps=6 if chosen.quick else 18,
        releases=[*plan.budget.before, *plan.budget.releases],
        epsilon=plan.budget.epsilon,
        delta=plan.budget.delta,
    )
    return [dataclasses.asdict(each) | {'is_within': each.is_within} for each in found]


def _by_rdp(config):
    """The config with the accountant and the relation that Opacus has."""
    config = config.copy_and_resolve_references()
    config.dp.update(accountant='rdp', relation='zero_out')
    return config


def _speed(chosen: flags.FlagValues, model, params) -> list[dict]:
    from dpp_jax import build
    from scripts.compare import speed

    config = chosen.config.copy_and_resolve_references()
    config.finetune.update(devices_per_image=1, microbatch=None)
    config.generate.sampler.update(name='heun', steps=speed.SAMPLING_STEPS, s_churn=0.0)
    task = speed.Task(config, params, config.finetune.draws)
    memory = chosen.memory_gib * 2**30 if chosen.memory_gib else speed.default_memory_bytes()
    limits = speed.Limits(
        build_seconds=chosen.build_seconds, call_seconds=chosen.call_seconds, memory_bytes=memory
    )
    sizes = {
        speed.PLAIN: (64, (32, 128, 512, 2048)),
        speed.PRIVATE: (max(4, speed.images_at_once(task.draws)), (1, 4, 16, 64, 256)),
        speed.SAMPLING: (32, (16, 64, 256, 1024)),
    }
    if chosen.quick:
        limits = dataclasses.replace(limits, turns=1, build_seconds=120, call_seconds=10, is_quick=True)
        sizes = {work: (trial, batches[:2]) for work, (trial, batches) in sizes.items()}
    rule = build.sizes(config, model).images
    found = []
    for work, (trial_batch, batches) in sizes.items():
        trials, sweep = speed.run(
            task, work, trial_batch=trial_batch, batches=batches, rule=rule, limits=limits, tell=_tell
        )
        found.append(
            {
                'work': work,
                'unit': speed.UNITS[work],
                'trials': list(map(dataclasses.asdict, trials)),
                'sweep': list(map(dataclasses.asdict, sweep)),
                'ratios': [dict(zip(('form', 'batch', 'ratio'), each)) for each in speed.ratios(sweep)],
            }
        )
    return found


def _training(chosen: flags.FlagValues) -> dict:
    import jax

    from dpp_jax.training import devices
    from scripts.compare import training

    config = _training_config(chosen)
    seeds = chosen.seeds or (2 if chosen.quick else 5)
    images = 200 if chosen.quick else 2000
    _tell(f'training: {config.name}, pre-training once')
    task = training.make_task(config, most_steps=6 if chosen.quick else None)
    # All of a CPU, as the program has it; one accelerator, as PyTorch.
    number = jax.local_device_count() if jax.default_backend() == 'cpu' else 1
    with devices.limited_to(number):
        outcomes = training.run(task, seeds, images, _tell)
    return {
        'config': config.name,
        'steps': task.steps,
        'seeds': seeds,
        'images': images,
        'noise_multiplier': task.mechanism.noise_multiplier,
        'sampling_probability': task.mechanism.sampling_probability,
        'clip_norm': task.mechanism.sensitivity,
        'outcomes': list(map(dataclasses.asdict, outcomes)),
        'rows': [row.figures() for row in training.rows(outcomes)],
    }


def _training_config(chosen: flags.FlagValues):
    """Read the config of the training; with --quick it is far too small to learn anything."""
    config = command_line.load_config(command_line.find_config(chosen.training))
    config.model.around = 'none'  # the other side knows nothing of it
    if chosen.quick:
        config.model.update(width=8, multipliers=(1,), attention_resolutions=(config.data.image_size,))
        config.pretrain.update(epochs=10, draws=1)
        config.generate.sampler.steps = 4
        config.evaluate.update(epochs=2, feature_epochs=1, classifiers=('logistic',))
    return config


def silence() -> None:
    """Hide warnings that tell a user nothing, here and in the processes that measure."""
    # Opacus's hooks on layers whose inputs need no gradient; kernels with one input channel; orders;
    # equal scores.
    for message in (
        'Full backward hook is firing',
        'grad and param do not obey the gradient layout',
        'Optimal order is the',
        'Precision loss occurred in moment',
    ):
        warnings.filterwarnings('ignore', message=message)
        os.environ['PYTHONWARNINGS'] = ','.join(
            filter(None, [os.environ.get('PYTHONWARNINGS'), f'ignore:{message}'])
        )


def write(report: dict, folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        'json': json.dumps(report, indent=1) + '\n',
        'md': pages.markdown(report),
        'html': pages.page(report),
    }
    for ending, text in texts.items():
        (folder / f'comparison.{ending}').write_text(text, encoding='utf-8')


def main(argv: list[str]) -> int:
    try:
        chosen = read_flags(argv)
        check_installed()
        silence()
        logging.set_verbosity(logging.WARNING)
        report = compare(chosen)
    except (Mistake, command_line.Mistake) as error:
        print(error, file=sys.stderr)
        return 2
    folder = Path(chosen.out)
    print('\n'.join(f'{title}: {value} {note}' for title, value, note, _ in pages.cards(report)))
    print(f'written: {folder / "comparison"}.html, .md, .json')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
