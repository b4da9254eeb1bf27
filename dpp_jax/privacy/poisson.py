"""Poisson sampling: every private image joins a batch by its own coin, whatever the others do.

The accountant's guarantee is for exactly this: independent inclusions with probability q, and a batch
of whatever size results. Batches are therefore padded to a fixed shape (so that nothing recompiles)
and never truncated, and a step with an empty batch is a step like any other.

How a batch is drawn (`COUNT`). Toss N coins: their number of heads is binomial, and given that number every
set of so many images is as likely as any other. So the number is drawn first, and then as many distinct
images. That takes time in the batch's size, not in N:

| | from | how far it is from exact |
|---|---|---|
| the number n | 256 random bits, by a table of the binomial distribution (`_table`) | < 2^-128 |
| the images | 64 random bits each, values that would favor an image thrown away | exact |

The second column is the distance in total variation, of a batch: less than the chance to guess a key of 128
bits. Everything is made of whole numbers, which no machine rounds: the same key gives the same batch in every
process, and in a run that goes on elsewhere.

Runs that an earlier version began toss a coin for every image (`COINS`): the uniform of 53 bits hits q to
1e-16. They go on so, because a step that is taken again must draw the same batch.
"""

import bisect
from collections.abc import Mapping
import dataclasses
import functools
import math

import numpy as np

from dpp_jax.privacy import checks, shares

COINS, COUNT = 'coins', 'count'
DRAWINGS = (COINS, COUNT)
_FRACTION_BITS = 192  # of a probability in the table, relative to the most likely number's
# Above one image in so many a table of all images is faster than sorting the batch.
_DENSE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoissonSampler:
    """Poisson batches of `size` examples; each is a function of its index alone.

    Attributes:
        size: number of private examples, in [1, 2^63).
        probability: inclusion probability q of each example in each batch, in (0, 1].
        key: 128 secret bits. Who knows them knows who was in which batch, and loses the
            amplification by sampling that the accountant counts on.
        public_size: N, a public constant > 0: what a noisy sum is divided by, and the size of a batch's
            arrays, come from it, and nothing but a batch comes from `size`. None: `size` itself is public.
        drawing: in `DRAWINGS`; the same for all batches of a key.

    Raises:
        ValueError: a field is out of range.
    """

    size: int
    probability: float
    key: int = dataclasses.field(repr=False)
    public_size: int | None = None
    drawing: str = COUNT

    def __post_init__(self):
        checks.require('size', self.size, checks.is_whole(self.size, 1), 'a whole number, at least 1')
        is_size = self.public_size is None or checks.is_whole(self.public_size, 1)
        checks.require('public_size', self.public_size, is_size, 'a whole number, at least 1, or None')
        is_probability = checks.is_positive(self.probability) and self.probability <= 1
        checks.require('probability', self.probability, is_probability, 'in (0, 1]')
        checks.require('drawing', self.drawing, self.drawing in DRAWINGS, ' or '.join(map(repr, DRAWINGS)))
        if not checks.is_whole(self.key, 0, 2**128 - 1):  # its value must not be printed
            raise ValueError('key must be a whole number of 128 bits')

    @property
    def expected_size(self) -> float:
        """q N, the public constant that a noisy sum is divided by."""
        return self.probability * self._public_size

    @property
    def _public_size(self) -> int:
        return self.size if self.public_size is None else self.public_size

    def indices(self, batch: int) -> np.ndarray:
        """Draw the examples in batch number `batch`: sorted, distinct int64, shape (n,), n >= 0.

        Philox is a counter-based generator, so any batch can be drawn again without its
        predecessors: a run resumed after a crash uses the same batches.
        """
        bits = np.random.Philox(key=self.key, counter=[0, 0, 0, batch])
        if self.drawing == COINS:
            return np.flatnonzero(np.random.Generator(bits).random(self.size) < self.probability)
        count = _draw_count(bits, self.size, float(self.probability))
        if 2 * count <= self.size:
            return _draw_distinct(bits, count, self.size)
        stay = np.ones(self.size, bool)
        stay[_draw_distinct(bits, self.size - count, self.size)] = False
        return np.flatnonzero(stay)

    def capacity(self, multiple: int, share_count: int = 1) -> int:
        """Return a padded batch size, divisible by `multiple`, that a batch exceeds with p < 2^-128.

        With several shares (see `shares`) it is that of a share, the same for all: the largest has N / shares
        examples, rounded up.

        Bernstein's inequality: P(n >= qN + t) <= exp(-t² / (2 (qN(1-q) + t/3))). The sum
        of a batch is cut to a unit that follows from this size (`clipping.Grid`), so that the size must not
        depend on who is in the batch: as rarely as somebody guesses a key of 128 bits, it does.
        """
        largest = -(-self._public_size // share_count)
        expected = self.probability * largest
        variance = expected * (1 - self.probability)
        bound = 128 * math.log(2)
        excess = bound / 3 + math.sqrt((bound / 3) ** 2 + 2 * bound * variance)
        size = min(largest, math.ceil(expected + excess))
        return math.ceil(size / multiple) * multiple


def fetch(
    arrays: Mapping[str, np.ndarray],
    indices: np.ndarray,
    capacity: int,
    share: shares.Share = shares.WHOLE,
    rows: int | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fetch a share's rows of a batch, padded with zeros: a padding row holds nobody's data.

    Args:
        arrays: name → (N, ...), one row per private example; of the share's own, if there are several.
        indices: (n,), who is in the batch, of all shares.
        capacity, rows: as of `shares.pad`.
        share: whose rows are fetched.

    Returns:
        name → (m, ...), the rows and then zeros, and the mask (m,) of the rows; m as of `shares.pad`.
    """
    units, mask = shares.pad(indices, capacity, share, rows)
    places = share.places(units[mask])
    fetched = {}
    for name, array in arrays.items():
        fetched[name] = np.zeros((len(mask), *array.shape[1:]), array.dtype)
        if len(places):  # a process may have no row at all
            fetched[name][: len(places)] = array[places]
    return fetched, mask


def _draw_count(bits: np.random.Philox, size: int, probability: float) -> int:
    """Draw a number from Binomial(size, probability) with 256 random bits."""
    least, ends = _table(size, probability)
    word = functools.reduce(lambda high, low: (high << 64) | low, map(int, bits.random_raw(4)))
    return least + bisect.bisect_right(ends, (word * ends[-1]) >> 256)


@functools.lru_cache(maxsize=8)
def _table(size: int, probability: float) -> tuple[int, list[int]]:
    """Make the distribution of Binomial(size, probability), as whole numbers.

    Weights are probabilities in units of 2^-192 of the most likely number's. From there each follows from its
    neighbor by their exact ratio, rounded down, until one is 0: some 16 standard deviations out.

    The most by which a weight is wrong grows by one unit with each step. So all weights together, those that
    are left out too, are wrong by R² units at most for a table of R numbers, and their sum is 2^192 units at
    least: a distance of R² 2^-192 in total variation, below 2^-128 for all tables that fit into a memory.

    Returns:
        the least number in the table, and the running sum of the weights from there on.
    """
    heads, all_of_it = probability.as_integer_ratio()  # q is a fraction: exactly this one
    tails = all_of_it - heads
    mode = min(size, (size + 1) * heads // all_of_it)
    below, above, top = [], [], 1 << _FRACTION_BITS
    weight, number = top, mode
    while number > 0 and (weight := weight * number * tails // ((size - number + 1) * heads)):
        below.append(weight)
        number -= 1
    least, weight, number = number, top, mode
    while number < size and (weight := weight * (size - number) * heads // ((number + 1) * tails)):
        above.append(weight)
        number += 1
    ends, total = [], 0
    for weight in (*reversed(below), top, *above):
        total += weight
        ends.append(total)
    return least, ends


def _draw_distinct(bits: np.random.Philox, count: int, size: int) -> np.ndarray:
    """Draw `count` of [0, size), each set of so many with the same probability: sorted int64.

    They are the first distinct values of a stream of independent uniform ones: never more are drawn than are
    missing, so that none is drawn in vain.
    """
    if _DENSE * count > size:
        drawn, missing = np.zeros(size, bool), count
        while missing:
            drawn[_draw_uniform(bits, missing, size)] = True
            missing = count - np.count_nonzero(drawn)
        return np.flatnonzero(drawn)
    found = np.zeros(0, np.int64)
    while len(found) < count:
        found = np.unique(np.append(found, _draw_uniform(bits, count - len(found), size)))
    return found


def _draw_uniform(bits: np.random.Philox, count: int, size: int) -> np.ndarray:
    """Draw `count` values, or fewer, each uniform in [0, size): int64, from 64 random bits each.

    Of the 2^64 values of 64 bits, the last (2^64 mod size) would favor small numbers: they are left out.
    """
    words = bits.random_raw(count)
    words = words[words <= np.uint64(2**64 - 1 - 2**64 % size)]
    return (words % np.uint64(size)).astype(np.int64)
