"""What earlier runs spent on the same private images, read from what they left."""

from pathlib import Path
from typing import Any

from dpp_jax import files
from dpp_jax.privacy import budget, groups
from dpp_jax.privacy.budget import Releases
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import keys
from dpp_jax.run.folder import WorkDir

_ALLOWED = 'work directories, paths of a ledger.jsonl, or of a privacy_statement.json, separated by commas'

# What `rows` writes of a release.
ROW = {
    'mechanism': str,
    'noise_multiplier': float,
    'sampling_probability': float,
    'count': int,
    'sensitivity': float,
    'declared?': bool,
}


def paths(text: str) -> list[Path]:
    """Return the paths in a list that is separated by commas."""
    return [files.path(part.strip()) for part in text.split(',') if part.strip()]


def releases(text: str, *, is_private: bool) -> tuple[Releases, ...]:
    """Read the releases that `config.dp.already_spent` names.

    A ledger names what one run released; a work directory and a statement also what was spent before it. If
    that is named as well, it counts twice: too much, never too little.

    Args:
        text: the setting.
        is_private: whether a run from a seed is refused: what it spent has no bound.

    Raises:
        ValueError, FileNotFoundError: a file is not there, names nothing or cannot be read; or two ledgers
            belong to the same run.
    """
    ledgers, found = [], []
    for path in paths(text):
        named = WorkDir.to_read(path).ledger if path.is_dir() else path
        if not named.is_file():
            raise FileNotFoundError(
                f'config.dp.already_spent names {named}, which is no file; allowed are {_ALLOWED}'
            )
        plan = WorkDir(path).plan
        if path.is_dir() and plan.is_file():
            before = files.read_json(plan, 'Restore the file', {'spent_before?': [ROW]})
            found += from_rows(before.get('spent_before', []))
        if named.suffix == '.jsonl':
            ledgers.append(Ledger(named, read_only=True))
            of_file = ledgers[-1].entries
            is_seeded = any(keys.is_seeded(entry.randomness) for entry in of_file)
        else:
            of_file, is_seeded = _of_statement(named)
            found += of_file
        if not of_file:
            raise ValueError(f'config.dp.already_spent names {named}, which holds no release; leave it out')
        if is_seeded and is_private:
            raise ValueError(
                f'config.dp.already_spent names {named}, of a run whose keys come from a seed. Such a run is '
                'not private: no ε covers what it released'
            )
    return (*budget.group(budget.together(ledgers)), *found)


def _of_statement(path: Path) -> tuple[list[Releases], bool]:
    """Read what a privacy statement covers, and whether its keys came from a seed."""
    form = {'mechanisms': [ROW], 'spent_before?': [ROW], 'private': bool}
    statement = files.read_json(path, f'config.dp.already_spent names it; allowed are {_ALLOWED}', form)
    try:
        covered = [*statement.get('spent_before', []), *statement['mechanisms']]
        return from_rows(covered), not statement['private']
    except ValueError as error:
        raise ValueError(
            f'config.dp.already_spent names {path}, which is no privacy statement ({error}); allowed are '
            f'{_ALLOWED}'
        ) from error


def rows(releases_before: tuple[Releases, ...]) -> list[dict[str, Any]]:
    """Write releases in JSON's types."""
    return [
        {
            'mechanism': part.mechanism.name,
            'noise_multiplier': part.mechanism.noise_multiplier,
            'sampling_probability': part.mechanism.sampling_probability,
            'count': part.count,
            'sensitivity': part.mechanism.sensitivity,
            'unit': part.mechanism.unit,
            'declared': part.declared,
        }
        for part in releases_before
    ]


def from_rows(written: list[dict[str, Any]]) -> list[Releases]:
    """Read what `rows` wrote, each of the form `ROW`; other fields are left out.

    Raises:
        ValueError: a field is out of range.
    """
    return [
        Releases(
            mechanism=GaussianMechanism(
                name=row['mechanism'],
                noise_multiplier=row['noise_multiplier'],
                sampling_probability=row['sampling_probability'],
                sensitivity=row['sensitivity'],
                unit=row.get('unit', groups.IMAGE),
            ),
            count=row['count'],
            declared=row.get('declared', False),
        )
        for row in written
    ]
