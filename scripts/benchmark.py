"""Speed of private training beside ordinary training and other ways to clip per-example gradients.

    python scripts/benchmark.py --config=configs/mnist_28.py:1 --json=benchmark.json

Everything runs in one process, in turns, on random images; the table gives medians of the turns after a
first one that is not counted, and ratios to the plain gradient. A "noised image" is one image with one
noise draw. Memory is what the compiler allots to the program, arguments and temporaries; PyTorch compiles
nothing and does not say what it takes. `--parts` adds a table of everything that is not the training step
(benchmark_parts.py).
"""

import dataclasses
import json
import os
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

from dpp_jax import pipeline
from dpp_jax.data import augment
from dpp_jax.diffusion import conv
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.stages import sizes as sizes_lib
from dpp_jax.training import devices, state as state_lib, steps
import benchmark_parts
import timing

_CONFIG = config_flags.DEFINE_config_file('config', None, 'As for the program.')
_MICROBATCH = flags.DEFINE_integer('microbatch', None, 'As config.finetune.microbatch.')
_DRAWS = flags.DEFINE_integer('draws', None, 'Noise draws K; by default those of the config.')
_EXAMPLES = flags.DEFINE_integer('examples', 4, 'Images per step; rounded up to whole microbatches.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Turns that count, at least 1.')
_JSON = flags.DEFINE_string('json', None, 'File for the figures.')
_SKIP = flags.DEFINE_list('skip', [], 'Contenders to leave out: naive, optax, jax_privacy, pytorch.')

_PARTS = flags.DEFINE_bool('parts', False, 'Also measure everything that is not the training step.')
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
    labels = (np.arange(count) % model.classes).astype(np.int32)
    optimizer = optax.adam(settings.learning_rate)
    params = model.init(jax.random.key(0))
    key = jax.random.key(1)
    in_parts = model.example_loss(
        draws=settings.draws, label_dropout=settings.label_dropout, draws_at_once=sizes.draws
    )
    with devices.limited_to(1):
        state = devices.replicate(state_lib.create(params, optimizer))
        batch = lambda multiple: devices.deal(
            steps.make_batch(images, labels, np.arange(count), multiple)
        )
        plain = steps.make_pretrain_step(
            in_parts,
            optimizer,
            augment=augment.make_augmentation('none'),
            ema_decay=settings.ema_decay,
            rows_at_once=sizes.microbatch,
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
        rows = batch(sizes.microbatch)
        found = [
            timing.donating(PLAIN, plain, state, rows, key),
            timing.donating(PRIVATE, private, state, rows, used, key),
        ]
    examples = {
        'image': images.astype(np.float32) / 127.5 - 1,
        'label': labels,
        'key': jax.random.split(key, count),
    }
    whole = model.example_loss(draws=settings.draws, label_dropout=settings.label_dropout)
    loss = lambda params, one: whole(params, one['image'], one['label'], one['key'])
    if 'optax' not in _SKIP.value:
        aggregate = optax.contrib.differentially_private_aggregate(settings.clip_norm, 1.0, 0)

        def with_optax(params, examples):
            gradients = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
            return aggregate.update(gradients, aggregate.init(params))[0]

        found.append(timing.compiled('optax aggregate', jax.jit(with_optax), params, examples))
    if 'jax_privacy' not in _SKIP.value:
        try:
            import jax_privacy
        except ImportError:
            pass
        else:
            clipped = jax_privacy.clipped_grad(
                loss, l2_clip_norm=settings.clip_norm, batch_argnums=1, microbatch_size=1,
                keep_batch_dim=False,
            )  # fmt: skip
            found.append(timing.compiled('jax_privacy clipped_grad', jax.jit(clipped), params, examples))
    if 'naive' not in _SKIP.value:
        with mock.patch.object(conv, 'conv3x3', library_convolution):
            gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
            found.append(timing.compiled('naive vmap(grad), nn.Conv', gradients, params, examples))
    if 'pytorch' not in _SKIP.value:
        found += pytorch_contenders(settings, model, params, images, labels)
    return found


def pytorch_contenders(settings, model, params, images, labels) -> list[timing.Contender]:
    """The same network in PyTorch, ordinary and with Opacus, where they are installed.

    On a CPU only: the twin runs in float32, which on other devices nobody would compare with.
    """
    if jax.default_backend() != 'cpu':
        return []
    try:
        import pytorch_baseline as baseline
        import torch
    except ImportError:
        return []
    torch.set_num_threads(os.cpu_count())  # as many as XLA takes
    pixels = torch.tensor(np.moveaxis(images, -1, 1)).float() / 127.5 - 1
    classes = torch.tensor(labels).long()

    def network():
        twin = baseline.make_network(model)
        baseline.load(twin, params)
        return twin

    draw = lambda: baseline.draw(
        pixels, classes, settings.draws, settings.label_dropout, model.classes
    )
    ordinary = network()
    private = baseline.PrivateStep(
        network(),
        clip_norm=settings.clip_norm,
        noise_multiplier=1.0,
        expected_batch_size=len(images),
        learning_rate=settings.learning_rate,
    )
    return [
        timing.Contender(
            PYTORCH, lambda: baseline.plain_gradient(ordinary, draw(), rows_at_once=_PYTORCH_ROWS)
        ),
        timing.Contender(OPACUS, lambda: private.step(draw(), settings.draws, images_at_once=1)),
    ]


def matmul(dtype) -> timing.Contender:
    """A large matrix product: the speed that nothing here can exceed."""
    x = jnp.ones((2048, 2048), dtype)
    return timing.compiled(f'matmul {jnp.dtype(dtype).name}', jax.jit(lambda x: x @ x), x)


def flops_per_noised_image(model) -> float:
    """Of the plain gradient, by XLA's count for the convolutions as they are defined."""
    params = model.shapes()

    def loss(params, image):
        return model.loss(
            model.denoiser(params), image, 0, jax.random.key(0),
            draws=1, label_dropout=0.1, no_class=model.classes,
        )  # fmt: skip

    with mock.patch.object(conv, 'conv3x3', library_convolution):
        image = jax.ShapeDtypeStruct(model.image_shape, jnp.float32)
        return jax.jit(jax.grad(loss)).lower(params, image).cost_analysis()['flops']


def training_rows(found, noised: int, flops: float, peak: float) -> list[dict]:
    """The figures of every contender; the first is the plain gradient."""
    rows = []
    for contender in found:
        rate = noised / contender.median
        rows.append(
            {
                'name': contender.title,
                'noised_images_per_second': rate,
                'ratio_to_plain': found[0].median / contender.median,
                'flops_per_second': rate * flops,
                'share_of_matmul': rate * flops / peak,
                'memory_bytes': contender.memory_bytes,
                'compile_seconds': contender.compile_seconds,
                'seconds': contender.seconds,
            }
        )
    return rows


def training_text(rows: list[dict]) -> str:
    """The figures as a table, and what the private step is measured by."""
    lines = [
        f'{"":28}{"noised/s":>10}{"ratio":>8}{"GFLOP/s":>9}{"of matmul":>11}{"MiB":>8}{"compile s":>11}'
    ]
    for row in rows:
        memory, compilation = row['memory_bytes'], row['compile_seconds']
        memory = '-' if memory is None else f'{memory / 2**20:.0f}'
        compilation = '-' if compilation is None else f'{compilation:.1f}'
        lines.append(
            f'{row["name"]:28}{row["noised_images_per_second"]:10.2f}{row["ratio_to_plain"]:8.2f}'
            f'{row["flops_per_second"] / 1e9:9.1f}{row["share_of_matmul"]:10.0%} {memory:>8}'
            f'{compilation:>11}'
        )
    lines += [''] + [f'{name:39}{ratio:7.2f}' for name, ratio in ratios(rows).items()]
    return '\n'.join(lines)


def ratios(rows: list[dict]) -> dict[str, float]:
    """How many times as fast the DP step is as what it is to be compared with."""
    rates = {row['name']: row['noised_images_per_second'] for row in rows}
    others = (name for name in (PLAIN, PYTORCH, OPACUS) if name in rates)
    return {f'{PRIVATE} / {name}': rates[PRIVATE] / rates[name] for name in others}


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax is talkative
    config = _CONFIG.value
    if _DRAWS.value:
        config.finetune.draws = _DRAWS.value
    if _MICROBATCH.value:
        config.finetune.microbatch = _MICROBATCH.value
    for flag in (_EXAMPLES, _REPEATS):
        if flag.value < 1:
            raise app.UsageError(f'--{flag.name} is {flag.value}; it must be at least 1')
    model = pipeline.make_model(config)
    sizes = sizes_lib.choose(config)
    reference = matmul(config.model.dtype)
    # Padding takes time and is not counted: as in a real batch, there is hardly any.
    examples = -(-_EXAMPLES.value // sizes.microbatch) * sizes.microbatch
    found = contenders(config, model, sizes, examples)
    timing.measure([reference, *found], _REPEATS.value)

    peak = 2 * 2048**3 / reference.median
    flops = flops_per_noised_image(model)
    rows = training_rows(found, examples * config.finetune.draws, flops, peak)
    device = f'{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}'
    print(
        f'{config.name}, {examples} images x {config.finetune.draws} draws, at once '
        f'{sizes.microbatch} x {sizes.draws}, {config.model.dtype}; {device}, jax {jax.__version__}\n'
        f'matmul {peak / 1e9:.0f} GFLOP/s; {flops / 1e9:.2f} GFLOP per noised image\n\n'
        f'{training_text(rows)}',
        flush=True,
    )
    report = {
        'config': config.name,
        'device': device,
        'jax': jax.__version__,
        'images': examples,
        'draws': config.finetune.draws,
        'at_once': dataclasses.asdict(sizes),
        'matmul_flops_per_second': peak,
        'flops_per_noised_image': flops,
        'contenders': rows,
        'ratios': ratios(rows),
    }
    if _PARTS.value:
        report['parts'] = benchmark_parts.measure(
            config,
            model,
            noised_per_second=rows[1]['noised_images_per_second'],
            repeats=_REPEATS.value,
            starts=_STARTS.value,
        )
        print('\n' + benchmark_parts.text(report['parts']))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    flags.mark_flag_as_required('config')
    app.run(main)
