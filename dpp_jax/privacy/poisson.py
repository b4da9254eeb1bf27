"""Poisson sampling: every private image joins a batch by its own coin, whatever the others do.

The accountant's guarantee is for exactly this: independent inclusions with probability q, and a batch
of whatever size results. Batches are therefore padded to a fixed shape (so that nothing recompiles)
and never truncated, and a step with an empty batch is a step like any other.
"""

from collections.abc import Mapping
import dataclasses
import math

import numpy as np

from dpp_jax.privacy import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoissonSampler:
    """Poisson batches of `size` examples; each is a function of its index alone.

    Attributes:
        size: number of private examples, > 0.
        probability: inclusion probability q of each example in each batch, in (0, 1].
        key: 128 secret bits. Who knows them knows who was in which batch, and loses the
            amplification by sampling that the accountant counts on.
        public_size: N, a public constant > 0: what a noisy sum is divided by, and the size of a batch's
            arrays, come from it, and nothing but a batch comes from `size`. None: `size` itself is public.

    Raises:
        ValueError: a field is out of range.
    """

    size: int
    probability: float
    key: int = dataclasses.field(repr=False)
    public_size: int | None = None

    def __post_init__(self):
        checks.require('size', self.size, checks.is_whole(self.size, 1), 'a whole number, at least 1')
        is_size = self.public_size is None or checks.is_whole(self.public_size, 1)
        checks.require('public_size', self.public_size, is_size, 'a whole number, at least 1, or None')
        is_probability = checks.is_positive(self.probability) and self.probability <= 1
        checks.require('probability', self.probability, is_probability, 'in (0, 1]')
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
        predecessors: a run resumed after a crash uses the same batches. Its 53-bit uniforms
        hit q to 1e-16, where a float32 comparison would be off by up to 1e-7.
        """
        generator = np.random.Generator(np.random.Philox(key=self.key, counter=[0, 0, 0, batch]))
        return np.flatnonzero(generator.random(self.size) < self.probability)

    def capacity(self, multiple: int) -> int:
        """Return a padded batch size, divisible by `multiple`, that a batch exceeds with p < 2^-128.

        Bernstein's inequality: P(n >= qN + t) <= exp(-t² / (2 (qN(1-q) + t/3))). The sum
        of a batch is cut to a unit that follows from this size (`clipping.Grid`), so that the size must not
        depend on who is in the batch: as rarely as somebody guesses a key of 128 bits, it does.
        """
        variance = self.expected_size * (1 - self.probability)
        bound = 128 * math.log(2)
        excess = bound / 3 + math.sqrt((bound / 3) ** 2 + 2 * bound * variance)
        size = min(self._public_size, math.ceil(self.expected_size + excess))
        return math.ceil(size / multiple) * multiple


def fetch(
    arrays: Mapping[str, np.ndarray], indices: np.ndarray, capacity: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fetch the rows of a batch, padded to a fixed shape with zeros: a padding row holds nobody's data.

    Args:
        arrays: name → (N, ...), one row per private example.
        indices: (n,), who is in the batch.
        capacity: rows to pad to.

    Returns:
        name → (m, ...), the rows and then zeros, and the mask (m,) of the rows. m is the smallest
        multiple of `capacity` that holds all rows, at least `capacity`.
    """
    count = len(indices)
    size = capacity * max(1, math.ceil(count / capacity))
    padded = np.zeros(size, np.int64)
    padded[:count] = indices
    fetched = {}
    for name, array in arrays.items():
        # One copy. Rows of their own size would have to be copied once more, into the padded array.
        fetched[name] = array[padded]
        fetched[name][count:] = 0
    return fetched, np.arange(size) < count
