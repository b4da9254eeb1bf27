"""The selection among classifiers: no unit changes its sums by more than the sensitivity."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from dpp_jax.privacy import accounting, budget
from dpp_jax.privacy.budget import SELECTION, Releases
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.privacy.selection import Selection

KEY = NoiseKey(identifier='k', keys=jax.random.split(jax.random.key(0), 4))


def mechanism(query, sigma=3.0, **changes):
    fields = dict(name=SELECTION, noise_multiplier=sigma, sampling_probability=1.0)
    return GaussianMechanism(**{**fields, 'sensitivity': query.sensitivity, **changes})


def sums(query, is_right, members=None):
    """Sums of all candidates, for is_right (n, k)."""
    return np.array([query.sum(column, members) for column in is_right.T], np.float64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    data=st.data(), n=st.integers(1, 30), k=st.integers(1, 12), units=st.sampled_from([1, 9, 60_000, 2**25])
)
def test_one_image_changes_the_sums_by_the_sensitivity_at_most(data, n, k, units):
    """Also if the number of images is far from the public one."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    query, is_right = Selection(candidates=k, units=units), rng.random((n, k)) < rng.random()
    row = data.draw(st.integers(0, n - 1))
    without = np.delete(is_right, row, axis=0)  # zero-out; add or remove one
    replaced = is_right.copy()
    replaced[row] = rng.random(k) < rng.random()
    whole = sums(query, is_right)
    assert np.linalg.norm(whole - sums(query, without)) <= query.sensitivity
    assert np.linalg.norm(whole - sums(query, replaced)) <= 2 * query.sensitivity


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), groups=st.integers(1, 12), k=st.integers(1, 8), m=st.integers(1, 5))
def test_one_group_changes_the_sums_by_the_sensitivity_at_most(data, groups, k, m):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sizes = rng.integers(1, m + 1, groups)
    members = np.full((groups, m), -1)
    for row, (size, start) in enumerate(zip(sizes, np.cumsum(sizes) - sizes)):
        members[row, :size] = np.arange(start, start + size)
    query, is_right = Selection(candidates=k, units=groups), rng.random((sizes.sum(), k)) < rng.random()
    row = data.draw(st.integers(0, groups - 1))
    replaced = is_right.copy()
    own = members[row][members[row] >= 0]
    replaced[own] = rng.random((len(own), k)) < rng.random()
    whole = sums(query, is_right, members)
    without = sums(query, is_right, np.delete(members, row, axis=0))
    assert np.linalg.norm(whole - without) <= query.sensitivity
    assert np.linalg.norm(whole - sums(query, replaced, members)) <= 2 * query.sensitivity
    # A group of any size counts as one image does, if it is right throughout.
    assert query.sum(np.ones(sizes.sum(), bool), members) == groups / 2


def test_the_bounds_are_attained():
    query = Selection(candidates=7, units=3)
    right, wrong = np.ones((3, 7), bool), np.zeros((3, 7), bool)
    assert np.linalg.norm(sums(query, right) - sums(query, right[:2])) == query.sensitivity
    change = np.concatenate([right[:2], wrong[:1]])
    assert np.linalg.norm(sums(query, right) - sums(query, change)) == pytest.approx(2 * query.sensitivity)


@pytest.mark.parametrize('units', [2**24 - 1, 2**24, 2**24 + 1, 40_000_000])
def test_sums_beyond_what_float32_counts_are_cut_and_stay_neighbors(units):
    query, right = Selection(candidates=1, units=units), np.ones(units, bool)
    whole, without = query.sum(right), query.sum(right[1:])
    assert whole == min(units, 2**24) / 2 and 0 <= whole - without <= query.sensitivity


def test_noise_has_the_standard_deviation_that_the_ledger_records():
    query = Selection(candidates=40_000, units=50)
    found, entry = query.noisy(mechanism(query), KEY)(0, np.zeros(40_000, np.float32))
    noise = (np.asarray(found) - 0.5) * 50  # estimated accuracies
    assert noise.std() == pytest.approx(entry.noise_multiplier * entry.sensitivity, rel=0.02)
    assert abs(noise.mean()) < 4 * noise.std() / 200
    assert (entry.mechanism, entry.index, entry.sampling_probability) == (SELECTION, 0, 1.0)
    again, _ = query.noisy(mechanism(query), KEY)(0, np.zeros(40_000, np.float32))
    np.testing.assert_array_equal(found, again)


def test_scores_without_noise_are_accuracies():
    query = Selection(candidates=2, units=8)
    is_right = np.array([[1, 0]] * 6 + [[0, 0]] * 2, bool)
    found, _ = query.noisy(mechanism(query, sigma=1e-6), KEY)(0, sums(query, is_right).astype(np.float32))
    np.testing.assert_allclose(found, [0.75, 0.0], atol=1e-5)


@pytest.mark.parametrize(
    'relation, accountant', [('zero_out', 'rdp'), ('add_remove', 'rdp'), ('replace_one', 'pld')]
)
def test_its_share_and_the_budget_hold_for_every_relation(relation, accountant):
    limits = dict(epsilon=2.0, delta=1e-5, accountant=accountant, relation=relation)
    query = Selection(candidates=10, units=1000)
    make = lambda sigma: Releases(mechanism=mechanism(query, sigma), count=1)
    dp_sgd = lambda sigma: Releases(
        mechanism=GaussianMechanism(
            name='dp_sgd', noise_multiplier=sigma, sampling_probability=0.1, sensitivity=1.0
        ),
        count=10,
    )
    chosen = make(budget.calibrate_share(make, 0.1, setting='evaluate.selection_share', **limits))
    made = budget.calibrate([], dp_sgd, after=[chosen], **limits)
    assert made.releases[-1] == chosen and made.spent(SELECTION) <= 0.2 and made.spent() <= 2.0
    alone = budget.calibrate([], dp_sgd, **limits)
    assert alone.releases[0].mechanism.noise_multiplier < made.releases[0].mechanism.noise_multiplier
    with pytest.raises(ValueError, match='config.evaluate.selection_share is 1e-07; it must be at least'):
        budget.calibrate_share(make, 1e-7, setting='evaluate.selection_share', **limits)


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'sensitivity': 1.0}, 'sensitivity is 1.0; it must be at least 1.58'),
        ({'sampling_probability': 0.5}, '1: every'),
    ],
)
def test_a_mechanism_that_does_not_cover_it_is_refused(changes, text):
    query = Selection(candidates=10, units=5)
    with pytest.raises(ValueError, match=text):
        query.noisy(mechanism(query, **changes), KEY)


@pytest.mark.parametrize('name', ['candidates', 'units'])
@pytest.mark.parametrize('value', [0, 1.5, None])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name} is {value}; it must be a whole number, at least 1'):
        Selection(**{'candidates': 1, 'units': 1, name: value})


def test_epsilon_is_that_of_a_gaussian_mechanism():
    query = Selection(candidates=10, units=5)
    part = Releases(mechanism=mechanism(query), count=1)
    expected = accounting.epsilon(accounting.subsampled_gaussian(3.0, 1.0, 1), 1e-5)
    assert accounting.epsilon(part.event, 1e-5) == expected
