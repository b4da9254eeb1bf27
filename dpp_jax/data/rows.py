"""Which rows of a split a process keeps."""

import numpy as np


class Rows:
    """Some rows of a split, in its order.

    Attributes:
        total: N, the number of rows of the whole split.
    """

    def __init__(self, total: int, kept: slice | np.ndarray | None = None):
        """Choose rows of a split.

        Args:
            total: N.
            kept: `slice(p, None, P)`, or numbers of rows, ascending integers (n,); None: all.

        Raises:
            ValueError: the numbers do not ascend, or are not in 0..N - 1.
        """
        self.total = total
        self._kept: range | np.ndarray
        if kept is None or isinstance(kept, slice):
            self._kept = range(total)[kept or slice(None)]
            is_good = self._kept.step > 0
        else:
            self._kept = np.asarray(kept, np.int64)
            is_inside = not len(kept) or (self._kept[0] >= 0 and self._kept[-1] < total)
            is_good = is_inside and bool(np.all(np.diff(self._kept) > 0))
        if not is_good:
            raise ValueError(f'rows is {kept}; it must be numbers from 0 to {total - 1} that ascend')

    def __len__(self) -> int:
        return len(self._kept)

    def numbers(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the numbers that rows `start`..`stop` of the kept ones have in the whole split, int64."""
        part = self._kept[start:stop]
        if isinstance(part, range):
            return np.arange(part.start, part.stop, part.step, np.int64)
        return part

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Return where rows with these numbers in the whole split lie among the kept ones; -1: not kept.

        Args:
            numbers: integers of any shape, in 0..N - 1.

        Returns:
            int64, of the same shape.
        """
        numbers = np.asarray(numbers, np.int64)
        if isinstance(self._kept, range):
            places, rest = np.divmod(numbers - self._kept.start, self._kept.step)
            return np.where((rest == 0) & (places >= 0) & (places < len(self)), places, -1)
        if not len(self):
            return np.full(numbers.shape, -1)
        places = np.minimum(np.searchsorted(self._kept, numbers), len(self) - 1)
        return np.where(self._kept[places] == numbers, places, -1)

    def within(self, start: int, stop: int) -> tuple[slice, slice | np.ndarray]:
        """Find what of a block of the split is kept.

        Args:
            start, stop: the block has the rows `start`..`stop` - 1.

        Returns:
            the places among the kept rows, and which rows of the block go there.
        """
        if isinstance(self._kept, range):
            first, last = (self._count_below(number) for number in (start, stop))
            part = self._kept[first:last]
            chosen = slice(part[0] - start, part[-1] - start + 1, part.step) if part else slice(0)
            return slice(first, last), chosen
        first, last = np.searchsorted(self._kept, [start, stop])
        return slice(first, last), self._kept[first:last] - start

    def _count_below(self, number: int) -> int:
        """How many of the kept rows, a range, have smaller numbers."""
        return min(max(0, -((self._kept.start - number) // self._kept.step)), len(self))
