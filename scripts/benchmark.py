"""Speed of private training beside ordinary training and other ways to clip per-example gradients.

    python scripts/benchmark.py --config=configs/mnist_28.py:1 --json=benchmark.json

Everything runs in one process, in turns, on random images; the table gives medians of the turns after a
first one that is not counted, and ratios to the plain gradient, medians as well of the ratios in one turn.
A "noised image" is one image with one noise draw. The two steps work on a batch of the config's own size, of
which they visit as many images as are counted. Memory is what the compiler allots to the program, arguments
and temporaries; of PyTorch it is what a process of its own grows by. `--parts` adds a table of everything
that is not the training step (benchmark_parts.py).

The contenders do not do quite the same: the plain gradient (PyTorch's too) clips nothing; optax's way, jax_privacy's
and the naive one take no optimizer step; the naive one neither clips nor sums; Opacus's keeps no average of
the weights. All of that takes less than a hundredth of the time.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
from pathlib import Path
import platform
import sys
from unittest import mock

from absl import app, flags, logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmark_parts
import timing

from dpp_jax import pipeline
from dpp_jax.data import augment
from dpp_jax.diffusion import winograd
from dpp_jax.privacy import poisson
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import sizes as sizes_lib
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib

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

# Rows of the batch that PyTorch's plain gradient takes at once: the best of 4, 8, 16, 32, 64 on two cores.
_PYTORCH_ROWS = 32
PLAIN, PRIVATE = 'plain gradient', 'DP step'
PYTORCH, OPACUS = 'PyTorch plain gradient', 'PyTorch + Opacus'


def library_convolution(x, kernel):
    """`flax.linen.Conv`'s: what a network has that was not written for this."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def contenders(config, model, sizes, count: int) -> list[timing.Contender]:
    """All that this environment can run on `count` images, compiled."""
    settings = config.finetune
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count,) + model.image_shape, dtype=np.uint8)
    noised = count * settings.draws
    labels = (np.arange(count) % model.classes).astype(np.int32)
    optimizer = optax.adam(settings.learning_rate)
    params = model.init(jax.random.key(0))
    key = jax.random.key(1)
    in_parts = model.example_loss(
        draws=settings.draws, label_dropout=settings.label_dropout, draws_at_once=sizes.draws
    )
    state = devices.replicate(state_lib.create(params, optimizer))
    batch = lambda size: devices.deal(steps.make_batch(images, labels, np.arange(count), size))
    plain = steps.make_pretrain_step(
        model.drawing(draws=settings.draws, label_dropout=settings.label_dropout),
        model.errors,
        optimizer,
        augment=augment.make_augmentation('none'),
        ema_decay=settings.ema_decay,
        images_at_once=sizes.microbatch * sizes.draws,
    )
    private = steps.make_dp_step(
        in_parts,
        optimizer,
        GaussianMechanism('dp_sgd', 1.0, 0.1, settings.clip_norm, 'benchmark'),
        expected_batch_size=float(count),
        microbatch=sizes.microbatch,
        ema_decay=settings.ema_decay,
    )
    used = steps.used_microbatches(count, sizes.microbatch)
    found = [
        timing.donating(PLAIN, plain, state, batch(count), key),
        timing.donating(PRIVATE, private, state, batch(capacity(config, sizes)), used, key),
    ]
    for step in found:
        step.amount = noised
    examples = {
        'image': images.astype(np.float32) / 127.5 - 1,
        'label': labels,
        'key': jax.random.split(key, count),
    }
    whole = model.example_loss(draws=settings.draws, label_dropout=settings.label_dropout)
    loss = lambda params, one: whole(params, one['image'], one['label'], one['key'])
    # These hold the gradients and activations of all their images at once.
    few = jax.tree.map(lambda leaf: leaf[: max(4, sizes.microbatch)], examples)
    few_noised = len(few['label']) * settings.draws
    if 'optax' not in _SKIP.value:
        aggregate = optax.contrib.differentially_private_aggregate(settings.clip_norm, 1.0, 0)

        def with_optax(params, examples):
            gradients = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
            return aggregate.update(gradients, aggregate.init(params))[0]

        found.append(timing.compiled('optax aggregate', jax.jit(with_optax), params, few))
        found[-1].amount = few_noised
    if 'jax_privacy' not in _SKIP.value:
        try:
            import jax_privacy
        except ImportError:
            pass
        else:
            clipped = jax_privacy.clipped_grad(
                loss, l2_clip_norm=settings.clip_norm, batch_argnums=1,
                microbatch_size=sizes.microbatch, keep_batch_dim=False,
            )  # fmt: skip
            found.append(timing.compiled('jax_privacy clipped_grad', jax.jit(clipped), params, examples))
            found[-1].amount = noised
    if 'naive' not in _SKIP.value:
        with mock.patch.object(winograd, 'conv3x3', library_convolution):
            gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
            found.append(timing.compiled('naive vmap(grad), nn.Conv', gradients, params, few))
            found[-1].amount = few_noised
    if 'pytorch' not in _SKIP.value:
        found += pytorch_contenders(settings, model, params, images, labels)
    return found


def capacity(config, sizes) -> int:
    """Rows of a padded batch of the config, as the stage would have them."""
    data, batch_size = config.data, config.finetune.batch_size
    sampler = poisson.PoissonSampler(data.train_images, batch_size / data.train_images, key=0)
    return sampler.capacity(sizes.microbatch * devices.count())


def pytorch_contenders(settings, model, params, images, labels) -> list[timing.Contender]:
    """The same network in PyTorch, ordinary and with Opacus, where they are installed.

    On a CPU only: the twin runs there, in float32.
    """
    if jax.default_backend() != 'cpu':
        return []
    try:
        import pytorch_baseline as baseline
        import torch
    except ImportError:
        return []
    torch.set_num_threads(devices.cores())  # as many as XLA takes
    pixels = torch.tensor(np.moveaxis(images, -1, 1)).float() / 127.5 - 1
    classes = torch.tensor(labels).long()

    def network():
        twin = baseline.make_network(model)
        baseline.load(twin, params)
        return twin

    draw = lambda: baseline.draw(pixels, classes, settings.draws, settings.label_dropout, model.classes)
    ordinary = network()
    private = baseline.PrivateStep(
        network(),
        clip_norm=settings.clip_norm,
        noise_multiplier=1.0,
        expected_batch_size=len(images),
        learning_rate=settings.learning_rate,
    )
    calls = {
        PYTORCH: lambda: baseline.plain_gradient(ordinary, draw(), rows_at_once=_PYTORCH_ROWS),
        OPACUS: lambda: private.step(draw(), settings.draws, images_at_once=1),
    }
    return [
        timing.Contender(title, call, amount=len(images) * settings.draws) for title, call in calls.items()
    ]


def pytorch_memory(config, title: str) -> int | None:
    """Bytes that a process grows by at most in one call on a few images; None where nobody says."""
    if not Path('/proc/self/clear_refs').exists():
        return None
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_grown_by, (config, title))


def _grown_by(config, title: str) -> int:
    model = pipeline.make_model(config)
    images = np.zeros((4,) + model.image_shape, np.uint8)
    labels = (np.arange(4) % model.classes).astype(np.int32)
    params = model.init(jax.random.key(0))
    found = pytorch_contenders(config.finetune, model, params, images, labels)
    call = next(contender.call for contender in found if contender.title == title)
    Path('/proc/self/clear_refs').write_text('5')  # forget the most there has been
    before = _resident_bytes('VmRSS')
    call()
    return _resident_bytes('VmHWM') - before


def _resident_bytes(kind: str) -> int:
    """Of this process: VmRSS is now, VmHWM the most there has been (Linux)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def matmul(dtype) -> timing.Contender:
    """A large matrix product: the speed that nothing here can exceed."""
    # Long enough that starting it does not count.
    size, number = (2048, 1) if jax.default_backend() == 'cpu' else (8192, 10)

    def products(x):
        y = x
        for _ in range(number):
            y = y @ x
        return y

    x = jnp.full((size, size), 1 / size, dtype)
    found = timing.compiled(f'matmul {jnp.dtype(dtype).name}', jax.jit(products), x)
    found.amount = 2 * size**3 * number
    return found


def flops_per_noised_image(model) -> float:
    """Of the plain gradient, by XLA's count for the convolutions as they are defined."""
    params = model.shapes()
    one_draw = model.example_loss(draws=1, label_dropout=0.1)
    loss = lambda params, image: one_draw(params, image, 0, jax.random.key(0))

    # Other backends do not analyse what is not compiled.
    with (
        mock.patch.object(winograd, 'conv3x3', library_convolution),
        jax.default_device(jax.devices('cpu')[0]),
    ):
        image = jax.ShapeDtypeStruct(model.image_shape, jnp.float32)
        return jax.jit(jax.grad(loss)).lower(params, image).cost_analysis()['flops']


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
        lines = Path('/proc/cpuinfo').read_text().splitlines()
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
    model = pipeline.make_model(config)
    if not config.loop.images_at_once:  # as for a long training
        config.loop.images_at_once = sizes_lib.measured(config, model)
    sizes = sizes_lib.choose(config)
    reference = matmul(config.model.dtype)
    flops = flops_per_noised_image(model)
    # Padding takes time and is not counted: as in a real batch, there is hardly any.
    wanted = _EXAMPLES.value or (4 if jax.default_backend() == 'cpu' else 16 * sizes.microbatch)
    at_a_time = sizes.microbatch * devices.count()
    examples = -(-wanted // at_a_time) * at_a_time
    found = contenders(config, model, sizes, examples)
    timing.measure([reference, *found], _REPEATS.value)

    rows = training_rows(found, flops, reference.rate)
    for row in rows:
        if row['name'] in (PYTORCH, OPACUS):
            row['memory_bytes'] = pytorch_memory(config, row['name'])
    report = {
        'config': config.name,
        'date': datetime.date.today().isoformat(),
        'machine': machine(),
        'versions': versions(),
        'dtype': config.model.dtype,
        'images': examples,
        'draws': config.finetune.draws,
        'at_once': dataclasses.asdict(sizes),
        'batch': capacity(config, sizes),
        'matmul_flops_per_second': reference.rate,
        'flops_per_noised_image': flops,
        'contenders': rows,
        'ratios': compare(found),
    }
    print(
        f'{config.name}, {examples} images x {config.finetune.draws} draws, at once '
        f'{sizes.microbatch} x {sizes.draws}, {config.model.dtype}; {report["date"]}, {report["machine"]}, '
        f'jax {jax.__version__}\nmatmul {reference.rate / 1e9:.0f} GFLOP/s; '
        f'{flops / 1e9:.2f} GFLOP per noised image\n\n{training_text(rows, report["ratios"])}',
        flush=True,
    )
    save(report)  # already: the parts take long, and may fail
    if _PARTS.value:
        report['parts'] = benchmark_parts.measure(
            config,
            model,
            noised_per_second=rows[1]['noised_images_per_second'],
            repeats=_REPEATS.value,
            turn_seconds=_TURN_SECONDS.value,
            starts=_STARTS.value,
        )
        print('\n' + benchmark_parts.text(report['parts']))
        save(report)


def save(report: dict) -> None:
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    flags.mark_flag_as_required('config')
    app.run(main)
