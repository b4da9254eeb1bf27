"""Settings that a config leaves unset get values from the images, from other settings and from each other.

How it goes:
  1. A work directory that has settings already keeps its values: the images are not asked.
  2. Else the source is described by its headers, by process 0 alone.
  3. Every unset setting that `_RULES` has gets its value, in this order, with the reason for `--stage=plan`.

The rules join two configs that were tried: `digits_8` (1,437 images) and `mnist_28` (the paper's, 60,000).
Between them, values go from one to the other with the number of images. What rules read from the images
(`FROM_IMAGES`) is public by declaration. No rule may look at more: not at counts of single classes.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

from ml_collections import ConfigDict

from dpp_jax import build
from dpp_jax.data import sources
from dpp_jax.data.sources import SourceInfo
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import accounting, budget, groups, queries
from dpp_jax.run import warnings
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.training import hosts

# Settings whose values are read from the private images; all others follow from these.
FROM_IMAGES = (
    'data.train_images',
    'data.train_groups',
    'dp.images_per_group',
    'data.image_size',
    'data.average_down',
    'data.channels',
    'data.classes',
    'data.class_names',
)
_FEW, _MANY = 1_437, 60_000  # private images of digits_8 and of mnist_28
_LARGE_NETWORK = (20_000, 24)  # from so many images, of so many pixels a side
_LARGEST_SIDE = 64  # that is chosen: larger ones are asked for
_SMALLEST_ASKED = 7  # pixels a side of a central image that still shows something
# Of a central image's pixel, in gray ranges: what the paper's queries may have, and what others aim at.
_PAPER_NOISE, _PIXEL_NOISE = 0.25, 0.15
_COUNT_NOISE = 0.15  # of a noisy class count, relative
_SHARES = (1 / 8, 1 / 4)  # of ε, for the queries: digits_8's, and where that leaves too much noise
_STEP_NOISE = 4.0  # of DP-SGD over the largest clipped sum: the largest of the paper's settings
_EPOCHS = 'finetune.epochs'
_CLIPPED = 0.35  # norm of a centered image over √d


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """A setting that had no value.

    Attributes:
        name: as 'finetune.epochs'.
        value: that it has now.
        why: where the value comes from.
    """

    name: str
    value: Any
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """What a rule may look at.

    Attributes:
        config: with all that earlier rules decided.
        info: of the source.
        unset: settings that have, or had, no value.
    """

    config: ConfigDict
    info: SourceInfo
    unset: tuple[str, ...]

    @property
    def images(self) -> int:
        """How many private images are used."""
        return build.unit(self.config).used_images

    @property
    def per_class(self) -> float:
        return self.images / self.config.data.classes

    @property
    def is_as_paper(self) -> bool:
        """Whether samples are asked, as in the paper, and not all images."""
        return self.config.query.sampling_probability < 1

    @property
    def has_large_network(self) -> bool:
        images, side = _LARGE_NETWORK
        return self.images >= images and self.config.data.image_size >= side


_Rule = Callable[[_Case], tuple[Any, str]]


def unset(config: ConfigDict) -> tuple[str, ...]:
    """Return the settings without a value that a rule gives one, in the order of the rules."""
    names = [name for name in _RULES if get(config, name) is None]
    if config.dp.unit != groups.GROUP:  # they must be left out
        names = [name for name in names if name not in ('data.train_groups', 'dp.images_per_group')]
    if 'query.pixel_center' not in names:  # without a norm, images are not clipped
        names = [name for name in names if name != 'query.clip_norm']
    return tuple(names)


def settled(config: ConfigDict, workdir: WorkDir, check: Callable[[ConfigDict], None]) -> ConfigDict:
    """Return the config with all settings, the same in all processes.

    Args:
        config: as the user gave it.
        workdir: process 0 reads the settings that it was made with.
        check: refuses settings, given the config and the names of those without a value.

    Raises:
        ValueError, OSError: settings are wrong, or the source cannot be described.
    """

    config = timed(config)

    def changes():
        known = recorded(config, workdir)
        if known is not None:
            return flatten(known)
        if not unset(config):
            return {}
        check(config, unset(config))
        data = config.data
        prepared = build.preparation(config)
        info = sources.describe(data.source, data_dir=data.dir, processes=hosts.count(), preparation=prepared)
        resolved, derived = resolve(config, info)
        return flatten({row.name: row.value for row in derived} | {'data.derived': resolved.data.derived})

    return with_values(config, hosts.from_first(changes))


def timed(config: ConfigDict) -> ConfigDict:
    """Return the config without its epochs of fine-tuning, if a time limit decides them."""
    return with_values(config, {_EPOCHS: None}) if config.finetune.time_limit else config


def recorded(config: ConfigDict, workdir: WorkDir) -> dict[str, Any] | None:
    """Return the values that a work directory has for settings that are unset; None if it has no settings.

    A source that is not named is that of the work directory too.
    """
    known = workdir.recorded()
    if known is None:
        return None
    names = [*unset(config), *(['data.source'] if config.data.source is None else [])]
    values = {name: known[name] for name in names if name in known}
    return values | {'data.derived': known.get('data.derived', [])}


def resolve(config: ConfigDict, info: SourceInfo) -> tuple[ConfigDict, tuple[Derived, ...]]:
    """Give every unset setting its value.

    Args:
        config: whose other settings are allowed, see `settings.check`.
        info: of its source.

    Returns:
        A config without unset settings, and what was derived, in the order of the rules.

    Raises:
        ValueError: a setting cannot be derived; the message names it.
    """
    names = unset(config)
    if not names:
        return config, ()
    config, derived = with_values(config, {}), []
    for name in names:
        value, why = _RULES[name](_Case(config=config, info=info, unset=names))
        config = with_values(config, {name: value})
        derived.append(Derived(name=name, value=value, why=why))
    if config.finetune.time_limit and _EPOCHS in names:
        value, why = _epochs_in_time(config)
        config = with_values(config, {_EPOCHS: value})
        derived = [row for row in derived if row.name != _EPOCHS]
        derived.append(Derived(name=_EPOCHS, value=value, why=why))
    read = tuple(name for name in names if name in FROM_IMAGES)
    return with_values(config, {'data.derived': read}), tuple(derived)


def table(derived: tuple[Derived, ...]) -> str:
    """Write what was derived for people: name, value and reason in columns."""
    shown = [(row.name, _shown(row.value), row.why) for row in derived]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    lines = [f'{name.ljust(widths[0])}  {value.ljust(widths[1])}  {why}' for name, value, why in shown]
    return '\n'.join(line.rstrip() for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return 'not set'
    if isinstance(value, tuple | list):
        texts = [str(entry) for entry in value]
        more = f', … ({len(texts)})' if len(texts) > 4 else ''
        return f'({", ".join(texts[:4])}{more})'
    return f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else f'{value}'


def get(config: ConfigDict, name: str) -> Any:
    """Return the value of a setting by its full name; 'missing' if the config has no such setting."""
    for part in name.split('.'):
        if not isinstance(config, ConfigDict) or part not in config:
            return 'missing'
        config = config[part]
    return config


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Return a config of its own with these values, by full names; lists become tuples."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for name, value in values.items():
            *sections, last = name.split('.')
            section = functools.reduce(lambda found, part: found[part], sections, config)
            section[last] = tuple(value) if isinstance(value, list) else value
    return config


# ---- the images ---------------------------------------------------------------------------------


def _train_images(case: _Case) -> tuple[int, str]:
    _refuse_secret_number(case.config, 'data.train_images')
    return case.info.train_images, f'private images in {case.info.name}'


def _train_groups(case: _Case) -> tuple[int, str]:
    data = case.config.data
    _refuse_secret_number(case.config, 'data.train_groups')
    number = case.info.groups
    if number is None:
        raise ValueError('config.data.train_groups is not set; it must be: only the whole set tells it')
    return number, f'groups in {data.groups}'


def _refuse_secret_number(config: ConfigDict, name: str) -> None:
    """Refuse to publish a number that the neighboring relation keeps secret."""
    if not accounting.RELATIONS[config.dp.relation].size_is_public:
        raise ValueError(
            f'config.{name} is not set; it must be a public number near the true one, because dp.relation is '
            f'{config.dp.relation!r}: the true number is private'
        )


def _images_per_group(case: _Case) -> tuple[int, str]:
    data = case.config.data
    mean = data.train_images / data.train_groups
    return min(1000, math.ceil(mean)), f'{mean:.3g} images per group in the mean'


def _average_down(case: _Case) -> tuple[int, str]:
    side, asked = _uniform_side(case.info), case.config.data.image_size
    if _is_fitted(case) or side is None:
        return 1, 'images are resized'
    if asked is not None:
        factor = side // asked if side % asked == 0 else 1
        return factor, f'images of {side} pixels for data.image_size = {asked}'
    if side <= _LARGEST_SIDE:
        return 1, f'images have {side} pixels, at most {_LARGEST_SIDE}'
    factors = [k for k in range(2, side + 1) if side % k == 0 and side // k <= _LARGEST_SIDE]
    even = [k for k in factors if side // k % 2 == 0]
    return (even or factors)[0], f'images of {side} pixels; at most {_LARGEST_SIDE} are chosen'


def _image_size(case: _Case) -> tuple[int, str]:
    data, side = case.config.data, _uniform_side(case.info)
    if not _is_fitted(case) and side is not None:
        return (
            side // data.average_down,
            f'images have {side} pixels, data.average_down is {data.average_down}',
        )
    if data.fit == 'none':
        height, width, _ = case.info.image_shape
        found = 'of several sizes' if height is None or width is None else f'{height} x {width}'
        raise ValueError(
            f'config.data.image_size is not set, and the images of {case.info.name} are {found}; set '
            "data.fit to 'crop' or 'pad', which makes them square"
        )
    known = [side for side in case.info.image_shape[:2] if side is not None]
    if not case.info.sides and not known:
        raise ValueError(
            'config.data.image_size is not set; it must be, because no header tells the size of images in '
            f'{case.info.name}'
        )
    short = case.info.sides[1] if case.info.sides else min(known)
    most = min(short, _LARGEST_SIDE)
    patch = case.config.model.patch
    levels = len(case.config.model.multipliers or _multipliers_for(most // patch))
    step = patch * 2 ** (levels - 1)
    return max(step, most // step * step), (
        f'short sides have {short} pixels in the median; at most {_LARGEST_SIDE}, in steps of {step}'
    )


def _uniform_side(info: SourceInfo) -> int | None:
    """Return the side of images that are all square and of one size; None for others."""
    height, width, _ = info.image_shape
    return height if height is not None and height == width else None


def _is_fitted(case: _Case) -> bool:
    """Whether images are made square and resized as they are read."""
    return case.config.data.fit != 'none'


def _channels(case: _Case) -> tuple[int, str]:
    channels = case.info.image_shape[2]
    return channels, 'gray images' if channels == 1 else 'there are color images'


def _classes(case: _Case) -> tuple[int, str]:
    relation = case.config.dp.relation
    if not accounting.RELATIONS[relation].size_is_public:
        raise ValueError(
            'config.data.classes is not set; it must be, and data.class_names where classes have names, '
            f'because dp.relation is {relation!r}: one image more could add a class, and change all numbers'
        )
    return case.info.classes, f'classes in {case.info.name}'


def _class_names(case: _Case) -> tuple[tuple[str, ...], str]:
    names = tuple(case.info.class_names)
    if len(names) != case.config.data.classes:
        return (), 'the source has no names: numbers stand for them'
    return names, f'names in {case.info.name}'


# ---- privacy ------------------------------------------------------------------------------------


def _delta(case: _Case) -> tuple[float, str]:
    """Choose the largest power of ten below one over the number of units."""
    number = build.unit(case.config).size
    exponent = len(str(number))  # 10^exponent is the smallest power of ten above it
    what = 'groups' if case.config.data.train_groups else 'images'
    return float(f'1e-{exponent}'), f'the power of ten below 1 / {number:,} private {what}'


# ---- the query ----------------------------------------------------------------------------------


def _kind(case: _Case) -> tuple[str, str]:
    del case
    return 'mean', 'as digits_8 and mnist_28'


def _sampling_probability(case: _Case) -> tuple[float, str]:
    data = case.config.data
    paper = math.sqrt(data.channels) * math.ceil(data.image_size / 2)
    noise = warnings.image_noise(5.0, paper, 0.1, case.per_class)
    if noise <= _PAPER_NOISE:
        return 0.1, f'as mnist_28: a tenth of the images, whose noise is {noise:.2g} gray ranges a pixel'
    return 1.0, f'all images: with a tenth, as in mnist_28, noise were {noise:.2g} gray ranges a pixel'


def _queries(case: _Case) -> tuple[int, str]:
    return (5, 'as mnist_28') if case.is_as_paper else (2, 'as digits_8: few of all images')


def _pixel_center(case: _Case) -> tuple[float, str]:
    data = case.config.data
    if case.config.query.kind != 'mean':
        return 0.0, f'of no use to the {case.config.query.kind} query'
    if case.is_as_paper and data.image_size >= _LARGE_NETWORK[1]:
        return 0.0, 'as mnist_28'
    if data.channels == 1:
        return 0.3, 'as digits_8: gray images are rather dark'
    return 0.5, 'the middle of the gray range, for color images'


def _noise_multiplier(case: _Case) -> tuple[float, str]:
    share = case.config.query.epsilon_share
    if share is not None:
        return _calibrated(case, share), f'{100 * share:.3g} % of ε, as query.epsilon_share says'
    if case.is_as_paper:
        least = _calibrated(case, _SHARES[1])
        return max(5.0, least), 'as mnist_28' if least < 5 else f'{100 * _SHARES[1]:.3g} % of ε'
    for share in _SHARES:
        sigma = _calibrated(case, share)
        noise = _pixel_noise(case, sigma, _downsamples(case)[-1])
        if noise <= _PIXEL_NOISE:
            break
    return sigma, f'{100 * share:.3g} % of ε = {case.config.dp.epsilon:g} for the queries'


def _calibrated(case: _Case, share: float) -> float:
    """Compute the σ that spends a share of ε, rounded up to three digits."""
    dp = case.config.dp
    sigma = budget.calibrate_share(
        functools.partial(build.query_releases, with_values(case.config, _PLAIN_QUERY), budget.CENTRAL_QUERY),
        share,
        epsilon=dp.epsilon,
        delta=dp.delta,
        accountant=dp.accountant,
        relation=dp.relation,
    )
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 2)
    return float(f'{math.ceil(sigma / unit) * unit:.6g}')


# What a query's ε does not depend on.
_PLAIN_QUERY = {
    'query.downsample': 1,
    'query.pixel_center': 0.0,
    'query.clip_norm': None,
    'query.class_counts': 'public',
}


def _downsample(case: _Case) -> tuple[int, str]:
    side, sigma = case.config.data.image_size, case.config.query.noise_multiplier
    if case.is_as_paper and side >= _LARGE_NETWORK[1]:
        return 2, 'as mnist_28'
    for factor in _downsamples(case):
        noise = _pixel_noise(case, sigma, factor)
        if noise <= _PIXEL_NOISE:
            break
    return factor, f'noise of a pixel: {noise:.2g} gray ranges (at most {_PIXEL_NOISE:g} wanted)'


def _downsamples(case: _Case) -> list[int]:
    """Return factors to reduce images by, as long as something is left to see."""
    side = case.config.data.image_size
    factors = [1]
    while side / (2 * factors[-1]) >= _SMALLEST_ASKED:
        factors.append(2 * factors[-1])
    return factors


def _pixel_noise(case: _Case, sigma: float, downsample: int) -> float:
    """Compute the noise of a pixel of a central image, in gray ranges."""
    query = case.config.query
    longest = _root(case, downsample)
    if query.kind == 'mean':
        norm = longest * max(query.pixel_center, 1 - query.pixel_center)
        longest = min(norm, query.clip_norm or norm)
        if _is_clipped(case):
            longest = _CLIPPED * _root(case, downsample)
    return warnings.image_noise(sigma, longest, query.sampling_probability, case.per_class)


def _root(case: _Case, downsample: int) -> float:
    """Return √d, d the number of values of an image that is asked."""
    data = case.config.data
    return math.sqrt(data.channels) * math.ceil(data.image_size / downsample)


def _is_clipped(case: _Case) -> bool:
    """Whether images will be clipped by the rule."""
    return 'query.clip_norm' in case.unset and case.config.query.pixel_center > 0


def _clip_norm(case: _Case) -> tuple[float | None, str]:
    if not _is_clipped(case):
        return None, 'not clipped: pixels are not centered'
    root = _root(case, case.config.query.downsample)
    return float(f'{_CLIPPED * root:.4g}'), f'{_CLIPPED:g} √d, d = {round(root**2):,} values; as digits_8'


def _class_counts(case: _Case) -> tuple[str, str]:
    query = case.config.query
    if query.kind != 'mean':
        return 'public', f'the only ones of the {query.kind} query'
    noise = query.noise_multiplier / (queries.COUNT_WEIGHT * query.sampling_probability * case.per_class)
    if noise <= _COUNT_NOISE:
        return 'noisy', f'for unequal classes: counts have {100 * noise:.2g} % noise'
    return 'public', f'noisy ones would have {100 * noise:.2g} % noise'


def _post_process(case: _Case) -> tuple[bool, str]:
    is_reduced = case.config.query.downsample > 1
    return is_reduced, 'central images are enlarged' if is_reduced else 'central images have all pixels'


# ---- the network --------------------------------------------------------------------------------


def _width(case: _Case) -> tuple[int, str]:
    return (32, 'as mnist_28') if case.has_large_network else (16, _small_network())


def _blocks(case: _Case) -> tuple[int, str]:
    return (2, 'as mnist_28') if case.has_large_network else (1, _small_network())


def _small_network() -> str:
    images, side = _LARGE_NETWORK
    return f'as digits_8: fewer than {images:,} images or {side} pixels'


def _multipliers(case: _Case) -> tuple[tuple[int, ...], str]:
    side = case.config.data.image_size // case.config.model.patch
    wanted, why = _multipliers_for(side), 'as celeba_64' if side > 32 else 'as digits_8 and mnist_28'
    while side % 2 ** (len(wanted) - 1):
        wanted, why = wanted[:-1], f'{side} pixels cannot be halved more often'
    return wanted, why


def _multipliers_for(side: int) -> tuple[int, ...]:
    return (1, 2, 4) if side > 32 else (2, 2)


def _attention(case: _Case) -> tuple[tuple[int, ...], str]:
    side = case.config.data.image_size // case.config.model.patch
    levels = len(case.config.model.multipliers)
    if levels == 1:
        chosen = (side,) if side <= 16 else ()
        return chosen, 'there is one level'
    chosen = side // 2 if side <= 32 or levels == 2 else side // 4
    what = 'data.image_size' if case.config.model.patch == 1 else 'data.image_size / model.patch'
    return (chosen,), f'{"half" if chosen == side // 2 else "a quarter"} of {what}'


# ---- pre-training -------------------------------------------------------------------------------

_PRETRAIN_BATCH, _NOISED_IMAGES = 64, 72  # central images of a step at most, and noised images about


def _pretrain_batch(case: _Case) -> tuple[int, str]:
    del case
    return _PRETRAIN_BATCH, 'as digits_8 and mnist_28'


def _pretrain_epochs(case: _Case) -> tuple[int, str]:
    steps, why = _between(case, 600, 2000)
    batches = math.ceil(_central_images(case) / case.config.pretrain.batch_size)
    return max(1, round(steps / batches)), f'{round(steps):,} steps: {why}'


def _pretrain_draws(case: _Case) -> tuple[int, str]:
    central = min(case.config.pretrain.batch_size, _central_images(case))
    return max(
        1, round(_NOISED_IMAGES / central)
    ), f'about {_NOISED_IMAGES} noised images of {central} in a step'


def _central_images(case: _Case) -> int:
    return case.config.query.queries * case.config.data.classes


def _augmentation(case: _Case) -> tuple[str, str]:
    if case.config.data.image_size < 24:
        return 'affine', 'as digits_8: other operations destroy images of few pixels'
    return 'rand_augment', 'as mnist_28'


def _magnitude(case: _Case) -> tuple[int, str]:
    return (3, 'as mnist_28') if case.config.data.channels == 1 else (9, 'as celeba_32: color images')


def _shift(case: _Case) -> tuple[float, str]:
    return case.config.data.image_size / 8, 'an eighth of data.image_size, as digits_8'


# ---- fine-tuning --------------------------------------------------------------------------------


def _batch_size(case: _Case) -> tuple[int, str]:
    """Choose a batch as large as in the anchors, or larger if DP-SGD's noise asks for it."""
    first = min(4096, 2 ** round(math.log2(max(1.0, case.images / 6))))
    size, model = first, build.model(case.config)
    while (noise := _step_noise(case, model, size)) > _STEP_NOISE and size < case.images:
        size = min(case.images, 2 * size)
    wanted = f'a sixth of {case.images:,} images, as digits_8' if first < 4096 else 'as mnist_28'
    more = '' if size == first else f'; more, because of noise {warnings.times(noise)} times the gradients'
    return size, wanted + more


def _step_noise(case: _Case, model: Model, batch_size: int) -> float:
    """Compute DP-SGD's noise over its largest sum, as `run.warnings` has it."""
    made = build.plan(with_values(case.config, {'finetune.batch_size': batch_size}), model)
    sigma = made.budget.of(budget.DP_SGD).mechanism.noise_multiplier
    return warnings.step_noise(sigma, made.parameters, made.expected_batch_size)


def _between(case: _Case, few: float, many: float) -> tuple[float, str]:
    """Return a value between those of digits_8 and mnist_28, by the number of images."""
    place = math.log(case.images / _FEW) / math.log(_MANY / _FEW)
    if place <= 0:
        return few, 'as digits_8'
    if place >= 1:
        return many, 'as mnist_28'
    return few * (many / few) ** place, f'between {few:g} (digits_8) and {many:g} (mnist_28)'


def _round_between(few: float, many: float, round_value: Callable[[float], Any]) -> _Rule:
    def rule(case):
        value, why = _between(case, few, many)
        return round_value(value), why

    return rule


def _two_digits(value: float) -> float:
    return float(f'{value:.2g}')


def _power_of_two(value: float) -> int:
    return 2 ** round(math.log2(value))


def _ema_decay(few: float, many: float) -> _Rule:
    """Go from one decay to the other by how many steps they average over, 1 / (1 - decay)."""

    def rule(case):
        value, why = _between(case, 1 / (1 - few), 1 / (1 - many))
        return round(1 - _two_digits(1 / value), 6), f'averages over {value:,.0f} steps: {why}'

    return rule


def _epochs_in_time(config: ConfigDict) -> tuple[float, str]:
    """Return how often each image is used within `finetune.time_limit`: of all else that is decided."""
    steps, seconds = build.timed_steps(config)
    return steps * build.batch(config).probability, (
        f'{steps:,} steps of {seconds:.2g} s in finetune.time_limit = {config.finetune.time_limit}, by the '
        'rate of this machine on random images'
    )


# ---- what is made -------------------------------------------------------------------------------


def _synthetic_images(case: _Case) -> tuple[int, str]:
    number, why = _between(case, 5_000, 60_000)
    classes = case.config.data.classes
    each = max(100, math.ceil(number / classes))
    return each * classes, f'{each:,} of each class: {why}'


_RULES: dict[str, _Rule] = {
    'data.train_images': _train_images,
    'data.train_groups': _train_groups,
    'dp.images_per_group': _images_per_group,
    'data.channels': _channels,
    'data.average_down': _average_down,
    'data.image_size': _image_size,
    'data.classes': _classes,
    'data.class_names': _class_names,
    'dp.delta': _delta,
    'query.kind': _kind,
    'query.sampling_probability': _sampling_probability,
    'query.queries': _queries,
    'query.pixel_center': _pixel_center,
    'query.noise_multiplier': _noise_multiplier,
    'query.downsample': _downsample,
    'query.clip_norm': _clip_norm,
    'query.class_counts': _class_counts,
    'query.post_process': _post_process,
    'model.width': _width,
    'model.blocks': _blocks,
    'model.multipliers': _multipliers,
    'model.attention_resolutions': _attention,
    'pretrain.batch_size': _pretrain_batch,
    'pretrain.epochs': _pretrain_epochs,
    'pretrain.draws': _pretrain_draws,
    'pretrain.learning_rate': _round_between(2e-3, 3e-4, _two_digits),
    'pretrain.ema_decay': _ema_decay(0.995, 0.999),
    'pretrain.augmentation': _augmentation,
    'pretrain.rand_augment.magnitude': _magnitude,
    'pretrain.affine.shift': _shift,
    'finetune.epochs': _round_between(20, 150, lambda value: float(round(value))),
    'finetune.draws': _round_between(4, 32, _power_of_two),
    'finetune.learning_rate': _round_between(2e-3, 3e-4, _two_digits),
    'finetune.ema_decay': _ema_decay(0.995, 0.999),
    'finetune.batch_size': _batch_size,
    'generate.images': _synthetic_images,
    'generate.sampler.steps': _round_between(18, 1000, round),
    'evaluate.epochs': _round_between(30, 50, round),
    'evaluate.ema_decay': _ema_decay(0.99, 0.9999),
}
