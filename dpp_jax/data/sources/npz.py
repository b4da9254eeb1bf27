"""NumPy archives, one for each split."""

import dataclasses
from pathlib import Path
import zipfile

import numpy as np

from dpp_jax.data.sources import folder
from dpp_jax.data.sources.source import Source, SourceInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Npz(Source):
    """A folder with train.npz and test.npz, each with the arrays `images` and `labels`."""

    form = 'npz:<folder>'
    has_groups = True

    def describe(self) -> SourceInfo:
        shapes = [_image_shape(self._path(split)) for split in ('train', 'test')]
        return folder.describe_arrays(self.name, *shapes, _array(self._path('train'), 'labels'))

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._path(split)
        return _array(path, 'images'), _array(path, 'labels')

    def groups(self, split: str, name: str) -> np.ndarray:
        path = self._path(split)
        with folder.reading(path), np.load(path, allow_pickle=False) as arrays:
            found = list(arrays)
        if name not in found:
            raise ValueError(
                f'config.data.groups is {name!r}; it must be an array of integers in {path}, which has '
                f'{", ".join(found)}'
            )
        return _array(path, name)

    def _path(self, split: str) -> Path:
        """Return the path of one split's file."""
        path = Path(self.where).expanduser() / f'{split}.npz'
        if not path.is_file():
            raise FileNotFoundError(
                f'{self.name} needs {path}, with the arrays images and labels; it is not there'
            )
        return path


def _array(path: Path, name: str) -> np.ndarray:
    """Return one array of a file without reading the others."""
    with folder.reading(path), np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def _image_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of `images`, from its header."""
    with folder.reading(path), zipfile.ZipFile(path) as archive, archive.open('images.npy') as file:
        if np.lib.format.read_magic(file) == (1, 0):
            return np.lib.format.read_array_header_1_0(file)[0]
        return np.lib.format.read_array_header_2_0(file)[0]
