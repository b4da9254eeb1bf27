"""SHA-256 of what a run released, in release/digests.json: compared before anything uses it.

Whoever gets only release/ can check it, too. What mechanisms released is also noted beside their keys.
"""

from collections.abc import Collection, Iterable
import re
from typing import Any

import numpy as np

from dpp_jax import files
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, SELECTION
from dpp_jax.run import statement
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys

# Name in release/ → the mechanism that made it. Pre-training sees no private image.
_MECHANISMS = {
    'central_images.npz': CENTRAL_QUERY,
    'moments.npz': MOMENTS,
    'frequency.npz': FREQUENCY,
    'generator.npz': None,
    'model/pretrain': None,
    'model/finetune': DP_SGD,
    'selection.json': SELECTION,
}
_STAGES = {
    'central_images.npz': 'central',
    'moments.npz': 'central',
    'frequency.npz': 'central',
    'generator.npz': 'pretrain',
    'model/pretrain': 'pretrain',
    'model/finetune': 'finetune',
    'selection.json': 'evaluate',
}


def note(workdir: WorkDir, name: str, arrays: Iterable[np.ndarray]) -> None:
    """Note the digest of what is about to appear in release/ as `name`."""
    known = _read(workdir) or {}
    files.write_json(workdir.digests, known | {name: files.digest(arrays)})


def noted(workdir: WorkDir, name: str) -> str | None:
    """Return the digest that `name` in release/ must have, if one is noted."""
    return (_read(workdir) or {}).get(name)


def check(workdir: WorkDir, name: str, arrays: Iterable[np.ndarray]) -> None:
    """Check that these arrays, read from `name` in release/, are those that this run released.

    A folder without digests.json, as earlier versions left it, is checked by the keys' file alone.

    Raises:
        ValueError: they are others, or nobody noted what they must be.
    """
    path, found, known = workdir.release / name, files.digest(arrays), _read(workdir)
    if known is not None and name not in known:
        raise ValueError(
            f'{path} was not made by this run: {workdir.digests} has no SHA-256 of it. Move it away. Or, if '
            f'it was made without the private images, add this line to that file: "{name}": "{found}"'
        )
    places = {workdir.digests: (known or {}).get(name)}
    if _MECHANISMS[name]:
        places[workdir.keys] = Keys(workdir.keys, None).released(_MECHANISMS[name])
    for place, expected in places.items():
        if expected not in (None, found):
            raise ValueError(
                f'{path} is not what this run released: its SHA-256 is {found[:12]}…; {place} has '
                f'{expected[:12]}…. Restore it. Or move it away, if private/ is whole, and run '
                f'--stage={_maker(name, statement.codes(workdir))}: it makes the same again'
            )


def begin(workdir: WorkDir, released: dict[str, Iterable[np.ndarray]]) -> None:
    """Begin digests.json in a folder that has none.

    What an earlier version released is taken as it is, if release/code.json says that the stage ran here.

    Args:
        workdir: of the run.
        released: name → arrays of what is there.
    """
    if not workdir.digests.exists():
        ran, keys = statement.codes(workdir), Keys(workdir.keys, None)
        known = {}
        for name, arrays in released.items():
            beside_keys = _MECHANISMS[name] and keys.released(_MECHANISMS[name])
            if beside_keys or _maker(name, ran) in ran:
                known[name] = beside_keys or files.digest(arrays)
        files.write_json(workdir.digests, known)


def _maker(name: str, ran: Collection[str]) -> str:
    """Return the stage that makes `name`, by those that ran here: a model may be imported."""
    return 'import' if 'import' in ran and _STAGES[name] not in ran else _STAGES[name]


def _read(workdir: WorkDir) -> dict[str, Any] | None:
    """Return name → digest; None if nobody noted any."""
    if not workdir.digests.exists():
        return None
    advice = 'Restore the file. Or delete it: what is in release/ is then taken as it is'
    return files.read_json(workdir.digests, advice, {'*': re.compile('[0-9a-f]{64}')})
