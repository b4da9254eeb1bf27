"""The plan of a work directory: kept as it was made, and refused where somebody changed it."""

import json
import math

import pytest

from dpp_jax import build, settings
from dpp_jax.privacy import calibration
from dpp_jax.privacy.budget import (
    CENTRAL_QUERY,
    DP_SGD,
    FREQUENCY,
    MECHANISMS,
    MOMENTS,
    SELECTION,
    Budget,
    Releases,
)
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import plan as plan_lib

_KEPT = tuple(plan_lib.NOISES.values())
_MOMENTS = {'moments__enabled': True, 'moments__frequencies': 9}
_SHARES = {
    'query__epsilon_share': 0.2,
    'moments__epsilon_share': 0.1,
    'frequency__enabled': True,
    'frequency__epsilon_share': 0.05,
    'evaluate__selection': 'private_noisy',
} | _MOMENTS
_NEEDED = [name for name in plan_lib._BINDING if name not in plan_lib._NEW_FIELDS] + ['noise_multiplier']


class NoModel:
    """Takes no time to be looked at."""

    def shapes(self):
        return {}


@pytest.fixture
def saved(tiny_config, tmp_path):
    """(change of plan.json's figures, settings) → the plan as made, and as loaded from the changed file."""

    def load(change, **changes):
        config, path = tiny_config(**changes), tmp_path / 'release' / 'plan.json'
        shares = {
            CENTRAL_QUERY: config.query.epsilon_share,
            MOMENTS: config.moments.epsilon_share,
            FREQUENCY: config.frequency.epsilon_share,
            SELECTION: config.evaluate.selection_share,
        }

        def make(noise, before):
            return build.plan(config, NoModel(), noise, before)

        made = plan_lib.load(path, make, shares)
        plan_lib.save(path, made)
        assert json.loads(path.read_text()) == made.figures()
        path.write_text(json.dumps(change(made.figures())))
        return made, plan_lib.load(path, make, shares)

    return load


@pytest.mark.parametrize('name', _KEPT)
def test_noise_that_another_version_calibrated_is_kept(saved, name):
    """Its last digits differ; the ledger of the run names them."""
    made, loaded = saved(lambda f: {**f, name: f[name] * (1 + 1e-12)}, **_SHARES)
    made, loaded = made.figures(), loaded.figures()
    assert loaded[name] == made[name] * (1 + 1e-12) != made[name]


@pytest.mark.parametrize(
    'name, factor, settings, text',
    [
        ('query_noise_multiplier', 0.99, {'query__epsilon_share': 0.2}, "within the query's share, 2"),
        ('moments_noise_multiplier', 0.99, _SHARES, "within the moments' share, 1"),
        ('frequency_noise_multiplier', 0.99, _SHARES, "within the frequency's share, 0.5"),
        ('query_noise_multiplier', 1.01, {}, 'query_noise_multiplier = 4.04; this config gives 4.0'),
        ('noise_multiplier', 0.99, {'query__epsilon_share': 0.2}, 'within the budget, 10'),
        ('selection_noise_multiplier', 0.99, _SHARES, "within the selection's share, 0.2"),
    ],
)
def test_noise_that_the_config_does_not_allow_is_refused(saved, name, factor, settings, text):
    with pytest.raises(ValueError, match=text):
        saved(lambda figures: {**figures, name: figures[name] * factor}, **settings)


def test_figures_that_follow_from_the_noise_are_not_believed(saved):
    """Nor looked at: an earlier version wrote one that is not there any more."""
    changes = {'epsilon_total': 1.0, 'parameters': 1, 'memory_bytes_per_device': 1}
    made, loaded = saved(lambda figures: {**figures, **changes})
    assert loaded == made


@pytest.mark.parametrize('name', plan_lib._BINDING)
def test_a_figure_that_the_guarantee_rests_on_is_that_of_the_config(saved, name):
    def change(figures):
        value = figures[name]
        other = {'accountant': 'pld', 'private_groups': 7, 'images_per_group': 7, 'declared': ['dp_sgd']}
        return {**figures, name: other.get(name) or value * 2}

    with pytest.raises(ValueError, match=f'plan.json has {name} = .*; this config gives'):
        saved(change, evaluate__selection='private_noisy', frequency__enabled=True, **_MOMENTS)


@pytest.mark.parametrize('name', _NEEDED)
def test_a_plan_without_a_figure_that_is_needed_is_refused_in_a_line(saved, name):
    def without(figures):
        return {key: value for key, value in figures.items() if key != name}

    with pytest.raises(ValueError, match=f'not a valid plan .it has no {name}.. Restore') as refused:
        saved(without)
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('name', _KEPT)
@pytest.mark.parametrize('value', [None, 'much', -1.0, 0.0, math.nan, math.inf, [1]], ids=repr)
def test_noise_that_is_no_noise_is_refused_in_a_line(saved, name, value):
    """It would be calibrated anew, or refused without a word of the file."""
    text = (
        'release/plan.json (is not a valid plan|has (query|moments|frequency|selection)_noise_multiplier = )'
    )
    with pytest.raises(ValueError, match=text) as refused:
        saved(lambda figures: {**figures, name: value}, **_SHARES)
    assert '\n' not in str(refused.value) and name in str(refused.value)


def test_a_plan_of_an_earlier_version_is_one_of_zero_out(saved):
    new = set(plan_lib._NEW_FIELDS)
    made, loaded = saved(lambda f: {name: value for name, value in f.items() if name not in new})
    assert loaded == made and loaded.budget.relation == 'zero_out'
    with pytest.raises(ValueError, match='relation = zero_out; this config gives add_remove'):
        saved(
            lambda f: {name: value for name, value in f.items() if name not in new}, dp__relation='add_remove'
        )


@pytest.mark.parametrize('value', [3, [{}], [{'mechanism': 'dp_sgd'}], {'a': 1}, None], ids=repr)
def test_what_was_spent_before_is_refused_in_a_line_where_it_cannot_be_read(saved, value):
    with pytest.raises(ValueError, match='plan.json is not a valid plan .*Restore') as refused:
        saved(lambda figures: {**figures, 'spent_before': value})
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('text', ['', '{"delta": 1', '[]', '\0' * 9, '\udce9'], ids=repr)
def test_a_damaged_plan_is_named(tmp_path, text):
    path = tmp_path / 'plan.json'
    path.write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ValueError, match='plan.json cannot be read .*Restore'):
        plan_lib.load(path, make=None, shares={})


def test_a_plan_is_fixed_once(tmp_path, tiny_config):
    first, second = (build.plan(tiny_config(dp__epsilon=e), NoModel()) for e in (10.0, 5.0))
    plan_lib.save(tmp_path / 'plan.json', first)
    plan_lib.save(tmp_path / 'plan.json', second)
    assert json.loads((tmp_path / 'plan.json').read_text()) == first.figures()


def test_a_share_of_the_query_is_calibrated_once(tiny_config, monkeypatch):
    """By the plan: whoever calibrates again may get another last digit, on another machine."""
    config = tiny_config(**_SHARES)
    made = build.plan(config, NoModel())
    monkeypatch.setattr(calibration, 'calibrate', None)
    settings.check(config)
    noise = {part.mechanism.name: part.mechanism.noise_multiplier for part in made.budget.releases}
    assert noise == plan_lib.noises(made.figures()) and set(noise) == set(MECHANISMS)
    assert build.plan(config, NoModel(), noise) == made


@pytest.mark.parametrize('images', [1, 7, 1437, 60_000, 162_770])
@pytest.mark.parametrize('batches', [1, 3, 23, 49, 93])
def test_the_expected_batch_is_the_images_over_the_number_of_batches(images, batches):
    mechanism = GaussianMechanism(
        name=DP_SGD, noise_multiplier=1.0, sampling_probability=1 / batches, sensitivity=1.0
    )
    releases = (Releases(mechanism=mechanism, count=5),)
    plan = plan_lib.Plan(
        budget=Budget(epsilon=1.0, delta=1e-5, accountant='rdp', releases=releases),
        private_images=images,
        parameters=0,
        pretrain_steps=0,
        pretrain_noised_images=2,
        finetune_noised_images=30,
    )
    assert plan.expected_batch_size == images / batches
    stages = ('central', 'pretrain', 'finetune', 'generate')
    assert plan.noised_images(stages) == 32 and plan.noised_images(stages[2:]) == 30
