"""Object stores: gs://, s3://, az://, and buckets that are mounted as folders.

Nothing there is renamed, appended to, locked, or given a mode or a time. What holds instead:
  - An object appears whole when it is closed, and takes the place of an old one whole.
  - A folder is only the beginning of names. While one is written or deleted, an object `.new_<name>` beside
    it says that it is not whole.
`files` decides between these functions and those of POSIX. Paths with a scheme go through etils' epath.
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import os
from pathlib import Path
import secrets
from typing import Any

from etils import epath

MOUNTED = 'DPP_JAX_OBJECT_STORES'  # environment variable: mounted buckets, separated as in PATH
UNFINISHED = '.new_'  # how names of what is not complete begin
_SCHEMES = ('gs', 's3', 'az')
_LIBRARIES = ('tensorflow', 'gcsfs', 's3fs', 'adlfs', 'google', 'botocore', 'aiobotocore', 'azure', 'aiohttp')
_AT_ONCE = 16  # requests: each takes tens of milliseconds, most of it waiting


def path(text: str | os.PathLike) -> Path:
    """Return the path that a text means: of epath where it has a scheme, of pathlib otherwise.

    Raises:
        ValueError: the scheme is not known.
    """
    text = os.fspath(text)
    scheme, colon, _ = text.partition('://')
    if not colon:
        return Path(text).expanduser()
    if scheme not in _SCHEMES:
        allowed = ', '.join(f'{name}://' for name in _SCHEMES)
        raise ValueError(f'{text}; it must be a folder of this machine, or begin with one of {allowed}')
    os.environ.setdefault(
        'TF_CPP_MIN_LOG_LEVEL', '3'
    )  # epath reaches gs:// by TensorFlow, which is talkative
    if scheme != 'gs':
        os.environ.setdefault('EPATH_USE_TF', '0')  # TensorFlow knows no other store; epath takes fsspec
    return epath.Path(text.rstrip('/'))


def has(where: Path) -> bool:
    """Whether a path lies in an object store: by its scheme, or below a folder that MOUNTED names."""
    if '://' in os.fspath(where):
        return True
    mounted = [Path(name).absolute() for name in os.environ.get(MOUNTED, '').split(os.pathsep) if name]
    absolute = Path(where).absolute()
    return any(folder in (absolute, *absolute.parents) for folder in mounted)


def check(where: Path, flag: str) -> None:
    """Check that the store of a path answers.

    Raises:
        OSError: it does not; the message says what may be missing.
    """
    try:
        where.exists()
    except Exception as error:  # whatever the store's library raises
        raise OSError(
            f'{flag}={where} cannot be reached ({type(error).__name__}: {first_line(error)}). gs:// needs '
            'credentials on this machine (gcloud auth application-default login) and a bucket that is there; '
            's3:// and az:// need EPATH_USE_TF=0 and the package s3fs or adlfs'
        ) from error


def is_from_store(error: BaseException) -> bool:
    """Whether an error comes from one of the libraries that reach stores."""
    return type(error).__module__.partition('.')[0] in _LIBRARIES


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [''])[0]


def check_writable(folder: Path) -> None:
    """Raise an OSError unless objects can be put into a folder and deleted from it."""
    probe = folder / f'{UNFINISHED}{secrets.token_hex(8)}'
    try:
        write(probe, b'Asks whether this place can be written.\n')
        probe.unlink()
    except OSError:
        raise
    except Exception as error:  # whatever the store's library raises
        raise OSError(f'{type(error).__name__}: {first_line(error)}') from error


def write(where: Path, data: bytes) -> None:
    """Put an object, whole. One call takes all bytes: what closes a file early would put a part of them."""
    _make_parent(where)
    with where.open('wb') as file:
        file.write(data)


def size(where: Path) -> int:
    """Return the bytes of an object; 0 if there is none."""
    try:
        found = where.stat()
    except FileNotFoundError:
        return 0
    return found.length if isinstance(where, epath.Path) else found.st_size


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none if it is not there."""
    try:
        # Some stores list the folder itself, or objects that stand for folders.
        return sorted({found.name for found in folder.iterdir()} - {'', folder.name})
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception:
        if not folder.is_dir():
            return []
        raise


def objects(folder: Path) -> list[Path]:
    """Return all objects below a folder, in its folders too."""
    found = []
    for name in names(folder):
        inner = folder / name
        found += objects(inner) if inner.is_dir() else [inner]
    return found


def unfinished_mark(folder: Path) -> Path:
    """Return the object that is there while a folder is not whole."""
    return folder.with_name(UNFINISHED + folder.name)


def is_whole(folder: Path) -> bool:
    """Whether a folder is there and complete."""
    return folder.exists() and not unfinished_mark(folder).exists()


def put_folder(source: Path, folder: Path) -> None:
    """Let a copy of the local folder `source` take the place of `folder`, whole or not at all."""
    write(unfinished_mark(folder), b'The folder of this name is not whole.\n')
    delete(folder)
    local = [inner for inner in sorted(source.rglob('*')) if inner.is_file()]
    _each(lambda inner: write(folder / inner.relative_to(source).as_posix(), inner.read_bytes()), local)
    unfinished_mark(folder).unlink()


def get_folder(folder: Path, target: Path) -> None:
    """Copy the objects below a folder to the local folder `target`."""

    def get(found: Path) -> None:
        inner = target / os.path.relpath(os.fspath(found), os.fspath(folder))
        inner.parent.mkdir(parents=True, exist_ok=True)
        inner.write_bytes(found.read_bytes())

    target.mkdir(parents=True, exist_ok=True)
    _each(get, objects(folder))


def remove_folder(folder: Path) -> None:
    """Delete a folder; one that is only half deleted is not taken for whole."""
    if folder.exists():
        write(unfinished_mark(folder), b'The folder of this name is not whole.\n')
        delete(folder)
        unfinished_mark(folder).unlink()


def delete(folder: Path) -> None:
    """Delete all that is below a folder, without the mark that it is not whole."""
    _each(lambda found: found.unlink(missing_ok=True), objects(folder))
    if folder.is_dir():  # a mounted one, or an object that stands for a folder
        _remove_empty(folder)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Delete, in these folders and below, what a killed process left that is not whole."""
    for folder in folders:
        for name in names(folder):
            inner = folder / name
            if inner.is_dir():
                remove_unfinished([inner])
            elif name.startswith(UNFINISHED):
                delete(folder / name.removeprefix(UNFINISHED))
                inner.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    for name in names(folder):
        if (folder / name).is_dir():
            _remove_empty(folder / name)
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()


def _make_parent(where: Path) -> None:
    """Make the folder of a mounted store. In others names need none."""
    if not isinstance(where, epath.Path):
        where.parent.mkdir(parents=True, exist_ok=True)


def _each(work: Callable[[Path], Any], paths: list[Path]) -> None:
    """Do the work for all paths, several at once; the first error is raised."""
    if paths:
        with futures.ThreadPoolExecutor(min(_AT_ONCE, len(paths))) as pool:
            for done in [pool.submit(work, each) for each in paths]:
                done.result()
