"""Stage `finetune`: DP-SGD on the private images, from the pre-trained weights."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict
import optax

from dpp_jax.data.images import Images
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import DP_SGD, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.sizes import Sizes
from dpp_jax.training import checkpoint, devices, loop, steps, tensorboard
from dpp_jax.training import state as state_lib

_ADVICE = (
    ' and use another --workdir. What this run spent on the private images adds up with the ε of the next '
    'one: --stage=compose --with=OLD,NEW states both together, and --config.dp.already_spent=OLD puts both '
    'into one budget (OLD and NEW: the two work directories)'
)


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger,
    private: Images,
    before_release: Callable[[], object],
    *,
    releases: Releases,
    unit: Unit,
    model: Model,
    sizes: Sizes,
) -> None:
    """Take the budget's steps; save weights and averaged weights in release/.

    Args:
        config: the settings.
        workdir: to write to.
        keys: of the run.
        ledger: gets every step before its result is used.
        private: the private images.
        before_release: called when the ledger holds all steps and nothing of them is in release/.
        releases: the budget's steps.
        unit: of privacy.
        model: to train.
        sizes: what is in work at once.
    """
    settings, mechanism = config.finetune, releases.mechanism
    own_keys = keys.of_mechanism(DP_SGD, ledger)
    members = keys.members(private.groups, unit.images_per_group)
    sample = poisson.PoissonSampler(
        size=len(private.images if members is None else members),
        probability=mechanism.sampling_probability,
        key=own_keys.sampling,
        public_size=unit.size,
    )
    capacity = sample.capacity(sizes.microbatch * devices.count() // sizes.devices_per_image)
    optimizer = optax.adam(settings.learning_rate)
    dp_step = steps.make_dp_step(
        model.example_loss(
            draws=settings.draws,
            label_dropout=settings.label_dropout,
            draws_at_once=sizes.draws,
            shares=sizes.devices_per_image,
        ),
        optimizer,
        mechanism,
        own_keys.noise,
        expected_batch_size=mechanism.sampling_probability * unit.used_images,
        rows=capacity,
        microbatch=sizes.microbatch,
        ema_decay=settings.ema_decay,
        devices_per_image=sizes.devices_per_image,
    )

    def step(state, number):
        indices = sample.indices(number)
        rows = steps.make_batch(private.images, private.labels, indices, capacity, members)
        batch = devices.deal_to_teams(rows, sizes.devices_per_image)
        used = steps.used_microbatches(len(indices), sizes.microbatch, sizes.devices_per_image)
        result, entry = dp_step(number, state, batch, used)
        ledger.append(entry)  # the device computes on meanwhile
        return result

    with (
        checkpoint.TrainingStore(workdir.checkpoints('finetune')) as store,
        tensorboard.writer(workdir.metrics('finetune')) as write,
    ):
        final = loop.train(
            step,
            state_lib.create(_initial_params(config, workdir, keys, model), optimizer),
            total_steps=releases.count,
            store=store,
            name='finetune',
            write=write,
            log_every_steps=config.loop.log_every_steps,
            checkpoint_every_seconds=config.loop.checkpoint_every_seconds,
            advice=_ADVICE,
        )
    released = final.weights()
    keys.bind_release(DP_SGD, jax.tree.leaves(released))
    before_release()
    digests.note(workdir, 'model/finetune', jax.tree.leaves(released))
    checkpoint.save_model(workdir.model('finetune'), released, scratch=workdir.private)


def _initial_params(config: ConfigDict, workdir: WorkDir, keys: Keys, model: Model):
    """Return the pre-trained weights (not their average, as the paper), or fresh ones."""
    if not config.pretrain.enabled:
        return model.init(keys.of_part('init').random)
    return artefacts.weights(workdir, 'pretrain', model.shapes())['params']
