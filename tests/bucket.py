"""Object stores for tests: a bucket below gs://, and a mounted one. Both refuse what object stores refuse.

`Bucket` takes the place of the library that talks to the service, below epath and fsspec: everything above it
is what a run on gs:// uses. Its objects lie in a folder, so that several processes see them.
"""

import io
import os
from pathlib import Path
import shutil
import sys
import tempfile

import fsspec

os.environ['EPATH_USE_TF'] = '0'  # epath takes fsspec then
FOLDER = 'TEST_BUCKETS'  # environment variable: where the objects are


class Bucket(fsspec.AbstractFileSystem):
    """Objects that appear whole when they are closed. A folder is there while an object in it is."""

    protocol = ('gs', 'gcs')
    cachable = False
    puts: list[tuple[str, int]] = []  # name and bytes of every object that this process wrote
    gets: list[str] = []

    def _place(self, path):
        return Path(os.environ[FOLDER]) / 'objects' / self._strip_protocol(str(path))

    def info(self, path, **_):
        place = self._place(path)
        if place.is_file():
            found = place.stat()
            return {'name': path, 'type': 'file', 'size': found.st_size, 'mtime': found.st_mtime}
        if place.is_dir() and any(inner.is_file() for inner in place.rglob('*')):
            return {'name': path, 'type': 'directory', 'size': 0}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        if self.info(path)['type'] == 'file':
            return [self.info(path) if detail else path]
        found = []
        for inner in self._place(path).iterdir():
            try:
                found.append(self.info(f'{self._strip_protocol(path)}/{inner.name}'))
            except FileNotFoundError:
                pass
        return found if detail else [each['name'] for each in found]

    def _open(self, path, mode='rb', **_):
        if mode == 'rb':
            self.gets.append(path)
            return io.BytesIO(self._place(path).read_bytes())
        assert mode == 'wb', f'an object store cannot open with mode {mode}'
        return _Upload(self, path)

    def rm_file(self, path):
        self._place(path).unlink()

    def _refuse(self, *_, **__):
        raise AssertionError('an object store cannot do this')

    mkdir = makedirs = mv = mv_file = move = rename = touch = cp_file = copy = chmod = _refuse

    def rmdir(self, path):
        raise AssertionError(f'no folder is there without an object: {path}')


class _Upload(io.BytesIO):
    def __init__(self, bucket, path):
        super().__init__()
        self._bucket, self._path = bucket, path

    def close(self):
        if not self.closed:
            data, place = self.getvalue(), self._bucket._place(self._path)
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.environ[FOLDER], delete=False) as file:
                file.write(data)
            os.replace(file.name, place)
            self._bucket.puts.append((self._path, len(data)))
        super().close()


fsspec.register_implementation('gcs', Bucket, clobber=True)
fsspec.register_implementation('gs', Bucket, clobber=True)

_without_posix: list[Path] = []  # folders in which calls of POSIX are refused


def _watch(event, arguments):
    """Refuse, in folders without POSIX, whatever changes files otherwise than by writing whole ones."""
    if not _without_posix:
        return
    paths = [Path(str(each)) for each in arguments if isinstance(each, str | os.PathLike)]
    if event == 'fcntl.flock' or (event in ('os.utime', 'os.chmod', 'os.truncate') and not paths):
        paths = [Path(os.readlink(f'/proc/self/fd/{arguments[0]}'))]
    if not any(folder in (path, *path.parents) for path in paths for folder in _without_posix):
        return
    if event == 'open':
        _, mode, flags = arguments
        appends = isinstance(mode, str) and set(mode) & set('a+x')
        is_bad = appends or (isinstance(flags, int) and flags & (os.O_APPEND | os.O_EXCL))
    else:
        names = ('rename', 'chmod', 'chown', 'utime', 'truncate', 'link', 'symlink', 'setxattr')
        is_bad = event in ('fcntl.flock', 'fcntl.lockf', *(f'os.{name}' for name in names))
    if is_bad:
        raise AssertionError(f'{event} {arguments} in an object store')


sys.addaudithook(_watch)


class without_posix:
    """A context in which `folder` is a mounted object store."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __enter__(self):
        os.environ['DPP_JAX_OBJECT_STORES'] = str(self.folder)
        _without_posix.append(self.folder)
        self._fsync = os.fsync
        os.fsync = self._checked_fsync
        return self.folder

    def _checked_fsync(self, descriptor):
        path = Path(os.readlink(f'/proc/self/fd/{descriptor}'))
        assert self.folder not in (path, *path.parents), f'fsync of {path}'
        self._fsync(descriptor)

    def __exit__(self, *_):
        os.fsync = self._fsync
        _without_posix.remove(self.folder)
        del os.environ['DPP_JAX_OBJECT_STORES']


def copy_of(folder, target):
    """Copy all objects of a folder to one of this machine."""
    place = Bucket()._place(folder) if '://' in str(folder) else Path(folder)
    shutil.copytree(place, target)
    return target
