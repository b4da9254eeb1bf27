"""A private/ that lies elsewhere (--private): both folders know each other.

With another private/ a run would draw new keys, and spend its budget a second time. So the work directory
remembers, outside of release/, where its private/ is; and both hold the same random name, by which a folder
that was moved, or belongs to another run, is known.
"""

from pathlib import Path
import secrets
from typing import Any

from dpp_jax import files

_PLACE, _NAME = 'private.json', 'run.json'  # in the work directory, and in private/
# What shows that a run began to use a private/.
_BEGUN = ('keys.json', 'ledger.jsonl', 'config_of_keys.json')
_LOST = 'If it is lost for good, delete {}: what is released can still be used, and nothing more be spent'


def place(root: Path) -> dict[str, Any] | None:
    """Return what a work directory remembers: the `path` of its private/ and their `run`; None: it is in it.

    Raises:
        ValueError: the file is damaged.
    """
    marker = root / _PLACE
    if not marker.exists():
        return None
    return files.read_json(marker, 'Restore the file', {'path': str, 'run': str})


def of(root: Path) -> Path:
    """Return the private/ of a run that is only read.

    Raises:
        FileNotFoundError: it is elsewhere, and not there.
        ValueError: a file is damaged.
    """
    known = place(root)
    if known is None:
        return root / 'private'
    private = files.path(known['path'])
    if _name(private) != known['run']:
        raise FileNotFoundError(
            f'private/ of {root} is at {private}, which is not there, or of another run. Its ledger may have '
            'more lines than the published one. Call from where it can be read. '
            + _LOST.format(root / _PLACE)
        )
    return private


def check(root: Path, private: Path) -> None:
    """Check that `private` is what this run has used so far, if it has begun.

    Raises:
        ValueError: it is not; or it cannot be one.
    """
    inside, known = root / 'private', place(root)
    if private == inside:
        if known:
            raise ValueError(
                f'--private is missing: private/ of --workdir={root} is elsewhere. Add '
                f'--private={known["path"]}. Without it this run would draw new keys, and spend its budget a '
                'second time. ' + _LOST.format(root / _PLACE)
            )
        return
    absolute = files.absolute(private)
    if files.absolute(root) in (absolute, *absolute.parents) or absolute in files.absolute(root).parents:
        raise ValueError(f'--private is {private}; it must lie outside of --workdir={root}')
    if known:
        if _name(private) != known['run']:
            raise ValueError(
                f'--private is {private}, which is not that of --workdir={root}: that one was last at '
                f'{known["path"]}. Give its path, or restore it: with another one this run would draw new '
                'keys, and spend its budget a second time. ' + _LOST.format(root / _PLACE)
            )
        return
    if _has_begun(inside):
        raise ValueError(
            f'--private is {private}, but this run began with {inside}. Leave --private out: with another '
            'folder it would draw new keys, and spend its budget a second time'
        )
    if _has_begun(private):
        raise ValueError(
            f'--private is {private}, which belongs to another run: its keys may serve one run only. Name an '
            f'empty folder. Or, if it is that of --workdir={root}, move it back to {inside} and leave '
            '--private out'
        )
    found = [name for name in files.names(private) if name != _NAME]
    if found:  # it would be closed to others, and deleted whole when the run is cleaned
        raise ValueError(
            f'--private is {private}, which holds {found[0]}. Name an empty folder: all in it will belong to '
            'this run, and --stage=clean deletes it'
        )


def bind(root: Path, private: Path) -> None:
    """Let both folders know each other, before the first key is made. After `check`."""
    if private == root / 'private':
        return
    known = place(root)
    text = str(files.absolute(private))
    if known is None or known['path'] != text:
        # Never the name that is there: that of another work directory, killed here, would join the two.
        run = known['run'] if known else secrets.token_hex(8)
        files.write_json(private / _NAME, {'run': run}, mode=0o600)
        note = 'Where private/ of this run is. Do not delete: without it the run would begin with new keys.'
        files.write_json(root / _PLACE, {'_note': note, 'path': text, 'run': run}, mode=0o600)


def forget(root: Path) -> None:
    """Remove what says where private/ is, after that was deleted."""
    (root / _PLACE).unlink(missing_ok=True)


def _has_begun(private: Path) -> bool:
    return any((private / name).exists() for name in _BEGUN)


def _name(private: Path) -> str | None:
    path = private / _NAME
    return files.read_json(path, 'Restore the file', {'run': str})['run'] if path.exists() else None
