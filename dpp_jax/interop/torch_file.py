"""Tensors in a file of `torch.save`, read without PyTorch.

Such a file is a pickle, and a pickle may run any code. This reader knows ordered dictionaries, tensors and
their storages, and refuses everything else by its name. It reads both formats: the zip archive of PyTorch
1.6 and later, and the row of pickles before.
"""

import collections
from collections.abc import Callable
import io
import math
import os
import pickle
from typing import Any, BinaryIO
import zipfile

import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file before PyTorch 1.6
_LEGACY_VERSION = 1001
_STORAGES = {
    'DoubleStorage': 'f8',
    'FloatStorage': 'f4',
    'HalfStorage': 'f2',
    'LongStorage': 'i8',
    'IntStorage': 'i4',
    'ShortStorage': 'i2',
    'CharStorage': 'i1',
    'ByteStorage': 'u1',
    'BoolStorage': '?',
}
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NotImplementedError,
    TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


class _Refused(Exception):
    """A pickle holds what this reader does not make."""


def read(path: str | os.PathLike) -> Any:
    """Return what `torch.save` wrote, with NumPy arrays in the place of tensors.

    Args:
        path: of the file.

    Returns:
        numbers, texts, lists, tuples and dictionaries of them and of arrays.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, no such file, or holds something other than tensors.
    """
    with open(path, 'rb') as file:
        try:
            if file.read(2) == b'PK':
                with zipfile.ZipFile(file) as archive:
                    return _read_zip(archive)
            file.seek(0)
            return _read_legacy(file)
        except _Refused as error:
            raise ValueError(f'{path} is not read: {error}') from error
        except _DAMAGE as error:
            raise ValueError(f'{path} is no whole file of torch.save: {error!r}') from error


def _read_zip(archive: zipfile.ZipFile) -> Any:
    """Read a zip archive: the pickle in <name>/data.pkl, and each storage in <name>/data/<key>."""
    pickled = next((name for name in archive.namelist() if name.endswith('data.pkl')), None)
    if pickled is None:
        raise ValueError('it has no data.pkl')
    root = pickled.removesuffix('data.pkl')
    has_order = f'{root}byteorder' in archive.namelist()
    order = '>' if has_order and archive.read(f'{root}byteorder').strip() == b'big' else '<'
    storages = {}

    def storage(kind: np.dtype, key: str, numel: int) -> np.ndarray:
        if key not in storages:
            found = archive.read(f'{root}data/{key}')
            storages[key] = np.frombuffer(found, kind.newbyteorder(order), count=numel)
        return storages[key]

    return _Unpickler(io.BytesIO(archive.read(pickled)), storage).load()


def _read_legacy(file: BinaryIO) -> Any:
    """Read the pickles of magic number, version, machine, object and keys, and then the storages.

    Storages are filled when the object is there already: tensors are views of them until then.
    """
    plain = lambda: _Unpickler(file, _no_storage).load()
    if plain() != _LEGACY_MAGIC or plain() != _LEGACY_VERSION:
        raise ValueError('it does not begin as one')
    if not plain().get('little_endian', True):
        raise ValueError('it comes from a machine with the other order of bytes')
    size = os.fstat(file.fileno()).st_size
    storages = {}

    def storage(kind: np.dtype, key: str, numel: int) -> np.ndarray:
        if not 0 <= numel * kind.itemsize <= size:
            raise ValueError(f'a storage of {numel} numbers does not fit into the file')
        return storages.setdefault(key, np.zeros(numel, kind))

    found = _Unpickler(file, storage).load()
    for key in plain():
        (numel,) = np.frombuffer(file.read(8), '<i8')
        if numel != storages[key].size or file.readinto(storages[key]) != storages[key].nbytes:
            raise ValueError(f'storage {key} has another size than its tensors')
    return found


def _no_storage(*_: Any) -> np.ndarray:
    raise _Refused('it has a tensor where none may be')


class _Unpickler(pickle.Unpickler):
    """Makes arrays of tensors, and nothing else of anything else."""

    def __init__(self, file: BinaryIO, storage: Callable[[np.dtype, str, int], np.ndarray]):
        super().__init__(file, encoding='utf-8')
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle; called for every one."""
        if module == 'torch' and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        allowed = {
            'collections.OrderedDict': collections.OrderedDict,
            'torch._utils._rebuild_tensor_v2': _tensor,
            'torch._utils._rebuild_parameter': _parameter,
        }
        if f'{module}.{name}' not in allowed:
            raise _Refused(f'it holds {module}.{name}; it may hold tensors and ordered dictionaries alone')
        return allowed[f'{module}.{name}']

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return a storage: ('storage', type, key, device, numel), and in old files None at the end."""
        if not isinstance(pid, tuple) or pid[0] != 'storage' or any(part is not None for part in pid[5:]):
            raise _Refused(f'it refers to {str(pid)[:60]}; it may refer to storages alone')
        _, kind, key, _, numel = pid[:5]
        return self._storage(kind, key, numel)


def _tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """Return the view of a storage that a tensor is."""
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    is_inside = min((offset, *size, *stride)) >= 0 and (0 in size or last < storage.size)
    # A step of 0 repeats a number. More numbers than the storage has could take any memory.
    if not is_inside or math.prod(size) > storage.size:
        raise ValueError(f'a tensor of shape {size} reaches beyond its storage')
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor
