"""The split of ε between queries and fine-tuning: what is said is what the plan with these settings has."""

import pytest

from dpp_jax import build
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, QUERIES
from dpp_jax.run import split

ALL = {'moments__enabled': True, 'moments__frequencies': 9, 'frequency__enabled': True}


def noise(config, model):
    return build.plan(config, model).budget.of(DP_SGD).mechanism.noise_multiplier


@pytest.mark.parametrize('more', [{}, ALL, {'dp__epsilon': 1.0}], ids=['one query', 'three', 'less ε'])
def test_shares_by_the_rule_raise_the_noise_of_fine_tuning_by_as_much(tiny_config, tiny_model, more):
    config = tiny_config(**{'query__noise_multiplier': 20.0} | more)
    found = split.of(build.plan(config, tiny_model).budget)
    alone = noise(tiny_config(**{'pretrain__enabled': False, 'dp__epsilon': config.dp.epsilon}), tiny_model)
    assert noise(config, tiny_model) == pytest.approx((1 + found.rise) * alone, rel=3e-3)
    assert list(found.shares) == ([CENTRAL_QUERY, MOMENTS, FREQUENCY] if more is ALL else [CENTRAL_QUERY])
    for name, share in found.shares.items():
        config[QUERIES[name]].epsilon_share = share
    assert noise(config, tiny_model) == pytest.approx((1 + split.RISE) * alone, rel=5e-3)


def test_nothing_is_said_where_nothing_is_asked(tiny_config, tiny_model):
    assert split.of(build.plan(tiny_config(pretrain__enabled=False), tiny_model).budget) is None


def test_words_round_shares_down():
    text = split.words(split.Split(share=0.1234, rise=0.0123, shares={CENTRAL_QUERY: 0.2789}))
    assert '12 % of ε alone' in text and 'by 1.2 %' in text and 'query.epsilon_share=0.27' in text
