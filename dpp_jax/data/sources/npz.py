"""NumPy archives: one for each split, or one for both."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
from pathlib import Path
from typing import BinaryIO
import zipfile

import numpy as np

from dpp_jax.data.rows import Rows
from dpp_jax.data.sources import folder
from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo

# How archives name images and labels: as here, as MedMNIST, as Keras.
_NAMES = (('images', 'labels'), ('{split}_images', '{split}_labels'), ('x_{split}', 'y_{split}'))
# How they name a validation part.
_VALIDATION = ('val_images', 'val_labels', 'x_val', 'y_val')
# No images are packed so well. What unpacks to more, and is large, was made to fill the memory.
_MOST_PACKED, _LARGE = 200, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Npz(Source):
    """A folder with train.npz and test.npz, or one .npz file that holds both splits.

    Each split's file has the arrays `images` and `labels`. The names of MedMNIST (train_images) and of Keras
    (x_train) do as well, and labels (N, 1) or one-hot (N, classes). A file for both splits needs the names
    that tell the split. A validation part (val_images) is not used.
    """

    form = 'npz:<folder>'
    has_groups = True

    def describe(self) -> SourceInfo:
        shapes = [self.shape(split) for split in SPLITS]
        groups = self.preparation.groups
        return folder.describe_arrays(
            self.name,
            *shapes,
            self._labels('train', Rows),
            groups=self.groups('train', groups) if groups else None,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        """Say what is not used."""
        path, *_ = self._find('train')
        with folder.reading(path), zipfile.ZipFile(path) as archive:
            found = [name.removesuffix('.npy') for name in archive.namelist()]
        unused = [name for name in found if name in _VALIDATION]
        if not unused:
            return ()
        return (f'{", ".join(unused)} (the validation part) are not used',)

    def shape(self, split: str) -> tuple[int, ...]:
        path, images, labels = self._find(split)
        headers = read_header(path, images, self.rows), read_header(path, labels, self.rows)
        shapes = [header.shape for header in headers]
        _check_images(path, images, labels, split, headers[0])
        return folder.image_shape(path, shapes[0], shapes[1], self.rows)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        path, images, _ = self._find(split)
        return read_array(path, images, self.rows), self._labels(split, self.rows)

    def identity(self, split: str) -> list[str]:
        path, *_ = self._find(split)
        with folder.reading(path), zipfile.ZipFile(path) as file:
            return [f'{found.filename} {found.file_size} {found.CRC:08x}' for found in file.infolist()]

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
        return read_array(path, name, Rows)

    def _labels(self, split: str, rows: Callable[[int], Rows]) -> np.ndarray:
        path, _, name = self._find(split)
        labels = read_array(path, name, rows)
        if labels.ndim != 2:
            return labels
        if labels.shape[1] == 1:
            return labels[:, 0]
        if ((labels != 0) & (labels != 1)).any() or (np.count_nonzero(labels, axis=1) != 1).any():
            raise ValueError(
                f'{path}: {name} have the shape (images, {labels.shape[1]}), and not one 1 in each row; they '
                'must be numbers of classes, or one-hot: an image has one class'
            )
        return labels.argmax(axis=1)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header:
    """What comes before the numbers of an array: their shape and order, and its own length in bytes."""

    shape: tuple[int, ...]
    is_reversed: bool
    dtype: np.dtype
    length: int


def _check_images(path: Path, images: str, labels: str, split: str, header: _Header) -> None:
    """Refuse images of another type or order of axes, with the line that converts them."""
    shape, dtype = header.shape, header.dtype
    is_transposed = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)
    if dtype == np.uint8 and not is_transposed:
        return
    changed, wanted = "a['" + images + "']", []
    if is_transposed:
        changed += '.transpose(0, 2, 3, 1)'
        wanted.append('of shape (images, height, width, channels)')
    if dtype != np.uint8:
        # The usual range of floating-point pixels; whole numbers are those of pixels already.
        changed = f'np.round({changed} * 255)' if dtype.kind == 'f' else changed
        changed = f"{changed}.clip(0, 255).astype('uint8')"
        wanted.insert(0, 'uint8 in 0..255')
    is_range = ', if its pixels are in [0, 1]' if dtype.kind == 'f' else ''
    raise ValueError(
        f'{path}: {images} are {dtype} of shape {shape}; they must be {" ".join(wanted)}. To convert '
        f"it{is_range}: python -c \"import numpy as np; a = np.load('{path}'); "
        f"np.savez_compressed('{split}.npz', images={changed}, labels=a['{labels}'])\""
    )


def read_header(path: Path, name: str, rows: Callable[[int], Rows]) -> _Header:
    """Read the header of one array, and check that the file can hold so much, and the memory the kept rows.

    Args:
        path: of the file.
        name: of the array.
        rows: N → those that are kept.
    """
    with _opened(path, name) as (file, member):
        is_old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
        shape, is_reversed, dtype = read(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f'{path} cannot be read ({name} holds Python objects); it must hold numbers')
    if not shape:
        raise ValueError(f'{path}: {name} is one number; it must have a number for each image')
    claimed = math.prod(shape) * dtype.itemsize
    if start + claimed != member.file_size:
        raise ValueError(
            f'{path} cannot be read: the header of {name} claims the shape {shape} of {dtype}, '
            f'{claimed:,} bytes; the file has {max(0, member.file_size - start):,} bytes of it'
        )
    folder.check_memory(path, len(rows(shape[0])) * math.prod(shape[1:]) * dtype.itemsize)
    if claimed > max(_LARGE, _MOST_PACKED * member.compress_size):
        raise ValueError(
            f'{path}: {name} unpacks to {claimed:,} bytes from {member.compress_size:,}; no images are '
            f'packed so well. Allowed are {_MOST_PACKED} times its size, or 1 GiB'
        )
    return _Header(shape=shape, is_reversed=is_reversed, dtype=dtype, length=start)


def read_array(path: Path, name: str, rows: Callable[[int], Rows]) -> np.ndarray:
    """Return some rows of one array of a file without reading the others; `rows`: N → which."""
    header = read_header(path, name, rows)
    shape, dtype, kept = header.shape, header.dtype, rows(header.shape[0])
    with _opened(path, name) as (file, _):
        file.read(header.length)
        if header.is_reversed:
            return _rows_of_reversed(file, shape, dtype, kept)
        array, found = folder.read_rows(file, shape, dtype, kept)
        if found != dtype.itemsize * math.prod(shape):
            raise ValueError(f'{name} ends after {found:,} bytes')
        return array


def _rows_of_reversed(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, rows: Rows) -> np.ndarray:
    """Read some rows of an array whose first axis runs fastest: every pixel's column of N, one by one."""
    numbers = rows.numbers()
    columns = np.empty((math.prod(shape[1:]), len(rows)), dtype)
    for column in columns:
        column[:] = np.frombuffer(file.read(shape[0] * dtype.itemsize), dtype, shape[0])[numbers]
    return np.ascontiguousarray(columns.reshape(*reversed(shape[1:]), len(rows)).T)
