"""What several work directories spent together on the same private images, from their ledgers."""

from collections.abc import Sequence
import itertools
from typing import Any

from dpp_jax import files
from dpp_jax.privacy import accounting, budget
from dpp_jax.privacy.budget import Releases
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import fingerprint, imported, statement, statement_text
from dpp_jax.run.already_spent import paths
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import is_seeded

_EXAMPLE = '--stage=compose --with=runs/a,runs/b'


def text(workdirs: str) -> str:
    """Say what the runs in these work directories, separated by commas, spent together.

    δ is the largest that one of them states: an ε at a smaller δ also holds at a larger one.

    Raises:
        ValueError, FileNotFoundError: a folder has no ledger or no plan, or two belong to the same run.
    """
    folders = [WorkDir.to_read(path) for path in paths(workdirs)]
    if not folders:
        raise ValueError(f'--with is empty; it must name work directories, as in {_EXAMPLE}')
    ledgers, plans = [], []
    for folder in folders:
        if not folder.ledger.is_file():
            raise FileNotFoundError(
                f'--with names {folder.root}, which has no release/ledger.jsonl; it must name work '
                'directories of runs that released something'
            )
        ledgers.append(Ledger(folder.ledger, read_only=True))
        plans.append(_plan(folder))
    entries = budget.together(ledgers)
    parts = tuple(budget.group(entries))
    delta = max(plan['delta'] for plan in plans)
    units = sorted({part.mechanism.unit for part in parts})
    if len(units) > 1:
        raise ValueError(
            f'--with names runs with different units of privacy ({" and ".join(units)}): their ε do not add '
            'up. Name runs of one unit'
        )
    lines = [f'{len(folders)} run(s) on the same private images, from their ledgers:', '']
    for folder, ledger, plan in zip(folders, ledgers, plans):
        own = tuple(budget.group(ledger.entries))
        lines.append(
            f'  {folder.root}: {_figures(own, plan["delta"])}; planned for {plan["relation"]}'
            f'{"" if not plan["spent_before"] else ", beside earlier runs (counted here only if named)"}'
        )
    lines += ['', f'  together: {_figures(parts, delta)}', '']
    settings = [folder.recorded() or {} for folder in folders]
    lines += _remarks(folders, plans, parts, settings)
    if any(is_seeded(entry.randomness) for entry in entries) or any(
        told.get('seed') is not None for told in settings
    ):
        lines.append('NOT PRIVATE: the keys of a run come from config.seed. No ε covers what it released.')
    return '\n'.join(lines)


def _plan(folder: WorkDir) -> dict[str, Any]:
    """Read δ, relation and what was spent before."""
    if not folder.plan.is_file():
        raise FileNotFoundError(
            f'--with names {folder.root}, which has no release/plan.json. Restore the file'
        )
    old = {'relation': accounting.ZERO_OUT, 'spent_before': []}
    form = {'relation?': str, 'delta': float, 'spent_before?': list}
    plan = old | files.read_json(folder.plan, 'Restore the file', form)
    if plan['relation'] not in accounting.RELATIONS:
        allowed = ' or '.join(map(repr, accounting.RELATIONS))
        raise ValueError(f'{folder.plan} has relation = {plan["relation"]!r}; it must be {allowed}')
    accountant = accounting.RELATIONS[plan['relation']].accountants[0]
    try:
        accounting.check_budget(1.0, plan['delta'], accountant, plan['relation'])
    except ValueError as error:
        raise ValueError(f'{folder.plan} cannot be used: {error}') from error
    return plan


def _figures(parts: tuple, delta: float) -> str:
    """Say ε by every relation and accountant that is available."""
    show = accounting.format_epsilon
    event = budget.total_event(parts)
    rdp = accounting.epsilon(event, delta)
    pld, replaced = (
        accounting.epsilon_if_stated(event, delta),
        statement.by_pld(parts, delta, accounting.REPLACE_ONE),
    )
    or_none = lambda value: 'not available' if value is None else show(value)
    return (
        f'ε = {show(rdp)} (RDP), {or_none(pld)} (PLD) by zero-out or add or remove one; '
        f'ε = {or_none(replaced)} (PLD) by replace one; '
        f'δ = {accounting.format_exact(delta)}'
    )


def _remarks(
    folders: Sequence[WorkDir],
    plans: Sequence[dict[str, Any]],
    parts: Sequence[Releases],
    settings: Sequence[dict[str, Any]],
) -> list[str]:
    """Say what was chosen, and what the user must know."""
    remarks = []
    deltas = sorted({plan['delta'] for plan in plans})
    if len(deltas) > 1:
        remarks.append(
            f'The runs state different δ ({", ".join(map(accounting.format_exact, deltas))}); the largest is '
            'taken: all of them hold there.'
        )
    relations = {plan['relation'] for plan in plans}
    if accounting.ZERO_OUT in relations and 'add_remove' in relations:
        remarks.append(
            'A run for zero_out makes the number of images public: together they are for zero_out.'
        )
    if accounting.REPLACE_ONE in relations and len(relations) > 1:
        remarks.append('The runs were planned for different relations: read the ε of the one that you need.')
    if any(part.declared for part in parts):
        remarks.append(
            'Some releases are declared: the owner of an imported checkpoint says that they were made. A '
            'checkpoint that several of these runs import counts once.'
        )
    if any(imported.kind(told) == imported.PUBLIC for told in settings):
        remarks.append(f'{statement_text.DECLARED_PUBLIC}.')
    seen = []
    for folder in folders:
        if folder.fingerprints.is_file():
            known = files.read_json(folder.fingerprints, 'Restore the file', fingerprint.FORM)
            seen.append(known.get('train', {}))
    if any(fingerprint.are_different(*pair) for pair in itertools.combinations(seen, 2)):
        remarks.append(
            'private/data.json names different private images in these folders. The sum is right for every '
            'image that is in all of them, and too large for the others.'
        )
    return remarks
