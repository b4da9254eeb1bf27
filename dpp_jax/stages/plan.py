"""Stage `plan`: what a run spends and needs, from the config alone. It touches no image."""

from collections.abc import Iterable
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.diffusion import model as model_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.run import statement
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.plan import Plan
from dpp_jax.run.sizes import Sizes


def run(
    config: ConfigDict,
    workdir: WorkDir,
    *,
    plan: Plan,
    todo: Iterable[str],
    model: Model,
    sizes: Sizes,
) -> None:
    """Print what would be run and spent, and draw what another budget for the query would do.

    Args:
        config: the settings.
        workdir: gets the picture.
        plan: of the run.
        todo: stages that are not done yet.
        model: whose memory is estimated.
        sizes: what is in work at once.
    """
    memory = _memory(config, model, sizes) / 2**20
    todo = ', '.join(todo) or 'nothing: everything is done'
    print(text(config, plan))
    print(
        f'memory         about {memory:,.0f} MiB per device ({sizes.microbatch} images x {sizes.draws} draws '
        f'at once, estimate), {jax.device_count()} {jax.devices()[0].platform} device(s)\n\n'
        f'would run      {todo}\n'
    )
    print(f'Privacy statement of this plan:\n\n{statement.markdown(_statement(config, plan))}')
    if plan.budget.of(CENTRAL_QUERY):
        from dpp_jax.run import plan_curve  # imports matplotlib, which nothing else needs

        picture = plan_curve.draw(plan.budget, config.name)
        try:
            files.write_bytes(workdir.curve, picture)
            print(f'Fine-tuning noise for other shares of ε (picture): {workdir.curve}')
        except OSError as error:  # all that matters was printed
            print(
                f'dpp-jax: {workdir.curve} was not drawn ({error}). The plan above is complete',
                file=sys.stderr,
            )


def text(config: ConfigDict, plan: Plan) -> str:
    """Describe the plan for people; every ε is rounded up, every σ down."""
    exact = accounting.format_exact
    budget, dp_sgd = plan.budget, plan.budget.of(DP_SGD)
    relation = accounting.RELATIONS[budget.relation]
    number = '' if relation.size_is_public else 'counted as '
    titles = {
        CENTRAL_QUERY: f'central images ({config.query.kind} query)',
        DP_SGD: 'fine-tuning (DP-SGD)',
    }
    lines = [
        f'Plan for {config.name}: {number}{plan.private_images:,} private images, '
        f'ε = {exact(budget.epsilon)}, δ = {exact(budget.delta)} ({budget.accountant.upper()} accountant)',
        f'Unit of privacy: {plan.unit.words()}. Neighboring relation: '
        f'{relation.sentence.format(unit=plan.unit.name)}.',
        f'The budget is for this relation.{_replace_one(plan)}',
        '',
        f'{"mechanism (Poisson-sampled Gaussian)":38}{"σ":>9}{"q":>10}{"count":>8}{"ε alone":>9}',
    ]
    rows = [(f'spent before: {part.mechanism.name}', part) for part in budget.before]
    for title, part in [*rows, *((titles[part.mechanism.name], part) for part in budget.releases)]:
        mechanism = part.mechanism
        lines.append(
            f'{title:38}{accounting.format_noise(mechanism.noise_multiplier):>9}'
            f'{mechanism.sampling_probability:10.6f}{part.count:8d}'
            f'{accounting.format_epsilon(budget.epsilon_of([part])):>9}'
        )
    lines += [
        f'{"together":38}{"":27}{accounting.format_epsilon(budget.spent()):>9}',
        '',
        f'network        {plan.parameters:,} parameters, denoiser {config.model.denoiser}',
        f'pre-training   {plan.pretrain_steps:,} steps, {plan.pretrain_noised_images:,} noised images',
        f'fine-tuning    {dp_sgd.count:,} steps of {plan.expected_batch_size:,.1f} expected images'
        f' x {config.finetune.draws} draws, {plan.finetune_noised_images:,} noised images',
        f'generation     {config.generate.images:,} images, {config.generate.sampler.name} '
        f'with {config.generate.sampler.steps} steps',
    ]
    return '\n'.join(lines)


def _replace_one(plan: Plan) -> str:
    """Say what ε is if neighbors differ by another image in the place of one."""
    budget = plan.budget
    if budget.relation == accounting.REPLACE_ONE:
        return ''
    found = statement.replace_one((*budget.before, *budget.releases), budget.delta)
    figure = 'not computed' if found is None else f'{accounting.format_epsilon(found)} (PLD)'
    return f' With another {plan.unit.name} in the place of one (replace one), ε = {figure}.'


def _statement(config: ConfigDict, plan: Plan) -> dict[str, Any]:
    """Make the privacy statement of a run that follows the plan."""
    budget = plan.budget
    return statement.make(
        budget.releases,
        is_private=config.seed is None,
        delta=budget.delta,
        accountant=budget.accountant,
        budget=budget.epsilon,
        relation=budget.relation,
        before=budget.before,
    )


def _memory(config: ConfigDict, model: Model, sizes: Sizes) -> int:
    """Estimate the bytes of state, per-example gradients and activations of one microbatch."""
    shapes, n = model.shapes(), sizes.microbatch
    # One part's: the gradient of a part is finished before the next part starts.
    loss = model.example_loss(draws=sizes.draws, label_dropout=config.finetune.label_dropout)

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
    # Weights, average, two moments of Adam, the sum, the noisy sum; two gradients per example.
    return activations + 4 * model_lib.size(shapes) * (6 + 2 * n)
