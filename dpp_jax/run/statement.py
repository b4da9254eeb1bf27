"""The privacy statement of a run: what was spent, on what, and what the figures rest on.

Made from the releases that the ledger names (or, before a run, from those that a plan foresees), so
that nobody types what ran.
"""

from collections.abc import Sequence
import functools
import importlib.metadata
from pathlib import Path
import subprocess
from typing import Any

import dpp_jax
from dpp_jax import files
from dpp_jax.privacy import accounting, groups
from dpp_jax.privacy.budget import DP_SGD, QUERIES, SELECTION, Budget, Releases, group, total_event
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import already_spent, imported
from dpp_jax.run import statement_text as words
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys, is_seeded


def make(
    releases: Sequence[Releases],
    *,
    is_private: bool,
    delta: float,
    accountant: str,
    budget: float,
    relation: str = accounting.ZERO_OUT,
    before: Sequence[Releases] = (),
    derived: Sequence[str] = (),
    kind: str = '',
    code_of_stages: dict[str, list] | None = None,
) -> dict[str, Any]:
    """Make the statement, in JSON's types.

    Args:
        releases: what was released, or would be.
        is_private: whether all keys came from the operating system; a run from a seed is not private.
        delta: δ at which ε is stated.
        accountant: a name in `accounting.ACCOUNTANTS`: whose ε is the run's own.
        budget: the ε that the run was planned for.
        relation: a name in `accounting.RELATIONS`: of which neighbors the run's own ε is.
        before: what earlier runs released from the same private images; the ε of this run includes it.
        derived: settings that were read from the private images.
        kind: of the checkpoint that the run imports, a name of `imported.KINDS`; '' if none.
        code_of_stages: stage → versions of the code that ran it, see `record_code`.
    """
    epsilon = _epsilons([*before, *releases], delta, accountant, relation)
    meaning, unit = accounting.RELATIONS[relation], _unit(releases)
    public = words.PUBLIC_NUMBER[unit] if meaning.size_is_public else words.PUBLIC
    return {
        'private': is_private,
        'epsilon': epsilon[accountant],
        'epsilon_rounded_up': accounting.format_epsilon(epsilon[accountant]),
        'delta': delta,
        'accountant': accountant,
        'budget': budget,
        'unit': unit,
        'unit_of_privacy': words.UNITS[unit],
        'relation': relation,
        'neighboring_relation': meaning.sentence.format(unit=unit),
        'epsilon_by_accountant': epsilon,
        'epsilon_of_replace_one': by_pld((*before, *releases), delta, accounting.REPLACE_ONE),
        'mechanisms': _rows(releases, delta, accountant, relation),
        'spent_before': _rows(before, delta, accountant, relation),
        'declared': _declared((*before, *releases), kind),
        'covered': list(words.COVERED),
        'not_covered': [*words.NOT_COVERED, words.NOT_COVERED_OF[unit]],
        'assumptions': [public, *words.read_from_images(derived), *words.ASSUMPTIONS],
        'code': code_version(),
        'code_of_stages': code_of_stages or {},
    }


def _declared(releases: Sequence[Releases], kind: str) -> str | None:
    """Say what rests on the word of the owner of the private images; None if nothing does."""
    # By the kind, too: the condition stands whatever the ledger names.
    rests = kind in (imported.PRETRAINED, imported.FINETUNED) or any(part.declared for part in releases)
    found = [words.DECLARED] if rests else []
    found += [words.DECLARED_PUBLIC] if kind == imported.PUBLIC else []
    return '. '.join(found) or None


def _unit(releases: Sequence[Releases]) -> str:
    """Return what the releases have as their unit; `make` gets those of one run."""
    return next((part.mechanism.unit for part in releases), groups.IMAGE)


def _rows(releases: Sequence[Releases], delta: float, accountant: str, relation: str) -> list[dict[str, Any]]:
    """Describe releases, each with its own ε."""
    return [
        row
        | {
            'kind': 'Poisson-sampled Gaussian',
            'epsilon': _epsilons([part], delta, accountant, relation),
        }
        for part, row in zip(releases, already_spent.rows(releases))
    ]


def of_ledger(
    workdir: WorkDir,
    ledger: Ledger,
    budget: Budget,
    derived: Sequence[str] = (),
    kind: str = '',
    is_private: bool = True,
) -> dict[str, Any]:
    """Make the statement of what a work directory's ledger names.

    `derived` and `kind` are as of `make`. `is_private`: whether the settings have no seed; then the keys that
    the ledger names decide.
    """
    return make(
        group(ledger.entries),
        is_private=is_private and not any(is_seeded(entry.randomness) for entry in ledger.entries),
        delta=budget.delta,
        accountant=budget.accountant,
        budget=budget.epsilon,
        relation=budget.relation,
        before=budget.before,
        derived=derived,
        kind=kind,
        code_of_stages=codes(workdir),
    )


def write(workdir: WorkDir, statement: dict[str, Any]) -> None:
    """Write release/privacy_statement.json and .md, after the ledger that they are computed from."""
    workdir.publish_ledger()
    if not statement['mechanisms'] and not workdir.released_ledger.exists():
        files.write_bytes(workdir.released_ledger, b'')  # nothing was spent yet
    files.write_json(workdir.statement, statement)
    files.write_text(workdir.statement_text, words.markdown(statement))


def exists(workdir: WorkDir) -> bool:
    """Whether both files of the statement are there, and the ledger that they are computed from."""
    return all(path.exists() for path in (workdir.statement, workdir.statement_text, workdir.released_ledger))


def stated(workdir: WorkDir, mechanism: str) -> int:
    """Return how many releases of `mechanism` the written statement names."""
    if not workdir.statement.exists():
        return 0
    statement = files.read_json(
        workdir.statement,
        'Restore the file. Or delete it and run --stage=all: it is written again from ledger.jsonl',
        {'mechanisms': [{'mechanism': str, 'count': int}]},
    )
    return sum(row['count'] for row in statement['mechanisms'] if row['mechanism'] == mechanism)


def check_lost(
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger,
    budget: Budget,
    released: dict[str, bool],
    stated: dict[str, int],
) -> None:
    """Refuse to repeat a release of which nothing tells what it was.

    Args:
        workdir: the folder of the run.
        keys: its keys.
        ledger: its ledger.
        budget: its plan's.
        released: mechanism → whether its result is there.
        stated: mechanism → releases that the statement counts; read before the ledger, which may grow.

    Raises:
        ValueError: the statement counts releases that the ledger lacks; or it covers what a stage released,
            which is not there any more, and the keys of its mechanism do not tell what it was.
    """
    stage_of = dict.fromkeys(QUERIES, 'central') | {DP_SGD: 'finetune', SELECTION: 'evaluate'}
    for name, stage in stage_of.items():
        count = stated[name]
        if count > ledger.count(name):
            raise ValueError(
                f'{ledger.path} has {ledger.count(name)} entries of {name}, but the privacy statement counts '
                f'{count} releases. Restore the ledger: ε cannot be computed without it'
            )
        is_stated = 0 < budget.count(name) == count
        if not released[name] and is_stated and not keys.may_repeat(name):
            raise ValueError(
                f'the output of --stage={stage} is missing in {workdir.release}, but the privacy statement '
                'counts it as released. private/keys.json has no digest of it: a new one could differ, and '
                'would be a second release under the same noise. Restore it, or use another --workdir'
            )


def record_code(workdir: WorkDir, stage: str) -> None:
    """Note in release/code.json that this version of the code runs (a part of) a stage."""
    recorded, version = codes(workdir), code_version()
    if version not in recorded.get(stage, []):
        recorded.setdefault(stage, []).append(version)
        files.write_json(workdir.code, recorded)


def codes(workdir: WorkDir) -> dict[str, list[dict[str, str]]]:
    """Return stage → versions of the code that ran it."""
    if not workdir.code.exists():
        return {}
    return files.read_json(
        workdir.code,
        'Restore the file. Or delete it: the statement then names no versions of earlier stages',
        {'*': [{'*': str}]},
    )


def code_version() -> dict[str, str]:
    """Return the versions of this package, with its commit in a git checkout, and of what it counts with."""
    names = ('dp-accounting', 'jax', 'jaxlib', 'numpy')
    versions = {'dpp_jax': dpp_jax.__version__}
    versions |= {name: importlib.metadata.version(name) for name in names}
    folder = Path(__file__).resolve().parents[2]
    if (folder / '.git').exists():
        try:
            commit = subprocess.run(
                ['git', 'describe', '--always', '--dirty', '--abbrev=40'],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
            versions['dpp_jax'] += f' ({commit.stdout.strip()})'
        except (OSError, subprocess.SubprocessError):
            pass  # without git there is the version alone
    return versions


def _epsilons(
    releases: Sequence[Releases], delta: float, accountant: str, relation: str
) -> dict[str, float | None]:
    """Compute ε by the accountants that can, and RDP's order."""
    event = total_event(releases)
    rdp, order = None, None
    if 'rdp' in accounting.RELATIONS[relation].accountants:
        rdp, order = accounting.epsilon_and_order(event, delta, relation)
    pld = by_pld(tuple(releases), delta, relation)
    return {'rdp': rdp, 'rdp_order': order, 'pld': pld}


@functools.lru_cache(maxsize=64)
def by_pld(releases: tuple[Releases, ...], delta: float, relation: str) -> float | None:
    """Compute ε by privacy loss distributions, which takes seconds; None where they cannot state it."""
    return accounting.epsilon_if_stated(total_event(releases), delta, relation)
