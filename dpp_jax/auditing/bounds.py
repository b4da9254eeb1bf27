"""Empirical lower bounds on ε: what an attacker's success proves about the code that runs.

An upper bound on ε is proved on paper, for the mechanism that somebody meant to write. A lower bound is
measured on the one that was written. Release something many times from a set of private examples and from
its neighbor, which has one example (the canary) more; give every release a score that should be high if
the canary was there; and compare how often an event {score > t} or {score <= t} occurs. (ε, δ)-differential
privacy bounds what one rate may be, given the other. If the measured rates break the bound that was claimed,
the claim is wrong.

The confidence is exact and does not assume anything about the scores but that releases are independent:
  - the event is chosen on the first half of the scores and its rates are measured on the second half, so
    that trying thousands of events costs nothing;
  - rates are bounded by Clopper and Pearson's (1934) intervals, of which one end per rate is used: each
    end fails with half of the probability 1 - confidence, both together with no more than all of it.
`plain_bound` holds for every mechanism. `gaussian_bound` (no sampling) and `family_bound` (sampling) are
much tighter and assume more; read there.

jax_privacy.auditing (2.0.0) cannot take their place. Its Gaussian bound takes the absolute value of a lower
bound on μ, and states ε > 1 for two equal sets of 50,000 scores. Its plain bound sees no canary that lowers
the scores, takes NaN for a score, and scatters 1.8 times as much. Where both apply they agree (bounds_test).
"""

from collections.abc import Callable
import dataclasses
import math
import numbers

import dp_accounting
from dp_accounting.pld import PLDAccountant
import numpy as np
from scipy import optimize, stats

from dpp_jax.privacy import accounting, checks

# Candidates for the threshold: so many quantiles of the scores that choose.
_QUANTILES = 500
# Bounds that choose may be wrong so much less often than the result. Their wider intervals keep the choice
# from rare events that look good by luck: Gaussian bounds then scatter a sixth as much (60,000 scores).
_CAUTION = 1e-4
# Relative width at which the search for a noise multiplier ends.
_TOLERANCE = 2e-3
# Of profiles: at how many ε they are asked, and the step of their privacy losses. A coarser step is rounded
# towards more loss, which only makes the bound smaller.
_EPSILONS, _LOSS_GRID = 200, 2e-3


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound on ε, and the event that proves it.

    Attributes:
        epsilon: ≥ 0; 0 says that nothing was proved.
        threshold: t of the event.
        above: the event is {score > t} if True, {score <= t} if False.
        rate_with: share of the measuring half's scores with the canary that are in the event.
        rate_without: the same without the canary.
    """

    epsilon: float
    threshold: float
    above: bool
    rate_with: float
    rate_without: float


def clopper_pearson(
    successes: np.ndarray | int, trials: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Exact two-sided interval of a success probability.

    Args:
        successes: how many of the trials, in [0, trials]; any shape.
        trials: ≥ 1.
        confidence: in (0, 1). Each end alone holds with (1 + confidence) / 2.

    Returns:
        lower and upper end, in [0, 1], shaped as `successes`.

    Raises:
        ValueError: an argument is out of range.
    """
    successes = np.asarray(successes)
    checks.require('trials', trials, isinstance(trials, numbers.Integral) and trials >= 1, 'at least 1')
    is_good = bool(np.all((successes >= 0) & (successes <= trials)))
    checks.require('successes', successes, is_good, f'in [0, trials] = [0, {trials}]')
    checks.require('confidence', confidence, 0 < confidence < 1, 'in (0, 1)')
    tail = (1 - confidence) / 2
    failures = trials - successes
    # The beta distribution is not defined where an end is that of the unit interval.
    lower = stats.beta.ppf(tail, np.maximum(successes, 1), failures + 1)
    upper = stats.beta.isf(tail, successes + 1, np.maximum(failures, 1))
    return np.where(successes == 0, 0.0, lower), np.where(failures == 0, 1.0, upper)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ of μ-Gaussian differential privacy at ε.

    δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2), exact (Balle and Wang 2018, theorem 8; Dong, Roth and Su
    2019, corollary 2.13). T releases of the Gaussian mechanism with noise multiplier σ have μ = sqrt(T) / σ.

    Args:
        epsilon: ε ≥ 0.
        mu: μ > 0.

    Raises:
        ValueError: an argument is out of range.
    """
    checks.require('epsilon', epsilon, math.isfinite(epsilon) and epsilon >= 0, 'finite and >= 0')
    checks.require('mu', mu, math.isfinite(mu) and mu > 0, 'finite and > 0')
    second = math.exp(epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2))
    return float(stats.norm.cdf(-epsilon / mu + mu / 2) - second)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Compute the least ε ≥ 0 with `gaussian_delta(ε, mu)` ≤ δ; 0 for μ ≤ 0.

    Args:
        mu: finite.
        delta: δ in (0, 1).

    Raises:
        ValueError: an argument is out of range.
    """
    checks.require('mu', mu, math.isfinite(mu), 'finite')
    checks.require('delta', delta, 0 < delta < 1, 'in (0, 1)')
    if mu <= 0 or gaussian_delta(0, mu) <= delta:
        return 0.0
    # The first term alone is δ here, so the root is below.
    upper = mu * mu / 2 + mu * stats.norm.isf(delta)
    return float(optimize.brentq(lambda e: gaussian_delta(e, mu) - delta, 0, upper, xtol=1e-12))


def plain_bound(
    with_canary: np.ndarray, without: np.ndarray, delta: float, confidence: float = 0.95
) -> Bound:
    """Lower bound on ε of any mechanism, at δ.

    For an event E and neighbors D, D' differential privacy asks P(E) <= e^ε P'(E) + δ, in both
    directions. So ε >= log((P(E) - δ) / P'(E)); the rates are replaced by the ends of their
    intervals that make the bound smaller. (Jagielski, Ullman and Oprea 2020; Nasr et al. 2021.)
    With n scores it cannot exceed about log(n / 7).

    Args:
        with_canary: scores of independent releases from the set with the canary, (n,), n ≥ 2.
        without: scores of independent releases from the set without it, (m,), m ≥ 2.
        delta: δ in [0, 1).
        confidence: probability, in (0, 1), that the bound does not exceed the mechanism's ε.

    Raises:
        ValueError: an argument is out of range, or a score is not a finite number.
    """
    checks.require('delta', delta, 0 <= delta < 1, 'in [0, 1)')

    def bounds(inside_with, with_trials, inside_without, without_trials, confidence):
        low_with, high_with = clopper_pearson(inside_with, with_trials, confidence)
        low_without, high_without = clopper_pearson(inside_without, without_trials, confidence)
        with np.errstate(divide='ignore'):
            return np.stack(
                [
                    np.log(np.maximum(low_with - delta, 0)) - np.log(high_without),
                    np.log(np.maximum(low_without - delta, 0)) - np.log(high_with),
                ]
            )

    return _measure(with_canary, without, bounds, confidence)


def gaussian_bound(
    with_canary: np.ndarray, without: np.ndarray, delta: float, confidence: float = 0.95
) -> Bound:
    """Lower bound on ε at δ of a mechanism that is known to be Gaussian (Nasr et al. 2023, section 5).

    With false-positive rate α and false-negative rate β of a test for the canary, a μ-Gaussian private
    mechanism has Φ⁻¹(1 - α) - Φ⁻¹(β) <= μ. The bound on μ, from the upper ends of both rates' intervals,
    is turned into ε by `gaussian_epsilon`. One threshold in the middle, where rates are well known, says
    everything; `plain_bound` needs rare events.

    What it assumes: that outcomes with and without the canary are no easier to tell apart than two normal
    distributions at some distance μ, and ε is that of the least such μ. This holds with equality for the
    Gaussian mechanism and its compositions without sampling (q = 1). It does not hold for q < 1, whose
    trade-off has another shape: use `family_bound`. Applied to code with a fault it is no longer a bound
    on that code's ε, but it still refutes a claim: correct code exceeds the claim with a
    probability of at most 1 - confidence.

    Arguments as for `plain_bound`, with δ in (0, 1).
    """
    checks.require('delta', delta, 0 < delta < 1, 'in (0, 1)')

    measured = _measure(with_canary, without, _distances, confidence)
    return dataclasses.replace(measured, epsilon=gaussian_epsilon(measured.epsilon, delta))


def family_bound(
    with_canary: np.ndarray,
    without: np.ndarray,
    make_event: Callable[[float], dp_accounting.DpEvent],
    noise_multipliers: tuple[float, float],
    delta: float,
    confidence: float = 0.95,
) -> Bound:
    """Lower bound on ε at δ of a mechanism that is known up to its noise (after Nasr et al. 2023).

    Every noise multiplier σ has a profile: δ as a function of ε, by privacy loss distributions. It asks
    P(E) <= e^ε P'(E) + δ(ε) at every ε, not at the one δ of the claim, so that an event whose rates are
    near a half, and therefore well known, can refute it. The bound is ε of the largest σ that the
    rates of one event, chosen by its distance as `gaussian_bound` measures it, do not refute.

    What it assumes: that the mechanism is the one that `make_event` describes, with some σ. If the code
    has a fault and is none of these, the number is no bound on that code's ε, but it still refutes
    a claim: correct code exceeds the claim with a probability of at most 1 - confidence.

    Args:
        with_canary: as for `plain_bound`.
        without: as for `plain_bound`.
        make_event: σ → the event, as for `calibration.calibrate`; for example ten Poisson samples.
        noise_multipliers: least and most σ of the search, 0 < least < most. The bound cannot exceed
            ε of the least; it is 0 if the most is not refuted. Distributions take memory in
            proportion to that ε.
        delta: δ in (0, 1).
        confidence: as for `plain_bound`.

    Raises:
        ValueError: an argument is out of range, or a score is not a finite number.
    """
    least, most = noise_multipliers
    is_good = bool(0 < least < most < math.inf)
    checks.require('noise_multipliers', noise_multipliers, is_good, '(least, most), 0 < least < most')
    checks.require('delta', delta, 0 < delta < 1, 'in (0, 1)')
    measured = _measure(with_canary, without, _distances, confidence)
    trials = [np.size(scores) - np.size(scores) // 2 for scores in (with_canary, without)]
    said = [
        round(rate * n) for rate, n in zip((measured.rate_with, measured.rate_without), trials, strict=True)
    ]
    true_positive, _ = clopper_pearson(said[0], trials[0], confidence)
    _, false_positive = clopper_pearson(said[1], trials[1], confidence)
    if not _refutes(make_event(most), float(true_positive), float(false_positive)):
        return dataclasses.replace(measured, epsilon=0.0)
    while most > (1 + _TOLERANCE) * least:
        middle = math.sqrt(least * most)
        if _refutes(make_event(middle), float(true_positive), float(false_positive)):
            most = middle
        else:
            least = middle
    # `most` is refuted: the largest σ that is not is below it, and ε of that is more.
    epsilon = accounting.epsilon(make_event(most), delta, 'pld')
    return dataclasses.replace(measured, epsilon=epsilon)


def _refutes(event: dp_accounting.DpEvent, true_positive: float, false_positive: float) -> bool:
    """True if no mechanism with the event's profile has rates as far apart as these."""
    if true_positive <= false_positive:
        return False
    # Of the guess "it is there", and of the guess "it is not there".
    guesses = ((true_positive, false_positive), (1 - false_positive, 1 - true_positive))
    # Where e^ε is as large as the ratio of the rates, nothing is left to refute.
    ratio = max(right / wrong for right, wrong in guesses)
    epsilons = np.linspace(0, math.log(ratio), _EPSILONS)
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_LOSS_GRID,
    )
    deltas = np.asarray(accountant.compose(event).get_delta(epsilons))
    return any(np.any(right > np.exp(epsilons) * wrong + deltas) for right, wrong in guesses)


def _distances(inside_with, with_trials, inside_without, without_trials, confidence) -> np.ndarray:
    """Lower bounds on μ, (1, events), if "the canary is there" is said inside the events."""
    _, false_positive = clopper_pearson(inside_without, without_trials, confidence)
    _, false_negative = clopper_pearson(with_trials - inside_with, with_trials, confidence)
    return (stats.norm.isf(false_positive) - stats.norm.ppf(false_negative))[None]


def _measure(with_canary, without, bounds, confidence) -> Bound:
    """Choose event and direction by `bounds` on one half of the scores, apply it to the other.

    `bounds` takes counts inside events and trials, with and without the canary, and a confidence; it
    returns a row for each direction. The result's `epsilon` is its value, or 0 if that is less.
    """
    checks.require('confidence', confidence, 0 < confidence < 1, 'in (0, 1)')
    choosing, measuring = zip(_halves('with_canary', with_canary), _halves('without', without), strict=True)
    thresholds = np.unique(
        np.quantile(np.concatenate(choosing), np.linspace(0, 1, _QUANTILES + 1), method='inverted_cdf')
    )

    def evaluate(halves, thresholds, confidence):
        """Values (sides, directions, thresholds) and counts [side][with, without] inside events."""
        trials = [len(half) for half in halves]
        below = [np.searchsorted(np.sort(half), thresholds, side='right') for half in halves]
        above = [n - k for n, k in zip(trials, below, strict=True)]
        sides = (above, below)
        values = [bounds(with_, trials[0], out, trials[1], confidence) for with_, out in sides]
        return np.stack(values), sides

    values, _ = evaluate(choosing, thresholds, 1 - _CAUTION * (1 - confidence))
    side, direction, best = np.unravel_index(np.argmax(values), values.shape)
    values, sides = evaluate(measuring, thresholds[best : best + 1], confidence)
    return Bound(
        epsilon=max(0.0, float(values[side, direction, 0])),
        threshold=float(thresholds[best]),
        above=bool(side == 0),
        rate_with=float(sides[side][0][0] / len(measuring[0])),
        rate_without=float(sides[side][1][0] / len(measuring[1])),
    )


def _halves(name: str, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and second half as float64, checked."""
    scores = np.asarray(scores, np.float64)
    checks.require(name, scores.shape, scores.ndim == 1 and scores.size >= 2, '(n,) with n >= 2')
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(f'{name}[{first}] is {scores[first]}; scores must be finite')
    return scores[: scores.size // 2], scores[scores.size // 2 :]
