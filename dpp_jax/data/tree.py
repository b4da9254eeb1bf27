"""Files below a folder or in a zip archive, by their paths below it."""

import abc
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import os
from pathlib import Path
import stat
from typing import BinaryIO
import zipfile
import zlib

_HEAD = 2**16  # bytes of a file in an archive that are unpacked for its header
_MOST_UNPACKED = 2**30  # of one file in an archive


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file.

    Attributes:
        size: bytes.
        stamp: what changes with the content: time of a file, checksum in an archive.
        own: the file's path below the root, with the folder that wraps all (see `Tree.files`).
    """

    size: int
    stamp: int
    own: str


class Tree(abc.ABC):
    """Files by their paths, with '/' between the parts. It is sent to the processes that decode."""

    @abc.abstractmethod
    def read(self, own: str) -> bytes:
        """Return the content of one file, of a path as in `File.own`."""

    @abc.abstractmethod
    def opened(self, own: str, whole: bool = True) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open one file for its header; not `whole`: the first bytes are enough."""

    @abc.abstractmethod
    def _all(self) -> Iterator[tuple[str, File]]:
        """Yield every file that is not hidden."""

    def files(self, kept: frozenset[str] = frozenset()) -> dict[str, File]:
        """Return path → file, sorted by path.

        Hidden files (a part of the path begins with '.') and __MACOSX are left out. A single folder that
        wraps all others, as archives have it, is left out of the paths, unless its name is one of `kept`.
        """
        found = dict(sorted(self._all()))
        while found:
            top = next(iter(found)).partition('/')[0]
            if top in kept or not all(path.startswith(f'{top}/') for path in found):
                break
            inside = {path.partition('/')[2]: file for path, file in found.items()}
            if any('/' not in path and not _may_lie_beside_folders(path) for path in inside):
                break  # a folder with images directly in it is a class
            found = inside
        return found


def _may_lie_beside_folders(path: str) -> bool:
    return path.lower().endswith(('.json', '.csv', '.txt', '.md', '.pdf', '.html', '.xml', '.yaml', '.yml'))


def _is_hidden(path: str) -> bool:
    return any(part.startswith('.') or part == '__MACOSX' for part in path.split('/'))


@dataclasses.dataclass(frozen=True)
class FolderTree(Tree):
    """Files of a folder; links are followed."""

    root: str

    def read(self, own: str) -> bytes:
        return Path(self.root, own).read_bytes()

    @contextlib.contextmanager
    def opened(self, own: str, whole: bool = True) -> Iterator[BinaryIO]:
        del whole  # what is not asked for is not read
        with open(os.path.join(self.root, own), 'rb') as file:
            yield file

    def _all(self) -> Iterator[tuple[str, File]]:
        seen = set()  # a link may lead to a folder above
        todo = ['']
        while todo:
            folder = todo.pop()
            found = os.stat(os.path.join(self.root, folder))
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        continue
                    path = f'{folder}/{entry.name}' if folder else entry.name
                    found = _stat(entry)
                    if stat.S_ISDIR(found.st_mode):
                        todo.append(path)
                    else:
                        yield path, File(size=found.st_size, stamp=found.st_mtime_ns, own=path)


def _stat(entry: os.DirEntry) -> os.stat_result:
    """Return facts about a file; about a link that leads nowhere, its own."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


@dataclasses.dataclass(frozen=True)
class ZipTree(Tree):
    """Files in a zip archive."""

    root: str

    def read(self, own: str) -> bytes:
        with self.opened(own) as file:
            return file.read()

    @contextlib.contextmanager
    def opened(self, own: str, whole: bool = True) -> Iterator[BinaryIO]:
        try:
            archive = _archive(self.root, os.stat(self.root).st_mtime_ns, os.getpid())
            if archive.getinfo(own).file_size > _MOST_UNPACKED:
                raise OSError(f'{own} unpacks to more than {_MOST_UNPACKED:,} bytes')
            with archive.open(own) as file:
                content = file.read(-1 if whole else _HEAD)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
            raise OSError(f'{own} cannot be unpacked: {error}') from error
        yield io.BytesIO(content)

    def _all(self) -> Iterator[tuple[str, File]]:
        try:
            with zipfile.ZipFile(self.root) as archive:
                found = archive.infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(
                f'{self.root} cannot be read ({error}); it must be a whole zip archive'
            ) from error
        for info in found:
            path = info.filename.replace('\\', '/')
            if not info.is_dir() and not _is_hidden(path):
                yield path, File(size=info.file_size, stamp=info.CRC, own=info.filename)


@functools.lru_cache(maxsize=1)
def _archive(path: str, time: int, process: int) -> zipfile.ZipFile:
    """Open an archive once for each process, as long as it stays as it is: its list of files is long."""
    del time, process
    return zipfile.ZipFile(path)
