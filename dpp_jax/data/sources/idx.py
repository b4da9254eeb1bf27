"""The four classic files of MNIST and its relatives, plain or gzipped."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import gzip
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dpp_jax.data.rows import Rows
from dpp_jax.data.sources import folder
from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo

_BEGINNINGS = {'train': 'train', 'test': 't10k'}  # of the file names
_MAGIC = {'images-idx3': 0x00000803, 'labels-idx1': 0x00000801}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idx(Source):
    """A folder with train-images-idx3-ubyte, t10k-labels-idx1-ubyte and so on; each may end in .gz."""

    form = 'idx:<folder>'

    def describe(self) -> SourceInfo:
        shapes = [self.shape(split) for split in SPLITS]
        return folder.describe_arrays(self.name, *shapes, self._array('train', 'labels-idx1', Rows))

    def shape(self, split: str) -> tuple[int, ...]:
        paths = {kind: self._path(split, kind) for kind in _MAGIC}
        headers = [_header(path, kind) for kind, path in paths.items()]
        return folder.image_shape(paths['images-idx3'], *headers, self.rows)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return self._array(split, 'images-idx3', self.rows), self._array(split, 'labels-idx1', self.rows)

    def identity(self, split: str) -> list[str]:
        return [folder.checksum(self._path(split, kind)) for kind in _MAGIC]

    def _array(self, split: str, kind: str, rows: Callable[[int], Rows]) -> np.ndarray:
        """Return some rows of the content of one file, uint8; `rows`: N → which."""
        path = self._path(split, kind)
        sizes = _header(path, kind)
        kept = rows(sizes[0])
        folder.check_memory(path, len(kept) * math.prod(sizes[1:]))
        with _opened(path) as file:
            file.read(4 * (1 + len(sizes)))
            array, found = folder.read_rows(file, sizes, np.dtype(np.uint8), kept)
        if found != math.prod(sizes):
            more = ' or more' if found > math.prod(sizes) else ''
            raise ValueError(
                f'{path} has {found}{more} bytes after its header; for the sizes in it, {sizes}, it '
                f'must have {math.prod(sizes)}'
            )
        return array

    def _path(self, split: str, kind: str) -> Path:
        """Return the path of one file, plain or gzipped."""
        plain = Path(self.where).expanduser() / f'{_BEGINNINGS[split]}-{kind}-ubyte'
        for path in (plain, plain.with_name(plain.name + '.gz')):
            if path.is_file():
                return path
        raise FileNotFoundError(f'{self.name} needs the file {plain} or {plain}.gz; neither is there')


def _header(path: Path, kind: str) -> tuple[int, ...]:
    """Return the sizes of all dimensions, the number of items first."""
    magic = _MAGIC[kind]
    length = 4 * (1 + magic % 256)  # the magic number's last byte counts the dimensions
    with _opened(path) as file:
        header = file.read(length)
    if len(header) < length or int.from_bytes(header[:4]) != magic:
        raise ValueError(
            f'{path} begins with {header[:4].hex() or "nothing"} and has {len(header)} of {length} '
            f'bytes of header; an idx file of this name begins with {magic:08x}'
        )
    return tuple(int.from_bytes(header[i : i + 4]) for i in range(4, length, 4))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked if it is gzipped."""
    with folder.reading(path), gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
        yield file
