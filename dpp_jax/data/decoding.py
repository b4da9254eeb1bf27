"""Many files to one array, in several processes, and kept in private/ for the next start."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
from pathlib import Path
import signal
import sys
import tempfile
import threading
import types
from typing import BinaryIO
import zlib

import numpy as np
import PIL

from dpp_jax import files
from dpp_jax.data import decode
from dpp_jax.data.listing import Listing
from dpp_jax.data.preparation import Preparation
from dpp_jax.data.rows import Rows
from dpp_jax.data.tree import Tree

Progress = Callable[[int, int], None]  # (files done, files in all) → nothing; it may raise to stop

_VERSION = 1  # of what is written: another one makes the cache worth nothing
_CHUNK = 64  # files that a process decodes at a time
_FEW = 200  # files that one process decodes before others would have started
_NAMED = 3  # files that a message names
# What an index holds.
_FORM = {'array': str, 'check': int, 'made_by': list, 'files': dict}


def images(
    listing: Listing,
    part: str,
    rows: Rows,
    preparation: Preparation,
    source: str,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return prepared images of one part, uint8 (n, side, side, channels).

    With a cache, all images of the part are decoded once and lie in a file that is mapped into memory; for
    a cache in an object store, in a file of this machine that nobody else sees and that ends with the
    process. Without a cache, or if it is empty and only some rows are asked for, they are decoded in memory.

    Args:
        listing: of the source.
        part: 'train' or 'test'.
        rows: of the part, which are returned.
        preparation: whose size and channels are set.
        source: name of the source, for messages.
        progress: is told how many files are decoded.

    Raises:
        ValueError: files cannot be used: all of both parts are named, with the reasons.
    """
    chosen = listing.rows(part)
    names = [listing.names[row] for row in chosen]
    is_whole = len(rows) == len(names)
    cache, is_in_store = preparation.cache, files.is_in_store(preparation.cache or Path())
    if cache is not None and not is_in_store:
        facts = _facts(listing, names, preparation)
        found = _cached(cache, part, facts, (len(names), *preparation.target()), source)
        if found is None and is_whole:
            found = _write(cache, part, facts, listing, names, preparation, source, progress)
        if found is not None:
            return found if is_whole else found[rows.numbers()]
    kept = names if is_whole else [names[row] for row in rows.numbers()]
    shape = (len(kept), *preparation.target())
    if cache is not None and is_in_store:
        with tempfile.TemporaryFile() as file:
            for block in _all_good(listing, kept, preparation, source, progress):
                file.write(block.data)
            file.flush()
            return np.memmap(file, np.uint8, 'r', shape=shape) if kept else np.empty(shape, np.uint8)
    array, start = np.empty(shape, np.uint8), 0
    for block in _all_good(listing, kept, preparation, source, progress):
        array[start : start + len(block)] = block
        start += len(block)
    return array


def _all_good(
    listing: Listing,
    names: Sequence[str],
    preparation: Preparation,
    source: str,
    progress: Progress | None,
) -> Iterator[np.ndarray]:
    """Yield the images of these files, block by block; if one cannot be used, a ValueError names all."""
    refused = list(listing.refused)
    for block, found in blocks(listing.tree, _own(listing, names), preparation, progress):
        refused += [(names[number], kind) for number, kind in found]
        if not refused:
            yield block
    if refused:
        seen = set(names)
        others = [name for name in listing.names if name not in seen]
        for _, found in blocks(listing.tree, _own(listing, others), preparation, progress):
            refused += [(others[number], kind) for number, kind in found]
        raise ValueError(decode.refusals(refused, len(listing.names) + len(listing.refused), source))


def _own(listing: Listing, names: Sequence[str]) -> list[str]:
    return [listing.files[name].own for name in names]


# ---- processes ----------------------------------------------------------------------------------


def blocks(
    tree: Tree, own: Sequence[str], preparation: Preparation, progress: Progress | None = None
) -> Iterator[tuple[np.ndarray, list[tuple[int, str]]]]:
    """Decode files, in their order.

    Args:
        tree: where they are.
        own: their paths, as of `File.own`.
        preparation: whose size and channels are set.
        progress: is told how many are done.

    Yields:
        images of some files, uint8 (n, side, side, channels); and (number of the file, reason) of those that
        cannot be used, whose images are zeros.
    """
    starts = range(0, len(own), _CHUNK)
    chunks = [(tree, own[start : start + _CHUNK], preparation) for start in starts]
    done = 0
    for start, (images, refused) in zip(starts, _results(chunks, len(own))):
        done += len(images)
        yield images, [(start + number, kind) for number, kind in refused]
        if progress is not None:
            progress(done, len(own))


def _results(chunks: list[tuple], count: int) -> Iterator[tuple[np.ndarray, list[tuple[int, str]]]]:
    """Yield the result of each chunk; in this process, where others are not worth it or do not start."""
    done, workers = 0, min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1, 32)
    if count > _FEW and workers > 1:
        with contextlib.suppress(BrokenProcessPool, OSError, ImportError):  # the rest is decoded here
            for result in _of_pool(chunks, workers):
                done += 1
                yield result
    for chunk in chunks[done:]:
        yield _decode_chunk(*chunk)


def _of_pool(chunks: list[tuple], workers: int) -> Iterator[tuple[np.ndarray, list[tuple[int, str]]]]:
    # Not forked: JAX has threads, whose locks a fork would copy.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context('spawn'), initializer=_start_worker
    )
    waiting: deque[concurrent.futures.Future] = deque()
    try:
        with _without_main():
            for chunk in chunks[: 2 * workers]:
                waiting.append(pool.submit(_decode_chunk, *chunk))
        for number in range(len(chunks)):
            result = waiting.popleft().result()
            if number + 2 * workers < len(chunks):
                waiting.append(pool.submit(_decode_chunk, *chunks[number + 2 * workers]))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let processes start without this program's main module.

    They need nothing of it. It imports JAX, and a user's script without a guard would run again.
    """
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
        yield
    finally:
        sys.modules['__main__'] = main


def _start_worker() -> None:
    """Leave Ctrl-C to the process that asked, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asking = multiprocessing.parent_process()

    def watch():
        multiprocessing.connection.wait([asking.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _decode_chunk(
    tree: Tree, own: Sequence[str], preparation: Preparation
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Decode some files: their images, zeros for those that are refused, and (number, reason) of these."""
    decoded, refused = np.zeros((len(own), *preparation.target()), np.uint8), []
    for number, path in enumerate(own):
        try:
            decoded[number] = decode.decode(tree.read(path), preparation)
        except decode.Refused as error:
            refused.append((number, error.kind))
        except OSError as error:  # with a number, it is the system's
            refused.append((number, decode.UNREADABLE if error.errno else decode.DAMAGED))
    return decoded, refused


# ---- the cache ----------------------------------------------------------------------------------


def _facts(listing: Listing, names: list[str], preparation: Preparation) -> dict:
    """Return what decides the pixels of decoded images: names, sizes and times of files, and what decodes."""
    return {
        'made_by': [_VERSION, PIL.__version__, *preparation.pixels],
        'files': {name: f'{listing.files[name].size} {listing.files[name].stamp}' for name in names},
    }


def _cached(cache: Path, part: str, facts: dict, shape: tuple[int, ...], source: str) -> np.ndarray | None:
    """Return decoded images of an earlier start; None: there are none, or files have changed since."""
    path = cache / f'{part}.json'
    if not path.exists():
        return None
    try:
        index = files.read_json(path, '', _FORM)
    except ValueError:  # it is made again
        return None
    if changes := _changes(index['files'], facts['files']):
        print(f'NOTE: files of {source} ({part}) changed since they were decoded: {changes}.', flush=True)
        return None
    if index['made_by'] != facts['made_by']:
        return None
    try:
        array = np.load(cache / index['array'], mmap_mode='r')
    except files.DAMAGE:
        return None
    is_good = array.shape == shape and array.dtype == np.uint8
    return array if is_good and zlib.crc32(array.data) == index['check'] else None


def _changes(old: dict, new: dict) -> str:
    """Say which files were added, removed or changed; '': none."""
    found = {
        'added': sorted(new.keys() - old.keys()),
        'removed': sorted(old.keys() - new.keys()),
        'changed': sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
    }
    return '; '.join(
        f'{len(names):,} {what} ({", ".join(names[:_NAMED])}{", …" if len(names) > _NAMED else ""})'
        for what, names in found.items()
        if names
    )


def _write(
    cache: Path,
    part: str,
    facts: dict,
    listing: Listing,
    names: list[str],
    preparation: Preparation,
    source: str,
    progress: Progress | None,
) -> np.ndarray:
    """Decode all images of a part into a file, and return it mapped into memory.

    The array comes first, then the index that names it: a killed process leaves none of them, or an array
    that no index names.
    """
    shape = (len(names), *preparation.target())
    digest = zlib.crc32(json.dumps(facts).encode())
    path, check = cache / f'{part}_{digest:08x}.npy', 0
    files.make_folder(cache, mode=0o700)
    with files.whole_file(path, mode=0o600) as file:
        _write_header(file, shape)
        for block in _all_good(listing, names, preparation, source, progress):
            file.write(block.data)
            check = zlib.crc32(block.data, check)
    files.write_json(cache / f'{part}.json', {**facts, 'array': path.name, 'check': check}, mode=0o600)
    for old in cache.glob(f'{part}_*.npy'):
        if old != path:
            old.unlink()
    return np.load(path, mmap_mode='r') if math.prod(shape) else np.empty(shape, np.uint8)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
