"""Every setting has a rule, and all that are wrong are named at once, before anything is spent."""

import dataclasses
import importlib
import math

from ml_collections import ConfigDict
import numpy as np
import pytest

from dpp_jax import build, settings
from dpp_jax.configs import (
    camelyon_32,
    celeba_32,
    default,
    digits_8,
    fmnist_28,
    mnist_14,
    mnist_28,
    mnist_28_hour,
)
from dpp_jax.privacy import calibration, queries
from dpp_jax.run.folder import flatten

# What a query checks itself, by kind and name, with the value that its class has without a setting.
QUERY_SETTINGS = {
    (kind, field.name): field.default
    for kind, query in queries.QUERIES.items()
    for field in dataclasses.fields(query)
    if field.name not in ('classes', 'dimensions', 'images_per_group', 'center')
}
# Names of what a query or an augmentation checks begin with these.
OWN = (
    'pretrain.rand_augment.',
    'pretrain.affine.',
    *(f'{"query" if kind in queries.CENTRAL_KINDS else kind}.{name}' for kind, name in QUERY_SETTINGS),
)


def names(config, prefix=''):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from names(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}'


def changed(changes):
    """The default config with other values, of other types too."""
    config = default.get_config('10')
    with config.ignore_type():
        for name, value in changes.items():
            *sections, last = name.split('.')
            section = config
            for part in sections:
                section = section[part]
            section[last] = value
    return config


def lines(config):
    """What `check` says, line by line."""
    try:
        settings.check(config)
    except ValueError as error:
        return str(error).splitlines()
    return []


GROUPED = {
    'dp.unit': 'group',
    'dp.images_per_group': 3,
    'data.source': 'npz:x',
    'data.groups': 'person',
    'data.train_groups': 900,
}


def test_groups_are_allowed_as_a_whole():
    assert lines(changed(GROUPED | {'dp.delta': 1 / 901})) == []
    assert lines(changed(GROUPED | {'data.source': 'tfds:x', 'data.groups': 'a/person'})) == []


def test_images_stay_in_files_only_where_the_source_allows_it():
    assert lines(changed({'data.in_memory': 'no', 'data.source': 'tfds:x'})) == []
    (line,) = lines(changed({'data.in_memory': 'no', 'data.source': 'npz:x'}))
    assert line.startswith("config.data.in_memory is 'no'; it must be 'auto' or 'yes': rows of 'npz:x'")
    assert line.endswith('tfds:<name>[/<config>][:<version>]')


@pytest.mark.parametrize('missing', [name for name in GROUPED if name not in ('data.source', 'dp.unit')])
@pytest.mark.parametrize('unit', ['image', 'group'])
def test_settings_of_groups_go_together(missing, unit):
    """One that is missing, or set where images are the unit, is named."""
    nothing = '' if missing == 'data.groups' else None
    if unit == 'group':
        found, text = lines(changed(GROUPED | {missing: nothing})), "must be set, because dp.unit is 'group'"
    else:
        found, text = (
            lines(changed({missing: GROUPED[missing]})),
            "must be left out, because dp.unit is 'image'",
        )
    assert any(line.startswith(f'config.{missing} is ') and text in line for line in found)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'dp.unit': 'person'}, "config.dp.unit is 'person'; it must be 'image' or 'group'"),
        ({'dp.images_per_group': 0}, 'images_per_group is 0; it must be a whole number in [1, 1000]'),
        ({'data.train_groups': 60001}, 'train_groups is 60001; it must be at most data.train_images = 60000'),
        ({'data.train_groups': 0}, 'train_groups is 0; it must be a whole number, at least 1'),
        ({'dp.delta': 1 / 900}, 'it must be below 1 / data.train_groups = 0.00111'),
        ({'data.source': 'idx:x'}, "'idx:x' says of no image whose it is"),
        ({'data.source': 'digits'}, 'says of no image whose it is. Sources with groups are folder:<path>'),
    ],
)
def test_settings_of_groups_out_of_range_are_named(change, text):
    found = lines(changed(GROUPED | change))
    assert any(text in line for line in found)


@pytest.mark.parametrize('epsilon', ['1', '10'])
@pytest.mark.parametrize(
    'module',
    [default, camelyon_32, celeba_32, digits_8, fmnist_28, mnist_14, mnist_28, mnist_28_hour],
    ids=str,
)
def test_the_configs_here_are_allowed(module, epsilon):
    settings.check(module.get_config(epsilon))


@pytest.mark.parametrize(
    'name, average_down, clip_norm',
    [
        ('mnist_28', 2, 2.52),
        ('fmnist_28', 2, 2.52),
        ('celeba_32', 2, 4.99),
        ('camelyon_32', 2, 4.99),
        ('cifar10_32', 2, 4.99),
        ('cifar100_32', 2, 4.99),
        ('eurosat_32', 2, 4.99),
        ('celeba_64', 4, 4.99),
    ],
)
@pytest.mark.parametrize('epsilon', ['1', '10'])
def test_a_word_after_epsilon_switches_a_benchmark_s_config_to_class_moments(
    name, average_down, clip_norm, epsilon
):
    module = importlib.import_module(f'dpp_jax.configs.{name}')
    paper, switched = module.get_config(epsilon=epsilon), module.get_config(f'{epsilon},moments')
    settings.check(switched)
    assert switched.moments.average_down == average_down
    assert switched.moments.clip_norm == pytest.approx(clip_norm, abs=0.005)
    assert module.get_config().name == name and switched.name == f'{name}_moments'
    assert build.plan(switched, build.model(switched)).budget.spent() <= float(epsilon)
    before, after = flatten(paper.to_dict()), flatten(switched.to_dict())
    assert {name.split('.')[0] for name in before if before[name] != after[name]} == {
        'name',
        'query',
        'moments',
        'model',
        'pretrain',
        'generate',
    }
    with pytest.raises(ValueError, match="after ε, --config has 'moment'; it may be moments"):
        module.get_config(f'{epsilon},moment')


def test_every_setting_has_a_rule_and_every_rule_a_setting():
    found = {name for name in names(default.get_config()) if not name.startswith(OWN)}
    assert found == set(settings._table())
    assert {relation.name for relation in settings._RELATIONS} <= found


@pytest.mark.parametrize(
    'change, text',
    [
        ({'dp__epsilon': 0.0}, 'config.dp.epsilon is 0.0; it must be a finite number > 0'),
        ({'dp__epsilon': -1.0}, 'config.dp.epsilon is -1.0'),
        ({'dp__epsilon': math.inf}, 'config.dp.epsilon is inf'),
        ({'dp__epsilon': math.nan}, 'config.dp.epsilon is nan'),
        ({'dp__delta': 0.0}, r'config.dp.delta is 0.0; it must be a number in \(0, 1\)'),
        ({'dp__delta': 1.0}, 'config.dp.delta is 1.0'),
        ({'dp__delta': 1 / 1437}, 'config.dp.delta is .*below 1 / data.train_images = 0.000696'),
        ({'dp__accountant': 'gdp'}, "config.dp.accountant is 'gdp'; it must be 'rdp' or 'pld'"),
        ({'dp__relation': 'swap'}, "config.dp.relation is 'swap'; it must be 'zero_out' or 'add_remove' or"),
        (
            {'dp__relation': 'replace_one'},
            "config.dp.accountant is 'rdp'; it must be 'pld', because dp.relation is 'replace_one'",
        ),
        ({'moments__frequencies': 0}, r'moments.frequencies is 0; it must be a whole number in \[1, 1024\]'),
        (
            {'moments__enabled': True, 'moments__frequencies': 65},
            'config.moments.frequencies is 65; it must be at most 64, the values of an image of shape',
        ),
        (
            {'moments__enabled': True, 'moments__average_down': 3},
            'config.moments.average_down is 3; it must divide the size of images, 8 x 8',
        ),
        (
            {'moments__enabled': True, 'pretrain__enabled': False},
            'config.moments.enabled is True; it must be False, because pretrain.enabled is False',
        ),
        (
            {'pretrain__moments_steps': 3},
            'config.pretrain.moments_steps is 3; it must be 0, because moments.enabled is False',
        ),
        (
            {'pretrain__epochs': 0},
            'config.pretrain.epochs is 0; it must be at least 1, because pretrain.moments_steps and '
            'pretrain.frequency_steps are 0',
        ),
        (
            {'frequency__enabled': True, 'frequency__features': 7},
            r'config.frequency.features is 7; it must be an even whole number in \[2, 100000\]',
        ),
        (
            {'frequency__enabled': True, 'pretrain__enabled': False},
            'config.frequency.enabled is True; it must be False, because pretrain.enabled is False',
        ),
        (
            {'model__patch': 3},
            r'config.data.image_size is 8; it must be divisible by \d+, because .* after model.patch = 3',
        ),
        ({'pretrain__schedule': 'step'}, "config.pretrain.schedule is 'step'; it must be 'constant' or"),
        (
            {'pretrain__frequency_steps': 3},
            'config.pretrain.frequency_steps is 3; it must be 0, because frequency.enabled is False',
        ),
        ({'generate__moments_share': 1.0}, r'config.generate.moments_share is 1.0; .* a number in \[0, 1\)'),
        ({'generate__moments_share': -0.1}, 'config.generate.moments_share is -0.1; it must be a number in'),
        (
            {'generate__moments_share': 0.3},
            'config.generate.moments_share is 0.3; it must be 0, because moments.enabled is False',
        ),
        (
            {'generate__moments_share': 0.3, 'moments__enabled': True, 'pretrain__enabled': False},
            '(?s)moments.enabled is True.*\nconfig.generate.moments_share is 0.3; it must be 0, because '
            'pretrain.enabled is False',
        ),
        ({'data__source': 'digitz'}, "data.source is 'digitz'; it must be 'digits' or 'folder:<path>'"),
        ({'data__source': 'tfds:'}, "data.source is 'tfds:'"),
        ({'data__source': 'digits:'}, "data.source is 'digits:'"),
        ({'data__source': 'digits:here'}, "data.source is 'digits:here'"),
        ({'data__train_images': 0}, 'data.train_images is 0; it must be a whole number, at least 1'),
        ({'data__channels': 2}, 'data.channels is 2; it must be 1 or 3'),
        ({'query__kind': 'median'}, "query.kind is 'median'; it must be 'mean' or 'mode'"),
        ({'query__sampling_probability': 1.2}, r'query.sampling_probability is 1.2.*\(0, 1\]'),
        ({'query__noise_multiplier': 0.0}, 'query.noise_multiplier is 0.0'),
        ({'query__epsilon_share': 1.0}, r'query.epsilon_share is 1.0; .*in \(0, 1\), or not set'),
        ({'query__downsample': 5}, 'query.downsample is 5; it must be at most 4, half of data.image_size'),
        ({'query__clip_norm': 0.0}, r'query.clip_norm is 0.0; .*in \[1e-6, 1e6\], or not set'),
        ({'query__pixel_center': 0.7}, r'query.pixel_center is 0.7; .*in \[0, 0.5\]'),
        ({'query__class_counts': 'exact'}, "query.class_counts is 'exact'; .*'public' or 'noisy'"),
        (
            {'query__kind': 'mode'},
            'config.query.clip_norm is 2.8.*, which the mode query cannot use; it must be None',
        ),
        (
            {'query__kind': 'mode', 'query__clip_norm': None, 'query__class_counts': 'noisy'},
            "config.query.class_counts is 'noisy', which the mode query cannot use; it must be 'public'",
        ),
        (
            {'query__kind': 'mode', 'query__clip_norm': None, 'query__bins': 257},
            r'config.query.bins is 257; it must be a whole number in \[2, 256\]',
        ),
        (
            {'model__multipliers': (1, 2), 'data__image_size': 7},
            'data.image_size is 7; it must be divisible by 2',
        ),
        (
            {'model__multipliers': (1, 2), 'model__attention_resolutions': (5,)},
            r'attention_resolutions is \(5,\).*\[8, 4\]',
        ),
        ({'model__multipliers': ()}, r'model.multipliers is \(\); it must be one or more whole numbers'),
        ({'model__network': 'mlp'}, "model.network is 'mlp'; it must be 'unet'"),
        ({'model__denoiser': 'edn'}, "model.denoiser is 'edn'"),
        ({'model__dtype': 'float16'}, "model.dtype is 'float16'"),
        ({'pretrain__augmentation': 'flip'}, "pretrain.augmentation is 'flip'; it must be .*'affine'"),
        ({'pretrain__ema_decay': 1.0}, r'pretrain.ema_decay is 1.0; it must be a number in \[0, 1\)'),
        ({'finetune__clip_norm': 0.0}, 'finetune.clip_norm is 0.0'),
        ({'finetune__clip_norm': 1e20}, 'finetune.clip_norm is 1e'),
        ({'finetune__learning_rate': 3.0}, r'finetune.learning_rate is 3.0; .*in \(0, 1\]'),
        ({'finetune__batch_size': 5000}, 'finetune.batch_size is 5000; it must be at most'),
        ({'finetune__microbatch': 0}, 'finetune.microbatch is 0; it must be a whole number'),
        ({'finetune__devices_per_image': 0}, 'finetune.devices_per_image is 0; it must be a whole number'),
        (
            {'finetune__draws': 6, 'finetune__devices_per_image': 4},
            'finetune.devices_per_image is 4; it must be a divisor of finetune.draws = 6',
        ),
        ({'generate__images': 0}, 'generate.images is 0'),
        ({'generate__images': 19}, 'generate.images is 19; it must be at least 20, two per class'),
        ({'generate__sampler__name': 'euler'}, "sampler.name is 'euler'; it must be .*'heun'"),
        ({'generate__sampler__rho': 0.0}, 'sampler.rho is 0.0'),
        ({'generate__sampler__s_churn': -1.0}, 'sampler.s_churn is -1.0; .*at least 0'),
        ({'generate__sampler__t_max': 0.001}, 'sampler.t_max is 0.001; it must be above t_min'),
        ({'evaluate__classifiers': ('svm',)}, 'evaluate.classifiers is .*svm'),
        ({'evaluate__held_out': 1.0}, r'evaluate.held_out is 1.0; it must be a number in \(0, 1\)'),
        ({'evaluate__learning_rate': 0.0}, 'evaluate.learning_rate is 0.0'),
        ({'loop__images_at_once': 0}, 'loop.images_at_once is 0; it must be a whole number'),
        ({'loop__checkpoint_every_seconds': -1.0}, 'loop.checkpoint_every_seconds is -1.0'),
        ({'pretrain__affine__zoom': 1.0}, r'config.pretrain.affine.zoom is 1.0; it must be in \[0, 1\)'),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_is_allowed(tiny_config, change, text):
    with pytest.raises(ValueError, match=text):
        settings.check(tiny_config(**change))


def test_all_problems_are_told_one_in_a_line():
    found = lines(
        changed(
            {
                'query.queries': 0,
                'generate.sampler.t_max': 0.001,
                'dp.epsilon': -1.0,
                'pretrain.rand_augment.magnitude': 40,
            }
        )
    )
    assert [line.split(' is ')[0] for line in found] == [
        'config.dp.epsilon',
        'config.query.queries',
        'config.generate.sampler.t_max',
        'config.pretrain.rand_augment.magnitude',
    ]
    assert all('; it must be ' in line for line in found)


def test_a_setting_is_named_once_and_nothing_is_said_that_follows_from_it():
    """Not: that the batch is larger than the -1 private images, and that δ is above 1 / -1."""
    assert lines(changed({'data.train_images': -1})) == [
        'config.data.train_images is -1; it must be a whole number, at least 1'
    ]


@pytest.mark.parametrize('value', ['1', None, math.nan, math.inf, -math.inf, (1,)], ids=repr)
def test_a_value_of_another_type_is_refused_in_the_same_words(value):
    """No setting takes all of these; which of them one may be shows in the valid configs."""
    told = 'not set' if value is None else repr(value)
    for name, rule in settings._table().items():
        if not rule.accepts(value):
            found = lines(changed({name: value}))
            assert found[0] == f'config.{name} is {told}; it must be {rule.words}', name
            assert len(found) == 1


@pytest.mark.parametrize('value', [True, 'x', math.nan, math.inf, 1 + 0j, np.zeros(2)], ids=repr)
def test_numbers_are_finite_and_neither_texts_nor_booleans(value):
    config = default.get_config()
    for name, rule in settings._table().items():
        usual = settings._value(config, name)
        if isinstance(usual, int | float) and not isinstance(usual, bool):
            assert not rule.accepts(value), name


@pytest.mark.parametrize('value', [2.0, 2.5, np.float32(2)], ids=repr)
def test_whole_numbers_are_whole(value):
    for name in ('query.queries', 'finetune.draws', 'loop.images_at_once', 'seed'):
        assert 'a whole number' in lines(changed({name: value}))[0]
    assert 'whole numbers' in lines(changed({'model.multipliers': (2, value)}))[0]


def test_a_missing_setting_and_a_missing_section_are_named():
    config = default.get_config()
    del config.query.queries, config.loop
    with config.unlocked():
        found = lines(config)
    assert found[0] == 'config.query.queries is missing; it must be a whole number, at least 1'
    assert [line.split(' is missing')[0] for line in found[1:]] == [
        'config.loop.images_at_once',
        'config.loop.log_every_steps',
        'config.loop.checkpoint_every_seconds',
    ]


def test_an_augmentation_says_what_is_wrong_with_its_settings():
    (line,) = lines(changed({'pretrain.rand_augment.magnitude': 40}))
    assert line == 'config.pretrain.rand_augment.magnitude is 40; it must be in 1..30 (bins - 1)'
    config = default.get_config()
    config.pretrain.rand_augment.angle = 3
    (line,) = lines(config)
    assert line.startswith('config.pretrain.rand_augment: ') and "'angle'" in line


def test_settings_of_an_augmentation_that_is_not_used_are_not_looked_at():
    assert not lines(changed({'pretrain.augmentation': 'none', 'pretrain.rand_augment.magnitude': 40}))


def test_a_query_says_what_is_wrong_with_its_settings(monkeypatch):
    def refuse(*_):
        raise ValueError('norm is 3; it must be 4')

    monkeypatch.setattr(build, 'query', refuse)
    assert lines(default.get_config()) == ['config.query.norm is 3; it must be 4']


@pytest.mark.parametrize('kind, name', QUERY_SETTINGS)
@pytest.mark.parametrize('value', ['x', math.nan, math.inf, -1.5, 1 + 0j, (1,)], ids=repr)
def test_a_setting_of_a_query_has_a_rule_of_its_class(kind, name, value):
    section, chosen = 'query', {'query.kind': kind}
    if kind not in queries.CENTRAL_KINDS:
        section, chosen = kind, {f'{kind}.enabled': True}
    (line,) = lines(changed(chosen | {f'{section}.{name}': value}))
    assert line.startswith(f'config.{section}.{name} is {value!r}; it must be ')


@pytest.mark.parametrize('kind, name', QUERY_SETTINGS)
def test_a_setting_of_a_query_that_is_missing_has_the_value_of_the_default_config(kind, name):
    """So that nobody promises, or drops, a bound by leaving a line out."""
    section = 'query' if kind in queries.CENTRAL_KINDS else kind
    assert default.get_config()[section][name] == QUERY_SETTINGS[kind, name]


def test_names_are_those_of_the_registries(monkeypatch):
    registries = settings._registries()
    registries['classifier'] = ('forest',)
    monkeypatch.setattr(settings, '_registries', lambda: registries)
    assert not lines(changed({'evaluate.classifiers': ('forest',)}))
    assert "a selection of 'forest'" in lines(changed({'evaluate.classifiers': ('cnn',)}))[0]


def test_no_noise_is_calibrated_for_the_check(tiny_config, monkeypatch):
    monkeypatch.setattr(calibration, 'calibrate', None)
    settings.check(tiny_config(query__epsilon_share=0.2))
