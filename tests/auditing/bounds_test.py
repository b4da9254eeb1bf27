"""The statistics of the audit, and that it tells the real code from code with a fault."""

import dataclasses
import json
from unittest import mock

import jax
from jax_privacy import auditing
import numpy as np
import optax
import pytest
from scipy import stats

from dpp_jax.auditing import bounds
from dpp_jax.privacy import accounting
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib
from scripts import audit

RUNS = 10_000


# --- Statistics


@pytest.mark.parametrize('trials', [1, 7, 5000])
@pytest.mark.parametrize('confidence', [0.9, 0.975])
def test_intervals_are_those_of_scipy(trials, confidence):
    successes = np.unique(np.linspace(0, trials, 9).astype(int))
    low, high = bounds.clopper_pearson(successes, trials, confidence)
    for number, ends in zip(successes, np.stack([low, high], axis=1), strict=True):
        interval = stats.binomtest(int(number), trials).proportion_ci(confidence, method='exact')
        np.testing.assert_allclose(ends, [interval.low, interval.high], rtol=1e-9, atol=1e-12)


def test_an_interval_of_no_success_is_the_rule_of_three():
    low, high = bounds.clopper_pearson(0, 1000, 0.9)
    assert low == 0
    np.testing.assert_allclose(high, 1 - 0.05 ** (1 / 1000), rtol=1e-9)


@pytest.mark.parametrize('mu', [0.3, 1.0, 3.0])
@pytest.mark.parametrize('delta', [1e-5, 1e-2])
def test_epsilon_of_a_gaussian_is_that_of_the_accountant(mu, delta):
    exact = bounds.gaussian_epsilon(mu, delta)
    np.testing.assert_allclose(bounds.gaussian_delta(exact, mu), delta, rtol=1e-6)
    pld = accounting.epsilon(accounting.subsampled_gaussian(1 / mu, 1.0, 1), delta, 'pld')
    assert exact <= pld * (1 + 1e-9)  # which rounds up
    np.testing.assert_allclose(exact, pld, rtol=2e-3)


def test_no_distance_is_no_epsilon():
    assert bounds.gaussian_epsilon(-1.0, 1e-5) == 0
    assert bounds.gaussian_epsilon(1e-6, 1e-5) == 0


@pytest.mark.parametrize('bound', [bounds.plain_bound, bounds.gaussian_bound])
def test_bounds_of_a_known_mechanism_are_below_its_epsilon_as_often_as_they_say(bound):
    """Of 200 bounds at 80 % confidence, with few scores, so that luck could carry them far."""
    mu, delta, repetitions, confidence = 0.4, 0.01, 200, 0.8
    exact = bounds.gaussian_epsilon(mu, delta)
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((repetitions, 2, 400))
    values = [bound(mu + w, o, delta, confidence).epsilon for w, o in scores]
    wrong = np.sum(np.array(values) > exact)
    assert wrong <= stats.binom.ppf(1 - 1e-6, repetitions, 1 - confidence)


@pytest.mark.parametrize('bound', [bounds.plain_bound, bounds.gaussian_bound])
def test_scores_that_choose_the_event_prove_nothing(bound):
    """The first half tells the sets apart without fail, the second not at all; then both halves do."""
    telling, silent = np.ones(500), np.zeros(500)
    found = bound(np.concatenate([telling, silent]), np.zeros(1000), 1e-5)
    assert found.epsilon == 0 and found.rate_with == found.rate_without == 0
    both = bound(np.concatenate([telling, telling]), np.zeros(1000), 1e-5)
    assert both.epsilon > 4 and (both.rate_with, both.rate_without) == (1, 0)


@pytest.mark.parametrize('sign', [1, -1])
def test_gaussian_bound_comes_within_a_tenth(sign):
    rng = np.random.default_rng(3)
    with_canary, without = sign * (0.5 + rng.standard_normal(40_000)), sign * rng.standard_normal(40_000)
    exact = bounds.gaussian_epsilon(0.5, 1e-5)
    bound = bounds.gaussian_bound(with_canary, without, 1e-5)
    assert 0.9 * exact < bound.epsilon < exact


def sampled_scores(rng, shape, *, q, sigma, releases):
    """Log-likelihood ratios, (..., 2 sets), of Poisson-sampled Gaussian mechanisms with and without."""
    noise = sigma * rng.standard_normal((*shape, 2, releases))
    there = rng.random(noise.shape) < q
    there[..., 1, :] = False
    ratio = (2 * (noise + there) - 1) / (2 * sigma**2)
    return np.logaddexp(np.log1p(-q), np.log(q) + ratio).sum(-1)


def test_family_bound_is_as_often_right_as_it_says(monkeypatch):
    """Of 60 at 80 % confidence, searched only at the true noise: 0, or wrong."""
    monkeypatch.setattr(bounds, '_LOSS_GRID', 0.02)  # coarse, so fast
    event = accounting.subsampled_gaussian(1.0, 0.5, 1)
    scores = sampled_scores(np.random.default_rng(6), (60, 400), q=0.5, sigma=1.0, releases=1)
    values = [
        bounds.family_bound(s[:, 0], s[:, 1], lambda _: event, (0.999, 1.0), 1e-5, 0.8).epsilon
        for s in scores
    ]
    assert np.sum(np.array(values) > 0) <= stats.binom.ppf(1 - 1e-6, 60, 0.2)
    # A claim of half as much noise again is refuted.
    event = accounting.subsampled_gaussian(1.5, 0.5, 1)
    scores = sampled_scores(np.random.default_rng(7), (20_000,), q=0.5, sigma=1.0, releases=1)
    bound = bounds.family_bound(*scores.T, lambda _: event, (1.499, 1.5), 1e-5, 0.8)
    assert bound.epsilon == accounting.epsilon(event, 1e-5, 'pld')


@pytest.mark.parametrize('sign', [1, -1])
def test_family_bound_comes_within_a_tenth_where_the_plain_one_loses_half(sign):
    def event(sigma):
        return accounting.subsampled_gaussian(sigma, 0.5, 10)

    scores = sampled_scores(np.random.default_rng(8), (60_000,), q=0.5, sigma=3.0, releases=10)
    scores = sign * scores.T
    exact = accounting.epsilon(event(3.0), 1e-5, 'pld')
    assert 0.9 * exact < bounds.family_bound(*scores, event, (1.5, 6.0), 1e-5).epsilon < exact
    assert 0 < bounds.plain_bound(*scores, 1e-5).epsilon < 0.6 * exact
    # The search is bounded on both sides.
    assert bounds.family_bound(*scores, event, (1.0, 1.5), 1e-5).epsilon == 0
    most = accounting.epsilon(event(5.0), 1e-5, 'pld')
    np.testing.assert_allclose(bounds.family_bound(*scores, event, (5.0, 6.0), 1e-5).epsilon, most, rtol=5e-3)


def test_family_bound_without_sampling_is_the_gaussian_bound():
    rng = np.random.default_rng(9)
    scores = 0.5 + rng.standard_normal(20_000), rng.standard_normal(20_000)
    family = bounds.family_bound(
        *scores, lambda sigma: accounting.subsampled_gaussian(sigma, 1.0, 1), (1.0, 4.0), 1e-5
    )
    gaussian = bounds.gaussian_bound(*scores, 1e-5)
    np.testing.assert_allclose(family.epsilon, gaussian.epsilon, rtol=5e-3)
    assert (family.threshold, family.above) == (gaussian.threshold, gaussian.above)


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('swap', [False, True])
def test_plain_bound_comes_within_a_twentieth_on_randomized_response(flip, swap):
    """Two answers, of which one tells: all four combinations of event and direction."""
    exact = 2.0
    rate = 0.1  # of the telling answer where it is rare; e² times that in the other set
    rng = np.random.default_rng(4)

    def answers(telling):
        return rng.choice(2, 100_000, p=[1 - telling, telling]) + 0.0

    pair = answers(rate * np.exp(exact)), answers(rate)
    pair = tuple(-scores for scores in pair) if flip else pair
    with_canary, without = pair[::-1] if swap else pair
    bound = bounds.plain_bound(with_canary, without, 0.0)
    assert 0.95 * exact < bound.epsilon < exact
    assert bound.above != flip
    assert (bound.rate_with > bound.rate_without) != swap


@pytest.mark.parametrize('delta', [0.0, 1e-5, 0.05])
def test_plain_bound_equals_jax_privacy_at_the_same_event(delta):
    """Independent code, of the half that measures. It says "there" of scores from a threshold on."""
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = [1.5 + rng.standard_normal(4000), rng.standard_normal(4000)]
        scores = scores[:: rng.choice([1, -1])]
        bound = bounds.plain_bound(*scores, delta, 0.9)
        is_likelier_with = bound.rate_with > bound.rate_without
        # {score > t} is {score >= the next number}; {score <= t} is {-score >= -t}.
        sign, threshold = (
            (1, np.nextafter(bound.threshold, np.inf)) if bound.above else (-1, -bound.threshold)
        )
        halves = [sign * half[2000:] for half in scores]
        auditor = auditing.CanaryScoreAuditor(*(halves if is_likelier_with else halves[::-1]))
        expected = auditor.epsilon_clopper_pearson(
            1 - 0.9, delta, threshold_strategy=auditing.Explicit(threshold)
        )
        assert 1 < bound.epsilon == pytest.approx(expected, rel=1e-9)
        seen.add((bound.above, bool(is_likelier_with)))
    assert len(seen) == 4


def test_equal_sets_prove_nothing():
    """As many scores as the quick audit has, of mechanisms that tell nothing: at most chance, once in 20."""
    wrong = 0
    for seed in range(20):
        scores = np.random.default_rng(seed).standard_normal((2, 50_000))
        wrong += bounds.plain_bound(*scores, 1e-5).epsilon > 0
        wrong += bounds.gaussian_bound(*scores, 1e-5).epsilon > 0
    assert wrong <= stats.binom.ppf(1 - 1e-6, 40, 0.05)


def test_delta_is_taken_off_the_plain_bound():
    """A mechanism that names the canary with probability δ and is silent otherwise has ε = 0."""
    rng = np.random.default_rng(5)
    with_canary, without = (rng.random(40_000) < 0.1) + 0.0, np.zeros(40_000)
    assert bounds.plain_bound(with_canary, without, 0.1).epsilon < 0.01
    assert bounds.plain_bound(with_canary, without, 0.01).epsilon > 5


def test_bad_arguments_are_named():
    good = np.zeros(4)
    with pytest.raises(ValueError, match=r'with_canary is \(1,\); it must be \(n,\)'):
        bounds.plain_bound(np.zeros(1), good, 0.1)
    with pytest.raises(ValueError, match=r'without\[2\] is nan; scores must be finite'):
        bounds.gaussian_bound(good, np.array([0, 1, np.nan, 2]), 0.1)
    with pytest.raises(ValueError, match=r'delta is 1.0; it must be in \[0, 1\)'):
        bounds.plain_bound(good, good, 1.0)
    with pytest.raises(ValueError, match=r'delta is 0.0; it must be in \(0, 1\)'):
        bounds.gaussian_bound(good, good, 0.0)
    with pytest.raises(ValueError, match='confidence is 1; it must be in'):
        bounds.plain_bound(good, good, 0.1, 1)
    with pytest.raises(ValueError, match=r'noise_multipliers is \(2, 1\); it must be \(least, most\)'):
        bounds.family_bound(good, good, lambda sigma: None, (2, 1), 0.1)
    with pytest.raises(ValueError, match='successes is .*11.*; it must be in .*10'):
        bounds.clopper_pearson(11, 10, 0.9)


# --- The code under attack


def make_mechanism(noise_multiplier, q):
    return GaussianMechanism(
        name='dp_sgd',
        noise_multiplier=noise_multiplier,
        sampling_probability=q,
        sensitivity=audit.CLIP_NORM,
    )


def test_the_audited_training_is_the_training():
    """The audit's vmap over one device takes the steps that a pmap takes: same batches, key, weights."""
    mechanism = make_mechanism(2.0, 0.5)
    masks = np.array([[True, True], [False, False], [True, False], [False, True]])
    key = jax.random.key(3)
    with mock.patch.object(devices, 'parallel', audit.over_one_device):
        audited = jax.jit(audit.make_training(mechanism, audit.REAL))(masks, key)

    optimizer = optax.sgd(audit.LEARNING_RATE)
    with devices.limited_to(1):
        step = steps.make_dp_step(
            audit.loss,
            optimizer,
            mechanism,
            NoiseKey(identifier='test', keys=jax.random.split(key, 4)),
            expected_batch_size=audit.EXPECTED_BATCH,
            rows=2,
            microbatch=1,
            ema_decay=0.9,
        )
        state = devices.replicate(state_lib.create(audit.init_params(), optimizer))
        images = np.stack([np.full((2, 2, 1), 200, np.uint8), np.zeros((2, 2, 1), np.uint8)])
        biases = [0.0]
        for number, mask in enumerate(masks):
            batch = steps.make_batch(images, np.arange(2), np.flatnonzero(mask), 2)
            (state, _), _ = step(number, state, devices.deal(batch), 2)
            biases.append(devices.first(state.params).tree()['bias'][1, 0])
    assert len(np.unique(biases)) == 5  # every step moved it
    np.testing.assert_allclose(audited, biases, rtol=1e-5)


def test_the_canary_is_as_long_as_the_claim_allows():
    """A shorter canary would prove less than the code may leak."""
    mechanism = make_mechanism(1e-6, 1.0)
    with mock.patch.object(devices, 'parallel', audit.over_one_device):
        run = jax.jit(audit.make_training(mechanism, audit.REAL))
        with_canary, without = (
            run(np.tile([True, there], (5, 1)), jax.random.key(0)) for there in (True, False)
        )
    per_step = audit.LEARNING_RATE * audit.CLIP_NORM / audit.EXPECTED_BATCH
    np.testing.assert_allclose(np.diff(with_canary), per_step, rtol=1e-4)
    np.testing.assert_allclose(without, 0, atol=1e-6)


@pytest.fixture(scope='module')
def rows():
    """The table, with few runs and coarse losses, which only make bounds smaller."""
    with mock.patch.object(bounds, '_LOSS_GRID', 0.02):
        return [audit.examine(attack, RUNS, 100 + i) for i, attack in enumerate(audit.attacks())]


def test_the_real_code_stays_within_its_claim_and_the_audit_is_not_blind(rows):
    real = [row for row in rows if row['fault'] is None]
    assert len(real) == 11
    for row in real:
        assert row['verdict'] == 'within the claim' and row['as_expected'], row
        # Most frequent gray values tell less than the noisy histograms that the claim is for.
        share = 0.25 if row['attack'] == 'query, mode' else 0.6
        assert share * row['claimed_epsilon'] < row['lower_bound'] <= row['claimed_epsilon'], row


def test_every_fault_is_caught_in_the_query_and_in_training(rows):
    faulty = [row for row in rows if row['fault'] is not None]
    attacked = {(row['attack'].split(',')[0], row['fault']) for row in faulty}
    halved, unclipped, realized, *sampling, doubled = audit.FAULTS
    of_all = (halved, unclipped, realized)
    expected = {(name, fault) for name in ('query', 'DP-SGD') for fault in (*of_all, *sampling)}
    expected |= {('moments', fault) for fault in (*of_all, doubled)}
    assert attacked == expected | {('frequency', fault) for fault in of_all}
    for row in faulty:
        excess = 1.0 if row['fault'] in ('sampled twice', 'off-diagonal weight 2') else 1.3
        assert row['lower_bound'] > excess * row['claimed_epsilon'], row
        assert row['verdict'] == 'caught' and row['as_expected'], row


def test_script_prints_writes_and_fails_when_a_claim_is_broken(monkeypatch, capsys, tmp_path):
    """A claim that is too low for the real code."""
    honest = audit.query_attack('query')
    event = accounting.subsampled_gaussian(20.0, 1.0, 1)
    bold = dataclasses.replace(honest, name='bold', event=event)
    monkeypatch.setattr(audit, 'attacks', lambda: [honest, bold])
    monkeypatch.setattr(audit, 'QUICK_RUNS', 6_000)
    file = tmp_path / 'new' / 'audit.json'
    assert audit.main(['--quick', f'--json={file}']) == 1
    written = json.loads(file.read_text())
    assert [row['verdict'] for row in written['rows']] == ['within the claim', 'CLAIM BROKEN']
    assert written['confidence'] == 0.95 and written['rows'][0]['runs'] == 6_000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].endswith(f'CLAIM BROKEN     {written["rows"][1]["seconds"]:>6}')

    monkeypatch.setattr(audit, 'attacks', lambda: [honest])
    assert audit.main(['--quick']) == 0
