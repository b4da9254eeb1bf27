"""How ε may be split between the queries and fine-tuning: a rule, and where a plan stands.

The rule: all queries together raise the noise of fine-tuning by 5 %. That is what fine-tuning notices. Their
share of ε says little: ε of parts do not add up, and 5 % more noise pays for a quarter of ε, often for
more.
"""

from collections.abc import Callable
import dataclasses
import math

from dp_accounting import DpEvent

from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import DP_SGD, QUERIES, Budget, Releases

RISE = 0.05
_TOLERANCE = 1e-3  # relative, of ε


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """What queries and fine-tuning have of a budget.

    Attributes:
        share: of ε, that the queries of the plan spend alone.
        rise: of fine-tuning's noise, that they cause.
        shares: by the rule: mechanism → the share of ε that a query would spend alone, if the noise of all
            queries changed by the same factor.
    """

    share: float
    rise: float
    shares: dict[str, float]


def of(budget: Budget) -> Split | None:
    """Compute the split of a budget, right to 0.1 % of ε; None where there is nothing to say.

    That is a plan without a query or DP-SGD of its own, or a relation that RDP cannot count: PLD would take
    minutes. Noise is compared by RDP; the shares are by the accountant of the budget.
    """
    asked = [part for part in budget.releases if part.mechanism.name in QUERIES and not part.declared]
    dp_sgd = budget.of(DP_SGD)
    can_count = 'rdp' in accounting.RELATIONS[budget.relation].accountants
    if not asked or not can_count or dp_sgd is None or dp_sgd.declared:
        return None
    others = [part for part in budget.releases if part not in (*asked, dp_sgd)]
    fixed = [part.event for part in (*budget.before, *others)]

    def share(*events: DpEvent, accountant: str = 'rdp') -> float:
        event = accounting.compose(events)
        return accounting.epsilon(event, budget.delta, accountant, budget.relation) / budget.epsilon

    def share_alone(*events: DpEvent) -> float:
        return share(*events, accountant=budget.accountant)

    def scaled(factor: float) -> list[DpEvent]:
        return [_with_noise(part, factor * part.mechanism.noise_multiplier).event for part in asked]

    def noise_beside(*events: DpEvent) -> float:
        start = dp_sgd.mechanism.noise_multiplier
        return search(lambda sigma: share(*fixed, *events, _with_noise(dp_sgd, sigma).event), start)

    alone = noise_beside()
    at_rule = _with_noise(dp_sgd, (1 + RISE) * alone).event
    factor = search(lambda factor: share(*fixed, *scaled(factor), at_rule), 1.0)
    return Split(
        share=share_alone(*scaled(1.0)),
        rise=max(0.0, noise_beside(*scaled(1.0)) / alone - 1),
        shares={part.mechanism.name: share_alone(event) for part, event in zip(asked, scaled(factor))},
    )


def search(relative: Callable[[float], float], sigma: float) -> float:
    """Find the σ (or factor of it) at which `relative` (ε / budget, falling in σ) is 1, by secants.

    Between logarithms of σ and of ε the curve is nearly a line. A step is at most a factor of two:
    distributions of privacy losses take memory in proportion to ε.
    """
    x, slope, before = math.log(sigma), -1.0, None
    for _ in range(20):
        y = math.log(relative(math.exp(x)))
        if abs(y) < _TOLERANCE:
            break
        if before is not None:
            slope = min((y - before[1]) / (x - before[0]), -0.05)
        before = x, y
        x -= max(-math.log(2), min(math.log(2), y / slope))
    return math.exp(x)


def words(split: Split) -> str:
    """Say it in a line."""
    settings = ', '.join(
        f'{QUERIES[name]}.epsilon_share={_down(share)}' for name, share in split.shares.items() if share
    )
    return (
        f'the queries spend {_percent(split.share)} of ε alone and raise the noise of fine-tuning by '
        f'{_percent(split.rise)}. {_percent(RISE)} are worth it as a rule: {settings}'
    )


def _percent(share: float) -> str:
    return f'{100 * share:{".0f" if share >= 0.1 else ".2g"}} %'


def _with_noise(part: Releases, sigma: float) -> Releases:
    return dataclasses.replace(part, mechanism=dataclasses.replace(part.mechanism, noise_multiplier=sigma))


def _down(share: float) -> str:
    """Round a share down to two digits."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return f'{math.floor(share / unit) * unit:.2g}'
