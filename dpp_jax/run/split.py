"""How ε may be split between the queries and fine-tuning: a rule, and where a plan stands.

The rule: all queries together raise the noise of fine-tuning by 5 %. That is what fine-tuning notices. Their
share of ε says little: ε of parts do not add up, and 5 % more noise pays for a quarter of ε, often for
more.
"""

import dataclasses
import math

from dp_accounting import DpEvent

from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import DP_SGD, QUERIES, Budget, Releases
from dpp_jax.run.plan_curve import search

RISE = 0.05


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
    """Compute the split of a budget, right to 0.1 % of ε; None if it has no query of its own, or no DP-SGD.

    By RDP, which takes milliseconds, where it can count the relation: what is compared is then all by it.
    """
    asked = [part for part in budget.releases if part.mechanism.name in QUERIES and not part.declared]
    dp_sgd = budget.of(DP_SGD)
    if not asked or dp_sgd is None or dp_sgd.declared:
        return None
    accountant = 'rdp' if 'rdp' in accounting.RELATIONS[budget.relation].accountants else budget.accountant
    others = [part for part in budget.releases if part not in (*asked, dp_sgd)]
    fixed = [part.event for part in (*budget.before, *others)]

    def share(*events: DpEvent) -> float:
        event = accounting.compose(events)
        return accounting.epsilon(event, budget.delta, accountant, budget.relation) / budget.epsilon

    def scaled(factor: float) -> list[DpEvent]:
        return [_with_noise(part, factor * part.mechanism.noise_multiplier).event for part in asked]

    def noise_beside(*events: DpEvent) -> float:
        start = dp_sgd.mechanism.noise_multiplier
        return search(lambda sigma: share(*fixed, *events, _with_noise(dp_sgd, sigma).event), start)

    alone = noise_beside()
    at_rule = _with_noise(dp_sgd, (1 + RISE) * alone).event
    factor = search(lambda factor: share(*fixed, *scaled(factor), at_rule), 1.0)
    return Split(
        share=share(*scaled(1.0)),
        rise=noise_beside(*scaled(1.0)) / alone - 1,
        shares={part.mechanism.name: share(event) for part, event in zip(asked, scaled(factor))},
    )


def words(split: Split) -> str:
    """Say it in a line."""
    settings = ', '.join(
        f'{QUERIES[name]}.epsilon_share={_down(share)}' for name, share in split.shares.items()
    )
    return (
        f'the queries spend {100 * split.share:.2g} % of ε alone and raise the noise of fine-tuning by '
        f'{100 * split.rise:.2g} %. {100 * RISE:.0f} % are worth it as a rule: {settings}'
    )


def _with_noise(part: Releases, sigma: float) -> Releases:
    return dataclasses.replace(part, mechanism=dataclasses.replace(part.mechanism, noise_multiplier=sigma))


def _down(share: float) -> str:
    """Round a share down to two digits."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return f'{math.floor(share / unit) * unit:.2g}'
