"""Stage `plan`: what a run spends and needs, from the config alone. It touches no image."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.diffusion import model as model_lib
from dpp_jax.privacy import accounting
from dpp_jax.privacy.ledger import Entry, Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import folder as workdir_lib
from dpp_jax.run import sizes
from dpp_jax.stages import central


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mechanisms of a run, calibrated to its budget, and its size."""

    private_images: int
    delta: float
    accountant: str
    epsilon_budget: float
    epsilon_query: float
    epsilon_finetune: float
    epsilon_total: float
    query_noise_multiplier: float | None
    query_sampling_probability: float | None
    query_count: int
    noise_multiplier: float
    sampling_probability: float
    steps: int
    expected_batch_size: float
    pretrain_steps: int
    parameters: int
    pretrain_noised_images: int
    finetune_noised_images: int
    memory_bytes_per_device: int


# What of a plan the guarantee rests on, other than noise that was calibrated: that is taken from the
# plan, because another version may calibrate it differently in the last digits.
_BINDING = (
    'private_images delta accountant epsilon_budget query_noise_multiplier '
    'query_sampling_probability query_count sampling_probability steps expected_batch_size'
).split()


def make(
    config: ConfigDict,
    model: model_lib.Model,
    noise_multiplier: float | None = None,
    query_noise_multiplier: float | None = None,
) -> Plan:
    """Calibrate the fine-tuning noise so that query and fine-tuning together stay within (ε, δ).

    q = 1 / ceil(N / batch_size), steps = epochs / q, as in the paper.

    Args:
        config: settings that `settings.check` accepts; `query.epsilon_share`, if set, decides the
            query's noise.
        model: whose parameters are counted.
        noise_multiplier: of fine-tuning, where it is known already.
        query_noise_multiplier: of a query whose noise `query.epsilon_share` decides, likewise.

    Raises:
        ValueError: the query alone exceeds the budget.
    """
    dp, query, finetune = config.dp, config.query, config.finetune
    images = config.data.train_images
    batches = math.ceil(images / finetune.batch_size)
    steps = max(1, round(finetune.epochs * batches))
    asked = query.queries if config.pretrain.enabled else 0
    query_sigma = _query_sigma(config, query_noise_multiplier) if asked else None

    def everything(sigma):
        return accounting.compose([*queries, accounting.subsampled_gaussian(sigma, 1 / batches, steps)])

    def spent(event):
        return accounting.epsilon(event, dp.delta, dp.accountant)

    queries = (
        [accounting.subsampled_gaussian(query_sigma, query.sampling_probability, asked)] if asked else []
    )
    sigma = noise_multiplier
    if sigma is None:
        sigma = accounting.calibrate(everything, dp.epsilon, dp.delta, dp.accountant)
    shapes = model.shapes()
    central_count = asked * config.data.classes
    pretrain_batch = min(config.pretrain.batch_size, max(central_count, 1))
    pretrain_steps = config.pretrain.epochs * math.ceil(central_count / pretrain_batch)
    return Plan(
        private_images=images,
        delta=dp.delta,
        accountant=dp.accountant,
        epsilon_budget=dp.epsilon,
        epsilon_query=spent(accounting.compose(queries)),
        epsilon_finetune=spent(accounting.subsampled_gaussian(sigma, 1 / batches, steps)),
        epsilon_total=spent(everything(sigma)),
        query_noise_multiplier=query_sigma,
        query_sampling_probability=query.sampling_probability if asked else None,
        query_count=asked,
        noise_multiplier=sigma,
        sampling_probability=1 / batches,
        steps=steps,
        expected_batch_size=images / batches,
        pretrain_steps=pretrain_steps,
        parameters=model_lib.size(shapes),
        pretrain_noised_images=pretrain_steps * pretrain_batch * config.pretrain.draws,
        finetune_noised_images=round(steps * images / batches * finetune.draws),
        memory_bytes_per_device=_memory(config, model, shapes),
    )


def load(config: ConfigDict, model: model_lib.Model, workdir: workdir_lib.WorkDir) -> Plan:
    """The plan that this work directory follows, or the one that it would be given.

    Of the folder's plan the noise is taken; every figure that follows from it is computed again.

    Raises:
        ValueError: the folder's plan is not one that this config can have: it takes other steps or
            batches, asks other queries, or does not stay within the budget.
    """
    path = workdir.release / 'plan.json'
    if not path.exists():
        return make(config, model)
    try:
        plan = Plan(**json.loads(path.read_text()))
        again = make(config, model, plan.noise_multiplier, plan.query_noise_multiplier)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is not a plan ({error}); restore it') from error
    for name in _BINDING:
        if getattr(plan, name) != getattr(again, name):
            raise ValueError(
                f'{path} has {name} = {getattr(plan, name)}; this config gives '
                f'{getattr(again, name)}. The plan was changed: restore it, or use another --workdir'
            )
    budget, share = config.dp.epsilon, config.query.epsilon_share
    for_query = math.inf if share is None else share * budget
    for name, spent, limit, allowed in (
        ('query_noise_multiplier', again.epsilon_query, "the query's share", for_query),
        ('noise_multiplier', again.epsilon_total, 'the budget', budget),
    ):
        if spent > allowed:
            raise ValueError(
                f'{path} has {name} = {getattr(plan, name)}, which spends ε = '
                f'{accounting.format_epsilon(spent, 6)}; it must be within {limit}, '
                f'{accounting.format_exact(allowed)}. The plan was changed: restore it, or use '
                'another --workdir'
            )
    return again


def save(plan: Plan, workdir: workdir_lib.WorkDir) -> None:
    """Fix the plan of a work directory that has none."""
    path = workdir.release / 'plan.json'
    if not path.exists():
        workdir_lib.write_json(path, dataclasses.asdict(plan))


def entries(plan: Plan, config: ConfigDict) -> list[Entry]:
    """What the ledger will hold when everything ran."""
    randomness = 'planned' if config.seed is None else workdir_lib.seeded(config.seed)
    steps = finetune_mechanism(plan, config, randomness)
    found = [steps.entry(n) for n in range(plan.steps)]
    if plan.query_count:
        query = central.make_mechanism(config, plan.query_noise_multiplier, randomness)
        found = [query.entry(n) for n in range(plan.query_count)] + found
    return found


def finetune_mechanism(plan: Plan, config: ConfigDict, randomness: str) -> GaussianMechanism:
    """One step of fine-tuning: the sum of gradients, each clipped to norm C."""
    return GaussianMechanism(
        name='dp_sgd',
        noise_multiplier=plan.noise_multiplier,
        sampling_probability=plan.sampling_probability,
        sensitivity=config.finetune.clip_norm,
        randomness=randomness,
    )


def check_ledger(plan: Plan, config: ConfigDict, ledger: Ledger, made: dict[str, int]) -> None:
    """Raise a ValueError if the ledger does not fit the plan or what was released.

    Args:
        made: mechanism → how many of its releases are known to have been used.
    """
    planned = {(e.mechanism, e.index): e for e in entries(plan, config)}
    for entry in ledger.entries:
        expected = planned.get((entry.mechanism, entry.index))
        if expected is None or dataclasses.replace(expected, randomness=entry.randomness) != entry:
            raise ValueError(
                f'{ledger.path} names {entry}, which is not in the plan ({expected}): its ε no longer '
                'covers what ran. Restore ledger.jsonl and plan.json, or use another --workdir'
            )
    for mechanism, count in made.items():
        if ledger.count(mechanism) < count:
            raise ValueError(
                f'{ledger.path} names {ledger.count(mechanism)} releases of {mechanism}; {count} '
                'were made. Restore the ledger: no ε can be stated without it'
            )


def text(plan: Plan, config: ConfigDict, done: dict[str, bool] | None = None) -> str:
    """The plan for people to read; every ε rounded up, every σ down."""
    show, noise, exact = (
        accounting.format_epsilon,
        accounting.format_noise,
        accounting.format_exact,
    )
    at_once = sizes.choose(config)
    lines = [
        f'Plan for {config.name}: {plan.private_images:,} private images, '
        f'ε = {exact(plan.epsilon_budget)}, δ = {exact(plan.delta)} ({plan.accountant.upper()} accountant)',
        'Unit of privacy: one image; neighbours differ by adding or removing one.',
        '',
        f'{"mechanism (Poisson-sampled Gaussian)":38}{"σ":>9}{"q":>10}{"count":>8}{"ε alone":>9}',
    ]
    if plan.query_count:
        lines.append(
            f'{"central images (" + config.query.kind + " query)":38}'
            f'{noise(plan.query_noise_multiplier):>9}{plan.query_sampling_probability:10.6f}'
            f'{plan.query_count:8d}{show(plan.epsilon_query):>9}'
        )
    lines += [
        f'{"fine-tuning (DP-SGD)":38}{noise(plan.noise_multiplier):>9}{plan.sampling_probability:10.6f}'
        f'{plan.steps:8d}{show(plan.epsilon_finetune):>9}',
        f'{"together":38}{"":27}{show(plan.epsilon_total):>9}',
        '',
        f'network        {plan.parameters:,} parameters, denoiser {config.model.denoiser}',
        f'pre-training   {plan.pretrain_steps:,} steps, {plan.pretrain_noised_images:,} noised images',
        f'fine-tuning    {plan.steps:,} steps of {plan.expected_batch_size:,.1f} expected images'
        f' x {config.finetune.draws} draws, {plan.finetune_noised_images:,} noised images',
        f'generation     {config.generate.images:,} images, {config.generate.sampler.name} '
        f'with {config.generate.sampler.steps} steps',
        f'memory         about {plan.memory_bytes_per_device / 2**20:,.0f} MiB per device '
        f'({at_once.microbatch} images x {at_once.draws} draws at once, estimate), '
        f'{jax.device_count()} {jax.devices()[0].platform} device(s)',
    ]
    if done is not None:
        todo = [name for name, is_done in done.items() if not is_done]
        lines += ['', 'would run      ' + (', '.join(todo) if todo else 'nothing: everything is done')]
    return '\n'.join(lines)


def _query_sigma(config: ConfigDict, known: float | None) -> float:
    """σ of the query: the setting, which nobody calibrates; or the known one; or calibrated."""
    if config.query.epsilon_share is None or known is None:
        return central.noise_multiplier(config)
    return known


def _memory(config: ConfigDict, model: model_lib.Model, shapes) -> int:
    """Bytes of state, per-example gradients and activations of one microbatch of fine-tuning."""
    finetune = config.finetune
    at_once = sizes.choose(config)
    # One part's: the gradient of a part is finished before the next part starts.
    loss = model.example_loss(draws=at_once.draws, label_dropout=finetune.label_dropout)
    n = at_once.microbatch

    def residuals(params, images, labels, keys):
        return jax.vjp(lambda p: jax.vmap(loss, (None, 0, 0, 0))(p, images, labels, keys), params)

    kept = jax.eval_shape(
        residuals,
        shapes,
        jax.ShapeDtypeStruct((n,) + model.image_shape, jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n)),
    )
    activations = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(kept)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    )
    parameters = model_lib.size(shapes)
    # Weights, average, two moments of Adam, the sum, the noisy sum; two gradients per example.
    return activations + 4 * parameters * (6 + 2 * n)
