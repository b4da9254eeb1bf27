"""From (ε, δ) to the noise of every mechanism, and from a ledger back to the budget.

A run has one to five mechanisms: the query for central images and, if asked for, those for class moments and
for frequencies (no query without pre-training), DP-SGD, and the selection among classifiers (if asked for).
A query's noise is given, or follows from its share of ε; the selection's follows from its share. DP-SGD gets
the least noise with which all together stay within (ε, δ). `Budget` holds the result: numbers alone, no
settings, no network.
"""

from collections import Counter
from collections.abc import Callable, Iterable
import dataclasses
import functools
import math

from dp_accounting import DpEvent

from dpp_jax.privacy import accounting, calibration, checks
from dpp_jax.privacy.ledger import Entry, Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism

# Names of the mechanisms, as ledgers and key files record them.
CENTRAL_QUERY = 'central_query'
MOMENTS = 'moments'
FREQUENCY = 'frequency'
DP_SGD = 'dp_sgd'
SELECTION = 'selection'
# The queries, with what settings and plans call them. A later one may use what earlier ones released.
QUERIES = {CENTRAL_QUERY: 'query', MOMENTS: 'moments', FREQUENCY: 'frequency'}
MECHANISMS = (*QUERIES, DP_SGD, SELECTION)  # in the order in which they run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Releases:
    """Equal releases of one mechanism, each on a fresh Poisson sample.

    Attributes:
        mechanism: adds the noise.
        count: how many releases, ≥ 1; they have the indices 0 .. count - 1.
        declared: whether they were made elsewhere, and are known by the owner's word alone.

    Raises:
        ValueError: the count is out of range.
    """

    mechanism: GaussianMechanism
    count: int
    declared: bool = False

    def __post_init__(self):
        checks.require('count', self.count, checks.is_whole(self.count, 1), 'a whole number, at least 1')

    @property
    def event(self) -> DpEvent:
        """What dp_accounting needs to know of all of them."""
        mechanism = self.mechanism
        return accounting.subsampled_gaussian(
            mechanism.noise_multiplier, mechanism.sampling_probability, self.count
        )

    def entry(self, index: int, identifier: str) -> Entry:
        """Return what the ledger says of release number `index`; arguments as of the mechanism's `entry`."""
        return dataclasses.replace(self.mechanism.entry(index, identifier), declared=self.declared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """(ε, δ) and the releases that were calibrated to it.

    Attributes:
        epsilon: the ε > 0 that all releases together must not exceed.
        delta: δ in (0, 1), at which every ε is stated.
        accountant: a name in `accounting.ACCOUNTANTS`.
        relation: a name in `accounting.RELATIONS`: of which neighbors ε is.
        releases: one item for each mechanism, in the order in which they run.
        before: what earlier runs released from the same private images; it is part of the budget.

    Raises:
        ValueError: a field is out of range, or two items have the same mechanism.
    """

    epsilon: float
    delta: float
    accountant: str
    relation: str = accounting.ZERO_OUT
    releases: tuple[Releases, ...]
    before: tuple[Releases, ...] = ()

    def __post_init__(self):
        accounting.check_budget(self.epsilon, self.delta, self.accountant, self.relation)
        names = [part.mechanism.name for part in self.releases]
        checks.require('releases', names, len(set(names)) == len(names), 'one item for each mechanism')

    def of(self, name: str) -> Releases | None:
        """Return the releases of the mechanism of this name; None if there are none."""
        return next((part for part in self.releases if part.mechanism.name == name), None)

    def count(self, name: str) -> int:
        """Return how often the mechanism of this name runs."""
        part = self.of(name)
        return part.count if part else 0

    def spent(self, *names: str) -> float:
        """Compute the ε of the named mechanisms together, or of all with what was spent before."""
        if not names:
            return self.epsilon_of([*self.before, *self.releases])
        return self.epsilon_of(part for part in self.releases if part.mechanism.name in names)

    def epsilon_of(self, releases: Iterable[Releases]) -> float:
        """Compute the ε of these releases together, as this budget counts."""
        return _epsilon(tuple(releases), self.delta, self.accountant, self.relation)

    def check_ledger(self, ledger: Ledger, used: dict[str, int]) -> None:
        """Check that the ledger fits this budget and what is known to have been used.

        Args:
            ledger: what ran.
            used: mechanism → how many of its releases are known to have been used.

        Raises:
            ValueError: the ledger names a release that this budget does not have, or lacks one.
        """
        for entry in ledger.entries:
            part = self.of(entry.mechanism)
            is_planned = part is not None and entry.index < part.count
            planned = part.entry(entry.index, entry.randomness) if is_planned else None
            if planned != entry:
                raise ValueError(
                    f'{ledger.path} has the entry {entry}, which the plan does not have (planned: '
                    f'{planned}). The ε of the plan does not cover it. Restore ledger.jsonl and plan.json, '
                    'or use another --workdir'
                )
        for mechanism, count in used.items():
            if ledger.count(mechanism) < count:
                raise ValueError(
                    f'{ledger.path} has {ledger.count(mechanism)} entries of {mechanism}, but {count} '
                    'releases were made. Restore the ledger: ε cannot be computed without it'
                )


@functools.lru_cache(maxsize=64)
def _epsilon(releases: tuple[Releases, ...], delta: float, accountant: str, relation: str) -> float:
    """Compute ε once: a plan is shown in many places, and PLD takes seconds."""
    return accounting.epsilon(total_event(releases), delta, accountant, relation)


def total_event(releases: Iterable[Releases]) -> DpEvent:
    """Compose all releases; none spend ε = 0."""
    return accounting.compose(part.event for part in releases)


def group(entries: Iterable[Entry]) -> list[Releases]:
    """Count equal ledger entries: one item for each that differs beside index and keys, in their order."""
    counts = Counter(
        (e.mechanism, e.noise_multiplier, e.sampling_probability, e.sensitivity, e.unit, e.declared)
        for e in entries
    )
    return [
        Releases(
            mechanism=GaussianMechanism(
                name=name,
                noise_multiplier=sigma,
                sampling_probability=q,
                sensitivity=sensitivity,
                unit=unit,
            ),
            count=count,
            declared=declared,
        )
        for (name, sigma, q, sensitivity, unit, declared), count in counts.items()
    ]


def together(ledgers: Iterable[Ledger]) -> list[Entry]:
    """Return what several ledgers of the same private images name.

    Two may begin with the same imported checkpoint: its declared releases were made once, and count once.

    Raises:
        ValueError: two of them name the same keys: one run, or a copy of it, which would be counted twice,
            or (continued) use the same noise twice.
    """
    declared, entries, seen = {}, [], {}
    for ledger in ledgers:
        declared |= dict.fromkeys(entry for entry in ledger.entries if entry.declared)
        drawn = [entry for entry in ledger.entries if not entry.declared]
        own = {(entry.mechanism, entry.randomness) for entry in drawn}
        for name, randomness in sorted(own):
            if (name, randomness) in seen:
                raise ValueError(
                    f'{ledger.path} and {seen[name, randomness]} have releases of {name} with the same keys '
                    f'({randomness}): one is a copy of the other, or continues it. Name one of them'
                )
        seen |= dict.fromkeys(own, ledger.path)
        entries += drawn
    return [*declared, *entries]


def calibrate(
    known: Iterable[Releases],
    free: Callable[[float], Releases],
    *,
    epsilon: float,
    delta: float,
    accountant: str,
    relation: str = accounting.ZERO_OUT,
    noise_multiplier: float | None = None,
    before: Iterable[Releases] = (),
    after: Iterable[Releases] = (),
) -> Budget:
    """Make the budget in which the free mechanism has the least noise.

    Args:
        known: releases with their noise, here the queries.
        free: noise multiplier → the other releases, here DP-SGD's. Their ε must not rise with it.
        epsilon: ε > 0 of all together.
        delta: δ in (0, 1).
        accountant: a name in `accounting.ACCOUNTANTS`.
        relation: a name in `accounting.RELATIONS`.
        noise_multiplier: of the free mechanism where it is decided already; nothing is searched then.
        before: what earlier runs released.
        after: releases with their noise that come after the free ones, here the selection.

    Raises:
        calibration.BudgetTooSmall: the known releases, with those before, exceed the budget alone.
        ValueError: an argument is out of range.
    """
    known, before, after = tuple(known), tuple(before), tuple(after)
    given = [*before, *known, *after]

    def event(sigma: float) -> DpEvent:
        return total_event([*before, *known, free(sigma), *after])

    if noise_multiplier is None:
        try:
            noise_multiplier = calibration.calibrate(event, epsilon, delta, accountant, relation)
        except calibration.BudgetTooSmall as error:
            limits = {'delta': delta, 'accountant': accountant, 'relation': relation}
            fixed = accounting.epsilon(total_event(given), **limits)
            if fixed <= epsilon:
                raise _below_the_least(
                    event(calibration.MOST_NOISE), epsilon, error.least, **limits
                ) from error
            is_declared = any(part.declared for part in known)
            if not before and not after and not is_declared:
                raise
            beside = [
                *(['what config.dp.already_spent names'] if before else []),
                *(['the selection (evaluate.selection_share)'] if after else []),
            ]
            raise calibration.BudgetTooSmall(
                f'config.dp.epsilon is {accounting.format_exact(epsilon)}; it must be above '
                f'{accounting.format_epsilon(error.least)}, the ε of the query'
                + (', as declared of config.imported.path,' if is_declared else '')
                + (f' together with {" and ".join(beside)}' if beside else ' alone'),
                error.least,
            ) from error
    return Budget(
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        relation=relation,
        releases=(*known, free(noise_multiplier), *after),
        before=before,
    )


def _below_the_least(
    event: DpEvent, epsilon: float, least: float, *, delta: float, accountant: str, relation: str
) -> calibration.BudgetTooSmall:
    """Make the error of an ε that nothing exceeds but the floor of the accountant."""
    advice = 'Raise the budget or dp.delta, take fewer steps (finetune.epochs)'
    if accountant == 'rdp':
        tight = accounting.epsilon_if_stated(event, delta, relation)
        if tight is not None and tight <= epsilon:
            advice += ", or set config.dp.accountant='pld', which can state it"
    return calibration.BudgetTooSmall(
        f'config.dp.epsilon is {accounting.format_exact(epsilon)}; it must be above '
        f'{accounting.format_epsilon(least)}, the least ε that the accountant {accountant!r} can state of '
        f'these steps at δ = {accounting.format_exact(delta)}, with a noise '
        f'multiplier up to {calibration.MOST_NOISE:,.0f}. {advice}',
        least,
    )


def calibrate_share(
    make_query: Callable[[float], Releases],
    share: float,
    *,
    setting: str = 'query.epsilon_share',
    epsilon: float,
    delta: float,
    accountant: str,
    relation: str = accounting.ZERO_OUT,
) -> float:
    """Compute the least σ with which the queries alone spend no more than share · ε.

    Args:
        make_query: σ → the queries, or the selection.
        share: in (0, 1).
        setting: that says the share, for messages.
        others: as of `calibrate`.

    Raises:
        ValueError: no noise keeps them within their share.
    """
    try:
        return calibration.calibrate(
            lambda sigma: make_query(sigma).event, share * epsilon, delta, accountant, relation
        )
    except calibration.BudgetTooSmall as error:
        least = accounting.format_epsilon(error.least)
        raise ValueError(
            f'config.{setting} is {share:g}; it must be at least '
            f'{accounting.format_epsilon(error.least / epsilon)}. It would get ε = '
            f"{share * epsilon:.6g}, but the accountant '{accountant}' cannot go below {least}"
        ) from error


def schedule(images: int, batch_size: int, epochs: float) -> tuple[float, int]:
    """Compute DP-SGD's sampling probability and number of steps, as in the paper.

    Args:
        images: N, number of private images.
        batch_size: expected images per step, at most N.
        epochs: expected uses of each image; may be a fraction.

    Returns:
        q = 1 / ceil(N / batch_size), and epochs / q steps, at least 1.
    """
    batches = math.ceil(images / batch_size)
    return 1 / batches, max(1, round(epochs * batches))
