"""How many noised images pass through the network at once, and what follows from it.

What is best depends on caches and cores. A rule gives a good guess; before a training that takes long, its
neighbors are tried on random images (`settle`). Another choice changes rounding only, so a work directory
keeps the one that it began with.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import math
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp

from dpp_jax import files
from dpp_jax.diffusion import microbatch as parts_lib
from dpp_jax.diffusion import model as model_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy.clipping import Grid, clipped_gradient_sum
from dpp_jax.run import hours, step_time
from dpp_jax.training import devices, preemption
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
# What is tried, in units of what the rule says, and how much faster it must be to be taken.
_FACTORS = (0.25, 0.5, 1, 2)
_WORTH = 1.03
_TURNS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is in work at once on one device. Another choice changes rounding only.

    Attributes:
        images: noised images.
        microbatch: private images of fine-tuning, each with its own gradient.
        draws: noise draws of each of them; divides config.finetune.draws / devices_per_image.
        devices_per_image: that share the draws of a private image.
    """

    images: int
    microbatch: int
    draws: int
    devices_per_image: int = 1

    def check_devices(self) -> None:
        """Refuse teams that the devices of this process cannot form.

        Raises:
            ValueError: some devices would be left over.
        """
        if len(devices.local()) % self.devices_per_image:
            raise ValueError(
                f'config.finetune.devices_per_image is {self.devices_per_image}; it must divide the '
                f'{len(devices.local())} devices of each host'
            )


def choose(
    model: Model,
    *,
    draws: int,
    images_at_once: int | None = None,
    microbatch: int | None = None,
    devices_per_image: int | None = None,
    batch: step_time.Batch | None = None,
    images_per_row: int = 1,
) -> Sizes:
    """Choose the sizes: those that are set, and for others what suits the devices by a rule.

    Args:
        model: whose activations have to fit.
        draws: K, noise draws of a private image in fine-tuning.
        images_at_once: as set by the user; None: by the rule.
        microbatch: likewise.
        devices_per_image: likewise; a divisor of the draws.
        batch: of fine-tuning, by which the rule decides the last two; None: a large one.
        images_per_row: of a batch.
    """
    images = images_at_once or _by_rule(model)
    layout = step_time.Layout(
        devices=devices.count(),
        microbatch=microbatch or max(1, images // draws),
        devices_per_image=devices_per_image or 1,
        hosts=devices.count() // len(devices.local()),
    )
    if batch is not None:
        parameters = model_lib.size(model.shapes())
        step = step_time.Step(batch=batch, draws=draws, parameters=parameters, images_per_row=images_per_row)
        layout = step_time.choose(
            step,
            step_time.machine(
                jax.default_backend(),
                parameters=parameters,
                devices=devices.count(),
                devices_of_host=len(devices.local()),
                operations=hours.operations(model),
            ),
            layout,
            sizes=[devices_per_image] if devices_per_image else step_time.teams(draws, len(devices.local())),
            is_microbatch_set=microbatch is not None,
        )
    own = draws // layout.devices_per_image
    parts = parts_lib.count(own, max(1, images // layout.microbatch))
    return Sizes(
        images=images,
        microbatch=layout.microbatch,
        draws=own // parts,
        devices_per_image=layout.devices_per_image,
    )


def settle(path: Path, model: Model, noised_images: int, **trial: Any) -> int:
    """Choose how many noised images are in work at once, for good as far as this folder and device go.

    Args:
        path: file in private/ that remembers the choice.
        model: of the run.
        noised_images: of both trainings. A long training is worth a measurement, which the user's
            cache folder keeps for other runs of this network on this kind of device.
        **trial: keyword arguments of `measured`.
    """
    known = _read(path)
    if devices.kind() not in known:
        longest = _LONG.get(jax.default_backend(), _LONG_ON_ACCELERATORS)
        is_long = noised_images / devices.count() * hours.operations(model) > longest
        known[devices.kind()] = measured(model, **trial) if is_long else _by_rule(model)
        files.write_json(path, known)
    return known[devices.kind()]


def measured(
    model: Model,
    *,
    draws: int,
    microbatch: int | None,
    label_dropout: float,
    images_at_once: int | None = None,
) -> int:
    """Measure the fastest number of noised images for the sum of clipped gradients, near the rule's.

    If `images_at_once` is set, it is the only number that is tried.
    """
    path = devices.cache_folder() / 'images_at_once.json'
    described = repr((devices.kind(), model.network, model.image_shape, draws, microbatch))
    if model.directions is not None:
        described += f' around {model.directions}'
    if images_at_once:
        described += f' {images_at_once}'
    name = hashlib.sha256(described.encode()).hexdigest()
    known = _read(path)
    if name not in known or not hours.is_measured(model):
        print('Measuring which number of noised images at once is fastest on this device ...', flush=True)
        rule = _by_rule(model)
        numbers = [images_at_once] if images_at_once else {int(factor * rule) for factor in _FACTORS}
        tried = {}
        for images in numbers:
            sizes = choose(model, draws=draws, images_at_once=images, microbatch=microbatch)
            tried[images] = _trial(model, sizes, draws=draws, label_dropout=label_dropout)
        calls = {n: call for n, call in tried.items() if call}
        known[name] = fastest(calls, images_at_once or rule, lambda rate: hours.keep(model, rate))
        try:
            files.write_json(path, known)
        except OSError:
            pass  # measured again next time
    return known[name]


def fastest(
    calls: dict[int, Callable[[], int]], preferred: int, note: Callable[[float], None] = lambda rate: None
) -> int:
    """Return the number whose call, which returns how many images it did, is fastest; all take turns.

    `preferred` stays unless another is clearly faster: rates on a busy machine scatter. `note` is given the
    highest rate, per second.
    """
    rates = dict.fromkeys(calls, 0.0)
    for _ in range(_TURNS):
        for images, call in calls.items():
            preemption.check()
            start = time.perf_counter()
            done = call()
            rates[images] = max(rates[images], done / (time.perf_counter() - start))
    for images, rate in sorted(rates.items()):
        print(f'  {images:5d} at once: {rate:,.1f} noised images/s', flush=True)
    best = max(rates, key=rates.get, default=preferred)
    if rates:
        note(rates[best])
    is_better = rates.get(best, 0.0) > _WORTH * rates.get(preferred, 0.0)
    return best if is_better else preferred


def _trial(model: Model, sizes: Sizes, *, draws: int, label_dropout: float) -> Callable[[], int] | None:
    """Make a call of two microbatches of fine-tuning; None if they do not fit into memory."""
    loss = model.example_loss(draws=draws, label_dropout=label_dropout, draws_at_once=sizes.draws)
    n = 2 * sizes.microbatch  # on each device: they share caches and memory
    all_of_them = (len(devices.local()), n)
    params = FlatParams.of(model.init(jax.random.key(0)))  # as a step has them
    arguments = (
        devices.replicate((params, model.stand_in())),
        jax.random.uniform(jax.random.key(1), all_of_them + model.image_shape, minval=-1.0),
        jnp.zeros(all_of_them, jnp.int32),
        jax.random.split(jax.random.key(2), all_of_them),
    )

    def clipped_sum(given, *examples):
        params, gaussians = given
        return clipped_gradient_sum(
            lambda params, example: loss(params.tree(), *example, gaussians=gaussians),
            params,
            examples,
            jnp.ones(n, bool),
            grid=Grid(clip_norm=1.0, rows=n),
            microbatch=sizes.microbatch,
            microbatches=2,
        )

    program = devices.parallel(clipped_sum, in_axes=(0, 0, 0, 0))

    def call():
        jax.block_until_ready(program(*arguments))
        return all_of_them[0] * n * draws

    try:
        call()
    except jax.errors.JaxRuntimeError:  # too little memory has many names; nothing here is needed
        return None
    return call


def _by_rule(model: Model) -> int:
    """Return a power of two, from 4: what a CPU's caches hold, or a part of an accelerator's memory."""
    network, (height, width, _) = model.network, model.image_shape
    pixels = height * width / network.patch**2
    layer = network.width * network.multipliers[0] * pixels * jnp.dtype(network.dtype).itemsize
    if jax.default_backend() == 'cpu':
        fitting = max(1, devices.cores() / len(devices.local())) * _CACHE_BYTES_PER_CORE / layer
    else:
        limit = (devices.local()[0].memory_stats() or {}).get('bytes_limit', math.inf)
        fitting = min(_MOST_ON_ACCELERATORS, _SHARE_OF_MEMORY * limit / (_LAYERS * layer))
    return 2 ** max(2, int(fitting).bit_length() - 1)


def _read(path: Path) -> dict:
    """Read numbers by their names; nothing if there is no such file, or none that can be read."""
    try:
        found = files.read_json(path, '', {'*': int})
    except ValueError:
        return {}
    return {name: number for name, number in found.items() if name.startswith('_') or number >= 1}
