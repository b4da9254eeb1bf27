"""Stage `finetune`: DP-SGD on the private images, from the pre-trained weights."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.privacy import poisson
from dpp_jax.run import folder as workdir_lib
from dpp_jax.run import sizes
from dpp_jax.stages.plan import Plan, finetune_mechanism
from dpp_jax.training import checkpoint, devices, loop, steps, tensorboard
from dpp_jax.training import state as state_lib


def is_done(workdir: workdir_lib.WorkDir) -> bool:
    return (workdir.release / 'model' / 'finetune').exists()


def run(
    config: ConfigDict,
    workdir: workdir_lib.WorkDir,
    ledger: ledger_lib.Ledger,
    plan: Plan,
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    before_release: Callable[[], None] = lambda: None,
) -> None:
    """Take the plan's steps; save weights and averaged weights in release/.

    `before_release` is called when the ledger holds all steps and nothing of them is in release/.
    """
    settings = config.finetune
    at_once = sizes.choose(config)
    keys = workdir.secret_keys(ledger, 'dp_sgd', config.seed)
    mechanism = finetune_mechanism(plan, config, keys.identifier)
    sampler = poisson.PoissonSampler(len(images), plan.sampling_probability, keys.sampling)
    capacity = sampler.capacity(at_once.microbatch * devices.count())
    optimizer = optax.adam(settings.learning_rate)
    release = mechanism.recorded(
        steps.make_dp_step(
            model.example_loss(
                draws=settings.draws,
                label_dropout=settings.label_dropout,
                draws_at_once=at_once.draws,
            ),
            optimizer,
            mechanism,
            expected_batch_size=sampler.expected_size,
            microbatch=at_once.microbatch,
            ema_decay=settings.ema_decay,
        )
    )

    def step(state, number):
        indices = sampler.indices(number)
        batch = devices.deal(steps.make_batch(images, labels, indices, capacity))
        used = steps.used_microbatches(len(indices), at_once.microbatch)
        result, entry = release(number, state, batch, used, keys.noise)
        ledger.append(entry)  # the device computes on meanwhile
        return result

    with (
        checkpoint.TrainingStore(workdir.private / 'resume' / 'finetune') as store,
        tensorboard.writer(workdir.private / 'metrics' / 'finetune') as write,
    ):
        final = loop.train(
            step,
            state_lib.create(_initial_params(config, workdir, model), optimizer),
            total_steps=plan.steps,
            store=store,
            name='finetune',
            write=write,
            log_every_steps=config.loop.log_every_steps,
            checkpoint_every_seconds=config.loop.checkpoint_every_seconds,
        )
    released = final.weights()
    workdir.bind_release('dp_sgd', jax.tree.leaves(released))
    before_release()
    checkpoint.save_model(workdir.release / 'model' / 'finetune', released)


def _initial_params(config: ConfigDict, workdir: workdir_lib.WorkDir, model: Model):
    """The pre-trained weights (not their average, as the paper), or fresh ones."""
    if not config.pretrain.enabled:
        return model.init(workdir.keys('init', config.seed).noise)
    shapes = model.shapes()
    saved = checkpoint.load_model(
        workdir.release / 'model' / 'pretrain', {'params': shapes, 'ema_params': shapes}
    )
    return saved['params']
