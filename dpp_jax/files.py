"""Whole files or none: the only place of fsync, rename and lock.

A file appears under its name when it is complete and on the disk, so that a crash or a power failure
leaves the old file or none. The same holds in object stores, which have none of the three
(`object_store`). In a folder that may be published it also tells no time (`timeless`), and that of
a run from a seed says that it is not private (`noted`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import functools
import hashlib
import io
import json
import math
import os
from pathlib import Path
import re
import shutil
import stat
import struct
import tempfile
import time
from typing import Any, BinaryIO
import zipfile
import zlib

import filelock
import numpy as np

from dpp_jax import lease, object_store

InUse, Lost = lease.InUse, lease.Lost
path = object_store.path
is_in_store = object_store.has
fetch_folder = object_store.get_folder
# What NumPy and zipfile raise for files that lost their end, or have zeros where data was.
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_UNFINISHED = object_store.UNFINISHED
_LOCAL, _LOCAL_LOCK = 'dpp_jax_copy_', 'lock'  # how names of local copies begin, and what each is held by
NOT_PRIVATE = 'NOT PRIVATE'  # how notes begin
_notes: dict[Path, str] = {}  # folder → note that all files in it carry
_timeless: dict[Path, Path] = {}  # folder → file whose time all in it has


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a binary file that appears under its name when it is complete, or not at all.

    This and all that writes or removes folders raises `Lost` if another process took the work directory over.
    """
    lease.check()
    if object_store.has(path):
        kept = io.BytesIO()
        yield kept
        object_store.write(path, kept.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_UNFINISHED, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            _set_time(Path(file.name))
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)  # the new name, too, survives a power failure
    _set_times_above(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty local folder that takes the place of `path` when it is complete, or not at all."""
    lease.check()
    if object_store.has(path):
        with local_folder() as unfinished, _with_note_of(path, unfinished):
            yield unfinished
            lease.check()  # again: to fill it may have taken long
            object_store.put_folder(unfinished, path)
        return
    unfinished = path.with_name(_UNFINISHED + path.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished  # after an error the remains are removed by the next run
    for each in (*unfinished.rglob('*'), unfinished):
        _set_time(each)
    lease.check()
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    _set_times_above(path)


def move_folder(source: Path, path: Path) -> None:
    """Let the folder `source` take the place of `path`, whole or not at all, on any file system."""
    lease.check()
    if object_store.has(source) or object_store.has(path):
        with local_copy(source) as local:
            put_folder(local, path)
        remove_folder(source)
        return
    with whole_folder(path) as unfinished:
        unfinished.rmdir()
        shutil.move(source, unfinished)


def absolute(path: Path) -> Path:
    """Return the whole path, without '..'; what has a scheme is one."""
    return path if '://' in str(path) else Path(os.path.abspath(path))


def make_folder(path: Path, mode: int | None = None) -> bool:
    """Make a folder, with all above it; return whether it has the mode. An object store knows neither.

    Some mounts ignore a mode, or refuse it.
    """
    if object_store.has(path):
        return mode is None
    path.mkdir(mode=0o777 if mode is None else mode, parents=True, exist_ok=True)
    if mode is None:
        return True
    with contextlib.suppress(PermissionError):
        os.chmod(path, mode)
    return stat.S_IMODE(path.stat().st_mode) == mode


def check_writable(folder: Path) -> None:
    """Raise an OSError unless files can be made in a folder."""
    if object_store.has(folder):
        object_store.check_writable(folder)
    else:
        with tempfile.TemporaryFile(dir=folder):
            pass


def store_advice(release: Path, private: Path, is_closed: bool) -> list[str]:
    """Say what a user must see to where an object store cannot: who reads private/, and times in release/."""
    found = []
    if not is_closed:
        found.append(
            f'WARNING: {private} cannot be closed to others from here (mode 0700), and who reads it has the '
            'keys. Give it a place of its own that only you and this machine may read. ' + _advice(private)
        )
    if object_store.has(release):
        found.append(
            f'NOTE: a store shows when each object in {release} was written, and so how long computations on '
            'private images took. Publish a copy, not the folder itself.'
        )
    return found


def _advice(private: Path) -> str:
    if not object_store.has(private):
        return 'Set on its disk or mount: no access for others. Or keep it elsewhere: --private=<folder>.'
    scheme, _, rest = str(private).partition('://')
    bucket = rest.partition('/')[0]
    if scheme == 'gs':
        return (
            f'Set: gcloud storage buckets update gs://{bucket} --uniform-bucket-level-access '
            '--public-access-prevention --clear-soft-delete; then remove other members from its policy: '
            f'gcloud storage buckets get-iam-policy gs://{bucket}. Or keep it on a disk: --private=<folder>.'
        )
    return (
        'Set: no public access, permissions by the bucket alone (no lists for single objects), no versions '
        'and no copies of deleted objects. Or keep it on a disk: --private=<folder>.'
    )


def put_folder(source: Path, path: Path) -> None:
    """Let a copy of the folder `source` of this machine take the place of `path`, whole or not at all."""
    with whole_folder(path) as unfinished:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it is there."""
    lease.check()
    if object_store.has(path):
        object_store.remove_folder(path)
    elif path.exists():
        shutil.rmtree(path)


def delete_private(path: Path) -> None:
    """Delete the folder `path`, keys and all, beside which nothing is ours."""
    lease.check()
    object_store.delete(path) if object_store.has(path) else shutil.rmtree(path)


def is_whole(folder: Path) -> bool:
    """Whether a folder is there and complete: what `whole_folder` or `move_folder` made, or a copy of it."""
    return object_store.is_whole(folder) if object_store.has(folder) else folder.exists()


def names(folder: Path) -> list[str]:
    """Return the names of what is whole in a folder, sorted; none if it is not there."""
    found = object_store.names(folder)
    return [name for name in found if not name.startswith(_UNFINISHED) and _UNFINISHED + name not in found]


@contextlib.contextmanager
def local_folder() -> Iterator[Path]:
    """Yield an empty folder of this machine, closed to others, that is deleted at the end.

    What goes there may be private, so that of a killed process is deleted by the next one of this machine.
    """
    _remove_local_folders_of_killed()
    with (
        tempfile.TemporaryDirectory(prefix=_LOCAL, ignore_cleanup_errors=True) as folder,
        locked(Path(folder) / _LOCAL_LOCK),
    ):
        inner = Path(folder) / 'files'
        inner.mkdir()
        yield inner


@functools.cache  # once
def _remove_local_folders_of_killed() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f'{_LOCAL}*'):
        lock = folder / _LOCAL_LOCK
        # Other users' folders raise an error of permission; that of a living process is locked.
        with contextlib.suppress(OSError, filelock.Timeout):
            if lock.exists():
                with locked(lock):
                    shutil.rmtree(folder)


@contextlib.contextmanager
def local_copy(folder: Path) -> Iterator[Path]:
    """Yield a folder of this machine with the content of `folder`: itself, where it is one."""
    if not object_store.has(folder):
        yield folder
        return
    with local_folder() as local:
        object_store.get_folder(folder, local)
        yield local


@contextlib.contextmanager
def following(folder: Path, every: float) -> Iterator[tuple[Path, Callable[[Callable[[], Any]], None]]]:
    """Yield a folder of this machine whose files appear in `folder` too, and a function that lets them.

    It is `folder` itself, where that is one. Otherwise the function copies what is there, if the last time
    was `every` seconds ago; before it does, it calls its argument. All is copied at the end.
    """
    if not object_store.has(folder):
        yield folder, lambda prepare: None
        return
    last = time.monotonic()

    def follow(prepare: Callable[[], Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            prepare()
            copy()
            last = time.monotonic()

    def copy() -> None:
        for path in sorted(local.rglob('*')):
            if path.is_file():
                object_store.write(folder / path.relative_to(local).as_posix(), path.read_bytes())

    with local_folder() as local:
        try:
            yield local, follow
        finally:
            copy()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to read from, at any place in it."""
    if object_store.has(path):
        yield io.BytesIO(path.read_bytes())
        return
    with open(path, 'rb') as file:
        yield file


@contextlib.contextmanager
def timeless(folder: Path, like: Path) -> Iterator[None]:
    """Let all that appears in `folder` have the modification time of the file `like`, once that is there.

    At the end everything in the folder gets it: times would tell how long a computation on private images
    took. An object store has its own times: there, copies tell nothing (`store_advice`).
    """
    if object_store.has(folder):
        yield
        return
    _timeless[folder] = like
    try:
        yield
    finally:
        for path in (*folder.rglob('*'), folder):
            _set_time(path)
        del _timeless[folder]


@contextlib.contextmanager
def noted(folder: Path, reason: str | None) -> Iterator[str | None]:
    """Let every file that is written in `folder` say that it is not private, with the reason; None: not.

    JSON and npz files have it as `_note`, texts above all else, PNG files as a comment.

    Yields:
        the note.
    """
    note = reason and f'{NOT_PRIVATE}: {reason}'
    if note:
        _notes[folder] = note
    try:
        yield note
    finally:
        _notes.pop(folder, None)


def note_of(path: Path) -> str | None:
    """Return the note that a file carries there."""
    return next((note for folder, note in _notes.items() if folder in path.parents), None)


@contextlib.contextmanager
def _with_note_of(path: Path, folder: Path) -> Iterator[None]:
    """Let files in `folder` carry the note of `path`, where they go."""
    note = note_of(path)
    _notes.update({folder: note} if note else {})
    try:
        yield
    finally:
        _notes.pop(folder, None)


def png_with_note(path: Path, content: bytes) -> bytes:
    """Return the content of a PNG file with the note that it carries at `path`, as a comment."""
    note = note_of(path)
    if note is None:
        return content
    chunk = b'tEXtComment\0' + note.encode('latin-1')
    first = len(b'\x89PNG\r\n\x1a\n') + 4 + len(b'IHDR') + 13 + 4  # signature and header come first
    packed = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
    return content[:first] + packed + content[first:]


def _set_time(path: Path) -> None:
    """Give a file or a folder the time of the timeless folder that it lies in, if it does."""
    for folder, like in _timeless.items():
        if folder in (path, *path.parents):
            # What is not there has no time, and other people's files keep theirs.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                time = like.stat().st_mtime_ns
                if path.lstat().st_mtime_ns != time:
                    os.utime(path, ns=(time, time), follow_symlinks=False)


def _set_times_above(path: Path) -> None:
    """Give the folders of a new name their time: a name changes it."""
    for parent in path.parents:
        _set_time(parent)


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that the file is there whole or not at all; a PNG file with the folder's note."""
    with whole_file(path, mode) as file:
        file.write(png_with_note(path, data) if path.suffix == '.png' else data)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write text in UTF-8, whole or not at all; notes and tables with the folder's note above them."""
    note = note_of(path)
    if note and path.suffix in ('.txt', '.md'):
        text = f'{note}\n\n{text}'
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write readable JSON, whole or not at all; an object with the folder's note in `_note`."""
    note = note_of(path)
    if note:
        own = value.get('_note')
        value = {'_note': None, **value} | {'_note': f'{note}\n{own}' if own else note}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n', mode)


def write_npz(path: Path, mode: int = 0o644, **arrays: np.ndarray) -> None:
    """Write a compressed .npz file, whole or not at all; with the folder's note in `_note`."""
    note = note_of(path)
    if note:
        arrays['_note'] = np.array(note)
    with whole_file(path, mode) as file:
        np.savez_compressed(file, **arrays)


def read_json(path: Path, advice: str, form: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the JSON object in `path`, which must be there; without the note of its folder.

    Args:
        path: of the file.
        advice: what to do with a damaged file.
        form: the fields that the object must have, see `fault`; None: any.

    Raises:
        ValueError: the file holds something else, as a power failure or an editor may leave it. The
            message names the file, the field and what was expected, and ends with `advice`.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError('it holds no JSON object')
        found = fault(value, form or {})
        if found:
            raise ValueError(found)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of UTF-8 and of JSON alike
        raise ValueError(f'{path} cannot be read ({error}). {advice}') from error
    note = value.get('_note')
    if isinstance(note, str) and note.startswith(NOT_PRIVATE):
        del value['_note']
        own = note.partition('\n')[2]
        value |= {'_note': own} if own else {}
    return value


_KINDS = {
    str: 'a text',
    bool: 'true or false',
    int: 'a whole number',
    float: 'a finite number',
    dict: 'an object',
    list: 'a list',
}


def fault(value: Any, form: Any, field: str = '') -> str | None:
    """Say, in a line, what of a value of JSON is not as it must be; None if all is.

    Args:
        value: to look at.
        form: a type; a pattern: a text that it matches; [form]: a list of such values; {field: form}: an
            object with these fields, of which those with '?' at the end of their name may be missing, and
            in which '*' stands for all other fields whose name does not begin with '_'.
        field: what the message calls the value.
    """
    name = f'field {field}' if field else 'it'
    if isinstance(form, re.Pattern):
        is_good, words = isinstance(value, str) and form.fullmatch(value), f'a text like {form.pattern}'
    elif form in (int, float):
        is_number = isinstance(value, int | form) and not isinstance(value, bool)
        is_good, words = is_number and math.isfinite(value), _KINDS[form]
    else:
        kind = form if isinstance(form, type) else type(form)
        is_good, words = isinstance(value, kind), _KINDS[kind]
    if not is_good:
        return f'{name} is {json.dumps(value, ensure_ascii=False)[:60]}; it must be {words}'
    parts: Iterable[tuple[str, Any, Any]] = ()  # (field, value, form)
    if isinstance(form, list):
        parts = ((f'{field}[{number}]', inner, form[0]) for number, inner in enumerate(value))
    elif isinstance(form, dict):
        forms = {key.removesuffix('?'): inner for key, inner in form.items() if key != '*'}
        for key in form:
            if key != '*' and not key.endswith('?') and key not in value:
                return f'{name} has no {key}' if field else f'it has no field {key}'
        for key in value.keys() - forms.keys():
            if '*' in form and not key.startswith('_'):
                forms[key] = form['*']
        parts = (
            (f'{field}.{key}' if field else key, value[key], inner)
            for key, inner in forms.items()
            if key in value
        )
    return next(filter(None, (fault(inner, its, where) for where, inner, its in parts)), None)


def read_npz(path: Path, advice: str) -> dict[str, np.ndarray]:
    """Read all arrays in `path`, without the note of its folder.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, see `read_json`.
    """
    try:
        with reading(path) as content, np.load(content) as file:
            return {name: file[name] for name in file.files if name != '_note'}
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ValueError(f'{path} cannot be read ({error}). {advice}') from error


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Return the SHA-256 of types, shapes and bytes, in hexadecimal."""
    result = hashlib.sha256()
    for array in map(np.asarray, arrays):
        result.update(f'{array.dtype} {array.shape} '.encode())
        result.update(np.ascontiguousarray(array))
    return result.hexdigest()


class Log:
    """A file that only grows, by whole pieces, each on the disk when `append` returns.

    Attributes:
        content: bytes that were there when it was opened.
        size: bytes that it has now, as this process knows.
    """

    def __init__(self, path: Path):
        """Read the file, if it is there."""
        self._path = path
        self._is_object = object_store.has(path)
        self.content = path.read_bytes() if path.exists() else b''
        self.size = len(self.content)
        # An object is written whole, each time: nothing can be added to one.
        self._known = bytearray(self.content if self._is_object else b'')

    def append(self, data: bytes) -> None:
        """Add `data` and wait for the disk; all of it or nothing.

        Raises:
            OSError: the disk took only a part; or another process changed the file, or took the folder over.
        """
        lease.check()
        if self._is_object:
            found = object_store.size(self._path)
            if found != self.size and not self._is_put_back():
                raise OSError(_changed(self._path, found, self.size))
            object_store.write(self._path, bytes(self._known + data))
            self._known += data
        else:
            if not self.size and not self._path.exists():
                create(self._path)
            append(self._path, data, self.size)
        self.size += len(data)

    def _is_put_back(self) -> bool:
        """Whether the object is an older state of this log, and this process alone may write.

        That is what a write of an earlier owner of the lease leaves, if it was on its way all the time.
        """
        return lease.is_held() and self._path.exists() and self._known.startswith(self._path.read_bytes())

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes and wait for the disk."""
        if self._is_object:
            lease.check()
            del self._known[size:]
            object_store.write(self._path, bytes(self._known))
        else:
            truncate(self._path, size)
        self.size = size


def create(path: Path) -> None:
    """Make an empty file, with its folder, whose name survives a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    sync_folder(path.parent)


def append(path: Path, data: bytes, known_size: int) -> None:
    """Append `data` and wait for the disk; all of it or nothing.

    Args:
        path: of the file.
        data: to append.
        known_size: bytes that the file must have now.

    Raises:
        OSError: the disk took only a part, or the file has another size: another process changed it.
    """
    with open(path, 'r+b', buffering=0) as file:
        if file.seek(0, os.SEEK_END) != known_size:
            raise OSError(_changed(path, file.tell(), known_size))
        try:
            if file.write(data) != len(data):
                raise OSError(f'{path}: the disk took only a part of an entry')
            os.fsync(file.fileno())
        except OSError:
            file.truncate(known_size)
            raise


def _changed(path: Path, found: int, known: int) -> str:
    return (
        f'{path} has {found} bytes; this process knows {known}: another process changed it. Only one process '
        'may run in a work directory'
    )


def truncate(path: Path, size: int) -> None:
    """Cut the file to `size` bytes and wait for the disk."""
    with open(path, 'r+b') as file:
        file.truncate(size)
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of new files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: Path) -> contextlib.AbstractContextManager:
    """Return a context that holds an exclusive lock on `path`, for this process alone.

    The system releases the lock however the process ends. Entering the context raises
    `filelock.Timeout` if another process holds it. In an object store it is a lease, and `InUse` is raised.
    """
    if object_store.has(path):
        return lease.held(path)
    # A marker file, which filelock may fall back to, would outlive a killed process, or be taken by another.
    return filelock.FileLock(path, timeout=0, fallback_to_soft=False)


def is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the lock of `locked`; None: not known. It takes no lock itself.

    Linux tells who holds what; a lock that was tried out would be in the way of a process that starts.
    """
    if object_store.has(path) or not Path('/proc/locks').exists():
        return None
    if not path.exists():
        return False
    found = path.stat()
    wanted = f'{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}'
    lines = Path('/proc/locks').read_text(encoding='utf-8').splitlines()
    return any(wanted in line.split() for line in lines)


def remove_unfinished(root: Path, folders: Iterable[Path]) -> None:
    """Remove what a killed process left unfinished in `folders`, and files directly in `root`."""
    folders = list(folders)
    object_store.remove_unfinished(folder for folder in folders if object_store.has(folder))
    if object_store.has(root):
        for name in object_store.names(root):
            if name.startswith(_UNFINISHED) and not (root / name).is_dir():
                (root / name).unlink(missing_ok=True)
        root = None
    found = [path for path in root.glob(f'{_UNFINISHED}*') if not path.is_dir()] if root else []
    for folder in (folder for folder in folders if not object_store.has(folder)):
        for name in (f'{_UNFINISHED}*', '*.orbax-checkpoint-tmp*'):
            found += folder.rglob(name)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
