"""Stage `finetune`: DP-SGD on the private images, from the pre-trained weights."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from dpp_jax.data.images import Images
from dpp_jax.diffusion.class_gaussians import ClassGaussians
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import DP_SGD, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run import artefacts, digests
from dpp_jax.run import batches as batches_lib
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.sizes import Sizes
from dpp_jax.training import checkpoint, devices, hosts, loop, steps
from dpp_jax.training import optimizer as optimizer_lib
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
    ledger: Ledger | None,
    private: Images,
    before_release: Callable[[], object],
    *,
    releases: Releases,
    unit: Unit,
    model: Model,
    sizes: Sizes,
    share: Share = WHOLE,
    gaussians: Callable[[], ClassGaussians | None] = lambda: None,
) -> None:
    """Take the budget's steps; save weights and averaged weights in release/.

    Args:
        config: the settings.
        workdir: to write to.
        keys: of the run.
        ledger: gets every step before its result is used; None but in process 0.
        private: the private images, of this process's share.
        before_release: called when the ledger holds all steps and nothing of them is in release/.
        releases: the budget's steps.
        unit: of privacy.
        model: to train.
        sizes: what is in work at once.
        share: the units of this process.
        gaussians: gives what the model's denoiser is around.
    """
    settings, mechanism = config.finetune, releases.mechanism
    own_keys = keys.of_mechanism(DP_SGD, ledger)
    batches = batches_lib.of_mechanism(private, unit, share, keys, own_keys, mechanism.sampling_probability)
    sampler, team = batches.sampler, sizes.devices_per_image
    capacity = sampler.capacity(sizes.microbatch * len(devices.local()) // team, share.count)
    # The unit of sums and the bound follow from it: the same for any devices, but in runs that an earlier
    # version began, whose steps may be taken again.
    is_new = sampler.drawing == poisson.COUNT
    rows = sampler.capacity(1 if is_new else sizes.microbatch * devices.count())
    expected_batch_size = mechanism.sampling_probability * unit.used_images
    noise = mechanism.noise_multiplier * mechanism.sensitivity / expected_batch_size
    optimizer = optimizer_lib.make(
        settings.learning_rate,
        schedule=settings.schedule,
        steps=releases.count,
        noise=noise if settings.noise_correction else 0.0,
    )
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
        expected_batch_size=expected_batch_size,
        rows=rows,
        capacity=share.count * capacity,
        microbatch=sizes.microbatch,
        ema_decay=settings.ema_decay,
        devices_per_image=sizes.devices_per_image,
    )

    known = gaussians()
    beside = {} if known is None else {'gaussians': devices.replicate(known)}
    snapshot_steps = _snapshot_steps(releases.count, settings.snapshots)

    def keep(state, number):
        """Keep the averaged weights after `number` steps, if they are asked for: no step reads them."""
        if number in snapshot_steps and hosts.is_first():
            artefacts.write_snapshot(workdir, number, devices.first(state.ema_params).vector)

    def step(state, number):
        if not number:
            keep(state, 0)
        indices = sampler.indices(number)
        batch = steps.make_batch(
            private.images,
            private.labels,
            indices,
            capacity,
            batches.members,
            share=share,
            rows=rows,
            own=batches.own,
        )
        used = steps.used_microbatches(share.largest(indices), sizes.microbatch, team)
        result, entry = dp_step(number, state, devices.deal_own(batch, team) | beside, used)
        # The devices compute on meanwhile. No process goes on before the line is on the disk.
        hosts.at_first(lambda: ledger.append(entry))
        keep(result[0], number + 1)
        return result

    with loop.outputs(workdir.checkpoints('finetune'), workdir.metrics('finetune')) as outputs:
        final = loop.train(
            step,
            state_lib.create(_initial_params(config, workdir, keys, model), optimizer),
            total_steps=releases.count,
            name='finetune',
            **outputs,
            log_every_steps=config.loop.log_every_steps,
            checkpoint_every_seconds=config.loop.checkpoint_every_seconds,
            advice=_ADVICE,
        )

    def release():
        released = final.weights()
        keys.bind_release(DP_SGD, jax.tree.leaves(released))
        before_release()
        digests.note(workdir, 'model/finetune', jax.tree.leaves(released))
        checkpoint.save_model(workdir.model('finetune'), released, scratch=workdir.private)

    hosts.at_first(release)


def _snapshot_steps(total: int, count: int) -> set[int]:
    """Return after which steps of `total` averaged weights are kept: 0, and 1/3, 1/9, ... of all."""
    return {0, *(total // 3**k for k in range(1, count))} if count else set()


def _initial_params(config: ConfigDict, workdir: WorkDir, keys: Keys, model: Model):
    """Return the pre-trained or imported weights (not their average, as the paper), or fresh ones."""
    if not config.pretrain.enabled and not config.imported.path:
        return model.init(keys.of_part('init').random)
    return hosts.from_first(lambda: artefacts.weights(workdir, 'pretrain', model.shapes())['params'])
