"""Speed of private training beside ordinary training and other ways to clip per-example gradients.

    python scripts/benchmark.py --config=configs/mnist_28.py:1 --json=benchmark.json

Everything runs in one process, in turns, on random images; the table gives medians of the turns after a
first one that is not counted, and ratios to the plain gradient. A "noised image" is one image with one
noise draw. Memory is what the compiler allots to the program, arguments and temporaries.
"""

from collections.abc import Callable
import dataclasses
import json
import os
from pathlib import Path
import platform
import statistics
import sys
import time
from typing import Any
from unittest import mock

from absl import app, flags
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

_CONFIG = config_flags.DEFINE_config_file('config', None, 'As for the program.')
_MICROBATCH = flags.DEFINE_integer('microbatch', None, 'As config.finetune.microbatch.')
_DRAWS = flags.DEFINE_integer('draws', None, 'Noise draws K; by default those of the config.')
_EXAMPLES = flags.DEFINE_integer('examples', 4, 'Images per step, at least 1.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Turns that count, at least 1.')
_JSON = flags.DEFINE_string('json', None, 'File for the figures.')
_SKIP = flags.DEFINE_list('skip', [], 'Names of contenders to leave out: naive, optax, jax_privacy.')


@dataclasses.dataclass
class Contender:
    """One way to train: a compiled program with its arguments."""

    title: str
    compile_seconds: float
    memory_bytes: int
    call: Callable[[], Any]
    seconds: list[float] = dataclasses.field(default_factory=list)


def compiled(title: str, function: Callable, *arguments) -> Contender:
    """Compile `function`, a jitted or mapped one that donates nothing."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Contender(title, seconds, needed, lambda: program(*arguments))


def library_convolution(x, kernel):
    """`flax.linen.Conv`'s: what a network has that was not written for this."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def contenders(config, model, sizes) -> list[Contender]:
    """All that this environment can run, compiled."""
    settings, count = config.finetune, _EXAMPLES.value
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
            donating('plain gradient', plain, state, rows, key),
            donating('DP step', private, state, rows, used, key),
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

        found.append(compiled('optax aggregate', jax.jit(with_optax), params, examples))
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
            found.append(compiled('jax_privacy clipped_grad', jax.jit(clipped), params, examples))
    if 'naive' not in _SKIP.value:
        with mock.patch.object(conv, 'conv3x3', library_convolution):
            gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
            found.append(compiled('naive vmap(grad), nn.Conv', gradients, params, examples))
    return found


def donating(title: str, step: Callable, state, *arguments) -> Contender:
    """Compile a step that takes over its state's memory; every call goes on from the last."""
    start = time.perf_counter()
    program = step.lower(state, *arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    current = jax.tree.map(jnp.array, state)

    def call():
        nonlocal current
        current, metrics = program(current, *arguments)
        return current, metrics

    return Contender(title, seconds, needed, call)


def matmul(dtype) -> Contender:
    """A large matrix product: the speed that nothing here can exceed."""
    x = jnp.ones((2048, 2048), dtype)
    return compiled(f'matmul {jnp.dtype(dtype).name}', jax.jit(lambda x: x @ x), x)


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


def measure(found: list[Contender], repeats: int) -> None:
    """Every contender once to warm up, then all in turns."""
    for turn in range(repeats + 1):
        for contender in found:
            start = time.perf_counter()
            jax.block_until_ready(contender.call())
            if turn:
                contender.seconds.append(time.perf_counter() - start)


def main(argv):
    del argv
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
    found = contenders(config, model, sizes)
    measure([reference, *found], _REPEATS.value)

    noised = _EXAMPLES.value * config.finetune.draws
    peak = 2 * 2048**3 / statistics.median(reference.seconds)
    flops = flops_per_noised_image(model)
    plain = statistics.median(found[0].seconds)
    device = f'{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}'
    print(
        f'{config.name}, {_EXAMPLES.value} images x {config.finetune.draws} draws, at once '
        f'{sizes.microbatch} x {sizes.draws}, {config.model.dtype}; {device}, jax {jax.__version__}\n'
        f'matmul {peak / 1e9:.0f} GFLOP/s; {flops / 1e9:.2f} GFLOP per noised image\n\n'
        f'{"":28}{"noised/s":>10}{"ratio":>8}{"GFLOP/s":>9}{"of matmul":>11}{"MiB":>8}{"compile s":>11}'
    )
    rows = []
    for contender in found:
        median = statistics.median(contender.seconds)
        rate = noised / median
        rows.append(
            {
                'name': contender.title,
                'noised_images_per_second': rate,
                'ratio_to_plain': plain / median,
                'flops_per_second': rate * flops,
                'share_of_matmul': rate * flops / peak,
                'memory_bytes': contender.memory_bytes,
                'compile_seconds': contender.compile_seconds,
                'seconds': contender.seconds,
            }
        )
        print(
            f'{contender.title:28}{rate:10.2f}{plain / median:8.2f}{rate * flops / 1e9:9.1f}'
            f'{rate * flops / peak:10.0%} {contender.memory_bytes / 2**20:8.0f}'
            f'{contender.compile_seconds:11.1f}'
        )
    if _JSON.value:
        report = {
            'config': config.name,
            'device': device,
            'jax': jax.__version__,
            'draws': config.finetune.draws,
            'at_once': dataclasses.asdict(sizes),
            'matmul_flops_per_second': peak,
            'flops_per_noised_image': flops,
            'contenders': rows,
        }
        Path(_JSON.value).write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    flags.mark_flag_as_required('config')
    app.run(main)
