"""Images that stay in files: a set larger than the memory, read row by row when rows are asked for."""

from collections.abc import Callable
import math
import os

import numpy as np


def memory_of_machine() -> int:
    """Return how many bytes of memory this machine has."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


class StoredImages:
    """Images in files, uint8 (N, H, W, C), to be indexed like an array; what an index asks for is read.

    The result of an index is an array of its own, with the values that the whole array would have there.
    """

    def __init__(
        self, read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int, int], dtype=np.uint8
    ):
        """Make them.

        Args:
            read: numbers of rows, int64 (n,), ascending, n ≥ 1 → their images, a new array (n, H, W, C).
            shape: (N, H, W, C).
            dtype: of the images.
        """
        self._read = read
        self.shape = shape
        self.dtype = np.dtype(dtype)

    ndim = 4

    @property
    def size(self) -> int:
        """How many numbers they are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they would take in memory."""
        return self.size * self.dtype.itemsize

    @property
    def are_too_many(self) -> bool:
        """Whether they would take more than half of this machine's memory."""
        return self.nbytes > memory_of_machine() / 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """Read rows.

        Args:
            index: a number, a slice, or an array of any shape of integers, or of booleans (N,).

        Returns:
            uint8 (*shape of the index, H, W, C).

        Raises:
            IndexError: a number is out of range, or it is another kind of index.
        """
        if isinstance(index, slice):
            numbers = np.arange(*index.indices(len(self)))
        else:
            numbers = np.asarray(index)
            if numbers.dtype == bool and numbers.shape == (len(self),):
                numbers = np.flatnonzero(numbers)
            elif numbers.dtype.kind not in 'iu' and numbers.size:
                raise IndexError(f'the index of stored images is {index!r}; it must be numbers of rows')
        # Padding asks for the same row again and again.
        distinct, place = np.unique(numbers.astype(np.int64), return_inverse=True)
        if len(distinct) and (distinct[0] < -len(self) or distinct[-1] >= len(self)):
            raise IndexError(f'the index of stored images has {distinct[-1]}; they are {len(self)}')
        if len(distinct) and distinct[0] < 0:
            return self[np.where(numbers < 0, numbers + len(self), numbers)]
        if not len(distinct):
            return np.empty((*numbers.shape, *self.shape[1:]), self.dtype)
        found = self._read(distinct)
        if numbers.shape == distinct.shape and np.array_equal(place.ravel(), np.arange(len(distinct))):
            return found
        return found[place.reshape(numbers.shape)]

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            f'{len(self):,} images ({self.nbytes / 2**30:.1f} GiB) stay in files and are not read at once; '
            "to read them, set config.data.in_memory to 'yes'"
        )

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> 'StoredImages':
        """Return the images that `function` makes of these, batch by batch, when they are read.

        Args:
            function: images (n, H, W, C) → (n, h, w, c), each from its own.
        """
        example = function(np.zeros((1, *self.shape[1:]), self.dtype))
        shape = len(self), *example.shape[1:]
        return StoredImages(lambda rows: function(self._read(rows)), shape, example.dtype)
