"""Stage `pretrain`: train on the central images. Post-processing: it costs no privacy."""

import math

import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from dpp_jax.diffusion.model import Model
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.sizes import Sizes
from dpp_jax.training import checkpoint, devices, hosts, loop, steps
from dpp_jax.training import state as state_lib

_ADVICE = (
    ' and give the same command, with the same --workdir: before fine-tuning begins, all settings of '
    'config.pretrain but enabled may change. Pre-training begins again from the same central images, and '
    'spends nothing'
)


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    model: Model,
    augment: steps.Augmentation,
    sizes: Sizes,
    total_steps: int,
) -> None:
    """Train from scratch; save weights and averaged weights in release/."""
    settings = config.pretrain
    saved = hosts.from_first(lambda: artefacts.central_arrays(artefacts.central_images(workdir))[:2])
    images, labels = saved
    own_keys = keys.of_part('pretrain')
    batch_size = min(settings.batch_size, len(images))
    capacity = math.ceil(batch_size / devices.count()) * devices.count()
    optimizer = optax.adam(settings.learning_rate)
    device_step = steps.make_pretrain_step(
        model.drawing(draws=settings.draws, label_dropout=settings.label_dropout),
        model.errors,
        optimizer,
        augment=augment,
        ema_decay=settings.ema_decay,
        images_at_once=sizes.images,
    )

    def step(state, number):
        indices = epoch_stream(len(images), batch_size, number, own_keys.order)
        batch = devices.deal(steps.make_batch(images, labels, indices, capacity))
        return device_step(state, batch, own_keys.random)

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
            is_loss_public=True,  # central images are released
            advice=_ADVICE,
        )
    hosts.at_first(lambda: _save(workdir, final.weights()))


def _save(workdir: WorkDir, trained) -> None:
    digests.note(workdir, 'model/pretrain', jax.tree.leaves(trained))
    checkpoint.save_model(workdir.model('pretrain'), trained, scratch=workdir.private)


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
