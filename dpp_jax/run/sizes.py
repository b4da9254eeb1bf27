"""How many noised images pass through the network at once, and what follows from it.

What is best depends on caches and cores. A rule gives a good guess; before a training that takes long, its
neighbours are tried on random images (`settle`). Another choice changes rounding only, so a work directory
keeps the one that it began with.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import math
from pathlib import Path
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.diffusion import microbatch as parts_lib
from dpp_jax.diffusion import model as model_lib
from dpp_jax.privacy.mechanism import clipped_gradient_sum
from dpp_jax.run import folder as workdir_lib
from dpp_jax.training import devices
from dpp_jax.training.state import FlatParams

# Activations of one layer at full size that stay in a CPU core's cache between two layers: with more, the
# gradient of the 28x28 network was up to 1.8 times slower; with less, hardly faster.
_CACHE_BYTES_PER_CORE = 0.85e6
# What a gradient keeps of an image, in units of one layer at full size: 24 MiB of 28 x 28 x 64 float32.
_LAYERS = 125
_MOST_ON_ACCELERATORS = 512
_SHARE_OF_MEMORY = 0.4
# A training of more operations per device than these (about half an hour) is worth minutes of trying.
_LONG = {'cpu': 1.5e14}
_LONG_ON_ACCELERATORS = 5e16
_OPERATIONS = 3.0  # per parameter and pixel, gradient included: 3.46e9 for the 28x28 network
# What is tried, in units of what the rule says, and how much faster it must be to be taken.
_FACTORS = (0.25, 0.5, 1, 2)
_WORTH = 1.03
_TURNS = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is in work at once on one device. Another choice changes rounding only.

    Attributes:
        images: noised images.
        microbatch: private images of fine-tuning, each with its own gradient.
        draws: noise draws of each of them; divides config.finetune.draws.
    """

    images: int
    microbatch: int
    draws: int


def choose(config: ConfigDict) -> Sizes:
    """The sizes that the config sets, and for others what suits the device by a rule."""
    images = config.loop.images_at_once or _by_rule(config)
    draws = config.finetune.draws
    microbatch = config.finetune.microbatch or max(1, images // draws)
    return Sizes(images, microbatch, draws // parts_lib.count(draws, max(1, images // microbatch)))


def settle(
    config: ConfigDict,
    model: model_lib.Model,
    workdir: workdir_lib.WorkDir,
    noised_images: int,
) -> ConfigDict:
    """`config` with its `loop.images_at_once` set, for good as far as this folder and device go.

    Args:
        config: as the user gave it. What it sets is kept.
        model: the config's.
        workdir: remembers the choice in private/.
        noised_images: of both trainings. A long training is worth a measurement, which the user's
            cache folder keeps for other runs of this network on this kind of device.
    """
    if config.loop.images_at_once:
        return config
    path = workdir.private / 'images_at_once.json'
    known = _read(path)
    if devices.kind() not in known:
        operations = _OPERATIONS * model_lib.size(model.shapes()) * np.prod(model.image_shape[:2])
        longest = _LONG.get(jax.default_backend(), _LONG_ON_ACCELERATORS)
        is_long = noised_images / devices.count() * operations > longest
        known[devices.kind()] = measured(config, model) if is_long else _by_rule(config)
        workdir_lib.write_json(path, known)
    return _with_images(config, known[devices.kind()])


def measured(config: ConfigDict, model: model_lib.Model) -> int:
    """The fastest number of noised images at once for the sum of clipped gradients, near the rule's."""
    path = devices.cache_folder() / 'images_at_once.json'
    name = hashlib.sha256(
        repr((devices.kind(), model.network, model.image_shape, config.model.denoiser,
              config.finetune.draws, config.finetune.microbatch)).encode()
    ).hexdigest()  # fmt: skip
    known = _read(path)
    if name not in known:
        print('Trying how many noised images at once are fastest on this device ...', flush=True)
        rule = _by_rule(config)
        tried = {images: _trial(config, model, images) for images in {int(f * rule) for f in _FACTORS}}
        known[name] = fastest({n: call for n, call in tried.items() if call}, rule)
        try:
            workdir_lib.write_json(path, known)
        except OSError:
            pass  # measured again next time
    return known[name]


def fastest(calls: dict[int, Callable[[], int]], preferred: int) -> int:
    """The number whose call, which returns how many images it did, is fastest; all take turns.

    `preferred` stays unless another is clearly faster: rates on a busy machine scatter.
    """
    rates = dict.fromkeys(calls, 0.0)
    for _ in range(_TURNS):
        for images, call in calls.items():
            start = time.perf_counter()
            done = call()
            rates[images] = max(rates[images], done / (time.perf_counter() - start))
    for images, rate in sorted(rates.items()):
        print(f'  {images:5d} at once: {rate:,.1f} noised images/s', flush=True)
    best = max(rates, key=rates.get, default=preferred)
    is_better = rates.get(best, 0.0) > _WORTH * rates.get(preferred, 0.0)
    return best if is_better else preferred


def _trial(config: ConfigDict, model: model_lib.Model, images: int) -> Callable[[], int] | None:
    """Two microbatches of fine-tuning with so many noised images at once; None if memory is too small."""
    at_once = choose(_with_images(config, images))
    settings = config.finetune
    loss = model.example_loss(
        draws=settings.draws, label_dropout=settings.label_dropout, draws_at_once=at_once.draws
    )
    n = 2 * at_once.microbatch  # on each device: they share caches and memory
    all_of_them = (len(devices.local()), n)
    arguments = (
        devices.replicate(FlatParams.of(model.init(jax.random.key(0)))),  # as a step has them
        jax.random.uniform(jax.random.key(1), all_of_them + model.image_shape, minval=-1.0),
        jnp.zeros(all_of_them, jnp.int32),
        jax.random.split(jax.random.key(2), all_of_them),
    )

    def clipped_sum(params, *examples):
        return clipped_gradient_sum(
            lambda params, example: loss(params.tree(), *example),
            params, examples, jnp.ones(n, bool),
            clip_norm=settings.clip_norm, microbatch=at_once.microbatch, microbatches=2,
        )  # fmt: skip

    program = devices.parallel(clipped_sum, in_axes=(0, 0, 0, 0))

    def call():
        jax.block_until_ready(program(*arguments))
        return all_of_them[0] * n * settings.draws

    try:
        call()
    except jax.errors.JaxRuntimeError:  # too little memory has many names; nothing here is needed
        return None
    return call


def _with_images(config: ConfigDict, images: int) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.loop.images_at_once = images
    return changed


def _by_rule(config: ConfigDict) -> int:
    """A power of two, from 4: what a CPU's caches hold, or a part of an accelerator's memory."""
    layer = config.model.width * config.model.multipliers[0] * config.data.image_size**2
    layer *= jnp.dtype(config.model.dtype).itemsize
    if jax.default_backend() == 'cpu':
        fitting = max(1, devices.cores() / len(devices.local())) * _CACHE_BYTES_PER_CORE / layer
    else:
        limit = (devices.local()[0].memory_stats() or {}).get('bytes_limit', math.inf)
        fitting = min(_MOST_ON_ACCELERATORS, _SHARE_OF_MEMORY * limit / (_LAYERS * layer))
    return 2 ** max(2, int(fitting).bit_length() - 1)


def _read(path: Path) -> dict:
    """A JSON file's content; nothing if there is none, or none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
