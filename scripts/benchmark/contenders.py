"""The programs of the benchmark's first table: private training and what it is compared with."""

from collections.abc import Sequence
import multiprocessing
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpp_jax import build
from dpp_jax.data import augment
from dpp_jax.diffusion import winograd
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import DP_SGD
from dpp_jax.privacy.mechanism import NOISE_KEYS, GaussianMechanism, NoiseKey
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib
from scripts.benchmark import timing

# Rows of the batch that PyTorch's plain gradient takes at once: the best of 4, 8, 16, 32, 64 on two cores.
_PYTORCH_ROWS = 32
PLAIN, PRIVATE = 'plain gradient', 'DP step'
PYTORCH, OPACUS = 'PyTorch plain gradient', 'PyTorch + Opacus'


def library_convolution(x, kernel):
    """`flax.linen.Conv`'s: what a network has that was not written for this."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def make(config, model, sizes, count: int, skip: Sequence[str]) -> list[timing.Contender]:
    """Return all that this environment can run on `count` images, compiled, but for those to `skip`."""
    settings = config.finetune
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count,) + model.image_shape, dtype=np.uint8)
    noised = count * settings.draws
    labels = (np.arange(count) % model.classes).astype(np.int32)
    optimizer = optax.adam(settings.learning_rate)
    params = model.init(jax.random.key(0))
    key = jax.random.key(1)
    keys = jax.random.split(key, NOISE_KEYS)
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
        GaussianMechanism(
            name=DP_SGD, noise_multiplier=1.0, sampling_probability=0.1, sensitivity=settings.clip_norm
        ),
        NoiseKey(identifier='benchmark', keys=keys),
        expected_batch_size=float(count),
        rows=capacity(config, sizes),
        microbatch=sizes.microbatch,
        ema_decay=settings.ema_decay,
    )
    used = steps.used_microbatches(count, sizes.microbatch)
    padded = batch(capacity(config, sizes))
    found = [
        timing.donating(PLAIN, plain, state, batch(count), key),
        timing.donating(PRIVATE, private.program, state, padded, used, keys, np.int32(0)),
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
    if 'optax' not in skip:
        aggregate = optax.contrib.differentially_private_aggregate(settings.clip_norm, 1.0, 0)

        def with_optax(params, examples):
            gradients = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
            return aggregate.update(gradients, aggregate.init(params))[0]

        found.append(timing.compiled('optax aggregate', jax.jit(with_optax), params, few))
        found[-1].amount = few_noised
    if 'jax_privacy' not in skip:
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
    if 'naive' not in skip:
        with mock.patch.object(winograd, 'conv3x3', library_convolution):
            gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
            found.append(timing.compiled('naive vmap(grad), nn.Conv', gradients, params, few))
            found[-1].amount = few_noised
    if 'pytorch' not in skip:
        found += pytorch_contenders(settings, model, params, images, labels)
    return found


def capacity(config, sizes) -> int:
    """Rows of a padded batch of the config, as the stage would have them."""
    data, batch_size = config.data, config.finetune.batch_size
    sampler = poisson.PoissonSampler(
        size=data.train_images, probability=batch_size / data.train_images, key=0
    )
    return sampler.capacity(sizes.microbatch * devices.count())


def pytorch_contenders(settings, model, params, images, labels) -> list[timing.Contender]:
    """The same network in PyTorch, ordinary and with Opacus, where they are installed.

    On a CPU only: the twin runs there, in float32.
    """
    if jax.default_backend() != 'cpu':
        return []
    try:
        import torch

        from scripts.compare import pytorch_port, pytorch_private
    except ImportError:
        return []
    torch.set_num_threads(devices.cores())  # as many as XLA takes
    pixels = torch.tensor(np.moveaxis(images, -1, 1)).float() / 127.5 - 1
    classes = torch.tensor(labels).long()

    draw = lambda: pytorch_port.draw(pixels, classes, settings.draws, settings.label_dropout, model.classes)
    ordinary = pytorch_port.make_network(model, params)
    private = pytorch_private.HooksOfRows(
        pytorch_port.make_network(model, params),
        draws=settings.draws,
        clip_norm=settings.clip_norm,
        noise_multiplier=1.0,
        expected_batch_size=len(images),
        learning_rate=settings.learning_rate,
    )
    calls = {
        PYTORCH: lambda: pytorch_port.plain_gradient(ordinary, draw(), rows_at_once=_PYTORCH_ROWS),
        OPACUS: lambda: private.step(draw(), images_at_once=1),
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
    model = build.model(config)
    images = np.zeros((4,) + model.image_shape, np.uint8)
    labels = (np.arange(4) % model.classes).astype(np.int32)
    params = model.init(jax.random.key(0))
    found = pytorch_contenders(config.finetune, model, params, images, labels)
    call = next(contender.call for contender in found if contender.title == title)
    Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')  # forget the most there has been
    before = _resident_bytes('VmRSS')
    call()
    return _resident_bytes('VmHWM') - before


def _resident_bytes(kind: str) -> int:
    """Of this process: VmRSS is now, VmHWM the most there has been (Linux)."""
    lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
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
