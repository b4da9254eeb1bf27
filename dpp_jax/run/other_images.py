"""Images of a file from elsewhere, which an evaluation scores beside the run's own, and as those."""

from pathlib import Path
import re
from typing import Any

import numpy as np

from dpp_jax import files
from dpp_jax.data import labeled_file

ABOUT = (
    'images of a file from elsewhere. This program does not know how they were made, and claims no privacy '
    'for them'
)
_LONGEST = 40  # letters of a file's name


class OtherImages:
    """Has what an evaluation asks of `artefacts.SyntheticImages`.

    Attributes:
        paths: as there: the file.
        for_classifiers: the file too.
    """

    def __init__(self, path: str):
        """`path`: of the file, see `labeled_file`."""
        self.for_classifiers = Path(path).expanduser()
        self.paths = {'images': self.for_classifiers}
        self._data: dict[str, np.ndarray] = {}
        self._digest = ''

    def read(self, **wanted: Any) -> str:
        """Read the file, in process 0 alone, and return a name for its results, from its name and contents.

        Args:
            wanted: as of `labeled_file.read`.

        Raises:
            ValueError: it is not there, or not as it must be.
        """
        try:
            found = labeled_file.read(self.for_classifiers, **wanted)
        except (OSError, ValueError) as error:
            lines = (f'config.evaluate.images: {line}' for line in str(error).splitlines())
            raise ValueError('\n'.join(lines)) from error
        self._data = {'images': found.images, 'labels': found.labels}
        self._digest = files.digest(self._data.values())
        stem = re.sub(r'[^\w\-]', '_', self.for_classifiers.stem)[:_LONGEST]
        return f'{stem}_{self._digest[:12]}'

    def load(self, path: Path) -> dict[str, np.ndarray]:
        """Return `images` (n, H, W, C) uint8 and `labels` (n,) int32 of the file."""
        del path  # there is one
        return self._data

    def identity(self) -> dict[str, str]:
        """Return what tells these images from others."""
        return {'sha256': self._digest}
