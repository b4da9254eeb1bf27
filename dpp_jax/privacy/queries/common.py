"""What all queries are, and how contributions are added up."""

import abc
from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpp_jax.privacy import checks
from dpp_jax.privacy.clipping import add_to_halves, join_halves, saturated_sum
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey, NoisySum

PyTree = Any
# Of a noisy class count, relative to the image's norm: 2 % more noise on the image, and on the count of a
# class noise of 5 σ images (MNIST in the paper's query: 26 of 600).
COUNT_WEIGHT = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How the rows of a sample are spread over devices, by public numbers.

    Attributes:
        rows: of a device's arrays, of a usual sample: all devices together have no more than the sum has
            room for (`rows` of `Query.sums`). A sample with more has larger arrays (`shares.pad`).
        axis: the devices' named axis; None: there is one device.
    """

    rows: int
    axis: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query(abc.ABC):
    """What is asked of the private images: sums per class, with a bound on what one unit adds to them.

    Attributes:
        classes: number of classes, ≥ 1.
        dimensions: d, the number of values of an image as the query gets it, ≥ 1.
        images_per_group: m ≥ 1, where the unit is a group of so many images; None: it is one image.

    Raises:
        ValueError: a field is out of range.
    """

    classes: int
    dimensions: int
    images_per_group: int | None = None

    def __post_init__(self):
        for name in ('classes', 'dimensions', 'images_per_group'):
            value = getattr(self, name)
            is_unset = name == 'images_per_group' and value is None
            checks.require(name, value, is_unset or checks.is_whole(value, 1), 'a whole number, at least 1')

    @property
    @abc.abstractmethod
    def sensitivity(self) -> float:
        """Δ: the largest L2 norm of one unit's contribution to the sums of all classes together."""

    def sums(
        self,
        images: jax.Array,
        labels: jax.Array,
        mask: jax.Array,
        rows: int | None = None,
        spread: Spread | None = None,
    ) -> PyTree:
        """Add up the contributions of a sample: with the same result, bit for bit, on any devices.

        Args:
            images: (n, ...) with `dimensions` values each, uint8 but where the query says otherwise; of
                groups, (n, m, ...).
            labels: (n,) int32 in [0, classes); of groups, (n, m).
            mask: as labels, bool, False for padding, whose images count as nothing.
            rows: a public number, from which the unit of the sum follows; None: n, where that is public.
            spread: over which devices the sample's rows are spread, of which n are here; None: all are here.

        Returns:
            float32 arrays with a leading axis of the classes.
        """
        rows = rows or len(images)
        adder = Adder(rows=rows, classes=self.classes, spread=spread or Spread(rows=rows))
        if self.images_per_group is None:
            return self._sums_of_images(images, labels, mask, adder)
        if self.images_per_group == 1:
            return self._sums_of_images(images[:, 0], labels[:, 0], mask[:, 0], adder)
        return self._sums_of_groups(images, labels, mask, adder)

    @abc.abstractmethod
    def _sums_of_images(
        self, images: jax.Array, labels: jax.Array, mask: jax.Array, adder: 'Adder'
    ) -> PyTree:
        """Compute `sums` where the unit is one image."""

    @abc.abstractmethod
    def _sums_of_groups(
        self, images: jax.Array, labels: jax.Array, mask: jax.Array, adder: 'Adder'
    ) -> PyTree:
        """Compute `sums` where the unit is a group of m > 1 images."""

    def _group_bound(self, rows: int) -> float:
        """Return the norm that groups are scaled down to: Δ, less what rounding may add.

        A norm has an error of 1e-5 at most; sums are rounded to float32 twice (see `clipping.Grid.bound`).
        """
        return self.sensitivity * (1 - 1e-5 - 4 * rows * 2.0**-24)

    @abc.abstractmethod
    def estimate(self, noisy: PyTree, expected_size: float) -> PyTree:
        """Compute what was asked for from the noisy sums.

        Args:
            noisy: what `sums` returned, with noise.
            expected_size: the expected number of images in the sample: a public constant.

        Returns:
            float32 arrays (classes, ...); of central images one, in [0, 1] but for the noise.
        """

    def counts(self, noisy: PyTree) -> jax.Array | None:
        """Return how many images of each class are in the sample, by the noisy sums: post-processing.

        Args:
            noisy: what `sums` returned, with noise.

        Returns:
            (classes,) float32, with noise, so perhaps below 0; None if the query does not count.
        """
        del noisy
        return None

    def noisy(
        self,
        mechanism: GaussianMechanism,
        noise_key: NoiseKey,
        expected_size: float,
        rows: int,
        *,
        spread: Spread | None = None,
        compiled: Callable[[Callable], Callable] = jax.jit,
        with_counts: bool = False,
    ) -> NoisySum:
        """Join the query with its noise: (index, batch, mask) → (estimate, ledger entry).

        `batch` is a dict of `images` and `labels`; they and `mask` are as for `sums`.

        Args:
            mechanism: adds the noise.
            noise_key: secret.
            expected_size: as for `estimate`.
            rows, spread: as for `sums`.
            compiled: makes a program of a function (batch, mask, keys, index).
            with_counts: the result is (estimate, `counts`).

        Raises:
            ValueError: the mechanism's sensitivity is below the query's.
        """
        is_covered = mechanism.sensitivity >= self.sensitivity
        allowed = f'at least {self.sensitivity!r}, the sensitivity of the query'
        checks.require('sensitivity', mechanism.sensitivity, is_covered, allowed)

        def then(noisy, *_):
            found = self.estimate(noisy, expected_size)
            return (found, self.counts(noisy)) if with_counts else found

        return mechanism.noisy(
            lambda batch, mask: (self.sums(batch['images'], batch['labels'], mask, rows, spread), None),
            noise_key,
            then=then,
            compiled=compiled,
        )


def along(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Give weights of the first axes of `values` as many axes as it has."""
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least `least`: to divide by it rounds nothing."""
    return 1 << (least - 1).bit_length()


def as_it_is(values: jax.Array) -> jax.Array:
    """Keep the compiler from joining what is computed before and after: in one program, but not in another.

    Contributions are cut to whole numbers, which a last bit decides: it must not depend on the rows at once.
    """
    return jax.lax.optimization_barrier(values)


def sum_in_order(values: jax.Array) -> jax.Array:
    """Add up float32 values along the last axis by halves: in the same order whatever the other axes are."""
    values = as_it_is(values)
    while (size := values.shape[-1]) > 1:
        half = size // 2
        rest = values[..., 2 * half :]
        values = jnp.concatenate([values[..., :half] + values[..., half : 2 * half], rest], axis=-1)
    return values[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adder:
    """Adds up values per class in [0, classes), over all devices; class `classes` is left out.

    Values are (n, ...), or (n, m, ...), and their own class (n,), or (n, m), as of `Query.sums`.
    """

    rows: int
    classes: int
    spread: Spread

    def counts(self, values: jax.Array, own_class: jax.Array) -> jax.Array:
        """Add up whole numbers, (classes, ...) int32: fewer than 2^31 ones."""
        total = self._here(values, own_class)
        return total if self.spread.axis is None else jax.lax.psum(total, self.spread.axis)

    def exact(self, values: jax.Array, own_class: jax.Array) -> jax.Array:
        """Add up values as if without error, and round once, (classes, ...) float32.

        The values of one row, together in [-1, 1], are cut, towards zero, so that no norm grows, to whole
        multiples of the smallest power of two with which an int32 holds the sum of `rows`. Sums of integers
        are exact in any order; float32 takes the result with a relative error of 2^-24. A sum of more rows is
        cut to what an int32 holds.
        """
        scale = self._scale
        whole = (values * scale).astype(jnp.int32)
        if len(values) <= self.spread.rows:  # all devices together have `rows` at most
            return self.counts(whole, own_class).astype(jnp.float32) / scale
        parts = [slice(start, start + self.rows) for start in range(0, len(values), self.rows)]
        sums = (self._here(whole[part], own_class[part]) for part in parts)
        return saturated_sum(sums, self.spread.axis).astype(jnp.float32) / scale

    def exact_of_parts(
        self, values_of: Callable[..., tuple[jax.Array, jax.Array]], *arrays: jax.Array, at_once: int
    ) -> jax.Array:
        """Add up as `exact`, with the values of a part of the rows in memory at a time.

        Args:
            values_of: (arrays of a part of the rows) → (values, their own class).
            arrays: leading axis of n rows; rows of zeros, which fill the last part, must have no own class.
            at_once: rows of a part, ≥ 1.
        """
        size = min(at_once, self.rows)  # whose sum an int32 holds
        # A loop of one turn would be compiled as none, which may round otherwise.
        parts = max(2, -(-len(arrays[0]) // size))

        def in_parts(array):
            more = [(0, parts * size - len(array)), *[(0, 0)] * (array.ndim - 1)]
            return jnp.pad(array, more).reshape(parts, size, *array.shape[1:])

        def visit(total, part):
            values, own_class = values_of(*part)
            return add_to_halves(total, self._here((values * self._scale).astype(jnp.int32), own_class)), None

        rows = tuple(map(in_parts, arrays))
        first = [array[0] for array in rows]
        shape = jax.eval_shape(lambda *part: self._here(*values_of(*part)), *first).shape
        zeros = jnp.zeros(shape, jnp.int32)
        total, _ = jax.lax.scan(visit, (zeros, zeros), rows)
        return join_halves(total, self.spread.axis).astype(jnp.float32) / self._scale

    @property
    def _scale(self) -> float:
        """Units in 1: the largest power of two with which an int32 holds the sum of `rows`."""
        return 2.0 ** math.floor(math.log2((2**31 - 1) / self.rows))

    def _here(self, values: jax.Array, own_class: jax.Array) -> jax.Array:
        """Add up the whole numbers of this device."""
        values = values.reshape((-1, *values.shape[own_class.ndim :]))
        return jax.ops.segment_sum(values, own_class.ravel(), self.classes + 1)[:-1]
