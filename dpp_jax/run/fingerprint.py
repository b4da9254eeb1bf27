"""Whether the private images are those with which a work directory was begun.

Half a run on one set and half on another would not be the mechanism that was accounted for. Every row has a
digest of its number, label, group and pixels; their sum modulo 2^256 is that of the set. So each process
adds up its own rows, and the sum does not depend on how many processes there are. It finds mistakes; it does
not stop somebody who may write in private/.

How it goes, at every start that needs private images:
  1. If images stay in files, and names, sizes and times of all files (their stamps) are those of the last
     check: done.
  2. Each process reads its rows and adds up their digests; the shares' sums are added.
  3. The first process compares the sum with private/data.json, or writes it there.
"""

from collections.abc import Callable, Iterator
import hashlib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.data.stored import StoredImages
from dpp_jax.run.keys import NOTE
from dpp_jax.training import progress

T = TypeVar('T')
# What private/data.json holds. Earlier versions wrote the digest of all arrays, `sha256`, and no `row_sum`.
FORM = {'*': {'count': int, 'sha256?': str, 'row_sum?': str, 'stamps?': [str]}}
_BYTES = 2**21  # of the images that are looked at together
_UNCHANGED, _ROWS, _ARRAYS = 'unchanged', 'rows', 'arrays'  # what is to be compared


def row_digest_sum(
    images: np.ndarray | StoredImages, labels: np.ndarray, groups: np.ndarray | None, numbers: np.ndarray
) -> int:
    """Add up the digests of rows, modulo 2^256; of a set's shares, in any order, the sum is that of the set.

    Args:
        images: (n, H, W, C).
        labels: integers (n,).
        groups: integers (n,), or None.
        numbers: of these rows in the whole split, integers (n,).
    """
    kind = f'{images.dtype} {images.shape[1:]} {"no " if groups is None else ""}groups '
    start = hashlib.sha256(kind.encode())
    facts = [numbers, labels] + ([] if groups is None else [groups])
    total, first = 0, 0
    for block in _blocks(images):
        own = [fact[first : first + len(block)].astype('<i8') for fact in facts]
        heads = np.stack(own, axis=1).view(np.uint8)
        rows = np.concatenate([heads, block.reshape(len(block), -1).view(np.uint8)], axis=1)
        for row in rows:
            digest = start.copy()
            digest.update(row)
            total += int.from_bytes(digest.digest())
        first += len(block)
    return total % 2**256


def check(
    path: Path,
    name: str,
    images: Images,
    gather: Callable[[str], list[str]] = lambda text: [text],
    at_first: Callable[[Callable[[], T]], T] = lambda function: function(),
) -> None:
    """Check that `name` ('train') names the images with which it was first seen in this folder.

    All processes call it, each with its share of the same split.

    Args:
        path: of private/data.json; only the first process touches it.
        name: of the split.
        images: of this process.
        gather: text of this process → those of all, in their order, at each of them; 64 characters at most.
        at_first: runs a function at the first process alone, and gives its result (a text) to all, or lets
            its error end all.

    Raises:
        ValueError: they are other images; or an earlier version began the folder, and several processes
            cannot compare its digest.
    """
    stamps = gather(images.stamp or '')
    todo = at_first(lambda: _to_compare(path, name, stamps))
    if todo == _UNCHANGED:
        return
    arrays = _digest(images) if todo == _ARRAYS else None
    own = row_digest_sum(images.images, images.labels, images.own_groups, images.kept.numbers())
    total = sum(int(share, 16) for share in gather(f'{own:064x}')) % 2**256
    found: dict[str, Any] = {'count': images.total, 'row_sum': f'{total:064x}'}
    if all(stamps):
        found['stamps'] = stamps
    at_first(lambda: _compare(path, name, found, arrays))


def _to_compare(path: Path, name: str, stamps: list[str]) -> str:
    """Say what must be compared with what is known of these images."""
    known = _read(path).get(name, {})
    if known and 'row_sum' not in known:
        if len(stamps) > 1:
            raise ValueError(
                f'{path} was written by an earlier version. {len(stamps)} processes cannot compute its '
                'fingerprint, as each has a share of the private images. Run one stage with one process '
                '(--distributed=none): it adds a fingerprint that they can'
            )
        return _ARRAYS
    return _UNCHANGED if all(stamps) and known.get('stamps') == stamps else _ROWS


def _compare(path: Path, name: str, found: dict[str, Any], arrays: str | None) -> str:
    """Compare a fingerprint with the one that is known, or make it known."""
    record = _read(path)
    known = record.get(name, {})
    if known and arrays:
        is_same = known.get('sha256') == arrays
    else:
        is_same = not known or known['row_sum'] == found['row_sum']
    if not is_same:
        raise ValueError(
            f'config.data.source has other images ({found["count"]}) than those that this work directory '
            f'was made with ({known["count"]}): their fingerprint differs from {path}. Restore the images, '
            'or use another --workdir'
        )
    now = {**known, **found}
    if now != known:
        files.write_json(path, {**record, name: now}, mode=0o600)
    return ''


def are_different(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two entries of `FORM` are certainly of different images."""
    return any(
        first[kind] != second[kind] for kind in ('row_sum', 'sha256') if kind in first and kind in second
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {'_note': NOTE}
    return files.read_json(
        path,
        'Restore the file. Or delete it if the private images did not change: it is written again',
        FORM,
    )


def _digest(images: Images) -> str:
    """Return the fingerprint of earlier versions, `files.digest` of all arrays, a block at a time."""
    result = hashlib.sha256(f'{images.images.dtype} {images.images.shape} '.encode())
    for block in _blocks(images.images):
        result.update(np.ascontiguousarray(block))
    for array in [images.labels] if images.groups is None else [images.labels, images.groups]:
        result.update(f'{array.dtype} {array.shape} '.encode())
        result.update(np.ascontiguousarray(array))
    return result.hexdigest()


def _blocks(images: np.ndarray | StoredImages) -> Iterator[np.ndarray]:
    """Yield images, some at once; with a progress bar where they are read from files."""
    at_once = max(1, _BYTES * len(images) // max(1, images.nbytes))
    starts = range(0, len(images), at_once)
    if not isinstance(images, StoredImages):
        yield from (images[start : start + at_once] for start in starts)
        return
    with progress.bar(len(images), 'fingerprint', 'image', compiles=False, meets=False) as bar:
        for start in starts:
            block = images[start : start + at_once]
            yield block
            bar.update(len(block))
