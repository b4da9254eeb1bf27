"""Stage `plan`: what a run spends and needs, and what cannot work. It touches no image."""

from collections.abc import Collection, Iterable
import functools
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
from dpp_jax.privacy import accounting, queries
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, SELECTION, Budget
from dpp_jax.run import hours, imported, split, statement, statement_text, step_time, warnings
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.plan import Plan
from dpp_jax.run.sizes import Sizes
from dpp_jax.training import checkpoint, devices


def run(
    config: ConfigDict,
    workdir: WorkDir,
    *,
    plan: Plan,
    todo: Iterable[str],
    model: Model,
    sizes: Sizes,
    made: int = 0,
    source: str = '',
    is_there: bool = True,
    smallest_class: int | None = None,
) -> None:
    """Print what would be run and spent, and draw what another budget for the query would do.

    Args:
        config: the settings.
        workdir: gets the picture, if it is there.
        plan: of the run.
        todo: stages that are not done yet.
        model: whose memory is estimated.
        sizes: what is in work at once.
        made: releases in the ledger.
        source: what is known of the private images, in one or more lines.
        is_there: whether the private images are; without them there is no statement.
        smallest_class: private images of the smallest class; None: not known.
    """
    draft = _draft(plan.budget, made)
    todo = tuple(todo)
    if draft:
        print(f'DRAFT: {draft}.\n')
    print(text(config, plan))
    found = split.of(plan.budget)
    if found is not None:
        print(f'split of ε     {split.words(found)}')
    if source:
        print('source         ' + source.replace('\n', '\n' + 15 * ' '))
    rate, is_measured = hours.rate(model)
    step = _step(plan, sizes, config.finetune.draws, rate)
    if not plan.budget.of(DP_SGD).declared:
        print(f'{_memory_words(config, model, sizes)}\n{_step_words(step)}')
    time, weeks = _time(config, plan, _left(workdir, plan, todo), step, rate, is_measured)
    print(f'{time}\n')
    print(f'would run      {", ".join(todo) or "nothing: everything is done"}\n')
    if is_there:
        shown = statement_text.markdown(_statement(config, plan), draft)
        print(f'Privacy statement of this plan{" (DRAFT)" if draft else ""}:\n\n{shown}')
    else:
        print('No privacy statement: there are no private images.\n')
    _draw(config, workdir, plan)
    # Last, where they are read.
    for warning in [*warnings_of(config, plan, smallest_class), *weeks]:
        print(f'\nWARNING: {warning}.')


def _draw(config: ConfigDict, workdir: WorkDir, plan: Plan) -> None:
    """Draw what another budget for the query would do, if there is a folder for the picture."""
    asked = plan.budget.of(CENTRAL_QUERY)
    if asked is None or asked.declared:
        return
    if not workdir.root.is_dir():
        print(f'No picture of other shares of ε: {workdir.root} is not there yet, and plan makes nothing.')
    else:
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
    budget = plan.budget
    relation = accounting.RELATIONS[budget.relation]
    number = '' if relation.size_is_public else 'counted as '
    titles = {
        CENTRAL_QUERY: f'central images ({config.query.kind} query)',
        **{name: statement_text.TITLES[name] for name in (MOMENTS, FREQUENCY, DP_SGD, SELECTION)},
    }
    rows = [(f'spent before: {part.mechanism.name}', part) for part in budget.before]
    rows += [
        (f'{"declared: " if part.declared else ""}{titles[part.mechanism.name]}', part)
        for part in budget.releases
    ]
    columns = [('mechanism (Poisson-sampled Gaussian)', 'σ', 'q', 'count', 'ε alone')]
    for title, part in rows:
        mechanism = part.mechanism
        columns.append(
            (
                title,
                accounting.format_noise(mechanism.noise_multiplier),
                f'{mechanism.sampling_probability:.6f}',
                str(part.count),
                accounting.format_epsilon(budget.epsilon_of([part])),
            )
        )
    columns.append(('together', '', '', '', accounting.format_epsilon(budget.spent())))
    lines = [
        f'Plan for {config.name}: {number}{plan.private_images:,} private images, '
        f'ε = {exact(budget.epsilon)}, δ = {exact(budget.delta)} ({budget.accountant.upper()} accountant)',
        f'Unit of privacy: {plan.unit.words()}. Neighboring relation: '
        f'{relation.sentence.format(unit=plan.unit.name)}.',
        f'The budget is for this relation.{_replace_one(plan)}',
        '',
        *_table(columns),
        '',
        f'network        {plan.parameters:,} parameters, denoiser {config.model.denoiser}'
        f'{" around the class moments" if config.model.around == "moments" else ""}',
        *_trainings(config, plan),
        f'generation     {config.generate.images:,} images, {config.generate.sampler.name} '
        f'with {config.generate.sampler.steps} steps{_moments_share(config)}',
        *_moments(config, plan),
        *_frequency(config, plan),
        *_selection(plan),
    ]
    return '\n'.join(lines)


def _moments_share(config: ConfigDict) -> str:
    """Say how many of the images do not come from the model, if any do not."""
    share = config.generate.moments_share
    return f'; in place of {100 * share:.4g} %, images drawn from the class moments' if share else ''


def _moments(config: ConfigDict, plan: Plan) -> list[str]:
    """Say what the noise leaves of the class moments."""
    releases, question = plan.budget.of(MOMENTS), _moments_question(config, plan)
    if releases is None:
        return []
    return [
        f'class moments  {question.query.dimensions} frequencies; eigenvalues above '
        f'{question.edge(releases):.2g} stand out of the noise, where the variance of all is at most '
        f'{question.most:.3g} (pixels in [0, 1])'
    ]


def _moments_question(config: ConfigDict, plan: Plan) -> warnings.MomentsQuestion | None:
    """Return what a warning about class moments needs to know; None if nobody asks for them."""
    if plan.budget.of(MOMENTS) is None:
        return None
    settings, classes = config.moments, config.data.classes
    query = queries.make_query(
        'moments',
        classes=classes,
        dimensions=settings.frequencies,
        settings=settings.to_dict(),
        images_per_group=plan.unit.images_per_group,
    )
    per_class = plan.unit.used_images / classes
    steps, share = config.pretrain.moments_steps, config.generate.moments_share
    is_used = bool(steps or share or config.model.around == MOMENTS)
    return warnings.MomentsQuestion(query=query, images_per_class=per_class, is_used=is_used)


def _frequency(config: ConfigDict, plan: Plan) -> list[str]:
    """Say what the noise leaves of mean features."""
    releases, question = plan.budget.of(FREQUENCY), _frequency_question(config, plan)
    if releases is None:
        return []
    return [
        f'frequencies    {question.query.features:,} random features; noise of '
        f'{question.noise(releases):.2g} in every direction, where the mean features of a class have a norm '
        'of at most 1'
    ]


def _frequency_question(config: ConfigDict, plan: Plan) -> warnings.FrequencyQuestion | None:
    """Return what a warning about the frequency query needs to know; None if nobody asks it."""
    if plan.budget.of(FREQUENCY) is None:
        return None
    return warnings.FrequencyQuestion(
        query=queries.make_query(
            'frequency',
            classes=config.data.classes,
            dimensions=config.data.channels * config.data.image_size**2,
            settings=config.frequency.to_dict(),
            images_per_group=plan.unit.images_per_group,
        ),
        images_per_class=plan.unit.used_images / config.data.classes,
        steps=config.pretrain.frequency_steps,
    )


def _trainings(config: ConfigDict, plan: Plan) -> list[str]:
    """Say how much is trained here, and what is imported in its place."""
    dp_sgd, kind = plan.budget.of(DP_SGD), config.imported.kind
    if kind:
        is_public = kind == imported.PUBLIC
        word = 'it spends nothing, as declared' if is_public else 'ε as declared'
        lines = [f'imported       a model that was {imported.MEANINGS[kind]}; {word}', *_declaring(config)]
    else:
        lines = [
            f'pre-training   {plan.pretrain_steps:,} steps, {plan.pretrain_noised_images:,} noised images'
        ]
    if not dp_sgd.declared:
        lines.append(
            f'fine-tuning    {dp_sgd.count:,} steps of {plan.expected_batch_size:,.1f} expected images'
            f' x {config.finetune.draws} draws, {plan.finetune_noised_images:,} noised images'
        )
    return lines


def _declaring(config: ConfigDict) -> list[str]:
    """Say, in a list of one line or none, which settings declare what was spent for an imported model."""
    settings = flatten(config.to_dict())
    values = [f'{name} = {settings[name]}' for name in imported.declaring(settings)]
    return [f'You declare:   {", ".join(values)}'] if values else []


def _selection(plan: Plan) -> list[str]:
    """Say how noisy the scores are by which private images select among classifiers."""
    releases = plan.budget.of(SELECTION)
    if releases is None:
        return []
    mechanism = releases.mechanism
    noise = mechanism.noise_multiplier * mechanism.sensitivity / plan.unit.size
    return [
        f'selection      {round(4 * mechanism.sensitivity**2)} candidates, by private images; noise of each '
        f'score: {100 * noise:.2g} % of accuracy'
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Align the first column to the left, the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _draft(budget: Budget, made: int) -> str:
    """Say why the plan is one; nothing if all of it was done."""
    total = sum(part.count for part in budget.releases)
    if not made:
        return 'nothing has run'
    return f'{made:,} of {total:,} releases were made' if made < total else ''


def warnings_of(config: ConfigDict, plan: Plan, smallest_class: int | None = None) -> list[str]:
    """Return what cannot work, see `run.warnings`."""
    asked = plan.budget.of(CENTRAL_QUERY)
    return warnings.find(
        plan.budget,
        images=plan.private_images,
        classes=config.data.classes,
        smallest_class=smallest_class,
        parameters=plan.parameters,
        batch_size=plan.expected_batch_size,
        question=warnings.Question(
            kind=config.query.kind,
            sensitivity=asked.mechanism.sensitivity if asked else 0.0,
            downsample=config.query.downsample,
            most_downsample=max(1, config.data.image_size // 2),
            is_scaled_by_group=(plan.unit.images_per_group or 1) > 1
            and config.query.class_counts == 'public'
            and config.query.kind == 'mean',
        ),
        moments=_moments_question(config, plan),
        frequency=_frequency_question(config, plan),
    )


def _step(plan: Plan, sizes: Sizes, draws: int, rate: float) -> step_time.Prediction:
    """Predict a step of fine-tuning on the devices in use, which together have this rate."""
    unit = plan.unit
    batch = step_time.Batch(
        units=unit.size, probability=plan.budget.of(DP_SGD).mechanism.sampling_probability
    )
    return step_time.predict_here(
        step_time.Step(
            batch=batch,
            draws=draws,
            parameters=plan.parameters,
            images_per_row=unit.images_per_group or 1,
        ),
        microbatch=sizes.microbatch,
        devices_per_image=sizes.devices_per_image,
        rate=rate,
    )


def _memory_words(config: ConfigDict, model: Model, sizes: Sizes) -> str:
    """Say how much memory a step of fine-tuning takes."""
    memory = _memory(config, model, sizes) / 2**20
    shared = '' if sizes.devices_per_image == 1 else f', {sizes.devices_per_image} devices share an image'
    return (
        f'memory         about {memory:,.0f} MiB per device ({sizes.microbatch} images x {sizes.draws} draws '
        f'at once{shared}, estimate), {jax.device_count()} {jax.devices()[0].platform} device(s)'
    )


def _step_words(step: step_time.Prediction) -> str:
    """Say how long a step takes, and where its time goes."""
    share = lambda seconds: f'{100 * seconds / step.seconds:.1f} %'
    time = hours.words(step.seconds) if step.seconds >= 60 else f'{step.seconds:.2g} s'
    return (
        f'step           {time} on {devices.count()} device(s), predicted efficiency '
        f'{100 * step.efficiency:.0f} % ({share(step.padding)} padding, {share(step.update)} update, '
        f'{share(step.sending)} sending)'
    )


def _left(workdir: WorkDir, plan: Plan, todo: Collection[str]) -> dict[str, float]:
    """Return training → the share of it that is left, by its newest checkpoint."""
    left = {}
    for name, steps in (('pretrain', plan.pretrain_steps), ('finetune', plan.budget.count(DP_SGD))):
        saved = checkpoint.latest_training(workdir.checkpoints(name))
        left[name] = (1 - (saved[0] if saved else 0) / max(1, steps)) * (name in todo)
    return left | {'generate': float('generate' in todo)}


def _time(
    config: ConfigDict,
    plan: Plan,
    left: dict[str, float],
    step: step_time.Prediction,
    rate: float,
    is_measured: bool,
) -> tuple[str, list[str]]:
    """Say how long what is left of the run takes on this machine, and warn where that is weeks."""
    settings = config.generate
    chosen = [settings.sampler]
    if settings.separate_classifier_images:
        chosen.append(settings.classifier_sampler)
    sampled = math.ceil(settings.images * (1 - settings.moments_share))
    evaluations = sum(
        hours.evaluations(sampled, steps=s.steps, name=s.name, guidance=s.guidance) for s in chosen
    )
    rate *= devices.count() / len(devices.local())
    parts = {
        'pre-training': left['pretrain'] * hours.of_trainings(plan.pretrain_noised_images, rate),
        'fine-tuning': left['finetune'] * plan.budget.count(DP_SGD) * step.seconds,
        'generation': left['generate'] * hours.of_generation(evaluations, rate),
    }
    total = sum(parts.values())
    how = (
        'measured on this machine'
        if is_measured
        else 'from a convolution timed just now, right to a factor of three; a long run first measures'
    )
    words = ', '.join(f'{name} {hours.words(seconds)}' for name, seconds in parts.items() if seconds)
    line = (
        f'time left      {hours.words(total)} on this machine, without compilation and evaluation: {words}\n'
        f'               ({rate:,.3g} noised images/s, {how})'
        if words
        else 'time left      none, without evaluation'
    )
    if total < hours.WEEK:
        return line, []
    longest = max(parts, key=parts.get)
    return line, [
        f'this run takes weeks here: {hours.words(total)}, of which {longest} {hours.words(parts[longest])}. '
        'A GPU or a TPU is faster by a factor of 10 to 1,000; smaller values of finetune.epochs, '
        'finetune.draws, generate.sampler.steps, generate.images or model.width help too'
    ]


def _replace_one(plan: Plan) -> str:
    """Say what ε is if neighbors differ by another image in the place of one."""
    budget = plan.budget
    if budget.relation == accounting.REPLACE_ONE:
        return ''
    releases = (*budget.before, *budget.releases)
    found = statement.by_pld(releases, budget.delta, accounting.REPLACE_ONE)
    own = statement.by_pld(releases, budget.delta, budget.relation)
    figure = 'not computed' if found is None else f'{accounting.format_epsilon(found)} (PLD)'
    beside = '' if own is None else f' By PLD, ε = {accounting.format_epsilon(own)}.'
    return f'{beside} With another {plan.unit.name} in the place of one (replace one), ε = {figure}.'


def _statement(config: ConfigDict, plan: Plan) -> dict[str, Any]:
    """Make the privacy statement of a run that follows the plan."""
    budget = plan.budget
    return statement.make(
        budget.releases,
        is_private=config.seed is None,
        derived=config.data.derived,
        kind=config.imported.kind,
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

    def residuals(params, gaussians, images, labels, keys):
        of_example = functools.partial(loss, gaussians=gaussians)
        return jax.vjp(lambda p: jax.vmap(of_example, (None, 0, 0, 0))(p, images, labels, keys), params)

    kept = jax.eval_shape(
        residuals,
        shapes,
        model.stand_in(),
        jax.ShapeDtypeStruct((n,) + model.image_shape, jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n)),
    )
    activations = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(kept)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    )
    vectors = 4 * n * sizes.draws * (model.directions or 0) ** 2  # of the class of each noised image
    # Weights, average, two moments of Adam, the sum, the noisy sum; two gradients per example.
    return activations + vectors + 4 * model_lib.size(shapes) * (6 + 2 * n)
