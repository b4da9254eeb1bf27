"""What a config leaves unset follows from public numbers of the images, and stays when a run goes on."""

import json
import math
from pathlib import Path
import shutil

import numpy as np
import pytest

from dpp_jax import build, derive, pipeline, settings
from dpp_jax.configs import digits_8, folder, mnist_28
from dpp_jax.data import sources
from dpp_jax.data.sources import SourceInfo
from dpp_jax.run import warnings
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.stages import plan


def info(**changes):
    found = {
        'name': 'npz:x',
        'train_images': 1080,
        'test_images': 300,
        'image_shape': (28, 28, 1),
        'classes': 3,
        'class_names': ('a', 'b', 'c'),
    }
    found |= changes
    height, width, _ = found['image_shape']
    if height is not None:  # as sources tell it
        found.setdefault('sides', (min(height, width),) * 3)
    return SourceInfo(**found)


DIGITS = {'train_images': 1437, 'image_shape': (8, 8, 1), 'classes': 10, 'class_names': ()}
MNIST = {'train_images': 60_000, 'image_shape': (28, 28, 1), 'classes': 10, 'class_names': ()}
SETS = {
    'few': {},
    'tiny': {'train_images': 40, 'classes': 2, 'class_names': ()},
    'color': {'train_images': 900, 'image_shape': (64, 64, 3)},
    'odd': {'train_images': 5000, 'image_shape': (25, 25, 1)},
    'large': {'train_images': 20_000, 'image_shape': (224, 224, 3), 'classes': 9, 'class_names': ()},
    'one class': {'classes': 1, 'class_names': ('images',)},
    'many classes': {'train_images': 50_000, 'image_shape': (32, 32, 3), 'classes': 100, 'class_names': ()},
    'sizes': {'image_shape': (None, None, 3), 'sides': (40, 90, 700)},
    'digits': DIGITS,
    'mnist': MNIST,
}


def unset_config(epsilon='8', **changes):
    config = folder.get_config(epsilon)
    config.data.source = 'npz:x'
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace('__', '.'): value})
    return config


def resolved(epsilon='8', of=None, **changes):
    """Derived settings; the size of a batch is given, because its rule plans a run."""
    changes = {'finetune__batch_size': 1} | changes
    return derive.resolve(unset_config(epsilon, **changes), info(**of or {}))[0]


@pytest.mark.parametrize('of', SETS.values(), ids=SETS)
@pytest.mark.parametrize('epsilon', ['1', '8'])
def test_what_is_derived_is_allowed_and_fits_the_images(of, epsilon, monkeypatch):
    monkeypatch.setattr(derive, '_step_noise', lambda *_: 1.0)  # the one rule that takes seconds
    config, derived = derive.resolve(unset_config(epsilon), info(**of))
    settings.check(config)
    assert not derive.unset(config) and len(derived) == len({row.name for row in derived})
    assert all(row.why and derive.get(config, row.name) == row.value for row in derived)
    if info(**of).image_shape[0] is not None:
        assert build.misfits(config, info(**of)) == []
    text = derive.table(derived)
    assert all(row.name in text and row.why in text for row in derived)


def ratio(derived, tuned):
    return max(derived, tuned) / min(derived, tuned)


@pytest.mark.parametrize(
    'tuned, of',
    [(digits_8.get_config('10'), DIGITS), (mnist_28.get_config('10'), MNIST)],
    ids=['digits', 'mnist'],
)
def test_rules_give_about_the_settings_that_were_tried(tuned, of):
    found, _ = derive.resolve(unset_config('10'), info(**of))
    same = (
        'data.train_images',
        'data.image_size',
        'data.channels',
        'data.classes',
        'dp.delta',
        'query.sampling_probability',
        'query.queries',
        'query.downsample',
        'query.pixel_center',
        'query.post_process',
        'model.width',
        'model.blocks',
        'model.multipliers',
        'model.attention_resolutions',
        'pretrain.augmentation',
        'pretrain.epochs',
        'pretrain.learning_rate',
        'pretrain.ema_decay',
        'finetune.batch_size',
        'finetune.epochs',
        'finetune.draws',
        'finetune.learning_rate',
        'finetune.ema_decay',
        'finetune.clip_norm',
        'generate.images',
        'generate.sampler.steps',
        'evaluate.epochs',
        'evaluate.ema_decay',
    )
    for name in same:
        assert derive.get(found, name) == derive.get(tuned, name), name
    for name in ('query.noise_multiplier', 'pretrain.draws'):
        assert ratio(derive.get(found, name), derive.get(tuned, name)) < 1.15, name
    assert found.query.clip_norm == pytest.approx(tuned.query.clip_norm)


@pytest.mark.parametrize(
    'name, epsilon, count', [('few', '8', 0), ('many classes', '8', 0), ('tiny', '1', 3)]
)
def test_plans_of_derived_settings_can_work(name, epsilon, count):
    """Only 40 images cannot: neither their central images nor a step of DP-SGD show anything."""
    config, _ = derive.resolve(unset_config(epsilon), info(**SETS[name]))
    assert len(plan.warnings_of(config, build.plan(config, build.model(config)))) == count


def test_what_is_set_stays_and_the_rest_follows_from_it():
    config = resolved(
        '8', query__epsilon_share=0.5, data__image_size=14, finetune__batch_size=90, dp__delta=1e-6
    )
    assert (config.data.image_size, config.data.average_down, config.finetune.batch_size) == (14, 1, 90)
    assert config.dp.delta == 1e-6 and config.model.attention_resolutions == (7,)
    spent = build.plan(config, build.model(config)).budget.spent('central_query')
    assert spent == pytest.approx(4, rel=0.02) and spent <= 4
    without_norm = resolved('8', query__pixel_center=0.5)
    assert without_norm.query.clip_norm is None
    mode = resolved('8', query__kind='mode')
    assert (mode.query.clip_norm, mode.query.class_counts, mode.query.pixel_center) == (None, 'public', 0.0)
    settings.check(mode)


@pytest.mark.parametrize('number', [1, 9, 10, 99, 1000, 1437, 60_000])
def test_delta_is_the_largest_power_of_ten_below_one_over_n(number):
    delta = resolved(
        '8', {'train_images': number, 'classes': 1, 'class_names': ()}, query__epsilon_share=0.5
    ).dp.delta
    assert delta < 1 / number <= 10 * delta * (1 + 1e-12)
    assert math.log10(delta) == pytest.approx(round(math.log10(delta)))


def test_noise_of_central_images_and_steps_decides():
    """Less budget: smaller images are asked, and larger batches drawn."""
    much, little = (derive.resolve(unset_config(epsilon), info())[0] for epsilon in ('8', '1'))
    assert little.query.downsample > much.query.downsample
    assert little.finetune.batch_size > much.finetune.batch_size
    query = build.query(much)
    noise = warnings.image_noise(much.query.noise_multiplier, query.sensitivity, 1.0, 360)
    assert noise < 1.05 * derive._PIXEL_NOISE


def test_no_rule_looks_at_single_classes():
    """Counts of classes are private: whatever they are, the settings are the same."""
    config = unset_config(finetune__batch_size=256)
    first, _ = derive.resolve(config, info(class_counts=(360, 360, 360)))
    second, _ = derive.resolve(config, info(class_counts=(1, 2, 1077)))
    assert flatten(first.to_dict()) == flatten(second.to_dict())


def test_a_number_that_the_relation_keeps_secret_is_not_published():
    with pytest.raises(ValueError, match="config.data.train_images is not set; .* 'add_remove'"):
        resolved(dp__relation='add_remove')
    with pytest.raises(ValueError, match="config.data.classes is not set; .* 'add_remove'"):
        resolved(dp__relation='add_remove', data__train_images=1000)
    config = resolved(dp__relation='add_remove', data__train_images=1000, data__classes=10)
    assert config.data.train_images == 1000 and 'data.train_images' not in config.data.derived


def test_images_that_are_not_square_need_to_be_fitted():
    with pytest.raises(
        ValueError, match="config.data.image_size is not set, .*30 x 40; set data.fit to 'crop'"
    ):
        resolved(of={'image_shape': (30, 40, 1)}, data__fit='none')
    fitted = resolved(of={'image_shape': (None, None, 3), 'sides': (20, 47, 90)})
    assert (fitted.data.image_size, fitted.data.average_down) == (44, 1)


def test_groups_are_counted(tmp_path):
    path = save(tmp_path / 'data', groups=np.arange(60) // 3)
    config = unset_config('30', data__source=path, data__groups='groups', finetune__batch_size=9)
    config.dp.unit = 'group'
    found, _ = derive.resolve(config, sources.describe(path, preparation=build.preparation(config)))
    assert (found.data.train_groups, found.dp.images_per_group, found.dp.delta) == (20, 3, 1e-2)
    settings.check(found)
    assert {'data.train_groups', 'dp.images_per_group'} <= set(found.data.derived)


# ---- whole runs ---------------------------------------------------------------------------------


def save(path, train=60, classes=3, size=8, **more):
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('test', 20)):
        images = rng.integers(0, 256, (count, size, size, 1), np.uint8)
        np.savez(path / f'{split}.npz', images=images, labels=np.arange(count) % classes, **more)
    return f'npz:{path}'


def small_config(source=None, **changes):
    """A whole run of seconds; what is not given here is derived."""
    config = unset_config(
        dp__epsilon=100.0,
        model__network='two_convolutions',
        model__width=8,
        model__multipliers=(1,),
        model__attention_resolutions=(8,),
        pretrain__epochs=2,
        finetune__epochs=1.0,
        finetune__draws=1,
        generate__images=12,
        generate__sampler__steps=2,
        evaluate__classifiers=('logistic',),
        evaluate__epochs=1,
        evaluate__feature_epochs=1,
        **changes,
    )
    config.data.source = source
    return config


@pytest.fixture(scope='module')
def begun(quick_model, tmp_path_factory):
    """A run of a config with unset settings: where its images are, and its work directory."""
    del quick_model  # its network is known now
    root = tmp_path_factory.mktemp('derived')
    source = save(root / 'data')
    pipeline.run(small_config(source), root / 'run', 'all')
    return source, WorkDir(root / 'run')


def test_a_run_records_its_values_and_states_what_was_read(begun):
    _, workdir = begun
    recorded = json.loads(workdir.config.read_text())
    assert (recorded['data.train_images'], recorded['data.classes'], recorded['dp.delta']) == (60, 3, 1e-2)
    assert 'data.train_images' in recorded['data.derived'] and 'dp.delta' not in recorded['data.derived']
    (line,) = [
        line for line in workdir.statement_text.read_text().splitlines() if 'public by declaration' in line
    ]
    assert all(f'`{name}`' in line for name in recorded['data.derived'])


def test_a_run_goes_on_with_its_values(begun, tmp_path, capsys):
    """Without the source's name too; and other images are refused, not derived from."""
    source, reference = begun
    workdir = WorkDir(shutil.copytree(reference.root, tmp_path / 'run'))
    pipeline.run(small_config(), workdir.root, 'all')
    assert 'Everything is done' in capsys.readouterr().out
    other = 'belongs to another config(?s:.*)config.{} there, {} now'
    with pytest.raises(ValueError, match=other.format('dp.delta: 0.01', 0.001)):
        pipeline.run(small_config(source, dp__delta=1e-3), workdir.root, 'finetune')
    with pytest.raises(ValueError, match=other.format('data.source: .*', 'npz:/elsewhere')):
        pipeline.run(small_config('npz:/elsewhere'), workdir.root, 'finetune')
    shutil.rmtree(workdir.model('finetune'))
    path = Path(source.partition(':')[2])
    before = (path / 'train.npz').read_bytes()
    try:
        save(path, train=61)
        with pytest.raises(ValueError, match='config.data.train_images is 60; it must be 61'):
            pipeline.run(small_config(), workdir.root, 'finetune')
    finally:
        (path / 'train.npz').write_bytes(before)


def test_a_bare_release_goes_on_without_its_images(begun, tmp_path, monkeypatch):
    _, reference = begun
    workdir = WorkDir(tmp_path)
    shutil.copytree(reference.release, workdir.release)
    shutil.rmtree(workdir.synthetic)
    monkeypatch.setattr(sources, 'describe', None)
    pipeline.run(small_config(), tmp_path, 'generate')
    assert len(np.load(workdir.synthetic / 'images.npz')['labels']) == 12


def test_plan_tells_every_value_and_makes_nothing(tmp_path, capsys):
    source = save(tmp_path / 'data')
    pipeline.run(unset_config(data__source=source, dp__epsilon=8.0), tmp_path / 'run', 'plan')
    told = capsys.readouterr().out
    names = derive.unset(unset_config())
    assert len(names) > 30 and all(f'\n{name} ' in told for name in names)
    assert 'private images by class: 0 20, 1 20, 2 20' in told and 'public by declaration' in told
    assert told.rstrip().splitlines()[-1].startswith('WARNING: ')  # of the noise, where it is read
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'changes, texts',
    [
        ({}, ['config.data.source is not set; it must be ']),
        ({'data__source': 'npz:/nowhere'}, ['config.data.source: npz:/nowhere needs']),
        (
            {'data__source': 'npz:/nowhere', 'dp__epsilon': -1.0, 'loop__log_every_steps': 0},
            [
                'config.dp.epsilon is -1.0',
                'config.loop.log_every_steps is 0',
                'config.data.source: npz:/nowhere',
            ],
        ),
        (
            {'data__source': 'good', 'finetune__batch_size': 61},
            ['config.finetune.batch_size is 61; it must be at m'],
        ),
    ],
)
@pytest.mark.parametrize('stage', ['plan', 'all'])
def test_problems_are_told_and_nothing_else(tmp_path, capsys, changes, texts, stage):
    config = unset_config(**changes)
    if 'data__source' not in changes:
        config.data.source = None
    elif config.data.source == 'good':
        config.data.source = save(tmp_path / 'data')
    with pytest.raises((ValueError, OSError)) as error:
        pipeline.run(config, tmp_path / 'run', stage)
    found = str(error.value).splitlines()
    if stage == 'plan':
        assert [line[: len(text)] for line, text in zip(found, texts, strict=True)] == texts
    assert 'Privacy statement' not in capsys.readouterr().out
    assert not (tmp_path / 'run' / 'release').exists()


def steps_of(config):
    return build.plan(config, build.model(config)).budget.count('dp_sgd')


def test_a_time_limit_decides_the_steps_of_a_run_for_good(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    timed = lambda limit: tiny_config(finetune__time_limit=limit, loop__images_at_once=8)
    settled = lambda limit, folder: derive.settled(timed(limit), WorkDir(tmp_path / folder), settings.check)
    short, long = (steps_of(settled(limit, 'none')) for limit in ('60s', '2m'))
    assert short >= 2 and long == pytest.approx(2 * short, abs=1)
    pipeline.run(timed('60s'), tmp_path / 'run', 'central')
    kept = tmp_path / 'cache/dpp_jax/noised_images_per_second.json'
    slower = {name: rate / 3 for name, rate in json.loads(kept.read_text()).items() if name[0] != '_'}
    kept.write_text(json.dumps(slower))
    assert steps_of(settled('60s', 'none')) < short / 2  # elsewhere
    assert steps_of(settled('60s', 'run')) == short
    with pytest.raises(ValueError, match='finetune.time_limit'):
        pipeline.run(timed('2m'), tmp_path / 'run', 'central')
    pipeline.run(timed('60s'), tmp_path / 'other', 'plan')
    assert 'in finetune.time_limit = 60s, by the rate of this machine' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['an hour', '5', '-3m', 'infh', '0s', 'm'])
def test_a_time_limit_that_is_no_time_is_named(tiny_config, text):
    with pytest.raises(ValueError, match=f'finetune.time_limit is {text!r}; it must be a time above 0 such'):
        settings.check(tiny_config(finetune__time_limit=text))
