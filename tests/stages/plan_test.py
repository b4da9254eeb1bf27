"""The plan: the paper's figures, and clear refusals before anything is spent."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from configs import camelyon_32, celeba_32, digits_8, fmnist_28, mnist_14, mnist_28
from dpp_jax import pipeline, settings
from dpp_jax.privacy import accounting
from dpp_jax.run import folder as workdir_lib
from dpp_jax.stages import plan

CONFIGS = {
    'mnist_28': mnist_28,
    'fmnist_28': fmnist_28,
    'celeba_32': celeba_32,
    'camelyon_32': camelyon_32,
}
REFERENCE = json.loads((Path(__file__).parents[1] / 'golden' / 'accounting_rdp_opacus.json').read_text())


class NoModel:
    """Takes no time to be looked at."""

    def shapes(self):
        return {}


@pytest.fixture
def small(monkeypatch):
    """A model of no size: where only noise is of interest."""
    monkeypatch.setattr(plan, '_memory', lambda *_: 0)
    return NoModel()


@pytest.mark.parametrize('row', [row for row in REFERENCE if row['name'] in CONFIGS], ids=str)
def test_the_papers_configs_give_the_pytorch_codes_noise(row):
    config = CONFIGS[row['name']].get_config(str(row['target_epsilon']))
    result = plan.make(config, pipeline.make_model(config))
    assert result.noise_multiplier == pytest.approx(row['noise_multiplier'], rel=1e-3)
    assert result.steps == row['steps']
    assert result.sampling_probability == pytest.approx(row['sample_rate'])
    assert result.epsilon_query == pytest.approx(row['query_epsilon'], rel=1e-3)
    assert result.epsilon_total <= row['target_epsilon']


def test_mnist_has_the_size_of_the_paper():
    config = mnist_28.get_config('1')
    result = plan.make(config, pipeline.make_model(config))
    assert result.parameters == 1_485_217
    assert result.pretrain_steps == 2000
    assert result.finetune_noised_images == 2250 * 4000 * 32
    assert 1e7 < result.memory_bytes_per_device < 4e9
    text = plan.text(result, config, {'central': True, 'finetune': False})
    for part in ('13.08', '1,485,217', 'would run      finetune', '2,250 steps'):
        assert part in text


@pytest.mark.parametrize(
    'module, epsilon, share',
    [
        (digits_8, '1.3', None),
        (digits_8, '10', None),
        (digits_8, '0.3', 0.1),
        (mnist_14, '0.2', None),
        (mnist_14, '10', None),
        (mnist_14, '0.1', 0.2),
    ],
)
def test_our_configs_use_the_whole_of_these_budgets(module, epsilon, share, small):
    config = module.get_config(epsilon)
    config.query.epsilon_share = share
    result = plan.make(config, small)
    assert 0.999 * float(epsilon) < result.epsilon_total <= float(epsilon)


@pytest.mark.parametrize('module, epsilon', [(digits_8, '1.27'), (mnist_14, '0.18')])
def test_our_configs_refuse_a_budget_that_their_query_exceeds_alone(module, epsilon, small):
    with pytest.raises(ValueError, match='query alone spends.*query.epsilon_share'):
        plan.make(module.get_config(epsilon), small)


def test_without_pretraining_the_whole_budget_goes_to_finetuning(tiny_config, tiny_model):
    with_query = plan.make(tiny_config(), tiny_model)
    without = plan.make(tiny_config(pretrain__enabled=False), tiny_model)
    assert without.query_count == 0 and without.epsilon_query == 0
    assert without.noise_multiplier < with_query.noise_multiplier
    assert without.epsilon_total <= 10


def test_a_query_that_exceeds_the_budget_alone_is_refused(tiny_config, tiny_model):
    with pytest.raises(ValueError, match='query'):
        plan.make(tiny_config(query__noise_multiplier=0.3), tiny_model)


def test_plan_allocates_nothing_on_the_device(tiny_config, tiny_model):
    before = len(jax.live_arrays())
    plan.make(tiny_config(), tiny_model)
    assert len(jax.live_arrays()) <= before + 1


@pytest.fixture
def saved(tiny_config, small, tmp_path):
    """(changes of plan.json, settings) → the plan as made, and as loaded from its edited file."""

    def load(changes, **settings):
        config, workdir = tiny_config(**settings), workdir_lib.WorkDir(tmp_path)
        made = plan.make(config, small)
        changes = {name: change(getattr(made, name)) for name, change in changes.items()}
        plan.save(dataclasses.replace(made, **changes), workdir)
        return made, plan.load(config, small, workdir)

    return load


@pytest.mark.parametrize('name', ['noise_multiplier', 'query_noise_multiplier'])
def test_noise_that_another_version_calibrated_is_kept(saved, name):
    """Its last digits differ; the ledger of the run names them."""
    made, loaded = saved({name: lambda sigma: sigma * (1 + 1e-12)}, query__epsilon_share=0.2)
    assert getattr(loaded, name) == getattr(made, name) * (1 + 1e-12) != getattr(made, name)


@pytest.mark.parametrize(
    'changes, settings, text',
    [
        ({'query_noise_multiplier': 0.99}, {'query__epsilon_share': 0.2}, "within the query's share, 2"),
        ({'query_noise_multiplier': 1.01}, {}, 'query_noise_multiplier = 4.04; this config gives 4.0'),
        ({'noise_multiplier': 0.99}, {'query__epsilon_share': 0.2}, 'within the budget, 10'),
    ],
)
def test_noise_that_the_config_does_not_allow_is_refused(saved, changes, settings, text):
    changes = {name: lambda sigma, factor=factor: sigma * factor for name, factor in changes.items()}
    with pytest.raises(ValueError, match=text):
        saved(changes, **settings)


def test_figures_that_follow_from_the_noise_are_not_believed(saved):
    made, loaded = saved({'epsilon_total': lambda _: 1.0, 'memory_bytes_per_device': lambda _: 1})
    assert loaded == made


def test_a_share_of_the_query_is_calibrated_once(tiny_config, small, monkeypatch):
    """By the plan: whoever calibrates again may get another last digit, on another machine."""
    config = tiny_config(query__epsilon_share=0.2)
    made = plan.make(config, small)
    monkeypatch.setattr(accounting, 'calibrate', None)
    settings.check(config)
    assert {e.noise_multiplier for e in plan.entries(made, config)} == {
        made.query_noise_multiplier,
        made.noise_multiplier,
    }
