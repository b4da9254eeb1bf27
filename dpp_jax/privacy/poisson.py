"""Poisson sampling: every private image joins a batch by its own coin, whatever the others do.

The accountant's guarantee is for exactly this: independent inclusions with probability q, and a batch
of whatever size results. Batches are therefore padded to a fixed shape (so that nothing recompiles)
and never truncated, and a step with an empty batch is a step like any other.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """Poisson batches of `size` examples, a function of the batch's index alone.

    Attributes:
        size: number N of private examples, > 0.
        probability: inclusion probability q of each example in each batch, in (0, 1].
        key: 128 secret bits. Who knows them knows who was in which batch, and loses the
            amplification by sampling that the accountant counts on.
    """

    size: int
    probability: float
    key: int = dataclasses.field(repr=False)

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f'size is {self.size}; sampling needs at least 1 example')
        if not 0 < self.probability <= 1:
            raise ValueError(f'probability is {self.probability}; it must be in (0, 1]')
        if not 0 <= self.key < 2**128:
            raise ValueError('key must be an integer of 128 bits')

    @property
    def expected_size(self) -> float:
        """q N, the public constant that a noisy sum is divided by."""
        return self.probability * self.size

    def indices(self, batch: int) -> np.ndarray:
        """The examples in batch number `batch`: sorted, distinct int64, shape (n,), n >= 0.

        Philox is a counter-based generator, so any batch can be drawn again without its
        predecessors: a run resumed after a crash uses the same batches. Its 53-bit uniforms
        hit q to 1e-16, where a float32 comparison would be off by up to 1e-7.
        """
        generator = np.random.Generator(np.random.Philox(key=self.key, counter=[0, 0, 0, batch]))
        return np.flatnonzero(generator.random(self.size) < self.probability)

    def capacity(self, multiple: int) -> int:
        """A padded batch size, divisible by `multiple`, that a batch exceeds with p < 1e-12.

        Bernstein's inequality: P(n >= qN + t) <= exp(-t² / (2 (qN(1-q) + t/3))). A batch that
        is larger all the same is padded to a larger shape: it costs a compilation, not privacy.
        """
        variance = self.expected_size * (1 - self.probability)
        bound = math.log(1e12)
        excess = bound / 3 + math.sqrt((bound / 3) ** 2 + 2 * bound * variance)
        size = min(self.size, math.ceil(self.expected_size + excess))
        return math.ceil(size / multiple) * multiple


def pad(indices: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices padded with zeros, and the mask of the real ones, both of shape (m,).

    m is the smallest multiple of `capacity` that holds all indices, at least `capacity`.
    """
    size = capacity * max(1, math.ceil(len(indices) / capacity))
    padded = np.zeros(size, np.int64)
    padded[: len(indices)] = indices
    return padded, np.arange(size) < len(indices)
