"""Speed of private training beside ordinary training and other ways to clip per-example gradients.

    python -m scripts.benchmark --config=configs/mnist_28.py:1 --json=benchmark.json

Everything runs in one process, in turns, on random images; the table gives medians of the turns after a
first one that is not counted, and ratios to the plain gradient, medians as well of the ratios in one turn.
A "noised image" is one image with one noise draw. The two steps work on a batch of the config's own size, of
which they visit as many images as are counted. Memory is what the compiler allots to the program, arguments
and temporaries; of PyTorch it is what a process of its own grows by. `--parts` adds a table of everything
that is not the training step (parts.py).

The contenders differ in small things, which take less than a hundredth of the time. The plain gradient
(PyTorch's too) clips nothing. optax's way, jax_privacy's and the naive one take no optimizer step. The naive
one neither clips nor sums. Opacus's keeps no average of the weights.
"""

import dataclasses
import datetime
import importlib.metadata
import json
from pathlib import Path
import platform

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from dpp_jax import build
from dpp_jax.run import sizes as sizes_lib
from dpp_jax.training import devices
from scripts.benchmark import contenders, parts, timing
from scripts.benchmark.contenders import OPACUS, PLAIN, PRIVATE, PYTORCH

_CONFIG = config_flags.DEFINE_config_file('config', None, 'As for the program.')
_MICROBATCH = flags.DEFINE_integer('microbatch', None, 'As config.finetune.microbatch.')
_DRAWS = flags.DEFINE_integer('draws', None, 'Noise draws K; by default those of the config.')
_EXAMPLES = flags.DEFINE_integer(
    'examples', None, 'Images per turn, rounded up to whole microbatches; by default 4, or 16 microbatches.'
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Turns that count, at least 1.')
_JSON = flags.DEFINE_string('json', None, 'File for the figures.')
_SKIP = flags.DEFINE_list('skip', [], 'Contenders to leave out: naive, optax, jax_privacy, pytorch.')
_PARTS = flags.DEFINE_bool('parts', False, 'Also measure everything that is not the training step.')
_TURN_SECONDS = flags.DEFINE_float(
    'turn_seconds',
    3.0,
    'With --parts: how long each is measured in every turn, at least one call.',
    lower_bound=0.0,
)
_STARTS = flags.DEFINE_integer('starts', 1, 'With --parts: cold and cached starts of the program; 0: none.')


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax is talkative
    config = _CONFIG.value
    if _DRAWS.value:
        config.finetune.draws = _DRAWS.value
    if _MICROBATCH.value:
        config.finetune.microbatch = _MICROBATCH.value
    for flag in (_EXAMPLES, _REPEATS):
        if flag.value is not None and flag.value < 1:
            raise app.UsageError(f'--{flag.name} is {flag.value}; it must be at least 1')
    devices.one_per_core()
    # All of a CPU, as the program has it; one accelerator.
    number = jax.local_device_count() if jax.default_backend() == 'cpu' else 1
    with devices.limited_to(number):
        benchmark(config)


def benchmark(config) -> None:
    """Measure, print and write, on the devices in use."""
    config.model.around = 'none'  # next to no work, and what is compared knows nothing of it
    model, settings = build.model(config), config.finetune
    settings.devices_per_image = 1  # what is compared knows no other; scaling.py measures those
    if not config.loop.images_at_once:  # as for a long training
        config.loop.images_at_once = sizes_lib.measured(
            model,
            draws=settings.draws,
            microbatch=settings.microbatch,
            label_dropout=settings.label_dropout,
        )
    sizes = build.sizes(config, model)
    reference = contenders.matmul(config.model.dtype)
    flops = contenders.flops_per_noised_image(model)
    # Padding takes time and is not counted: as in a real batch, there is hardly any.
    wanted = _EXAMPLES.value or (4 if jax.default_backend() == 'cpu' else 16 * sizes.microbatch)
    at_a_time = sizes.microbatch * devices.count()
    examples = -(-wanted // at_a_time) * at_a_time
    found = contenders.make(config, model, sizes, examples, _SKIP.value)
    timing.measure([reference, *found], _REPEATS.value)

    rows = training_rows(found, flops, reference.rate)
    for row in rows:
        if row['name'] in (PYTORCH, OPACUS):
            row['memory_bytes'] = contenders.pytorch_memory(config, row['name'])
    report = {
        'config': config.name,
        'date': datetime.date.today().isoformat(),
        'machine': machine(),
        'versions': versions(),
        'dtype': config.model.dtype,
        'images': examples,
        'draws': settings.draws,
        'at_once': dataclasses.asdict(sizes),
        'batch': contenders.capacity(config, sizes),
        'matmul_flops_per_second': reference.rate,
        'flops_per_noised_image': flops,
        'contenders': rows,
        'ratios': compare(found),
    }
    print(
        f'{config.name}, {examples} images x {settings.draws} draws, at once '
        f'{sizes.microbatch} x {sizes.draws}, {config.model.dtype}; {report["date"]}, {report["machine"]}, '
        f'jax {jax.__version__}\nmatmul {reference.rate / 1e9:.0f} GFLOP/s; '
        f'{flops / 1e9:.2f} GFLOP per noised image\n\n{training_text(rows, report["ratios"])}',
        flush=True,
    )
    save(report)  # already: the parts take long, and may fail
    if _PARTS.value:
        report['parts'] = parts.measure(
            config,
            model,
            sizes,
            noised_per_second=rows[1]['noised_images_per_second'],
            repeats=_REPEATS.value,
            turn_seconds=_TURN_SECONDS.value,
            starts=_STARTS.value,
        )
        print('\n' + parts.text(report['parts']))
        save(report)


def save(report: dict) -> None:
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')


def training_rows(found, flops: float, peak: float) -> list[dict]:
    """The figures of every contender; the first is the plain gradient."""
    rows = []
    for contender in found:
        rows.append(
            {
                'name': contender.title,
                'noised_images_per_second': contender.rate,
                'ratio_to_plain': contender.times_as_fast_as(found[0]),
                'flops_per_second': contender.rate * flops,
                'share_of_matmul': contender.rate * flops / peak,
                'memory_bytes': contender.memory_bytes,
                'compile_seconds': contender.compile_seconds,
                'seconds': contender.seconds,
            }
        )
    return rows


def training_text(rows: list[dict], ratios: dict[str, float]) -> str:
    """The figures as a table, and what the private step is measured by."""
    lines = [f'{"":28}{"noised/s":>10}{"ratio":>8}{"GFLOP/s":>9}{"of matmul":>11}{"MiB":>8}{"compile s":>11}']
    for row in rows:
        memory, compilation = row['memory_bytes'], row['compile_seconds']
        memory = '-' if memory is None else f'{memory / 2**20:.0f}'
        compilation = '-' if compilation is None else f'{compilation:.1f}'
        lines.append(
            f'{row["name"]:28}{row["noised_images_per_second"]:10.2f}{row["ratio_to_plain"]:8.2f}'
            f'{row["flops_per_second"] / 1e9:9.1f}{row["share_of_matmul"]:10.0%} {memory:>8}'
            f'{compilation:>11}'
        )
    lines += [''] + [f'{name:39}{ratio:7.2f}' for name, ratio in ratios.items()]
    return '\n'.join(lines)


def compare(found: list[timing.Contender]) -> dict[str, float]:
    """How many times as fast the DP step is as what it is to be compared with."""
    named = {contender.title: contender for contender in found}
    others = [name for name in (PLAIN, PYTORCH, OPACUS) if name in named]
    return {f'{PRIVATE} / {name}': named[PRIVATE].times_as_fast_as(named[name]) for name in others}


def machine() -> str:
    """The device, with the processor's own name where JAX says no more than "cpu"."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        name = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    device = jax.devices()[0].device_kind
    return f'{"" if device == "cpu" else device + ", "}{devices.cores()} cores of {name}'


def versions() -> dict[str, str]:
    """Of the packages that are measured, as far as they are installed."""
    names = ('jax', 'jaxlib', 'optax', 'jax-privacy', 'torch', 'opacus')
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


if __name__ == '__main__':
    flags.mark_flag_as_required('config')
    app.run(main)
