"""NumPy archives: one for each split, or one for both."""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
from pathlib import Path
from typing import BinaryIO
import zipfile

import numpy as np

from dpp_jax.data.sources import folder
from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo

# How archives name images and labels: as here, as MedMNIST, as Keras.
_NAMES = (('images', 'labels'), ('{split}_images', '{split}_labels'), ('x_{split}', 'y_{split}'))
# No images are packed so well. What unpacks to more, and is large, was made to fill the memory.
_MOST_PACKED, _LARGE = 200, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Npz(Source):
    """A folder with train.npz and test.npz, or one .npz file that holds both splits.

    Each split's file has the arrays `images` and `labels`. The names of MedMNIST (train_images) and of Keras
    (x_train) do as well, and labels (N, 1). A file for both splits needs the names that tell the split.
    """

    form = 'npz:<folder>'
    has_groups = True

    def describe(self) -> SourceInfo:
        shapes = [self.shape(split) for split in SPLITS]
        return folder.describe_arrays(self.name, *shapes, self._labels('train'))

    def shape(self, split: str) -> tuple[int, ...]:
        path, images, labels = self._find(split)
        return folder.image_shape(path, _header(path, images, np.uint8), _header(path, labels))

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        path, images, _ = self._find(split)
        return _array(path, images), self._labels(split)

    def near_groups(self, name: str) -> np.ndarray:
        return self.groups('train', name)

    def groups(self, split: str, name: str) -> np.ndarray:
        path, _, _ = self._find(split)
        with folder.reading(path), np.load(path, allow_pickle=False) as arrays:
            found = list(arrays)
        if name not in found:
            raise ValueError(
                f'config.data.groups is {name!r}; it must be an array of integers in {path}, which has '
                f'{", ".join(found)}'
            )
        return _array(path, name)

    def _labels(self, split: str) -> np.ndarray:
        path, _, name = self._find(split)
        labels = _array(path, name)
        return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels

    def _find(self, split: str) -> tuple[Path, str, str]:
        """Return one split's file, and the names of its images and labels."""
        where = Path(self.where).expanduser()
        is_file = where.is_file()
        path = where if is_file else where / f'{split}.npz'
        if not path.is_file():
            raise FileNotFoundError(
                f'{self.name} needs {path}, with the arrays images and labels; it is not there'
            )
        with folder.reading(path), zipfile.ZipFile(path) as archive:
            found = [name.removesuffix('.npy') for name in archive.namelist()]
        for names in _NAMES[1:] if is_file else _NAMES:
            images, labels = (name.format(split=split) for name in names)
            if {images, labels} <= set(found):
                return path, images, labels
        wanted = f'{split}_images and {split}_labels' if is_file else 'images and labels'
        raise ValueError(
            f'{path} has the arrays {", ".join(found) or "(none)"}; it must have {wanted}. To convert it: '
            f"python -c \"import numpy as np; a = np.load('{path}'); "
            f"np.savez_compressed('{split}.npz', images=a['…'], labels=a['…'])\""
        )


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[BinaryIO, zipfile.ZipInfo]]:
    with folder.reading(path), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f'{name}.npy')
        with archive.open(member) as file:
            yield file, member


def _header(path: Path, name: str, wanted: type | None = None) -> tuple[int, ...]:
    """Return the shape of one array, from its header, after a check that the file can hold so much."""
    with _opened(path, name) as (file, member):
        is_old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f'{path} cannot be read ({name} holds Python objects); it must hold numbers')
    if wanted is not None and dtype != wanted:
        raise ValueError(f'{path}: {name} are {dtype} of shape {shape}; they must be {np.dtype(wanted)}')
    claimed = math.prod(shape) * dtype.itemsize
    if start + claimed != member.file_size:
        raise ValueError(
            f'{path} cannot be read: the header of {name} claims the shape {shape} of {dtype}, '
            f'{claimed:,} bytes; the file has {max(0, member.file_size - start):,} bytes of it'
        )
    folder.check_memory(path, claimed)
    if claimed > max(_LARGE, _MOST_PACKED * member.compress_size):
        raise ValueError(
            f'{path}: {name} unpacks to {claimed:,} bytes from {member.compress_size:,}; no images are '
            f'packed so well. Allowed are {_MOST_PACKED} times its size, or 1 GiB'
        )
    return shape


def _array(path: Path, name: str) -> np.ndarray:
    """Return one array of a file without reading the others."""
    _header(path, name)
    with folder.reading(path), np.load(path, allow_pickle=False) as arrays:
        return arrays[name]
