"""How much noise a budget asks for: the least σ with which ε stays within it.

Only `accounting` computes ε; this module searches. However it does, the σ that it returns was checked.
"""

from collections.abc import Callable

import dp_accounting
from dp_accounting import DpEvent
import numpy as np

from dpp_jax.privacy import accounting

# Relative accuracy of a calibrated noise multiplier, and where the search for it ends.
_TOLERANCE = 1e-4
_LEAST_NOISE = 2.0**-7
MOST_NOISE = 2.0**14
# A search begins with distributions that are so many times as coarse, unless ε is as small as their interval.
_ROUGH = 16.0
_LEAST_EPSILON_OF_ROUGH = 1.0


class BudgetTooSmall(ValueError):
    """No noise multiplier keeps a run within its budget.

    Attributes:
        least: ε that is spent with the most noise that was tried.
    """

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least


def calibrate(
    make_event: Callable[[float], DpEvent],
    epsilon: float,
    delta: float,
    accountant: str = 'rdp',
    relation: str = accounting.ZERO_OUT,
) -> float:
    """Find the least noise multiplier σ with which ε(make_event(σ)) stays within the budget.

    Args:
        make_event: everything that a run will do, given the σ that is free. ε must not rise with σ.
        epsilon: the budget ε, finite and > 0.
        delta: δ in (0, 1).
        accountant: a name in `accounting.ACCOUNTANTS`.
        relation: a name in `accounting.RELATIONS`.

    Returns:
        σ, at most 1e-4 (relative) above the least one. ε(make_event(σ)) by the same accountant was
        computed for the σ returned and does not exceed `epsilon`.

    Raises:
        BudgetTooSmall: no σ meets the budget, because what does not depend on σ (the query) exceeds
            it alone.
        ValueError: an argument is out of range.
    """
    accounting.check_budget(epsilon, delta, accountant, relation)

    if accountant == 'pld':
        return _calibrate_pld(make_event, epsilon, delta, relation)

    def spent(sigma: float) -> float:
        return accounting.unchecked_epsilon(make_event(sigma), delta, accountant, relation)

    lower, upper = _bracket(spent, epsilon, delta, start=1.0, factor=2.0)
    sigma = _search(
        make_event, epsilon, delta, lambda: accounting.make_accountant(accountant, relation), lower, upper
    )
    # dp_accounting returns a σ within the budget; this holds even if a later version does not.
    while spent(sigma) > epsilon:
        sigma *= 1 + _TOLERANCE / 2
    return float(sigma)


def _calibrate_pld(
    make_event: Callable[[float], DpEvent], epsilon: float, delta: float, relation: str
) -> float:
    """Do the same by PLD: by RDP first, then by rough distributions. Fine ones take seconds each."""
    try:
        start = calibrate(make_event, epsilon, delta, 'rdp')
    except BudgetTooSmall:  # PLD may meet a budget that RDP cannot: start with much noise
        start = MOST_NOISE
    accounting.check_count(make_event(start))
    fine = accounting.finest_interval(make_event(start), delta)
    # Rough ones are above fine ones, so their answer is within the budget: it is the right one if with a
    # little less noise fine ones are not.
    width, growth = 1.25, 1.0
    if epsilon >= _LEAST_EPSILON_OF_ROUGH and start < MOST_NOISE:
        try:
            start = _pld_search(make_event, epsilon, delta, relation, _ROUGH * fine, start, 1.25, 1.0)
            width, growth = 1 + _TOLERANCE / 2, 2.0
        except BudgetTooSmall:
            pass
    sigma = _pld_search(make_event, epsilon, delta, relation, fine, start, width, growth)
    while (
        accounting.unchecked_epsilon(make_event(sigma), delta, 'pld', relation) > epsilon
    ):  # by the interval that will be stated
        sigma *= 1 + _TOLERANCE / 2
    return float(sigma)


def _pld_search(
    make_event: Callable[[float], DpEvent],
    epsilon: float,
    delta: float,
    relation: str,
    interval: float,
    start: float,
    width: float,
    growth: float,
) -> float:
    """Find the least noise by distributions with one interval, from `start` outwards."""

    def spent(sigma: float) -> float:
        return accounting.unchecked_epsilon(make_event(sigma), delta, 'pld', relation, interval)

    lower, upper = _bracket(spent, epsilon, delta, start, width, growth)
    if upper <= lower * (1 + _TOLERANCE / 2):
        return upper
    fresh = lambda: accounting.make_accountant('pld', relation, interval)
    return _search(make_event, epsilon, delta, fresh, lower, upper)


def _search(
    make_event: Callable[[float], DpEvent],
    epsilon: float,
    delta: float,
    fresh: Callable[[], dp_accounting.PrivacyAccountant],
    lower: float,
    upper: float,
) -> float:
    """Find the least noise between two values, by the accountants that `fresh` makes."""
    with np.errstate(over='ignore'):
        return dp_accounting.calibrate_dp_mechanism(
            fresh,
            make_event,
            epsilon,
            delta,
            dp_accounting.ExplicitBracketInterval(lower, upper),
            tol=_TOLERANCE / 2 * lower,
        )


def _bracket(
    spent: Callable[[float], float],
    budget: float,
    delta: float,
    start: float,
    factor: float,
    growth: float = 1.0,
) -> tuple[float, float]:
    """Find a σ above the budget and one within it, at most `factor` apart.

    With each try `factor` is raised to the power `growth`.
    """
    upper = start
    while (figure := spent(upper)) > budget:
        if upper >= MOST_NOISE:
            raise BudgetTooSmall(
                f'the query alone spends ε = {accounting.format_epsilon(figure)} at δ = '
                f'{accounting.format_exact(delta)}; the budget dp.epsilon is '
                f'{accounting.format_exact(budget)}. Lower query.queries, raise query.noise_multiplier, set '
                'query.epsilon_share, or raise the budget',
                figure,
            )
        upper, factor = min(upper * factor, MOST_NOISE), factor**growth
    lower = upper / factor
    while spent(lower) <= budget:
        if lower <= _LEAST_NOISE:
            raise ValueError(
                f'epsilon is {accounting.format_exact(budget)}; it must be small enough to ask for a '
                f'noise multiplier above {_LEAST_NOISE:g}'
            )
        factor **= growth
        lower, upper = lower / factor, lower
    return lower, upper
