"""From the names and numbers in a config to objects: model, query, budget, augmentation, samplers, images."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.data import augment, sources
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.data.frequencies import Frequencies
from dpp_jax.data.generator import Generator
from dpp_jax.data.images import Images
from dpp_jax.data.preparation import Preparation
from dpp_jax.diffusion import class_gaussians, denoiser, sampler
from dpp_jax.diffusion import model as model_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.evaluation import classifiers, needs, trainer
from dpp_jax.privacy import accounting, queries
from dpp_jax.privacy import budget as budget_lib
from dpp_jax.privacy import selection as selection_lib
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, QUERIES, SELECTION, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import already_spent, artefacts, hours, imported, step_time
from dpp_jax.run import plan as plan_lib
from dpp_jax.run import sizes as sizes_lib
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.training import devices

_SAMPLER_STEPS_OF_SNAPSHOTS = 18


def model(config: ConfigDict) -> Model:
    """Make the model: network, denoiser and loss by their names."""
    data, settings = config.data, config.model
    network = model_lib.NETWORKS[settings.network](
        image_channels=data.channels,
        classes=data.classes,
        width=settings.width,
        multipliers=tuple(settings.multipliers),
        blocks=settings.blocks,
        attention_resolutions=tuple(settings.attention_resolutions),
        dtype=jnp.dtype(settings.dtype),
        patch=settings.patch,
    )
    return Model(
        network=network,
        image_shape=(data.image_size, data.image_size, data.channels),
        classes=data.classes,
        kind=denoiser.make_kind(settings.denoiser),
        directions=config.moments.frequencies if settings.around == MOMENTS else None,
    )


def gaussians(config: ConfigDict, workdir: WorkDir) -> class_gaussians.ClassGaussians | None:
    """Return the class moments that the model's denoiser is around: they follow from the release."""
    if config.model.around != MOMENTS:
        return None
    return class_gaussians.of_moments(*artefacts.moments(workdir), frequencies(config).synthesis)


def class_names(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of the classes, in the order of labels: as set, or their numbers."""
    return tuple(config.data.class_names) or tuple(map(str, range(config.data.classes)))


def unit(config: ConfigDict) -> Unit:
    """Make the unit of privacy: one image, or a group of images."""
    return Unit(
        images=config.data.train_images,
        groups=config.data.train_groups,
        images_per_group=config.dp.images_per_group,
    )


def query(config: ConfigDict) -> queries.Query:
    """Make the query for central images.

    Raises:
        ValueError: a setting of config.query is out of range, or the query cannot use it.
    """
    data, settings = config.data, config.query
    side = -(-data.image_size // settings.downsample)
    return queries.make_query(
        settings.kind,
        classes=data.classes,
        dimensions=data.channels * side * side,
        settings=settings.to_dict(),
        images_per_group=config.dp.images_per_group,
    )


def moments_query(config: ConfigDict) -> queries.Query:
    """Make the query for class moments, without its center.

    Raises:
        ValueError: a setting of config.moments is out of range.
    """
    settings = config.moments
    return queries.make_query(
        'moments',
        classes=config.data.classes,
        dimensions=settings.frequencies,
        settings=settings.to_dict(),
        images_per_group=config.dp.images_per_group,
    )


def frequencies(config: ConfigDict) -> Frequencies:
    """Make the frequencies in which class moments are asked for.

    Raises:
        ValueError: config.moments has more of them than its images have values.
    """
    data, settings = config.data, config.moments
    shape = (data.image_size, data.image_size, data.channels)
    return Frequencies(image_shape=shape, average_down=settings.average_down, count=settings.frequencies)


def frequency_query(config: ConfigDict) -> queries.Query:
    """Make the frequency query.

    Raises:
        ValueError: a setting of config.frequency is out of range.
    """
    data = config.data
    return queries.make_query(
        'frequency',
        classes=data.classes,
        dimensions=data.channels * data.image_size**2,
        settings=config.frequency.to_dict(),
        images_per_group=config.dp.images_per_group,
    )


def generator(config: ConfigDict) -> Generator:
    """Make the generator that is fitted to the frequency query's answer."""
    data = config.data
    shape = (data.image_size, data.image_size, data.channels)
    return Generator(image_shape=shape, classes=data.classes)


def drawings(config: ConfigDict) -> dict[str, artefacts.Drawing]:
    """Return mechanism → how images are drawn from its answer, of the queries that are asked for that."""
    found = {}
    if config.moments.enabled:
        own = frequencies(config)
        found[MOMENTS] = artefacts.Drawing(
            load=lambda workdir: artefacts.moments(workdir)._asdict(),
            draw=lambda answer, *batch: ClassMoments(**answer).draw(own, *batch),
        )
    if config.frequency.enabled:
        found[FREQUENCY] = artefacts.Drawing(load=artefacts.generator, draw=generator(config).draw)
    return found


# Mechanism → its query.
_MAKERS: dict[str, Callable[[ConfigDict], queries.Query]] = {
    CENTRAL_QUERY: query,
    MOMENTS: moments_query,
    FREQUENCY: frequency_query,
}


def asked(config: ConfigDict) -> list[str]:
    """Return the mechanisms of the queries, in their order: those asked here, or declared of a checkpoint."""
    if not has_query(config):
        return []
    return [name for name, section in QUERIES.items() if config[section].get('enabled', True)]


def classifier_settings(config: ConfigDict) -> trainer.Settings:
    """Make the settings with which classifiers are trained."""
    settings = config.evaluate
    return trainer.Settings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        ema_decay=settings.ema_decay,
        held_out=settings.held_out,
        candidates=settings.candidates if settings.selection == classifiers.PRIVATE_NOISY else None,
        is_even=not settings.as_paper,
    )


def selection(config: ConfigDict) -> selection_lib.Selection | None:
    """Make what is asked to select among classifiers; None if no private image takes part in that."""
    settings = config.evaluate
    if settings.selection != classifiers.PRIVATE_NOISY or needs.why_no_classes(config.data.classes):
        return None
    of_training = classifier_settings(config)
    candidates = sum(
        classifiers.trainings(kind, settings.seeds) * classifiers.candidates(kind, of_training)
        for kind in settings.classifiers
    )
    return selection_lib.Selection(candidates=candidates, units=unit(config).size)


def has_query(config: ConfigDict) -> bool:
    """Whether central images are asked for, here or where the imported checkpoint comes from."""
    return imported.has_query(flatten(config.to_dict()))


def plan(
    config: ConfigDict,
    run_model: Model,
    noise: Mapping[str, float] | None = None,
    spent_before: Sequence[Releases] | None = None,
) -> plan_lib.Plan:
    """Make the plan: calibrate the noise so that all mechanisms together stay within (ε, δ).

    Args:
        config: the settings; `epsilon_share` of a query, if set, decides its noise.
        run_model: whose parameters are counted.
        noise: mechanism → noise multiplier that is decided already, of those that follow from the budget or a
            share of it.
        spent_before: what the run was calibrated beside, likewise; None: what `dp.already_spent` names.

    Raises:
        ValueError: the queries, with what was spent before, exceed the budget, or no noise keeps one within
            its share, or what was spent before cannot be read; or what is declared of an imported model
            exceeds the budget.
    """
    noise = noise or {}
    dp, finetune, pretrain, counted = config.dp, config.finetune, config.pretrain, unit(config)
    is_finetuned = config.imported.kind == imported.FINETUNED
    if is_finetuned:
        noise = {**noise, DP_SGD: config.imported.noise_multiplier}
    limits = {
        'epsilon': dp.epsilon,
        'delta': dp.delta,
        'accountant': dp.accountant,
        'relation': dp.relation,
    }
    if spent_before is None:
        spent_before = already_spent.releases(dp.already_spent, is_private=config.seed is None)
    if bool(already_spent.paths(dp.already_spent)) != bool(spent_before):
        raise ValueError(
            f'config.dp.already_spent is {dp.already_spent!r}, but plan.json has {len(spent_before)} '
            'releases that were spent before. Someone changed the plan: restore the file, or use another '
            '--workdir'
        )
    if other := {part.mechanism.unit for part in spent_before} - {counted.name}:
        raise ValueError(
            f'config.dp.already_spent is {dp.already_spent!r}, with releases whose unit of privacy is '
            f'{other.pop()}; it must be {counted.name}, as config.dp.unit: ε of different units do not '
            'add up'
        )
    q, steps = budget_lib.schedule(counted.used_images, finetune.batch_size, finetune.epochs)
    known = []
    for name in asked(config):
        section, make_query = config[QUERIES[name]], functools.partial(query_releases, config, name)
        sigma = section.noise_multiplier
        if section.epsilon_share is not None:
            setting = f'{QUERIES[name]}.epsilon_share'
            sigma = noise.get(name) or budget_lib.calibrate_share(
                make_query, section.epsilon_share, setting=setting, **limits
            )
        known.append(make_query(sigma))

    chosen = []
    if selection(config) is not None:
        make_selection = functools.partial(_selection_releases, config)
        sigma = noise.get(SELECTION) or budget_lib.calibrate_share(
            make_selection,
            config.evaluate.selection_share,
            setting='evaluate.selection_share',
            **limits,
        )
        chosen = [make_selection(sigma)]

    def dp_sgd(sigma: float) -> Releases:
        mechanism = GaussianMechanism(
            name=DP_SGD,
            noise_multiplier=sigma,
            sampling_probability=q,
            sensitivity=finetune.clip_norm,
            unit=counted.name,
        )
        return Releases(mechanism=mechanism, count=steps, declared=is_finetuned)

    budget = budget_lib.calibrate(
        known, dp_sgd, noise_multiplier=noise.get(DP_SGD), before=spent_before, after=chosen, **limits
    )
    if is_finetuned:  # its noise was not calibrated
        _check_within(budget)
    central = 0 if config.imported.kind else budget.count(CENTRAL_QUERY) * config.data.classes
    batch = min(pretrain.batch_size, max(central, 1))
    drawn_steps = sum(pretrain[f'{QUERIES[name]}_steps'] for name in (MOMENTS, FREQUENCY) if budget.of(name))
    pretrain_steps = pretrain.epochs * math.ceil(central / batch)
    noised_images = (pretrain_steps * batch + drawn_steps * pretrain.batch_size) * pretrain.draws
    finetune_steps = 0 if is_finetuned else steps
    return plan_lib.Plan(
        budget=budget,
        private_images=counted.images,
        groups=counted.groups,
        images_per_group=counted.images_per_group,
        parameters=model_lib.size(run_model.shapes()),
        pretrain_steps=pretrain_steps + drawn_steps,
        pretrain_noised_images=noised_images,
        finetune_noised_images=round(finetune_steps * counted.places / round(1 / q) * finetune.draws),
    )


def _check_within(budget: budget_lib.Budget) -> None:
    """Refuse a fine-tuning that, as declared, exceeds the budget with all else."""
    sigma, spent = budget.of(DP_SGD).mechanism.noise_multiplier, budget.spent()
    if spent > budget.epsilon:
        raise ValueError(
            f'config.imported.noise_multiplier is {sigma:g}: with it, what is declared of '
            f'config.imported.path and all else spend ε = {accounting.format_epsilon(spent, 6)}. '
            f'config.dp.epsilon is {accounting.format_exact(budget.epsilon)}; it must be at least that'
        )


def query_releases(config: ConfigDict, name: str, sigma: float) -> Releases:
    """Make the releases of a query (its mechanism's name) with this noise multiplier."""
    settings = config[QUERIES[name]]
    mechanism = GaussianMechanism(
        name=name,
        noise_multiplier=sigma,
        sampling_probability=settings.sampling_probability,
        sensitivity=_MAKERS[name](config).sensitivity,
        unit=config.dp.unit,
    )
    is_declared = bool(config.imported.kind)
    return Releases(mechanism=mechanism, count=settings.get('queries', 1), declared=is_declared)


def _selection_releases(config: ConfigDict, sigma: float) -> Releases:
    """Make the selection with this noise multiplier."""
    mechanism = GaussianMechanism(
        name=SELECTION,
        noise_multiplier=sigma,
        sampling_probability=1.0,
        sensitivity=selection(config).sensitivity,
        unit=config.dp.unit,
    )
    return Releases(mechanism=mechanism, count=1)


def sizes(config: ConfigDict, run_model: Model, images_at_once: int | None = None) -> sizes_lib.Sizes:
    """Choose what is in work at once, as set or by the rule; `images_at_once` replaces the setting."""
    settings = config.finetune
    return sizes_lib.choose(
        run_model,
        draws=settings.draws,
        images_at_once=images_at_once or config.loop.images_at_once,
        microbatch=settings.microbatch,
        devices_per_image=settings.devices_per_image,
        batch=batch(config),
        images_per_row=config.dp.images_per_group or 1,
    )


def batch(config: ConfigDict) -> step_time.Batch:
    """Describe how many rows a step of fine-tuning has."""
    counted, settings = unit(config), config.finetune
    q, _ = budget_lib.schedule(counted.used_images, settings.batch_size, settings.epochs)
    return step_time.Batch(units=counted.size, probability=q)


def settled_images(config: ConfigDict, run_model: Model, path: Path, noised_images: int) -> int:
    """Choose how many noised images are in work at once, as set or for good, see `sizes.settle`."""
    settings = config.finetune
    return config.loop.images_at_once or sizes_lib.settle(
        path,
        run_model,
        noised_images,
        draws=settings.draws,
        microbatch=settings.microbatch,
        label_dropout=settings.label_dropout,
    )


def timed_steps(config: ConfigDict) -> tuple[int, float]:
    """Return how many steps of fine-tuning fit into `finetune.time_limit`, at least 1, and seconds of one.

    The rate of this machine is measured on random images, unless it is known from an earlier run.
    """
    settings, run_model = config.finetune, model(config)
    with devices.limited_to(len(devices.local())):  # of several processes, this one measures alone
        sizes_lib.measured(
            run_model,
            draws=settings.draws,
            microbatch=settings.microbatch,
            label_dropout=settings.label_dropout,
            images_at_once=config.loop.images_at_once,
        )
    rate, _ = hours.rate(run_model)
    chosen = sizes(config, run_model)
    step = step_time.Step(
        batch=batch(config),
        draws=settings.draws,
        parameters=model_lib.size(run_model.shapes()),
        images_per_row=config.dp.images_per_group or 1,
    )
    found = step_time.predict_here(
        step, microbatch=chosen.microbatch, devices_per_image=chosen.devices_per_image, rate=rate
    )
    return max(1, int(hours.seconds(settings.time_limit) / found.seconds)), found.seconds


def augmentation(config: ConfigDict) -> Callable:
    """Make the augmentation of pre-training, (key, image) → image."""
    settings = config.pretrain
    return augment.make_augmentation(
        settings.augmentation, **settings.get(settings.augmentation, ConfigDict())
    )


def samplers(config: ConfigDict) -> dict[str, Callable]:
    """Make the samplers: purpose of the images → (denoise, z, label, noise) → images in [-1, 1]."""
    settings, no_class = config.generate, config.data.classes
    # Enough to see what there is.
    few_steps = {'steps': min(settings.sampler.steps, _SAMPLER_STEPS_OF_SNAPSHOTS), 'guidance': 0.0}
    return {
        'images': sampler.make_sampler(no_class=no_class, **settings.sampler),
        'classifier_images': sampler.make_sampler(no_class=no_class, **settings.classifier_sampler),
        'over_finetuning': sampler.make_sampler(
            no_class=no_class, **(settings.sampler.to_dict() | few_steps)
        ),
    }


def preparation(config: ConfigDict, cache: Path | None = None) -> Preparation:
    """Say how the source is read and what is done with its images.

    Args:
        config: whose image size and channels may be None: not decided yet.
        cache: folder in private/ for decoded images; None: they are decoded when they are needed.
    """
    data = config.data
    return Preparation(
        image_size=data.image_size and data.image_size * data.average_down,
        channels=data.channels,
        fit=data.fit,
        resize=data.resize,
        test_share=data.test_share,
        split_seed=data.split_seed,
        labels=data.labels,
        image_key=data.image_key,
        label_key=data.label_key,
        groups=data.groups,
        validation=data.validation,
        is_listing_public=config.dp.relation == accounting.ZERO_OUT and not data.groups,
        class_names=tuple(data.class_names or ()),
        cache=cache,
    )


def source_problems(config: ConfigDict, processes: int = 1) -> tuple[sources.SourceInfo | None, list[str]]:
    """Describe the source by its headers, and say where the config does not fit it.

    Args:
        config: the settings; where some are not set yet, it is not compared.
        processes: that keep a share of the images each.

    Returns:
        What the source says of itself, None if it is not there; and a line for each problem.
    """
    data, prepared = config.data, preparation(config)
    try:
        info = sources.describe(data.source, data_dir=data.dir, processes=processes, preparation=prepared)
    except (ValueError, OSError) as error:
        return None, [f'config.data.source: {error}']
    return info, misfits(config, info)


def misfits(config: ConfigDict, info: sources.SourceInfo) -> list[str]:
    """Say where the config does not fit its source, in a line each; what is not set yet fits."""
    data, prepared = config.data, preparation(config)
    if None in (data.image_size, data.channels, data.average_down, data.train_images, data.classes):
        return []
    problems = data_problems(config, 'train', (info.train_images, *prepared.shape(info.image_shape)))
    if not prepared.changes_images and None in info.image_shape:
        least, _, most = info.sides or (None, None, None)
        sides = '' if info.sides is None else f' (short sides from {least} to {most} pixels)'
        problems.append(
            f"config.data.fit is 'none'; it must be 'crop' or 'pad', because the images of {info.name} "
            f'differ in size{sides}'
        )
    if info.classes > data.classes:
        problems.append(
            f'config.data.classes is {data.classes}; it must be at least {info.classes}, because the labels '
            f'in {info.name} go to {info.classes - 1}'
        )
    if not info.test_images:
        problems.append(
            f'config.data.test_share is {data.test_share}, by which {info.name} has no test image; it must '
            'be larger'
        )
    if data.groups:
        try:
            groups = sources.near_groups(data.source, data.groups, data_dir=data.dir, preparation=prepared)
            if groups is not None:
                _check_groups(config, groups)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def check_headers(config: ConfigDict, splits: Sequence[str]) -> None:
    """Compare the headers of these splits with the config, before anything is read, of whatever size.

    Raises:
        ValueError, FileNotFoundError: one line for everything that does not fit, of all splits.
    """
    data, problems = config.data, []
    for split in splits:
        try:
            found = sources.shape(data.source, split, data_dir=data.dir, preparation=preparation(config))
            problems += data_problems(config, split, found)
        except ValueError as error:
            problems.append(str(error))
    _refuse(list(dict.fromkeys(problems)))


def images(
    config: ConfigDict,
    split: str,
    rows: sources.AnyRows = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Load the real images of one split ('train' is the private set) and compare them with the config.

    Args:
        config: the settings.
        split: 'train' or 'test'.
        rows: which rows of the split it keeps, see `sources.load`; None: all. The
            number of images that is compared is that of the whole split.
        cache: folder in private/ for decoded images; None: they are decoded again at every start.
        progress: is told (images decoded, images in all), where that takes long; it may raise to stop.

    Raises:
        ValueError, FileNotFoundError: they are not as the config says, or not there. What is wrong with
            labels or pixels, a process with another share may not find.
    """
    data, prepared = config.data, preparation(config, cache)
    # From the headers: before anything is read, of whatever size.
    shape = sources.shape(data.source, split, data_dir=data.dir, rows=rows, preparation=prepared)
    _refuse(data_problems(config, split, shape))
    found = sources.load(
        data.source,
        split,
        data_dir=data.dir,
        average_down=data.average_down,
        classes=data.classes,
        groups=data.groups,
        rows=rows,
        in_memory=data.in_memory if split == 'train' else 'yes',  # all of the others are needed at once
        preparation=prepared,
        progress=progress,
    )
    _, height, width, channels = found.images.shape
    before_pooling = (found.total, height * data.average_down, width * data.average_down, channels)
    _refuse(data_problems(config, split, before_pooling))  # what no header told
    if split == 'train' and found.groups is not None:
        _check_groups(config, found.groups)
    return found


def _check_groups(config: ConfigDict, groups: np.ndarray) -> None:
    """Compare the number of groups with the config, where it is public."""
    data, number = config.data, len(np.unique(groups))
    if accounting.RELATIONS[config.dp.relation].size_is_public and number != data.train_groups:
        raise ValueError(
            f'config.data.train_groups is {data.train_groups}; it must be {number}, the number of groups '
            f'in {data.source}. If their number is not public, set config.dp.relation to '
            "'add_remove' and train_groups to a public guess of it"
        )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError('\n'.join(problems))


def data_problems(config: ConfigDict, split: str, shape: Sequence[int | None]) -> list[str]:
    """Compare the images of one split with the config; return a line for everything that does not fit.

    Args:
        config: the settings.
        split: 'train' or 'test'.
        shape: (N, H, W, C) of the prepared images, before average pooling; None: not known.
    """
    data, (count, *image_shape) = config.data, shape
    side = data.image_size * data.average_down
    wanted, problems = (side, side, data.channels), []
    of_split = 'private images' if split == 'train' else 'test images'
    if any(found not in (None, needed) for found, needed in zip(image_shape, wanted)):
        problems.append(
            f'config.data.image_size is {data.image_size}, data.average_down is {data.average_down} and '
            f'data.channels is {data.channels}: images must have the shape {wanted}. The {of_split} of '
            f"{data.source} have the shape {tuple(image_shape)}. With config.data.fit 'crop' or 'pad' they "
            'are made to fit'
        )
    is_public = accounting.RELATIONS[config.dp.relation].size_is_public
    if split == 'train' and is_public and not data.groups and count != data.train_images:
        problems.append(
            f'config.data.train_images is {data.train_images}; it must be {count}, the number of '
            f'private images in {data.source}. ε is computed from it. If their number is not public, set '
            "config.dp.relation to 'add_remove' and train_images to a public guess of it"
        )
    return problems
