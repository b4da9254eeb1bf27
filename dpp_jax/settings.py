"""What every setting may be, section by section, in the order of configs/default.py.

`_table` says what one value may be; `_RELATIONS` says what it may be beside other settings. A query and an
augmentation check their own settings. Allowed names are those of the registries.
"""

from collections.abc import Callable, Collection
import dataclasses
import math
import numbers
import re
from typing import Any

from ml_collections import ConfigDict

from dpp_jax import build
from dpp_jax.data import augment, preparation, sources
from dpp_jax.diffusion import denoiser, model, sampler
from dpp_jax.evaluation import classifiers
from dpp_jax.interop import pytorch
from dpp_jax.privacy import accounting, groups, queries
from dpp_jax.run import artefacts, hours, imported
from dpp_jax.run.folder import flatten
from dpp_jax.training import optimizer


def _registries() -> dict[str, Collection[str]]:
    """Return family → the names that a setting may have."""
    return {
        'accountant': tuple(accounting.ACCOUNTANTS),
        'relation': tuple(accounting.RELATIONS),
        'query': queries.CENTRAL_KINDS,
        'source': {kind: source.form for kind, source in sources.SOURCES.items()},
        'augmentation': tuple(augment.AUGMENTATIONS),
        'classifier': tuple(classifiers.CLASSIFIERS),
        'selection': classifiers.SELECTIONS,
        'metric': tuple(artefacts.METRICS),
        'denoiser': tuple(denoiser.DENOISERS),
        'sampler': tuple(sampler.SAMPLERS),
        'network': tuple(model.NETWORKS),
    }


def check(config: ConfigDict, unset: Collection[str] = ()) -> None:
    """Refuse settings that cannot be.

    Args:
        config: see configs/default.py.
        unset: settings without a value, which they get from the images (`derive`): not looked at yet.

    Raises:
        ValueError: one or more settings are not allowed. The message has one line for each:
            `config.NAME is VALUE; it must be ALLOWED`.
    """
    problems = {}  # the setting's name → its line

    def refuse(name, value, allowed):
        found = 'is missing' if value is _MISSING else 'is not set' if value is None else f'is {value!r}'
        problems[name] = f'config.{name} {found}; it must be {allowed}'

    for name, rule in _table().items():
        value = _value(config, name)
        if name in unset:
            continue
        if value is _MISSING or not rule.accepts(value):
            refuse(name, value, rule.words)
    for name in unset:
        if name in imported.declaring(flatten(config.to_dict())):
            refuse(name, None, 'what config.imported.path was made with: it declares what was spent for it')
    known = lambda names: problems.keys().isdisjoint(names) and names.isdisjoint(unset)
    for relation in _RELATIONS:
        if known({relation.name, *relation.others}):
            value = _value(config, relation.name)
            others = [_value(config, other) for other in relation.others]
            if not relation.accepts(value, *others):
                refuse(relation.name, value, relation.words(*others))
    lines, open_names = list(problems.values()), {*problems, *unset}
    # What is built from several settings is built only where each of them is allowed.
    if not any(name.startswith(('data.', 'query.', 'dp.images_per_group')) for name in open_names):
        lines += _query(config)
    if not any(name.startswith(('data.', 'moments.', 'dp.images_per_group')) for name in open_names):
        lines += _moments(config)
    if not any(name.startswith(('data.', 'frequency.', 'dp.images_per_group')) for name in open_names):
        lines += _frequency(config)
    if not any(name.startswith(('pretrain.augmentation', 'pretrain.rand_augment')) for name in open_names):
        lines += _augmentation(config)
    if not any(name.startswith(('data.', 'generate.')) for name in open_names):
        lines += _refusal('generate', lambda: build.samplers(config))
    if lines:
        raise ValueError('\n'.join(lines))


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A condition on one value of any type, and the same in words that follow "it must be"."""

    accepts: Callable[[Any], bool]
    words: str


@dataclasses.dataclass(frozen=True)
class _Relation:
    """A condition on the setting `name` beside `others`: asked where each alone is allowed."""

    name: str
    others: tuple[str, ...]
    accepts: Callable[..., bool]  # (value, *values of others)
    words: Callable[..., str]  # (*values of others)


# ---- kinds of values ----------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    """Return whether this is a finite real number; a boolean is not."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and -math.inf < value < math.inf


def _is_whole(value: Any) -> bool:
    return _is_number(value) and isinstance(value, numbers.Integral)


def _number(accepts: Callable[[float], bool], words: str) -> _Rule:
    return _Rule(lambda value: _is_number(value) and accepts(value), words)


def _whole(accepts: Callable[[int], bool], words: str) -> _Rule:
    return _Rule(lambda value: _is_whole(value) and accepts(value), words)


def _is_time(text: Any) -> bool:
    try:
        return text == '' or hours.seconds(text) > 0
    except (TypeError, ValueError):
        return False


def _unset_or(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.accepts(value), f'{rule.words}, or not set')


def _name_in(known: Collection[str]) -> _Rule:
    return _Rule(lambda value: isinstance(value, str) and value in known, ' or '.join(map(repr, known)))


def _names_in(known: Collection[str]) -> _Rule:
    one = _name_in(known)
    return _sequence(one, f'a selection of {", ".join(map(repr, known))}')


def _sequence(rule: _Rule, words: str, least: int = 0) -> _Rule:
    return _Rule(
        lambda value: (
            isinstance(value, tuple | list) and len(value) >= least and all(map(rule.accepts, value))
        ),
        words,
    )


def _source_in(forms: dict[str, str]) -> _Rule:
    """Return a rule for '<kind>' and '<kind>:<where>', as the kind's form has it."""

    def accepts(value):
        if not isinstance(value, str):
            return False
        kind, colon, where = value.partition(':')
        return kind in forms and bool(colon) == bool(where) == (':' in forms[kind])

    return _Rule(accepts, ' or '.join(map(repr, forms.values())))


_TEXT = _Rule(lambda value: isinstance(value, str), 'a text')
_SWITCH = _Rule(lambda value: isinstance(value, bool), 'True or False')
_COUNT = _whole(lambda n: n >= 1, 'a whole number, at least 1')
_POSITIVE = _number(lambda x: x > 0, 'a finite number > 0')
_NOT_NEGATIVE = _number(lambda x: x >= 0, 'a finite number, at least 0')
_INSIDE = _number(lambda x: 0 < x < 1, 'a number in (0, 1)')
_PROBABILITY = _number(lambda x: 0 < x <= 1, 'a number in (0, 1]')
_SHARE = _number(lambda x: 0 <= x < 1, 'a number in [0, 1)')
# Far from the ends of float32 (1e-38 and 3e38), also when it is squared and a million squares are summed.
_SQUARABLE = _number(lambda x: 1e-6 <= x <= 1e6, 'a number in [1e-6, 1e6]')
# Adam moves every weight by about the learning rate in each step, and weights are of the order of 1 or less.
_LEARNING_RATE = _number(lambda x: 0 < x <= 1, 'a number in (0, 1]')


# ---- the table ----------------------------------------------------------------------------------


def _table() -> dict[str, _Rule]:
    """Return name → what its value may be, whatever the other settings are."""
    known = _registries()
    return {
        'name': _TEXT,
        'seed': _unset_or(_whole(lambda n: True, 'a whole number')),
        # dp
        'dp.epsilon': _POSITIVE,
        'dp.delta': _INSIDE,
        'dp.accountant': _name_in(known['accountant']),
        'dp.relation': _name_in(known['relation']),
        'dp.unit': _name_in(groups.UNITS),
        'dp.images_per_group': _unset_or(_whole(lambda m: 1 <= m <= 1000, 'a whole number in [1, 1000]')),
        'dp.already_spent': _TEXT,
        # data
        'data.source': _source_in(known['source']),
        'data.dir': _TEXT,
        'data.in_memory': _name_in(sources.IN_MEMORY),
        'data.train_images': _COUNT,
        'data.groups': _TEXT,
        'data.train_groups': _unset_or(_COUNT),
        'data.image_size': _COUNT,
        'data.channels': _whole(lambda n: n in (1, 3), '1 or 3'),
        'data.classes': _COUNT,
        'data.class_names': _sequence(_TEXT, 'texts, one for each class'),
        'data.average_down': _COUNT,
        'data.fit': _name_in(preparation.FITS),
        'data.resize': _name_in(preparation.RESIZES),
        'data.test_share': _INSIDE,
        'data.split_seed': _whole(lambda n: True, 'a whole number'),
        'data.labels': _TEXT,
        'data.image_key': _Rule(lambda key: isinstance(key, str) and bool(key), 'the name of a feature'),
        'data.label_key': _TEXT,
        'data.validation': _name_in(preparation.VALIDATIONS),
        'data.derived': _sequence(_TEXT, 'names of settings, which the program writes'),
        # query
        'query.kind': _name_in(known['query']),
        'query.noise_multiplier': _POSITIVE,
        'query.epsilon_share': _unset_or(_INSIDE),
        'query.sampling_probability': _PROBABILITY,
        'query.queries': _COUNT,
        'query.downsample': _COUNT,
        'query.post_process': _SWITCH,
        # moments
        'moments.enabled': _SWITCH,
        'moments.noise_multiplier': _POSITIVE,
        'moments.epsilon_share': _unset_or(_INSIDE),
        'moments.sampling_probability': _PROBABILITY,
        'moments.average_down': _COUNT,
        # Their products, a matrix for each class, are in memory.
        'moments.frequencies': _whole(lambda k: 1 <= k <= 1024, 'a whole number in [1, 1024]'),
        # frequency
        'frequency.enabled': _SWITCH,
        'frequency.noise_multiplier': _POSITIVE,
        'frequency.epsilon_share': _unset_or(_INSIDE),
        'frequency.sampling_probability': _PROBABILITY,
        # imported, export
        'imported.path': _Rule(
            lambda path: isinstance(path, str) and '://' not in path,
            "the path of a file on this machine, or '' (copy it from a bucket first)",
        ),
        'imported.kind': _name_in(('', *imported.KINDS)),
        'imported.noise_multiplier': _unset_or(_POSITIVE),
        'imported.trust': _SWITCH,
        'export.path': _Rule(
            lambda path: isinstance(path, str) and (not path or path.endswith(pytorch.SUFFIXES)),
            f"a path that ends in {' or '.join(pytorch.SUFFIXES)}, or ''",
        ),
        # model
        'model.network': _name_in(known['network']),
        'model.width': _COUNT,
        'model.multipliers': _sequence(_COUNT, 'one or more whole numbers, each at least 1', least=1),
        'model.blocks': _COUNT,
        'model.attention_resolutions': _sequence(_COUNT, 'whole numbers, each at least 1'),
        'model.denoiser': _name_in(known['denoiser']),
        'model.patch': _COUNT,
        'model.around': _name_in(('none', 'moments')),
        'model.dtype': _name_in(('float32', 'bfloat16')),
        # pretrain
        'pretrain.enabled': _SWITCH,
        'pretrain.batch_size': _COUNT,
        'pretrain.epochs': _whole(lambda n: n >= 0, 'a whole number, at least 0'),
        'pretrain.moments_steps': _whole(lambda n: n >= 0, 'a whole number, at least 0'),
        'pretrain.frequency_steps': _whole(lambda n: n >= 0, 'a whole number, at least 0'),
        'pretrain.generator_steps': _COUNT,
        'pretrain.draws': _COUNT,
        'pretrain.learning_rate': _LEARNING_RATE,
        'pretrain.schedule': _name_in(optimizer.SCHEDULES),
        'pretrain.ema_decay': _SHARE,
        'pretrain.label_dropout': _SHARE,
        'pretrain.augmentation': _name_in(known['augmentation']),
        # finetune
        'finetune.batch_size': _COUNT,
        'finetune.epochs': _number(lambda x: 0 < x <= 1e12, 'a number in (0, 1e12]'),
        'finetune.time_limit': _Rule(_is_time, "a time above 0 such as '45m', '1.5h' or '90s', or ''"),
        'finetune.draws': _COUNT,
        'finetune.clip_norm': _SQUARABLE,
        'finetune.learning_rate': _LEARNING_RATE,
        'finetune.schedule': _name_in(optimizer.SCHEDULES),
        'finetune.noise_correction': _SWITCH,
        'finetune.ema_decay': _SHARE,
        'finetune.label_dropout': _SHARE,
        'finetune.microbatch': _unset_or(_COUNT),
        'finetune.devices_per_image': _unset_or(_COUNT),
        'finetune.snapshots': _whole(lambda n: 0 <= n <= 20, 'a whole number in [0, 20]'),
        # generate
        'generate.images': _COUNT,
        'generate.class_counts': _name_in(('balanced', 'shares', 'query')),
        'generate.class_shares': _sequence(_POSITIVE, 'finite numbers > 0, one for each class'),
        'generate.moments_share': _SHARE,
        'generate.batch_size': _COUNT,
        **_sampler('generate.sampler', known['sampler']),
        'generate.separate_classifier_images': _SWITCH,
        **_sampler('generate.classifier_sampler', known['sampler']),
        'generate.png_tree': _SWITCH,
        'generate.tfds': _SWITCH,
        'generate.dpimagebench': _SWITCH,
        # evaluate
        'evaluate.images': _TEXT,
        'evaluate.as_paper': _SWITCH,
        'evaluate.fid': _SWITCH,
        'evaluate.features': _name_in(('auto', 'inception', 'cnn')),
        'evaluate.inception': _TEXT,
        'evaluate.feature_epochs': _COUNT,
        'evaluate.metrics': _names_in(known['metric']),
        'evaluate.classifiers': _names_in(known['classifier']),
        'evaluate.epochs': _COUNT,
        'evaluate.batch_size': _COUNT,
        'evaluate.learning_rate': _LEARNING_RATE,
        'evaluate.ema_decay': _SHARE,
        'evaluate.held_out': _INSIDE,
        'evaluate.real_images': _SWITCH,
        'evaluate.seeds': _COUNT,
        'evaluate.selection': _name_in(known['selection']),
        'evaluate.selection_share': _INSIDE,
        'evaluate.candidates': _COUNT,
        # loop
        'loop.images_at_once': _unset_or(_COUNT),
        'loop.log_every_steps': _COUNT,
        'loop.checkpoint_every_seconds': _NOT_NEGATIVE,
    }


def _sampler(section: str, known: Collection[str]) -> dict[str, _Rule]:
    """Return the rows of the table for one sampler."""
    rows = {
        'name': _name_in(known),
        'steps': _COUNT,
        'guidance': _NOT_NEGATIVE,
        'guidance_min': _NOT_NEGATIVE,
        'guidance_max': _NOT_NEGATIVE,
        's_churn': _NOT_NEGATIVE,
        's_min': _NOT_NEGATIVE,
        's_max': _number(lambda x: x >= 0, 'a finite number, at least 0 (as t_max: no limit)'),
        's_noise': _NOT_NEGATIVE,
        't_min': _SQUARABLE,
        't_max': _SQUARABLE,
        'rho': _number(lambda x: 0.1 <= x <= 1000, 'a number in [0.1, 1000]'),  # t_max^(1/rho) is finite
    }
    return {f'{section}.{name}': rule for name, rule in rows.items()}


def _sides(image_size: int, multipliers: tuple[int, ...], patch: int) -> list[int]:
    """Return the sizes that an image has in the network, the largest first."""
    return [image_size // patch // 2**level for level in range(len(multipliers))]


_RELATIONS = (
    _Relation(
        'dp.accountant',
        ('dp.relation',),
        lambda accountant, relation: accountant in accounting.RELATIONS[relation].accountants,
        lambda relation: (
            f'{" or ".join(map(repr, accounting.RELATIONS[relation].accountants))}, because dp.relation is '
            f'{relation!r}'
        ),
    ),
    _Relation(
        'dp.epsilon',
        ('dp.accountant',),
        lambda epsilon, accountant: accountant != 'pld' or epsilon <= accounting.MOST_EPSILON_OF_PLD,
        lambda _: (
            f"at most {accounting.MOST_EPSILON_OF_PLD:g} with dp.accountant 'pld'; 'rdp' counts any budget"
        ),
    ),
    _Relation(
        'dp.delta',
        ('dp.accountant',),
        lambda delta, accountant: accountant != 'pld' or delta > accounting.LEAST_DELTA_OF_PLD,
        lambda _: (
            f"above {accounting.LEAST_DELTA_OF_PLD:g} with dp.accountant 'pld', which cuts off tails of "
            "1e-15; 'rdp' states any δ"
        ),
    ),
    _Relation(
        'dp.delta',
        ('data.train_images', 'data.train_groups'),
        lambda delta, images, groups: delta < 1 / (groups or images),
        lambda images, groups: (
            f'below 1 / data.train_{"groups" if groups else "images"} = {1 / (groups or images):.3g}'
        ),
    ),
    *(
        _Relation(
            name,
            ('dp.unit',),
            # Written out: not only "set with groups" but "not set without", lest a wish be dropped silently.
            lambda value, unit: (value not in (None, '')) == (unit == groups.GROUP),
            lambda unit: (
                f'{"set" if unit == groups.GROUP else "left out"}, because dp.unit is {unit!r} '
                "(dp.unit='group' goes with data.groups, data.train_groups and dp.images_per_group)"
            ),
        )
        for name in ('dp.images_per_group', 'data.groups', 'data.train_groups')
    ),
    _Relation(
        'data.groups',
        ('data.source',),
        lambda name, source: not name or sources.SOURCES[source.partition(':')[0]].has_groups,
        lambda source: (
            f"'': {source!r} says of no image whose it is. Sources with groups are "
            + ' and '.join(kind.form for kind in sources.SOURCES.values() if kind.has_groups)
        ),
    ),
    _Relation(
        'data.class_names',
        ('data.classes',),
        lambda names, classes: len(names) in (0, classes) and len(set(names)) == len(names),
        lambda classes: f'{classes} different names, or ()',
    ),
    _Relation(
        'data.in_memory',
        ('data.source',),
        lambda where, source: (
            where != 'no' or issubclass(sources.SOURCES[source.partition(':')[0]], sources.StoredSource)
        ),
        lambda source: (
            f"'auto' or 'yes': rows of {source!r} cannot be read when they are needed. Sources that can are "
            + ' and '.join(
                kind.form for kind in sources.SOURCES.values() if issubclass(kind, sources.StoredSource)
            )
        ),
    ),
    _Relation(
        'data.train_groups',
        ('data.train_images',),
        lambda number, images: number is None or number <= images,
        lambda images: f'at most data.train_images = {images}',
    ),
    _Relation(
        'data.image_size',
        ('model.multipliers', 'model.patch'),
        lambda size, multipliers, patch: size % (patch * 2 ** (len(multipliers) - 1)) == 0,
        lambda multipliers, patch: (
            f'divisible by {patch * 2 ** (len(multipliers) - 1)}, because model.multipliers = '
            f'{tuple(multipliers)} halves images {len(multipliers) - 1} times'
            + (f', after model.patch = {patch}' if patch > 1 else '')
        ),
    ),
    _Relation(
        'query.downsample',
        ('data.image_size',),
        lambda factor, size: factor <= max(1, size // 2),
        lambda size: f'at most {max(1, size // 2)}, half of data.image_size',
    ),
    *(
        relation
        for query in ('moments', 'frequency')
        for relation in (
            _Relation(
                f'{query}.enabled',
                ('pretrain.enabled',),
                lambda asked, trains: trains or not asked,
                lambda _: 'False, because pretrain.enabled is False: nothing would use the answer',
            ),
            _Relation(
                f'{query}.enabled',
                ('imported.path',),
                lambda asked, path: not (asked and path),
                lambda _: 'False, because imported.path has a model that was trained without this query',
            ),
            _Relation(
                f'pretrain.{query}_steps',
                (f'{query}.enabled',),
                lambda steps, asked: asked or steps == 0,
                lambda _, query=query: (
                    f'0, because {query}.enabled is False: no images are drawn from its answer'
                ),
            ),
        )
    ),
    _Relation(
        'model.around',
        ('moments.enabled',),
        lambda around, asked: asked or around == 'none',
        lambda _: "'none', because moments.enabled is False: there are no moments for the denoiser",
    ),
    _Relation(
        'pretrain.epochs',
        ('pretrain.moments_steps', 'pretrain.frequency_steps'),
        lambda epochs, *steps: epochs > 0 or any(steps),
        lambda *_: 'at least 1, because pretrain.moments_steps and pretrain.frequency_steps are 0',
    ),
    _Relation(
        'query.epsilon_share',
        ('imported.path', 'imported.kind', 'pretrain.enabled'),
        lambda share, path, kind, has_query: (
            not (share and path and has_query and kind in (imported.PRETRAINED, imported.FINETUNED))
        ),
        lambda *_: 'not set: query.noise_multiplier declares what imported.path was made with',
    ),
    _Relation(
        'imported.kind',
        ('imported.path',),
        lambda kind, path: bool(kind) == bool(path),
        lambda path: (
            ' or '.join(f'{kind!r} ({meaning})' for kind, meaning in imported.MEANINGS.items())
            + ': this declares what was spent for imported.path'
            if path
            else "'', because imported.path is ''"
        ),
    ),
    _Relation(
        'imported.kind',
        ('pretrain.enabled',),
        lambda kind, has_query: kind != imported.PRETRAINED or has_query,
        lambda _: f'{imported.PUBLIC!r} or {imported.FINETUNED!r}, because pretrain.enabled is False',
    ),
    _Relation(
        'dp.unit',
        ('imported.kind',),
        lambda unit, kind: unit == groups.IMAGE or kind not in (imported.PRETRAINED, imported.FINETUNED),
        lambda kind: (
            f'{groups.IMAGE!r}, because imported.kind is {kind!r}: the PyTorch implementation clips and '
            'samples single images'
        ),
    ),
    _Relation(
        'imported.noise_multiplier',
        ('imported.kind',),
        lambda sigma, kind: (sigma is not None) == (kind == imported.FINETUNED),
        lambda kind: (
            'the noise multiplier (noise std / clip norm) of the DP-SGD that made imported.path'
            if kind == imported.FINETUNED
            else f'left out, because imported.kind is {kind!r}'
        ),
    ),
    _Relation(
        'model.patch',
        ('imported.path',),
        lambda patch, path: patch == 1 or not path,
        lambda _: '1, because imported.path is of the PyTorch implementation, which has no patches',
    ),
    _Relation(
        'model.attention_resolutions',
        ('data.image_size', 'model.multipliers', 'model.patch'),
        lambda chosen, *network: set(chosen) <= set(_sides(*network)),
        lambda *network: f'a selection of {_sides(*network)}, the image sizes in the network',
    ),
    _Relation(
        'finetune.batch_size',
        ('data.train_images',),
        lambda size, images: size <= images,
        lambda images: f'at most data.train_images = {images}',
    ),
    _Relation(
        'evaluate.inception',
        ('evaluate.features',),
        lambda path, features: not path or features != 'cnn',
        lambda _: "'', because evaluate.features is 'cnn'",
    ),
    _Relation(
        'finetune.devices_per_image',
        ('finetune.draws',),
        lambda devices, draws: devices is None or draws % devices == 0,
        lambda draws: f'a divisor of finetune.draws = {draws}, or not set',
    ),
    _Relation(
        'generate.images',
        ('data.classes',),
        lambda images, classes: images >= 2 * classes,
        lambda classes: f'at least {2 * classes}, two per class',
    ),
    _Relation(
        'generate.class_shares',
        ('generate.class_counts', 'data.classes'),
        # Written out, lest a wish be dropped silently.
        lambda shares, counts, classes: len(shares) == (classes if counts == 'shares' else 0),
        lambda counts, classes: (
            f'{classes} numbers, one for each class'
            if counts == 'shares'
            else f"(), because generate.class_counts is {counts!r}, not 'shares'"
        ),
    ),
    _Relation(
        'generate.class_counts',
        ('pretrain.enabled', 'query.kind', 'query.class_counts', 'imported.path'),
        lambda counts, has_query, kind, counted, path: (
            counts != 'query' or (has_query and kind == 'mean' and counted == 'noisy' and not path)
        ),
        lambda *_: (
            "'balanced' or 'shares': no query releases counts here (that takes pretrain.enabled = True, "
            "query.kind = 'mean', query.class_counts = 'noisy' and imported.path = '')"
        ),
    ),
    # With a checkpoint or without pre-training, moments.enabled must be False: that is told with this.
    _Relation(
        'generate.moments_share',
        ('imported.path',),
        lambda share, path: share == 0 or not path,
        lambda _: '0, because imported.path has a model that was trained without class moments',
    ),
    _Relation(
        'generate.moments_share',
        ('pretrain.enabled',),
        lambda share, has_query: share == 0 or has_query,
        lambda _: '0, because pretrain.enabled is False: no query asks for class moments',
    ),
    _Relation(
        'generate.moments_share',
        ('moments.enabled',),
        lambda share, asked: share == 0 or asked,
        lambda _: '0, because moments.enabled is False: there are no class moments to draw images from',
    ),
    _Relation(
        'evaluate.selection',
        ('evaluate.classifiers',),
        lambda selection, chosen: selection != classifiers.PRIVATE_NOISY or len(chosen) > 0,
        lambda _: f'{classifiers.SYNTHETIC!r}: evaluate.classifiers names none to select from',
    ),
    _Relation(
        'evaluate.selection',
        ('evaluate.images',),
        lambda selection, images: not images or selection != classifiers.PRIVATE_NOISY,
        lambda _: (
            f'{classifiers.SYNTHETIC!r}, because evaluate.images names a file: ε would be spent on images '
            'from elsewhere'
        ),
    ),
    *(
        _Relation(
            f'evaluate.{name}',
            ('evaluate.as_paper',),
            lambda value, as_paper, accepts=accepts: not as_paper or accepts(value),
            lambda _, words=words: f'{words}, because evaluate.as_paper is True',
        )
        for name, accepts, words in (
            ('epochs', lambda epochs: epochs == 50, '50'),
            ('batch_size', lambda size: size == 64, '64'),
            ('learning_rate', lambda rate: rate in (3e-4, 1e-4), '3e-4, or 1e-4 as for Camelyon'),
            ('ema_decay', lambda decay: decay == 0.9999, '0.9999'),
            ('features', lambda name: name != 'cnn', "'inception' or 'auto'"),
            (
                'classifiers',
                lambda chosen: set(chosen) <= set(classifiers.AS_PAPER),
                f'a selection of {", ".join(map(repr, classifiers.AS_PAPER))}',
            ),
            ('selection', lambda name: name == classifiers.SYNTHETIC, f'{classifiers.SYNTHETIC!r}'),
        )
    ),
    *(
        _Relation(
            f'generate.{sampler}.t_max',
            (f'generate.{sampler}.t_min',),
            lambda most, least: most > least,
            lambda least: f'above t_min = {least}',
        )
        for sampler in ('sampler', 'classifier_sampler')
    ),
)


# ---- what checks itself -------------------------------------------------------------------------


def _query(config: ConfigDict) -> list[str]:
    """Return what the query says of its own settings."""
    return _refusal('query', lambda: build.query(config))


def _moments(config: ConfigDict) -> list[str]:
    """Return what the query for class moments says of its own settings; if it is not asked, nothing."""
    if not config.moments.enabled:
        return []
    found = _refusal('moments', lambda: build.moments_query(config))
    return found + _refusal('moments', lambda: build.frequencies(config))


def _frequency(config: ConfigDict) -> list[str]:
    """Return what the frequency query says of its own settings; if it is not asked, nothing."""
    return _refusal('frequency', lambda: build.frequency_query(config)) if config.frequency.enabled else []


def _augmentation(config: ConfigDict) -> list[str]:
    """Return what the augmentation of pre-training says of its own settings."""
    name = config.pretrain.augmentation
    settings = config.pretrain.get(name, ConfigDict())
    return _refusal(f'pretrain.{name}', lambda: augment.make_augmentation(name, **settings))


def _refusal(section: str, make: Callable[[], Any]) -> list[str]:
    """Return the line for the error that `make` raises, or nothing."""
    try:
        make()
    except (ValueError, TypeError) as error:  # the second: of a setting that there is not
        names_a_setting = re.match(r'\w+ is ', str(error))
        return [f'config.{section}{"." if names_a_setting else ": "}{error}']
    return []


# ---- reading a config ---------------------------------------------------------------------------

_MISSING = object()


def _value(config: ConfigDict, name: str) -> Any:
    """Return the value of a setting, or `_MISSING`."""
    value = config
    for part in name.split('.'):
        if not isinstance(value, ConfigDict) or part not in value:
            return _MISSING
        value = value[part]
    return value
