"""The budget: noise calibrated to (ε, δ), and a ledger compared with what was planned."""

import dataclasses
import json
import math
from pathlib import Path
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from dpp_jax.privacy import accounting, budget, calibration
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, Budget, Releases
from dpp_jax.privacy.ledger import Entry, Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism

REFERENCE = json.loads((Path(__file__).parents[1] / 'golden' / 'accounting_rdp_opacus.json').read_text())
DELTA = 1e-4


def releases(name, sigma, q, count, sensitivity=1.0):
    mechanism = GaussianMechanism(
        name=name, noise_multiplier=sigma, sampling_probability=q, sensitivity=sensitivity
    )
    return Releases(mechanism=mechanism, count=count)


def queries(sigma=4.0):
    return releases(CENTRAL_QUERY, sigma, 1.0, 2, sensitivity=8.0)


def dp_sgd(sigma=1.1):
    return releases(DP_SGD, sigma, 1 / 6, 12)


def make_budget(**changes):
    fields = dict(epsilon=10.0, delta=DELTA, accountant='rdp', releases=(queries(), dp_sgd()))
    return Budget(**{**fields, **changes})


@pytest.mark.parametrize('accountant, epsilon', [('rdp', 1e-3), ('rdp', 1e-5), ('pld', 1e-7)])
@pytest.mark.parametrize('known', [(), (releases(CENTRAL_QUERY, 1e6, 0.1, 1),)], ids=['alone', 'query'])
def test_an_epsilon_that_no_noise_reaches_is_refused_with_the_least_that_can_be_stated(
    accountant, epsilon, known
):
    """It is not the query that spends too much."""
    limits = dict(delta=1e-5, accountant=accountant)
    with pytest.raises(calibration.BudgetTooSmall, match='least ε that the accountant') as refused:
        budget.calibrate(known, lambda s: releases(DP_SGD, s, 1 / 6, 12), epsilon=epsilon, **limits)
    text, least = str(refused.value), refused.value.least
    assert 'query' not in text and '\n' not in text and least > epsilon
    assert f'must be above {accounting.format_epsilon(least)}, ' in text
    # Another accountant is named only if it can.
    assert ("accountant='pld'" in text) == (accountant == 'rdp' and epsilon == 1e-3)
    budget.calibrate(known, lambda s: releases(DP_SGD, s, 1 / 6, 12), epsilon=least * 1.001, **limits)


# --- What a budget knows


def test_releases_are_found_by_the_name_of_their_mechanism():
    both = make_budget()
    assert (both.of(CENTRAL_QUERY), both.of(DP_SGD), both.of('other')) == (queries(), dp_sgd(), None)
    assert [both.count(name) for name in (CENTRAL_QUERY, DP_SGD, 'other')] == [2, 12, 0]


@pytest.mark.parametrize('accountant', accounting.ACCOUNTANTS)
def test_what_is_spent_is_that_of_the_named_mechanisms_together(accountant):
    both = make_budget(accountant=accountant)
    query = accounting.subsampled_gaussian(4.0, 1.0, 2)
    steps = accounting.subsampled_gaussian(1.1, 1 / 6, 12)

    def epsilon(*events):
        return pytest.approx(accounting.epsilon(accounting.compose(events), DELTA, accountant))

    assert both.spent(CENTRAL_QUERY) == epsilon(query)
    assert both.spent(DP_SGD) == epsilon(steps)
    assert both.spent() == both.spent(DP_SGD, CENTRAL_QUERY) == epsilon(query, steps)
    assert both.spent('other') == 0 < both.spent(CENTRAL_QUERY) < both.spent()


def test_the_sensitivity_does_not_change_what_is_spent():
    """σ is relative to it."""
    larger = make_budget(releases=(queries(), releases(DP_SGD, 1.1, 1 / 6, 12, sensitivity=50.0)))
    assert larger.spent() == make_budget().spent()


# --- Calibration


@pytest.mark.parametrize(
    ('accountant', 'known'),
    [('rdp', ()), *((name, (queries(),)) for name in accounting.ACCOUNTANTS)],
    ids=lambda value: value if isinstance(value, str) else f'{len(value)} queries',
)
def test_the_free_mechanism_gets_the_least_noise_within_the_budget(accountant, known):
    limits = dict(epsilon=3.0, delta=DELTA, accountant=accountant)
    made = budget.calibrate(known, dp_sgd, **limits)
    assert (made.epsilon, made.delta, made.accountant) == (3.0, DELTA, accountant)
    assert made.releases[:-1] == known and made.count(DP_SGD) == 12
    sigma = made.of(DP_SGD).mechanism.noise_multiplier
    assert made.spent() <= 3.0
    less = budget.calibrate(known, dp_sgd, noise_multiplier=sigma * (1 - 1e-4), **limits)
    assert less.spent() > 3.0


def test_queries_cost_noise_of_the_free_mechanism():
    limits = dict(epsilon=3.0, delta=DELTA, accountant='rdp')
    alone, beside = (budget.calibrate(known, dp_sgd, **limits) for known in ((), (queries(),)))
    sigmas = [made.of(DP_SGD).mechanism.noise_multiplier for made in (alone, beside)]
    assert sigmas[0] < sigmas[1]


def test_noise_that_is_decided_already_is_not_searched(monkeypatch):
    """Another version or machine may find another last digit; the ledger names this one."""
    monkeypatch.setattr(calibration, 'calibrate', None)
    made = budget.calibrate(
        [queries()], dp_sgd, epsilon=0.1, delta=DELTA, accountant='rdp', noise_multiplier=1.3
    )
    assert made.of(DP_SGD) == dp_sgd(1.3) and made.of(CENTRAL_QUERY) == queries()


def test_queries_that_exceed_the_budget_alone_are_refused_with_what_they_spend():
    spent = make_budget().spent(CENTRAL_QUERY)
    with pytest.raises(calibration.BudgetTooSmall, match='query alone spends ε = ') as refused:
        budget.calibrate([queries()], dp_sgd, epsilon=0.9 * spent, delta=DELTA, accountant='rdp')
    assert refused.value.least == pytest.approx(spent, rel=1e-3)


@pytest.mark.parametrize('accountant', accounting.ACCOUNTANTS)
def test_a_share_of_epsilon_decides_the_noise_of_the_queries(accountant):
    limits = dict(epsilon=10.0, delta=DELTA, accountant=accountant)
    sigma = budget.calibrate_share(queries, 0.07, **limits)
    spent = accounting.epsilon(queries(sigma).event, DELTA, accountant)
    assert 0.999 * 0.7 < spent <= 0.7


def test_a_share_that_no_noise_can_meet_is_named_with_the_least_that_can_be():
    limits = dict(epsilon=0.1, delta=1e-5, accountant='rdp')
    with pytest.raises(ValueError) as refused:
        budget.calibrate_share(queries, 0.01, **limits)
    text = str(refused.value)
    assert 'config.query.epsilon_share is 0.01; it must be at least ' in text
    assert 'would get ε = 0.001, but' in text  # share x budget
    share = 1.001 * float(re.search(r'at least ([\d.]+)\. ', text)[1])
    sigma = budget.calibrate_share(queries, share, **limits)
    assert accounting.epsilon(queries(sigma).event, 1e-5) <= share * 0.1


# --- The schedule of DP-SGD


@pytest.mark.parametrize(
    ('images', 'batch_size', 'epochs'),
    [(60_000, 4096, 150), (182_637, 2048, 150), (302_436, 2048, 20)],
    ids=['mnist', 'celeba', 'camelyon'],
)
def test_schedule_is_that_of_the_paper(images, batch_size, epochs):
    """q = 1 / ceil(N / batch), steps = epochs / q; the reference figures hold both."""
    q, steps = budget.schedule(images, batch_size, epochs)
    rows = {(row['sample_rate'], row['steps']) for row in REFERENCE}
    assert any(q == pytest.approx(rate, rel=1e-12) and steps == number for rate, number in rows)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), images=st.integers(1, 10**7), epochs=st.floats(0.01, 2000))
def test_schedule_takes_no_more_images_than_asked_for(data, images, epochs):
    batch_size = data.draw(st.integers(1, images))
    q, steps = budget.schedule(images, batch_size, epochs)
    assert 0 < q <= 1 and q * images <= batch_size * (1 + 1e-12)
    assert isinstance(steps, int) and steps >= 1
    assert steps == 1 or steps * q == pytest.approx(epochs, abs=q)  # each image so often, but for half a step


def test_a_whole_batch_is_no_sample():
    assert budget.schedule(100, 100, 3) == (1.0, 3)
    assert budget.schedule(100, 50, 0.001) == (0.5, 1)


# --- The ledger


@pytest.fixture
def fill(tmp_path):
    """A function from entries to the ledger that holds them."""

    def make(entries):
        ledger = Ledger(tmp_path / 'ledger.jsonl')
        for entry in entries:
            assert ledger.append(entry)
        return ledger

    return make


def entries_of(part, identifier='k', numbers=None):
    """What the ledger holds when these releases ran; all, by default."""
    return [part.mechanism.entry(index, identifier) for index in numbers or range(part.count)]


WHOLE = entries_of(queries()) + entries_of(dp_sgd())


@pytest.mark.parametrize('used', [{}, {CENTRAL_QUERY: 2}, {CENTRAL_QUERY: 2, DP_SGD: 12}, {DP_SGD: 3}])
@pytest.mark.parametrize('order', [1, -1])
def test_a_ledger_of_what_was_planned_is_good(fill, used, order):
    make_budget().check_ledger(fill(WHOLE[::order]), used)


def test_nothing_ran_is_good_and_so_is_a_part(fill, tmp_path):
    make_budget().check_ledger(Ledger(tmp_path / 'empty.jsonl'), {})
    make_budget().check_ledger(fill(WHOLE[:1] + WHOLE[5:9]), {CENTRAL_QUERY: 1, DP_SGD: 4})


@pytest.mark.parametrize(
    'change',
    [
        dict(noise_multiplier=1.0),
        dict(noise_multiplier=1.2),  # more noise is not what was planned, either
        dict(noise_multiplier=math.nextafter(1.1, 2)),
        dict(sampling_probability=0.2),
        dict(sampling_probability=0.1),
        dict(sensitivity=2.0),
        dict(index=12),
        dict(mechanism='other'),
        dict(mechanism=CENTRAL_QUERY),
    ],
    ids=str,
)
def test_a_release_that_was_not_planned_is_refused_and_named(fill, change):
    """Whatever stands beside it: ε of the plan does not cover it."""
    entry = dataclasses.replace(dp_sgd().mechanism.entry(11, 'k'), **change)
    ledger = fill([*WHOLE[:-1], entry])
    with pytest.raises(ValueError) as refused:
        make_budget().check_ledger(ledger, {})
    text = str(refused.value)
    assert text.startswith(f'{ledger.path} has the entry {entry}, which the plan does not have')
    assert 'does not cover it' in text


@pytest.mark.parametrize('known', [(), (releases('other', 4.0, 1.0, 2, sensitivity=8.0),)])
def test_a_query_is_refused_where_none_was_planned(fill, known):
    with pytest.raises(
        ValueError, match='has the entry Entry.mechanism=.central_query.*the plan does not have'
    ):
        make_budget(releases=(*known, dp_sgd())).check_ledger(fill(WHOLE), {})


@pytest.mark.parametrize(
    ('missing', 'used', 'text'),
    [
        (WHOLE[0], {CENTRAL_QUERY: 2}, 'has 1 entries of central_query, but 2 releases were made'),
        (WHOLE[5], {CENTRAL_QUERY: 2, DP_SGD: 12}, 'has 11 entries of dp_sgd, but 12 releases were made'),
        (WHOLE[-1], {DP_SGD: 12}, 'has 11 entries of dp_sgd, but 12 releases were made'),
    ],
)
def test_a_ledger_that_lacks_a_release_that_was_used_is_refused(fill, missing, used, text):
    with pytest.raises(ValueError, match=f'{text}. Restore the ledger'):
        make_budget().check_ledger(fill([entry for entry in WHOLE if entry != missing]), used)


# --- Groups of entries


def test_equal_entries_are_one_group_in_the_order_of_appearance():
    steps, weaker = entries_of(dp_sgd()), entries_of(dp_sgd(0.9), numbers=[3, 4])
    mixed = [*steps[:3], *entries_of(queries()), *weaker, *steps[3:]]
    assert budget.group(mixed) == [
        dp_sgd(),
        queries(),
        dataclasses.replace(dp_sgd(0.9), count=2),
    ]
    assert budget.group([]) == []


def test_releases_with_other_keys_are_counted_again():
    (part,) = budget.group(entries_of(queries(), 'one') + entries_of(queries(), 'other'))
    assert part.count == 4


ENTRIES = st.lists(
    st.builds(
        Entry,
        mechanism=st.sampled_from([CENTRAL_QUERY, DP_SGD]),
        index=st.integers(0, 5),
        noise_multiplier=st.sampled_from([1.0, 1.1, 4.0]),
        sampling_probability=st.sampled_from([0.1, 1.0]),
        sensitivity=st.sampled_from([1.0, 8.0]),
        randomness=st.sampled_from(['a', 'b']),
    ),
    max_size=25,
)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(entries=ENTRIES, shuffled=st.randoms(use_true_random=False))
def test_groups_lose_nothing_and_spend_what_the_releases_spend_in_any_order(entries, shuffled):
    groups = budget.group(entries)
    assert sum(part.count for part in groups) == len(entries)
    for part in groups:
        fields = dataclasses.asdict(part.mechanism.entry(0, 'a'))
        like = [e for e in entries if dataclasses.asdict(e) | {'index': 0, 'randomness': 'a'} == fields]
        assert part.count == len(like)
    one_by_one = accounting.compose(
        accounting.subsampled_gaussian(e.noise_multiplier, e.sampling_probability, 1) for e in entries
    )
    epsilon = accounting.epsilon(budget.total_event(groups), DELTA)
    assert epsilon == pytest.approx(accounting.epsilon(one_by_one, DELTA), rel=1e-9)
    shuffled.shuffle(entries)
    again = accounting.epsilon(budget.total_event(budget.group(entries)), DELTA)
    assert again == pytest.approx(epsilon, rel=1e-12)


# --- What is refused


@pytest.mark.parametrize(
    ('field', 'value', 'allowed'),
    [
        ('epsilon', 0.0, 'finite and > 0'),
        ('epsilon', math.inf, 'finite and > 0'),
        ('epsilon', math.nan, 'finite and > 0'),
        ('epsilon', '1', 'finite and > 0'),
        ('delta', 0.0, r'in \(0, 1\)'),
        ('delta', 1.0, r'in \(0, 1\)'),
        ('accountant', 'gdp', ' or '.join(map(repr, accounting.ACCOUNTANTS))),
    ],
)
def test_a_bad_budget_is_named_with_its_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f'^{field} is {value!r}; it must be {allowed}$'):
        make_budget(**{field: value})


def test_a_mechanism_stands_in_a_budget_once():
    """Its name is how the ledger and the stages find it."""
    with pytest.raises(
        ValueError, match=r"^releases is \['dp_sgd', 'dp_sgd'\]; it must be one item for each"
    ):
        make_budget(releases=(dp_sgd(), dp_sgd(2.0)))


@pytest.mark.parametrize('count', [0, -1, 1.0, True, math.nan])
def test_releases_are_counted_in_whole_numbers(count):
    with pytest.raises(ValueError, match=f'^count is {count!r}; it must be a whole number, at least 1$'):
        Releases(mechanism=dp_sgd().mechanism, count=count)


def test_budget_and_releases_take_names_only_and_cannot_be_changed():
    with pytest.raises(TypeError):
        Releases(dp_sgd().mechanism, 3)
    with pytest.raises(TypeError):
        Budget(1.0, 1e-5, 'rdp', ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        dp_sgd().count = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_budget().epsilon = 100.0
