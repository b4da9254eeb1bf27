"""Stage `pretrain`: train on what the queries released. Post-processing: it costs no privacy.

Phases, each of which may have no step: the central images, augmented; then images drawn from the answers of
other queries, as they are. Weights, average and Adam's state go on from one to the next. What a step sees
depends on its number and the keys alone: a run that was killed goes on with the same images.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.diffusion.class_gaussians import ClassGaussians
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy.budget import QUERIES
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.sizes import Sizes
from dpp_jax.training import checkpoint, devices, hosts, loop, steps
from dpp_jax.training import optimizer as optimizer_lib
from dpp_jax.training import state as state_lib

_ADVICE = (
    ' and give the same command, with the same --workdir: before fine-tuning begins, all settings of '
    'config.pretrain but enabled may change. Pre-training begins again from the same central images, and '
    'spends nothing'
)


class Phase(NamedTuple):
    """A part of pre-training.

    Attributes:
        steps: how many.
        step: (state, number of the step in the phase) → (state, metrics).
    """

    steps: int
    step: Callable


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    model: Model,
    augment: steps.Augmentation,
    sizes: Sizes,
    total_steps: int,
    drawings: Mapping[str, artefacts.Drawing] | None = None,
    gaussians: Callable[[], ClassGaussians | None] = lambda: None,
) -> None:
    """Train from scratch; save weights and averaged weights in release/.

    Args:
        config: the settings.
        workdir: to read from and write to.
        keys: of the run.
        model: is trained.
        augment: (key, image) → image, of the central images.
        sizes: what is in work at once.
        total_steps: of all phases.
        drawings: mechanism → how images are drawn from its answer.
        gaussians: gives what the model's denoiser is around.
    """
    settings = config.pretrain
    streams = {name: settings[f'{QUERIES[name]}_steps'] for name in drawings or {}}
    saved = hosts.from_first(lambda: artefacts.central_arrays(artefacts.central_images(workdir))[:2])
    images, labels = saved
    own_keys = keys.of_part('pretrain')
    known = gaussians()
    beside = {} if known is None else {'gaussians': devices.replicate(known)}
    optimizer = optimizer_lib.make(settings.learning_rate, schedule=settings.schedule, steps=total_steps)

    def phase(count: int, batch_size: int, augment: steps.Augmentation, batch_of: Callable) -> Phase:
        """Train on batches of `batch_size` rows, number → (images, labels, indices of the rows)."""
        capacity = math.ceil(batch_size / devices.count()) * devices.count()
        device_step = steps.make_pretrain_step(
            model.drawing(draws=settings.draws, label_dropout=settings.label_dropout),
            model.errors,
            optimizer,
            augment=augment,
            ema_decay=settings.ema_decay,
            images_at_once=sizes.images,
        )

        def step(state, number):
            batch = devices.deal(steps.make_batch(*batch_of(number), capacity))
            return device_step(state, batch | beside, own_keys.random)

        return Phase(count, step)

    central_batch = min(settings.batch_size, len(images))
    of_central = lambda number: (
        images,
        labels,
        epoch_stream(len(images), central_batch, number, own_keys.order),
    )
    phases = [phase(total_steps - sum(streams.values()), central_batch, augment, of_central)]
    for name, count in streams.items():
        if count:
            answer = hosts.from_first(functools.partial(drawings[name].load, workdir))
            draw = functools.partial(drawings[name].draw, answer)
            own_order = keys.of_part(f'pretrain/{QUERIES[name]}').order
            batches = stream(draw, model.classes, settings.batch_size, own_order)
            phases.append(phase(count, settings.batch_size, lambda _, image: image, batches))

    def step(state, number):
        for part in phases[:-1]:
            if number < part.steps:
                return part.step(state, number)
            number -= part.steps
        return phases[-1].step(state, number)

    start = state_lib.create(model.init(own_keys.random), optimizer)
    with loop.outputs(workdir.checkpoints('pretrain'), workdir.metrics('pretrain')) as outputs:
        final = loop.train(
            step,
            start,
            total_steps=total_steps,
            name='pretrain',
            **outputs,
            log_every_steps=config.loop.log_every_steps,
            checkpoint_every_seconds=config.loop.checkpoint_every_seconds,
            is_loss_public=True,  # what it trains on is released
            advice=_ADVICE,
        )
    hosts.at_first(lambda: _save(workdir, final.weights()))


def _save(workdir: WorkDir, trained) -> None:
    digests.note(workdir, 'model/pretrain', jax.tree.leaves(trained))
    checkpoint.save_model(workdir.model('pretrain'), trained, scratch=workdir.private)


def stream(draw: Callable, classes: int, batch_size: int, key: int) -> Callable:
    """Make number of a batch → (images, labels, indices of all rows): an endless sequence of new images.

    Every class comes equally often.

    Args:
        draw: (labels, key, number) → images.
        classes: their number.
        batch_size: images.
        key: 128 bits.
    """

    def batch(number: int):
        indices = np.arange(batch_size)
        labels = ((number * batch_size + indices) % classes).astype(np.int32)
        return draw(labels, key, number), labels, indices

    return batch


def epoch_stream(size: int, batch_size: int, batch: int, seed: int) -> np.ndarray:
    """Return the indices (batch_size,) of batch number `batch` in an endless sequence of shuffled passes."""
    first = batch * batch_size
    epochs = range(first // size, (first + batch_size - 1) // size + 1)
    passes = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch])).permutation(size)
        for epoch in epochs
    ]
    offset = first - epochs[0] * size
    return np.concatenate(passes)[offset : offset + batch_size]
