"""Which rows of a batch a process has, and how many rows its arrays have.

Units (images, or groups) are dealt to the processes like cards: unit u belongs to process u mod P, as its
number u div P. A process holds the images of its own units alone. Every process draws the whole batch, so
each knows how many rows the others have: all take arrays of one shape and the same number of microbatches,
and nobody has to ask. A process without a row takes part like any other.

Shapes follow from public numbers, but for a batch that has more rows than anybody expected (p < 2^-128 where
the number of units is public).
"""

import dataclasses
import math

import numpy as np

from dpp_jax.privacy import checks


@dataclasses.dataclass(frozen=True)
class Share:
    """The units of one of several processes.

    Attributes:
        index: p, which process, in [0, count).
        count: P, how many processes, > 0.

    Raises:
        ValueError: a field is out of range.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self):
        checks.require('count', self.count, checks.is_whole(self.count, 1), 'a whole number, at least 1')
        is_index = checks.is_whole(self.index, 0, self.count - 1)
        checks.require('index', self.index, is_index, f'a whole number in [0, {self.count - 1}]')

    def has(self, units: np.ndarray) -> np.ndarray:
        """Whether units, (n,) whole numbers, are of this share: (n,) bool."""
        return units % self.count == self.index

    def own(self, units: np.ndarray) -> np.ndarray:
        """Return those of the units, (n,), that are of this share, in the same order."""
        return units if self.count == 1 else units[self.has(units)]

    def images(self, groups: np.ndarray | None) -> slice | np.ndarray:
        """Return which images of a set a process of this share keeps: a slice, or ascending numbers, int64.

        Args:
            groups: (N,) integers, the group that each image belongs to; units are groups then, counted in the
                order of their numbers. None: units are images.
        """
        if groups is None:
            return slice(self.index, None, self.count)
        return np.flatnonzero(self.has(np.unique(groups, return_inverse=True)[1]))

    def places(self, own: np.ndarray) -> np.ndarray:
        """Return where this process keeps units of its own: their rows in its arrays."""
        return own // self.count

    def size(self, units: int) -> int:
        """Return how many of `units` units this share has."""
        return max(0, -(-(units - self.index) // self.count))

    def largest(self, units: np.ndarray) -> int:
        """Return the most of the units, (n,), that any share has."""
        if self.count == 1:
            return len(units)
        return int(np.bincount(units % self.count, minlength=self.count).max())


WHOLE = Share()  # of the only process


def pad(
    indices: np.ndarray, capacity: int, share: Share, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pad a share's units of a batch to a size that is the same in every share.

    Args:
        indices: (n,), the whole batch, of all shares.
        capacity: usual rows of a share, > 0.
        share: whose units are asked for.
        rows: of all shares, that a sum of a usual batch has room for (`clipping.Grid.rows`). A batch with
            more is told by its shape. None: as many as fit into the arrays.

    Returns:
        units (m,) int64, those of the share and then zeros; and the mask (m,) of the former. m is the
        smallest multiple of `capacity` that holds the rows of every share; at least twice `capacity` for a
        batch with more than `rows`.
    """
    is_large = rows is not None and len(indices) > rows
    parts = max(1 + is_large, math.ceil(share.largest(indices) / capacity))
    own = share.own(indices)
    units = np.zeros(parts * capacity, np.int64)
    units[: len(own)] = own
    return units, np.arange(len(units)) < len(own)
