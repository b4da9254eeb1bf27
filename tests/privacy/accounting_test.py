"""ε and calibration against the reference figures, and what must hold for any settings."""

import json
import logging
import math
from pathlib import Path
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dpp_jax.privacy import accounting, calibration

ROWS = json.loads((Path(__file__).parents[1] / 'golden' / 'accounting_rdp_opacus.json').read_text())


def history(row):
    return [accounting.subsampled_gaussian(*query) for query in row['query_history'] or []]


def everything(row):
    """The query and the fine-tuning of one row, for any noise multiplier of the latter."""

    def make_event(sigma):
        steps = accounting.subsampled_gaussian(sigma, row['sample_rate'], row['steps'])
        return accounting.compose([*history(row), steps])

    return make_event


def name(row):
    return f'{row["name"]}-{row["target_epsilon"]:g}'


@pytest.fixture
def no_warnings(caplog, monkeypatch):
    """Fails a test during which dp_accounting warned (absl's logger does not always propagate)."""
    monkeypatch.setattr(logging.getLogger('absl'), 'propagate', True)
    with caplog.at_level(logging.WARNING):
        yield
    assert not caplog.get_records('call')


@pytest.mark.parametrize('row', ROWS, ids=name)
def test_reference_figures(row, no_warnings):
    event = everything(row)(row['noise_multiplier'])
    spent = accounting.epsilon(event, row['delta'])
    query = accounting.epsilon(accounting.compose(history(row)), row['delta'])
    assert spent == pytest.approx(row['epsilon'], rel=1e-3)
    assert query == pytest.approx(row['query_epsilon'], rel=1e-3)


# Fashion-MNIST has MNIST's settings: once is enough.
@pytest.mark.parametrize('row', [r for r in ROWS if r['name'] != 'fmnist_28'], ids=name)
def test_calibration_finds_the_least_noise_and_the_reference_noise(row, no_warnings):
    make_event, target, delta = everything(row), row['target_epsilon'], row['delta']
    sigma = calibration.calibrate(make_event, target, delta)
    assert sigma == pytest.approx(row['noise_multiplier'], rel=1e-3)
    assert accounting.epsilon(make_event(sigma), delta) <= target
    assert accounting.epsilon(make_event(sigma * (1 - 1e-4)), delta) > target


@pytest.mark.parametrize(('epsilon', 'sigma'), [(1.0, 12.030), (10.0, 1.742)])
def test_pld_needs_less_noise_on_mnist(epsilon, sigma, no_warnings):
    (row,) = [r for r in ROWS if r['name'] == 'mnist_28' and r['target_epsilon'] == epsilon]
    make_event = everything(row)
    found = calibration.calibrate(make_event, epsilon, row['delta'], 'pld')
    assert found == pytest.approx(sigma, rel=3e-4)
    assert accounting.epsilon(make_event(found), row['delta'], 'pld') <= epsilon


@pytest.mark.parametrize(
    'relation, spent', [('zero_out', 10.00065), ('add_remove', 10.00065), ('replace_one', 21.31401)]
)
def test_every_relation_has_its_epsilon_on_mnist(relation, spent):
    event = accounting.compose(
        [accounting.subsampled_gaussian(5.0, 0.1, 5), accounting.subsampled_gaussian(1.7424, 1 / 15, 2250)]
    )
    assert accounting.epsilon(event, 1e-5, 'pld', relation) == pytest.approx(spent, abs=1e-5)


@settings(max_examples=5, deadline=None)
@given(sigma=st.floats(1.0, 8.0), q=st.sampled_from([0.01, 0.3, 1.0]), count=st.integers(1, 30))
def test_zero_out_spends_as_add_or_remove_one_and_replace_one_up_to_twice_the_change(sigma, q, count):
    """Replacing moves a sum by at most twice as much: at most as half the noise, and exactly so for q = 1."""
    event = accounting.subsampled_gaussian(sigma, q, count)
    spent = {name: accounting.epsilon(event, 1e-5, 'pld', name) for name in accounting.RELATIONS}
    assert spent['zero_out'] == spent['add_remove'] <= spent['replace_one']
    most = accounting.epsilon(accounting.subsampled_gaussian(sigma / 2, q, count), 1e-5, 'pld')
    assert spent['replace_one'] <= most * (1 + 1e-3) + 1e-3
    if q == 1:
        assert spent['replace_one'] == pytest.approx(most, rel=1e-3, abs=1e-3)


def test_noise_for_replace_one_is_the_least_that_keeps_it_within_the_budget():
    def make_event(sigma):
        return accounting.subsampled_gaussian(sigma, 0.1, 50)

    sigma = calibration.calibrate(make_event, 2.0, 1e-5, 'pld', 'replace_one')
    assert accounting.epsilon(make_event(sigma), 1e-5, 'pld', 'replace_one') <= 2.0
    assert accounting.epsilon(make_event(sigma * (1 - 2e-4)), 1e-5, 'pld', 'replace_one') > 2.0


@pytest.mark.parametrize(
    'accountant, relation, text',
    [
        ('rdp', 'replace_one', "accountant is 'rdp'; it must be 'pld' with relation 'replace_one'"),
        ('pld', 'swap', "relation is 'swap'; it must be 'zero_out' or 'add_remove' or 'replace_one'"),
    ],
)
def test_a_relation_that_cannot_be_counted_is_refused(accountant, relation, text):
    event = accounting.subsampled_gaussian(1.0, 0.1, 1)
    with pytest.raises(ValueError, match=text):
        accounting.epsilon(event, 1e-5, accountant, relation)
    with pytest.raises(ValueError, match=text):
        calibration.calibrate(lambda sigma: event, 1.0, 1e-5, accountant, relation)


def exact_gaussian_delta(sigma, epsilon):
    """δ(ε) of one Gaussian mechanism (Balle, Wang 2018, theorem 8)."""

    def normal_cdf(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    a, b = 1 / (2 * sigma), epsilon * sigma
    return normal_cdf(a - b) - math.exp(epsilon) * normal_cdf(-a - b)


@pytest.mark.parametrize('sigma', [0.7, 2.0, 9.0])
def test_plain_gaussian_against_its_closed_form(sigma):
    """Four releases at 2σ are one at σ; PLD is tight, RDP is above."""
    event = accounting.subsampled_gaussian(2 * sigma, 1, 4)
    pld = accounting.epsilon(event, 1e-5, 'pld')
    rdp = accounting.epsilon(event, 1e-5, 'rdp')
    assert exact_gaussian_delta(sigma, pld) <= 1e-5
    assert exact_gaussian_delta(sigma, pld * 0.999 - 1e-3) > 1e-5
    assert pld < rdp < 1.35 * pld


sigmas = st.floats(0.6, 20)
rates = st.floats(1e-3, 1)
counts = st.integers(1, 500)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sigma=sigmas, q=rates, count=counts)
def test_more_noise_fewer_samples_fewer_steps_and_larger_delta_spend_less(sigma, q, count):
    def spent(sigma=sigma, q=q, count=count, delta=1e-5):
        event = accounting.subsampled_gaussian(sigma, q, count)
        return accounting.epsilon(event, delta)

    limit = spent() * (1 + 1e-9)
    assert spent(sigma=1.1 * sigma) <= limit
    assert spent(q=0.9 * q) <= limit
    assert spent(count=(count + 1) // 2) <= limit
    assert spent(delta=1e-4) <= limit


@settings(max_examples=6, deadline=None, derandomize=True)
@given(epsilon=st.floats(0.3, 20), q=rates, count=counts)
def test_calibration_never_exceeds_the_budget(epsilon, q, count):
    def make_event(sigma):
        return accounting.subsampled_gaussian(sigma, q, count)

    sigma = calibration.calibrate(make_event, epsilon, 1e-5)
    assert accounting.epsilon(make_event(sigma), 1e-5) <= epsilon
    assert accounting.epsilon(make_event(sigma * (1 - 1e-4)), 1e-5) > epsilon


def test_composition_adds_up_and_the_order_does_not_matter():
    a = accounting.subsampled_gaussian(3, 0.1, 20)
    b = accounting.subsampled_gaussian(5, 1, 2)
    both = accounting.epsilon(accounting.compose([a, b]), 1e-5)
    assert both == pytest.approx(accounting.epsilon(accounting.compose([b, a]), 1e-5))
    assert both > max(accounting.epsilon(a, 1e-5), accounting.epsilon(b, 1e-5))
    single = accounting.subsampled_gaussian(3, 0.1, 1)
    twenty = accounting.epsilon(accounting.compose([single] * 20), 1e-5)
    assert twenty == pytest.approx(accounting.epsilon(a, 1e-5))


@pytest.mark.parametrize('accountant', ['rdp', 'pld'])
def test_nothing_spends_nothing(accountant):
    assert accounting.epsilon(accounting.compose([]), 1e-5, accountant) == 0


def test_the_best_order_gives_the_same_epsilon():
    event = accounting.subsampled_gaussian(1.0, 1, 1)
    epsilon, order = accounting.epsilon_and_order(event, 1e-5)
    assert epsilon == accounting.epsilon(event, 1e-5)
    assert order in accounting.RDP_ORDERS
    # Rényi divergence α/2 turned into (ε, δ) by Canonne, Kamath, Steinke 2020, proposition 12.
    converted = order / 2 + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1)
    assert epsilon == pytest.approx(converted)


@pytest.mark.parametrize('accountant', ['rdp', 'pld'])
def test_a_query_that_alone_exceeds_the_budget_is_refused_with_both_figures(accountant):
    row = ROWS[0]
    alone = accounting.epsilon(accounting.compose(history(row)), row['delta'], accountant)
    text = f'query alone spends ε = {accounting.format_epsilon(alone)} .*budget dp.epsilon is 0.1[.]'
    with pytest.raises(calibration.BudgetTooSmall, match=text) as refused:
        calibration.calibrate(everything(row), 0.1, row['delta'], accountant)
    assert refused.value.least == pytest.approx(alone, rel=1e-3)


def test_pld_may_fit_a_budget_that_rdp_cannot():
    row = ROWS[0]
    budget = 0.175  # the query alone: 0.188 by RDP, 0.165 by PLD
    with pytest.raises(ValueError, match='query alone'):
        calibration.calibrate(everything(row), budget, row['delta'])
    sigma = calibration.calibrate(everything(row), budget, row['delta'], 'pld')
    assert accounting.epsilon(everything(row)(sigma), row['delta'], 'pld') <= budget


def test_a_budget_that_needs_no_noise_is_refused():
    def make_event(sigma):
        return accounting.subsampled_gaussian(sigma, 0.5, 1)

    with pytest.raises(ValueError, match=r'epsilon is 1000000; it must be small enough'):
        calibration.calibrate(make_event, 1e6, 1e-5)


# --- How far distributions of privacy losses reach


@pytest.mark.parametrize('relation', ['zero_out', 'replace_one'])
@pytest.mark.parametrize('epsilon', [100.0, 700.0])
def test_pld_calibrates_large_budgets_in_seconds(epsilon, relation):
    def make_event(sigma):
        return accounting.compose(
            [accounting.subsampled_gaussian(4.0, 1, 2), accounting.subsampled_gaussian(sigma, 1 / 6, 120)]
        )

    start = time.process_time()
    sigma = calibration.calibrate(make_event, epsilon, 1e-4, 'pld', relation)
    assert time.process_time() - start < 60  # before: minutes and gigabytes, or no end
    assert accounting.epsilon(make_event(sigma), 1e-4, 'pld', relation) <= epsilon
    assert accounting.epsilon(make_event(sigma * (1 - 2e-4)), 1e-4, 'pld', relation) > epsilon


@settings(max_examples=6, deadline=None, derandomize=True)
@given(sigma=st.floats(0.03, 0.4), times=st.sampled_from([1, 4, 30]))
def test_coarse_distributions_stay_above_the_exact_epsilon_and_near_it(sigma, times):
    """Plain Gaussian releases have a closed form."""
    event = accounting.subsampled_gaussian(sigma * times**0.5, 1, times)
    found = accounting.epsilon(event, 1e-5, 'pld')
    assert exact_gaussian_delta(sigma, min(found, 700.0)) <= 1e-5 or found > 700
    if found <= 700:
        assert exact_gaussian_delta(sigma, found * 0.999) > 1e-5


@pytest.mark.parametrize('interval', [3e-4, 1e-3, 1e-2, 0.1])
def test_a_coarser_interval_never_gives_less(interval):
    event = accounting.compose(
        [accounting.subsampled_gaussian(4.0, 1, 2), accounting.subsampled_gaussian(0.9, 1 / 6, 120)]
    )
    fine = accounting.epsilon(event, 1e-4, 'pld')
    for relation in accounting.RELATIONS:
        assert accounting.unchecked_epsilon(event, 1e-4, 'pld', relation, interval) >= fine


@pytest.mark.parametrize(
    'arguments, text',
    [
        ((1.0, 1e-14), "delta is 1e-14; it must be above 1e-14 with accountant 'pld'.*'rdp' states any"),
        ((1.0, 1e-30), "delta is 1e-30; it must be above 1e-14 with accountant 'pld'.*'rdp' states any"),
        ((701.0, 1e-5), "epsilon is 701.0; it must be at most 700 with accountant 'pld'.*'rdp' counts any"),
        ((1e4, 1e-5), "epsilon is 10000.0; it must be at most 700 with accountant 'pld'"),
    ],
)
def test_what_pld_cannot_state_is_refused_with_the_accountant_that_can(arguments, text):
    def make_event(sigma):
        return accounting.subsampled_gaussian(sigma, 0.1, 9)

    with pytest.raises(ValueError, match=text):
        calibration.calibrate(make_event, *arguments, 'pld')
    assert calibration.calibrate(make_event, *arguments, 'rdp') > 0


def test_a_plan_of_any_length_is_counted_at_once_or_refused():
    def make_event(sigma):
        return accounting.subsampled_gaussian(sigma, 1 / 6, 6 * 10**9)

    start = time.process_time()
    sigma = calibration.calibrate(make_event, 10.0, 1e-5)
    assert accounting.epsilon(make_event(sigma), 1e-5) <= 10
    with pytest.raises(ValueError, match='it must be .rdp. for a mechanism with 6,000,000,000 releases'):
        calibration.calibrate(make_event, 10.0, 1e-5, 'pld')
    assert accounting.epsilon_if_stated(make_event(sigma), 1e-5) is None
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ((0.0, 0.1, 1), 'noise_multiplier is 0.0; it must be finite and > 0'),
        ((-1.0, 0.1, 1), 'noise_multiplier is -1.0'),
        ((math.nan, 0.1, 1), 'noise_multiplier is nan'),
        ((math.inf, 0.1, 1), 'noise_multiplier is inf'),
        ((1.0, 0.0, 1), r'sampling_probability is 0.0; it must be in \(0, 1\]'),
        ((1.0, 1.5, 1), 'sampling_probability is 1.5'),
        ((1.0, math.nan, 1), 'sampling_probability is nan'),
        ((1.0, 0.1, 0), 'count is 0; it must be a whole number, at least 1'),
        ((1.0, 0.1, 2.0), 'count is 2.0'),
        ((1.0, 0.1, True), 'count is True'),
    ],
)
def test_bad_mechanisms_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        accounting.subsampled_gaussian(*arguments)


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({'epsilon': 0.0}, 'epsilon is 0.0; it must be finite and > 0'),
        ({'epsilon': math.inf}, 'epsilon is inf'),
        ({'epsilon': math.nan}, 'epsilon is nan'),
        ({'delta': 0.0}, r'delta is 0.0; it must be in \(0, 1\)'),
        ({'delta': 1.0}, 'delta is 1.0'),
        ({'accountant': 'gdp'}, "accountant is 'gdp'; it must be 'rdp' or 'pld'"),
    ],
)
def test_bad_budgets_are_refused(changes, text):
    def make_event(sigma):
        return accounting.subsampled_gaussian(sigma, 0.1, 10)

    arguments = {'epsilon': 1.0, 'delta': 1e-5, 'accountant': 'rdp'} | changes
    with pytest.raises(ValueError, match=text):
        calibration.calibrate(make_event, **arguments)
    if 'epsilon' not in changes:
        del arguments['epsilon']
        with pytest.raises(ValueError, match=text):
            accounting.epsilon(make_event(1.0), **arguments)


def test_numbers_of_numpy_are_numbers():
    event = accounting.subsampled_gaussian(np.float32(2), np.float64(0.5), np.int64(3))
    assert event == accounting.subsampled_gaussian(2.0, 0.5, 3)
