"""From a config to a plan: the paper's figures, and clear refusals before anything is spent."""

import json
from pathlib import Path
import re

import jax
import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.configs import camelyon_32, celeba_32, digits_8, fmnist_28, mnist_14, mnist_28
from dpp_jax.data import resize
from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.privacy.shares import Share

CONFIGS = {
    'mnist_28': mnist_28,
    'fmnist_28': fmnist_28,
    'celeba_32': celeba_32,
    'camelyon_32': camelyon_32,
}
REFERENCE = json.loads((Path(__file__).parent / 'golden' / 'accounting_rdp_opacus.json').read_text())


class NoModel:
    """Takes no time to be looked at, where only noise is of interest."""

    def shapes(self):
        return {}


@pytest.mark.parametrize('row', [row for row in REFERENCE if row['name'] in CONFIGS], ids=str)
def test_the_papers_configs_give_the_pytorch_codes_noise(row):
    budget = build.plan(CONFIGS[row['name']].get_config(str(row['target_epsilon'])), NoModel()).budget
    dp_sgd = budget.of(DP_SGD)
    assert dp_sgd.mechanism.noise_multiplier == pytest.approx(row['noise_multiplier'], rel=1e-3)
    assert dp_sgd.count == row['steps']
    assert dp_sgd.mechanism.sampling_probability == pytest.approx(row['sample_rate'])
    assert budget.spent(CENTRAL_QUERY) == pytest.approx(row['query_epsilon'], rel=1e-3)
    assert budget.spent() <= row['target_epsilon']


def test_mnist_has_the_size_of_the_paper():
    config = mnist_28.get_config('1')
    plan = build.plan(config, build.model(config))
    assert plan.parameters == 1_485_217
    assert plan.pretrain_steps == 2000
    assert plan.finetune_noised_images == 2250 * 4000 * 32


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
def test_our_configs_use_the_whole_of_these_budgets(module, epsilon, share):
    config = module.get_config(epsilon)
    if share is not None:
        config.query.epsilon_share = share
    spent = build.plan(config, NoModel()).budget.spent()
    assert 0.999 * float(epsilon) < spent <= float(epsilon)


@pytest.mark.parametrize('module, epsilon', [(digits_8, '1.27'), (mnist_28, '0.18')])
def test_our_configs_refuse_a_budget_that_their_query_exceeds_alone(module, epsilon):
    with pytest.raises(ValueError, match='query alone spends.*query.epsilon_share'):
        build.plan(module.get_config(epsilon), NoModel())


def test_without_pretraining_the_whole_budget_goes_to_finetuning(tiny_config):
    with_query = build.plan(tiny_config(), NoModel())
    without = build.plan(tiny_config(pretrain__enabled=False), NoModel())
    assert without.budget.of(CENTRAL_QUERY) is None and without.budget.count(CENTRAL_QUERY) == 0
    figures = without.figures()
    assert figures['query_count'] == 0 and figures['epsilon_query'] == 0
    assert figures['query_noise_multiplier'] is None and figures['query_sampling_probability'] is None
    assert figures['noise_multiplier'] < with_query.figures()['noise_multiplier']
    assert without.budget.spent() <= 10
    assert without.pretrain_steps == without.pretrain_noised_images == 0


def test_a_query_that_exceeds_the_budget_alone_is_refused(tiny_config):
    with pytest.raises(ValueError, match='query'):
        build.plan(tiny_config(query__noise_multiplier=0.3), NoModel())


def test_plan_allocates_nothing_on_the_device(tiny_config, tiny_model):
    before = len(jax.live_arrays())
    build.plan(tiny_config(), tiny_model)
    assert len(jax.live_arrays()) <= before + 1


@pytest.mark.parametrize('accountant', ['rdp', 'pld'])
def test_a_share_of_epsilon_decides_the_noise_of_the_query(tiny_config, accountant):
    config = tiny_config(query__epsilon_share=0.07, dp__accountant=accountant)
    budget = build.plan(config, NoModel(), noise={DP_SGD: 5.0}).budget
    assert budget.accountant == accountant
    spent = accounting.epsilon(budget.of(CENTRAL_QUERY).event, config.dp.delta, accountant)
    assert 0.999 * 0.7 < spent <= 0.7
    assert spent == budget.spent(CENTRAL_QUERY)


def test_a_share_that_no_noise_can_meet_is_named_with_the_least_that_can_be(tiny_config):
    config = tiny_config(query__epsilon_share=0.01, dp__epsilon=0.1, dp__delta=1e-5)
    with pytest.raises(ValueError) as refused:
        build.plan(config, NoModel())
    text = str(refused.value)
    assert 'config.query.epsilon_share is 0.01; it must be at least ' in text
    assert 'would get ε = 0.001, but' in text  # share x budget
    config.query.epsilon_share = 1.001 * float(re.search(r'at least ([\d.]+)\. ', text)[1])
    build.plan(config, NoModel(), noise={DP_SGD: 100.0})


@pytest.mark.parametrize(
    'size, channels, downsample', [(28, 1, 2), (32, 3, 2), (8, 1, 1), (28, 3, 3), (9, 1, 4)]
)
def test_the_sensitivity_is_that_of_the_images_that_are_asked(tiny_config, size, channels, downsample):
    config = tiny_config(
        data__image_size=size,
        data__channels=channels,
        query__downsample=downsample,
        query__clip_norm=None,
        query__pixel_center=0.25,
    )
    asked = resize.nearest(np.zeros((1, size, size, channels), np.uint8), downsample)
    query = build.query(config)
    assert (query.dimensions, query.classes) == (asked.size, 10)
    mechanism = build.plan(config, NoModel(), noise={DP_SGD: 5.0}).budget.of(CENTRAL_QUERY).mechanism
    assert mechanism.sensitivity == query.sensitivity == pytest.approx(0.75 * asked.size**0.5)


def test_the_mechanisms_are_those_of_the_settings(tiny_config):
    config = tiny_config(finetune__clip_norm=0.3)
    query, dp_sgd = build.plan(config, NoModel()).budget.releases
    assert (query.count, query.mechanism.noise_multiplier) == (config.query.queries, 4.0)
    assert query.mechanism.sampling_probability == config.query.sampling_probability
    assert query.mechanism.sensitivity == config.query.clip_norm
    assert (dp_sgd.count, dp_sgd.mechanism.sampling_probability) == (23, 1 / 23)
    assert dp_sgd.mechanism.sensitivity == 0.3


def test_the_number_of_images_that_is_compared_is_that_of_the_whole_split(tiny_config):
    config = tiny_config()
    share = build.images(config, 'train', rows=Share(1, 3).images)
    assert (len(share.images), share.total) == (479, config.data.train_images)
    config.data.train_images = 479
    with pytest.raises(ValueError, match='config.data.train_images is 479; it must be 1437'):
        build.images(config, 'train', rows=Share(1, 3).images)
