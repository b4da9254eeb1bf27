"""What Poisson-sampled Gaussian mechanisms spend.

Every figure is computed by dp_accounting; this module builds its events, fixes its settings and
checks its arguments. ε is always that of one neighboring relation, a name in `RELATIONS`.
"""

from collections.abc import Iterable
import dataclasses
import decimal
import math

import dp_accounting
from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
import numpy as np

from dpp_jax.privacy import checks

# Orders of the Rényi divergence. Every order gives a valid bound and the least bound is taken: the
# choice decides how tight ε is, never whether it holds.
#   - Fractions start at 2.5. Below, the series for fractional orders (Mironov, Talwar, Zhang 2019,
#     section 3.3) often converges too slowly; dp_accounting then warns and leaves the order out.
#     Large ε needs the rest (MNIST at ε = 10 attains it at 3.3; integers alone lose 1 %).
#   - Integers up to 63 are those of the reference figures, which a finer choice beyond 63 would
#     undercut (the query of Camelyon by 0.2 %). The powers of two serve ε far below 1.
RDP_ORDERS = (
    2.0,
    *(tenths / 10 for tenths in range(25, 110)),
    *(float(order) for order in range(11, 64)),
    *(128.0, 256.0, 512.0, 1024.0),
)
# Name → a function of the neighboring relation. 'rdp': Rényi divergences, as the paper; 'pld': privacy loss
# distributions, rounded towards more loss; tighter and slower.
# The last argument is for 'pld' alone: the step, in units of ε, to which privacy losses are rounded.
ACCOUNTANTS = {
    'rdp': lambda relation, interval: RdpAccountant(RDP_ORDERS, relation),
    'pld': PLDAccountant,
}
# A distribution has about ε / interval values: up to this ε (by RDP) the finest interval is used, beyond it
# one in proportion to ε. The rounding is towards more loss: ε stays an upper bound, 1e-5 (relative) higher.
FINEST_INTERVAL = 1e-4
_LARGEST_EPSILON_OF_FINEST = 30.0
# What 'pld' can state: of each mechanism it cuts off tails of 1e-15, and it needs time in proportion to the
# number of releases.
LEAST_DELTA_OF_PLD = 1e-14
MOST_RELEASES_OF_PLD = 300_000
MOST_EPSILON_OF_PLD = 700.0  # e^ε must be a float64


@dataclasses.dataclass(frozen=True)
class Relation:
    """Which sets of private images are neighbors.

    Attributes:
        sentence: for people, with {unit} for 'image' or 'group'; continues "Neighboring relation: ".
        definition: as dp_accounting names it.
        size_is_public: whether the exact number of units may be known. If not, what is released
            must not depend on it.
        accountants: names in `ACCOUNTANTS` that can count with it.
    """

    sentence: str
    definition: NeighboringRelation
    size_is_public: bool
    accountants: tuple[str, ...]


# zero_out and add_remove have the same ε: a sum changes by the contribution of one image. A sum changes by
# up to twice as much if an image is replaced, which dp_accounting's relation counts.
RELATIONS = {
    'zero_out': Relation(
        'two sets are neighbors if they differ in one {unit} that counts as nothing in one of them '
        '(zero-out); the number of {unit}s is public and the same',
        NeighboringRelation.REPLACE_SPECIAL,
        True,
        ('rdp', 'pld'),
    ),
    'add_remove': Relation(
        'two sets are neighbors if one has exactly one {unit} more (add or remove one); the number of '
        '{unit}s is not public',
        NeighboringRelation.ADD_OR_REMOVE_ONE,
        False,
        ('rdp', 'pld'),
    ),
    'replace_one': Relation(
        'two sets are neighbors if one {unit} is another one (replace one); the number of {unit}s is public '
        'and the same',
        NeighboringRelation.REPLACE_ONE,
        True,
        ('pld',),
    ),
}
ZERO_OUT, REPLACE_ONE = 'zero_out', 'replace_one'


def subsampled_gaussian(noise_multiplier: float, sampling_probability: float, count: int) -> DpEvent:
    """Make the event of `count` releases of a Gaussian mechanism, each on a fresh Poisson sample.

    Args:
        noise_multiplier: σ = noise standard deviation / L2 sensitivity, finite and > 0.
        sampling_probability: q in (0, 1], with which each example enters each sample,
            independently of the others. q = 1 is the plain Gaussian mechanism.
        count: how many releases, ≥ 1.

    Raises:
        ValueError: an argument is out of range. σ = 0 is refused: it gives no guarantee.
    """
    checks.require(
        'noise_multiplier', noise_multiplier, checks.is_positive(noise_multiplier), 'finite and > 0'
    )
    checks.require(
        'sampling_probability',
        sampling_probability,
        checks.is_positive(sampling_probability) and sampling_probability <= 1,
        'in (0, 1]',
    )
    checks.require('count', count, checks.is_whole(count, 1), 'a whole number, at least 1')
    event = dp_accounting.GaussianDpEvent(float(noise_multiplier))
    if sampling_probability < 1:
        event = dp_accounting.PoissonSampledDpEvent(float(sampling_probability), event)
    return dp_accounting.SelfComposedDpEvent(event, int(count))


def compose(events: Iterable[DpEvent]) -> DpEvent:
    """All `events` on the same private examples, one after the other. No events spend ε = 0."""
    return dp_accounting.ComposedDpEvent(list(events))


def epsilon(event: DpEvent, delta: float, accountant: str = 'rdp', relation: str = ZERO_OUT) -> float:
    """Compute the ε that `event` spends at δ: an upper bound.

    Args:
        event: from `subsampled_gaussian` or `compose`.
        delta: δ in (0, 1).
        accountant: a name in `ACCOUNTANTS`.
        relation: a name in `RELATIONS`.

    Raises:
        ValueError: `delta`, `accountant` or `relation` is out of range, or the accountant cannot count with
            the relation.
    """
    _check(delta, accountant, relation)
    if accountant == 'pld':
        check_count(event)
    return unchecked_epsilon(event, delta, accountant, relation)


def epsilon_and_order(event: DpEvent, delta: float, relation: str = ZERO_OUT) -> tuple[float, float]:
    """Compute ε by RDP as `epsilon` gives it, and the order of `RDP_ORDERS` that attains it.

    The order says nothing where ε is 0.
    """
    _check(delta, 'rdp', relation)
    result, order = make_accountant('rdp', relation).compose(event).get_epsilon_and_optimal_order(delta)
    return float(result), float(order)


def format_epsilon(value: float, digits: int = 4) -> str:
    """Write ε with `digits` decimals, rounded up: a stated ε is never below the one computed."""
    return _rounded(value, digits, decimal.ROUND_CEILING)


def format_exact(value: float) -> str:
    """Write a budget or δ with all its digits, as short as they can be written."""
    return repr(float(value)).removesuffix('.0')


def format_noise(value: float, digits: int = 4) -> str:
    """Write σ with `digits` decimals, rounded down: no more noise is stated than there was."""
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(float(value))
    step = decimal.Decimal(1).scaleb(-digits)
    holds_any_float = decimal.Context(prec=400)
    return str(decimal.Decimal(value).quantize(step, rounding, holds_any_float))


def make_accountant(
    name: str, relation: str, interval: float = FINEST_INTERVAL
) -> dp_accounting.PrivacyAccountant:
    """Make an empty accountant."""
    return ACCOUNTANTS[name](RELATIONS[relation].definition, interval)


def unchecked_epsilon(
    event: DpEvent, delta: float, accountant: str, relation: str, interval: float | None = None
) -> float:
    """Compute `epsilon` without its checks."""
    if accountant == 'pld' and interval is None:
        interval = finest_interval(event, delta)
    with np.errstate(over='ignore'):  # e^ε, where ε is beyond what is stated
        return float(make_accountant(accountant, relation, interval).compose(event).get_epsilon(delta))


def finest_interval(event: DpEvent, delta: float) -> float:
    """Choose the interval of the distributions by RDP's ε, which is above theirs, or near it."""
    scale = unchecked_epsilon(event, delta, 'rdp', ZERO_OUT)
    return FINEST_INTERVAL * max(1.0, scale / _LARGEST_EPSILON_OF_FINEST)


def epsilon_if_stated(event: DpEvent, delta: float, relation: str = ZERO_OUT) -> float | None:
    """Compute ε by PLD; None where PLD cannot state it: for so small a δ, so many releases, so large an ε."""
    if delta <= LEAST_DELTA_OF_PLD or _most_releases(event) > MOST_RELEASES_OF_PLD:
        return None
    found = epsilon(event, delta, 'pld', relation)
    return found if found <= MOST_EPSILON_OF_PLD else None


def _most_releases(event: DpEvent) -> int:
    """Return the largest number of equal releases in an event."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return max(map(_most_releases, event.events), default=0)
    return event.count if isinstance(event, dp_accounting.SelfComposedDpEvent) else 1


def check_count(event: DpEvent) -> None:
    """Raise a ValueError if distributions of so many releases take too long."""
    count = _most_releases(event)
    if count > MOST_RELEASES_OF_PLD:
        raise ValueError(
            f"config.dp.accountant is 'pld'; it must be 'rdp' for a mechanism with {count:,} releases. "
            f'Privacy loss distributions are counted for at most {MOST_RELEASES_OF_PLD:,}'
        )


def check_budget(epsilon: float, delta: float, accountant: str, relation: str = ZERO_OUT) -> None:
    """Raise a ValueError unless ε > 0, δ is in (0, 1), and this accountant can count with this relation."""
    checks.require('epsilon', epsilon, checks.is_positive(epsilon), 'finite and > 0')
    _check(delta, accountant, relation)
    if accountant == 'pld':
        allowed = f"at most {MOST_EPSILON_OF_PLD:g} with accountant 'pld'; 'rdp' counts any"
        checks.require('epsilon', epsilon, epsilon <= MOST_EPSILON_OF_PLD, allowed)


def _check(delta: float, accountant: str, relation: str) -> None:
    """Raise unless all are in range."""
    checks.require('delta', delta, checks.is_positive(delta) and delta < 1, 'in (0, 1)')
    checks.require('accountant', accountant, accountant in ACCOUNTANTS, ' or '.join(map(repr, ACCOUNTANTS)))
    checks.require('relation', relation, relation in RELATIONS, ' or '.join(map(repr, RELATIONS)))
    able = RELATIONS[relation].accountants
    allowed = f'{" or ".join(map(repr, able))} with relation {relation!r}'
    checks.require('accountant', accountant, accountant in able, allowed)
    if accountant == 'pld':
        allowed = f"above {LEAST_DELTA_OF_PLD:g} with accountant 'pld', which cuts off tails of 1e-15"
        checks.require('delta', delta, delta > LEAST_DELTA_OF_PLD, f"{allowed}; 'rdp' states any")
