"""The four classic files of MNIST and its relatives, plain or gzipped."""

import dataclasses
import gzip
import math
from pathlib import Path

import numpy as np

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
        return folder.describe_arrays(self.name, *shapes, self._array('train', 'labels-idx1'))

    def shape(self, split: str) -> tuple[int, ...]:
        paths = {kind: self._path(split, kind) for kind in _MAGIC}
        headers = [_header(path, kind) for kind, path in paths.items()]
        return folder.image_shape(paths['images-idx3'], *headers)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return self._array(split, 'images-idx3'), self._array(split, 'labels-idx1')

    def _array(self, split: str, kind: str) -> np.ndarray:
        """Return the whole content of one file, uint8."""
        path = self._path(split, kind)
        sizes = _header(path, kind)
        folder.check_memory(path, math.prod(sizes))
        start = 4 * (1 + len(sizes))
        # One byte more than there may be: a small gzipped file can unpack to any length.
        content = np.frombuffer(_bytes(path, start + math.prod(sizes) + 1), np.uint8)[start:]
        if len(content) != math.prod(sizes):
            more = ' or more' if len(content) > math.prod(sizes) else ''
            raise ValueError(
                f'{path} has {len(content)}{more} bytes after its header; for the sizes in it, {sizes}, it '
                f'must have {math.prod(sizes)}'
            )
        return content.reshape(sizes)

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
    header = _bytes(path, length)
    if len(header) < length or int.from_bytes(header[:4]) != magic:
        raise ValueError(
            f'{path} begins with {header[:4].hex() or "nothing"} and has {len(header)} of {length} '
            f'bytes of header; an idx file of this name begins with {magic:08x}'
        )
    return tuple(int.from_bytes(header[i : i + 4]) for i in range(4, length, 4))


def _bytes(path: Path, length: int = -1) -> bytes:
    """Return the first `length` bytes of a file (-1: all), unpacked if it is gzipped."""
    with folder.reading(path), gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
        return file.read(length)
