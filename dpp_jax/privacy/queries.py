"""The queries for central images: contribution of an image, sensitivity, estimate (DP-FETA, section 4.1).

A query takes a Poisson sample of the private images and releases, for every class, the sum of its sampled
images' contributions, with Gaussian noise of standard deviation σ·Δ (`mechanism`). One image belongs to one
class. If its contribution counts as nothing (zero-out, N fixed), or if it is added or removed, all classes'
sums together change by at most the norm Δ of one contribution; if it is replaced, by at most 2 Δ:

| query | contribution of an image with d pixels in [0, 1] | sensitivity Δ |
|---|---|---|
| mean | pixels minus `pixel_center` c | sqrt(d) max(c, 1 - c) |
| mean, `clip_norm` B | the same, scaled down to norm B where it is longer | min(B, the above) |
| mean, `class_counts` noisy | one more coordinate w = 0.2 Δ, which counts the image | sqrt(Δ² + w²) |
| mode | d one-hot histograms of `bins` bins | sqrt(d) |

Where the unit is a group of up to m images (`groups`), its contribution is the sum of theirs, over all
classes, scaled down as a whole to norm Δ where it is longer. Δ is as above: noisy counts shrink with what
they count, and votes weigh less. But public counts cannot know what was scaled: there Δ is m times as large,
and nothing is longer.

The estimate divides by n_c = q N / classes, a public constant, or by the noisy counts: post-processing. (The
PyTorch code divides by the sampled count of the class, which the noise does not cover.)

A new query is one class here and one entry in `QUERIES`. Its fields are settings of `config.query` by name.
"""

import abc
from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.privacy import checks, groups
from dpp_jax.privacy.clipping import clip_weights, saturated_sum
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
    """A query for central images: one value for every pixel and class.

    Attributes:
        classes: number of classes, ≥ 1.
        dimensions: d, the number of values of an image, ≥ 1.
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
            images: (n, ...) uint8 with `dimensions` values each; of groups, (n, m, ...).
            labels: (n,) int32 in [0, classes); of groups, (n, m).
            mask: as labels, bool, False for padding, whose images count as nothing.
            rows: a public number, from which the unit of the sum follows; None: n, where that is public.
            spread: over which devices the sample's rows are spread, of which n are here; None: all are here.

        Returns:
            float32 arrays with a leading axis of the classes.
        """
        rows = rows or len(images)
        adder = _Adder(rows=rows, classes=self.classes, spread=spread or Spread(rows=rows))
        if self.images_per_group is None:
            return self._sums_of_images(images, labels, mask, adder)
        if self.images_per_group == 1:
            return self._sums_of_images(images[:, 0], labels[:, 0], mask[:, 0], adder)
        return self._sums_of_groups(images, labels, mask, adder)

    @abc.abstractmethod
    def _sums_of_images(
        self, images: jax.Array, labels: jax.Array, mask: jax.Array, adder: '_Adder'
    ) -> PyTree:
        """Compute `sums` where the unit is one image."""

    @abc.abstractmethod
    def _sums_of_groups(
        self, images: jax.Array, labels: jax.Array, mask: jax.Array, adder: '_Adder'
    ) -> PyTree:
        """Compute `sums` where the unit is a group of m > 1 images."""

    def _group_bound(self, rows: int) -> float:
        """Return the norm that groups are scaled down to: Δ, less what rounding may add.

        A norm has an error of 1e-5 at most; sums are rounded to float32 twice (see `clipping.Grid.bound`).
        """
        return self.sensitivity * (1 - 1e-5 - 4 * rows * 2.0**-24)

    @abc.abstractmethod
    def estimate(self, noisy: PyTree, expected_size: float) -> jax.Array:
        """Compute central images from the noisy sums.

        Args:
            noisy: what `sums` returned, with noise.
            expected_size: the expected number of images in the sample: a public constant.

        Returns:
            (classes, ...) float32, in [0, 1] but for the noise.
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
        """Join the query with its noise: (index, batch, mask) → (central images, ledger entry).

        `batch` is a dict of `images` and `labels`; they and `mask` are as for `sums`.

        Args:
            mechanism: adds the noise.
            noise_key: secret.
            expected_size: as for `estimate`.
            rows, spread: as for `sums`.
            compiled: makes a program of a function (batch, mask, keys, index).
            with_counts: the result is (central images, `counts`).

        Raises:
            ValueError: the mechanism's sensitivity is below the query's.
        """
        is_covered = mechanism.sensitivity >= self.sensitivity
        allowed = f'at least {self.sensitivity!r}, the sensitivity of the query'
        checks.require('sensitivity', mechanism.sensitivity, is_covered, allowed)

        def then(noisy, *_):
            images = self.estimate(noisy, expected_size)
            return (images, self.counts(noisy)) if with_counts else images

        return mechanism.noisy(
            lambda batch, mask: (self.sums(batch['images'], batch['labels'], mask, rows, spread), None),
            noise_key,
            then=then,
            compiled=compiled,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanQuery(Query):
    """The mean image of every class.

    Attributes:
        pixel_center: c in [0, 0.5], subtracted from pixels in [0, 1] before the sum and added back.
        clip_norm: B in [1e-6, 1e6], the L2 norm to which centered images are scaled down; None: no bound.
        class_counts: 'public': a class's sum is divided by q N / classes; 'noisy': by its noisy count.
    """

    pixel_center: float = 0.0
    clip_norm: float | None = None
    class_counts: str = 'public'

    def __post_init__(self):
        super().__post_init__()
        is_center = checks.is_number(self.pixel_center, 0, 0.5)
        checks.require('pixel_center', self.pixel_center, is_center, 'a number in [0, 0.5]')
        # Far from the ends of float32 (1e-38 and 3e38), also when it is squared.
        is_norm = self.clip_norm is None or checks.is_number(self.clip_norm, 1e-6, 1e6)
        checks.require('clip_norm', self.clip_norm, is_norm, 'a number in [1e-6, 1e6], or not set')
        is_known = self.class_counts in ('public', 'noisy')
        checks.require('class_counts', self.class_counts, is_known, "'public' or 'noisy'")

    @property
    def image_norm(self) -> float:
        """The largest norm of an image's pixels as they are summed."""
        longest = math.sqrt(self.dimensions) * max(self.pixel_center, 1 - self.pixel_center)
        return longest if self.clip_norm is None else min(longest, self.clip_norm)

    @property
    def count_weight(self) -> float | None:
        """w, with which an image counts in its class; None: classes are not counted."""
        return COUNT_WEIGHT * self.image_norm if self.class_counts == 'noisy' else None

    @property
    def sensitivity(self) -> float:
        if self.count_weight is None:
            return float(self.image_norm * (self.images_per_group or 1))
        # NumPy's, not math's: ledgers of earlier versions hold its last digit.
        return float(np.hypot(self.image_norm, self.count_weight))

    def _sums_of_images(self, images, labels, mask, adder):
        centered = images / jnp.float32(255) - self.pixel_center
        # Pays for the rounding of the pixels and, once, of each sum to float32 (see `clipping.Grid.bound`).
        shrink = 1 - 1e-6 - 2 * adder.rows * 2.0**-24
        weights = jnp.ones(len(images), jnp.float32)
        if self.clip_norm is not None:
            weights, _ = clip_weights(centered, mask, self.clip_norm * (1 - 1e-5))
        centered = (shrink * weights).reshape((-1,) + (1,) * (images.ndim - 1)) * centered
        own_class = jnp.where(mask, labels, self.classes)
        total = adder.exact(centered, own_class)
        if self.count_weight is None:
            return total
        counts = adder.counts(mask.astype(jnp.int32), own_class)
        return total, shrink * self.count_weight * counts.astype(jnp.float32)

    def _sums_of_groups(self, images, labels, mask, adder):
        centered = images / jnp.float32(255) - self.pixel_center
        if self.clip_norm is not None:  # each image, as if it were alone
            each = centered.reshape((-1, *images.shape[2:]))
            weights, _ = clip_weights(each, mask.ravel(), self.clip_norm)
            centered = _along(weights.reshape(mask.shape), centered) * centered
        pixels = groups.sum_by_class(centered, labels, mask)
        counts = groups.sum_by_class(mask.astype(jnp.float32), labels, mask)
        weighted = (self.count_weight or 0.0) * counts
        weights, _ = clip_weights((pixels, weighted), mask.any(axis=1), self._group_bound(adder.rows))
        weights = weights[:, None]
        own_class = jnp.where(counts > 0, labels, self.classes)
        # Of one class, a group's pixels are at most `most` each, and so are its images.
        most = _power_of_two(self.images_per_group)
        total = adder.exact(_along(weights, pixels) * pixels / most, own_class)
        if self.count_weight is None:
            return most * total
        numbers = adder.exact(weights * counts / most, own_class)
        return most * total, self.count_weight * most * numbers

    def counts(self, noisy):
        return None if self.count_weight is None else noisy[1] / self.count_weight

    def estimate(self, noisy, expected_size):
        if self.count_weight is None:
            return noisy / (expected_size / self.classes) + self.pixel_center
        total, weighted = noisy
        # Fewer than one image in a class of the sample: whatever is divided by is as good as any.
        sizes = jnp.maximum(weighted / self.count_weight, 1.0)
        return total / sizes.reshape((-1,) + (1,) * (total.ndim - 1)) + self.pixel_center


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeQuery(Query):
    """The most frequent gray value of every pixel and class.

    Attributes:
        bins: how many equal bins the gray values fall into, in [2, 256].
    """

    bins: int = 2

    def __post_init__(self):
        super().__post_init__()
        checks.require('bins', self.bins, checks.is_whole(self.bins, 2, 256), 'a whole number in [2, 256]')

    @property
    def sensitivity(self) -> float:
        return math.sqrt(self.dimensions)

    def _sums_of_images(self, images, labels, mask, adder):
        own_class = jnp.where(mask, labels, self.classes)
        values = (images.astype(jnp.int32) * self.bins) // 256
        votes = [adder.counts((values == b).astype(jnp.int32), own_class) for b in range(self.bins)]
        return jnp.stack(votes, axis=-1).astype(jnp.float32)

    def _sums_of_groups(self, images, labels, mask, adder):
        own_class = jnp.where(mask, labels, self.classes)
        values = (images.astype(jnp.int32) * self.bins) // 256
        norms = groups.norms_of_votes(values, labels, mask)
        bound = self._group_bound(adder.rows)
        weights = (bound / jnp.maximum(norms, bound))[:, None]
        most = _power_of_two(self.images_per_group)  # votes of one group for a bin
        votes = [
            adder.exact(_along(weights, values) * (values == b) / most, own_class) for b in range(self.bins)
        ]
        return most * jnp.stack(votes, axis=-1)

    def estimate(self, noisy, expected_size):
        """Return bin / (bins - 1): the first bin is black, the last white."""
        del expected_size
        return jnp.argmax(noisy, axis=-1).astype(jnp.float32) / (self.bins - 1)


QUERIES: dict[str, type[Query]] = {'mean': MeanQuery, 'mode': ModeQuery}
# Settings that promise less noise or other sums: a query that cannot keep them must not drop them silently.
_PROMISES: Mapping[str, Any] = {'clip_norm': None, 'class_counts': 'public'}


def make_query(
    kind: str,
    *,
    classes: int,
    dimensions: int,
    settings: Mapping[str, Any],
    images_per_group: int | None = None,
) -> Query:
    """Make the query of this kind.

    Args:
        kind: a name in `QUERIES`.
        classes: number of classes.
        dimensions: values of an image.
        settings: by name; those that are fields of the query's class are used.
        images_per_group: as of `Query`.

    Raises:
        ValueError: the kind is unknown, a setting is out of range, or the query cannot use it.
    """
    names = ' or '.join(repr(name) for name in QUERIES)
    checks.require('kind', kind, kind in QUERIES, names)
    query = QUERIES[kind]
    own = {field.name for field in dataclasses.fields(query)}
    for name, unused in _PROMISES.items():
        if name not in own and settings.get(name, unused) != unused:
            raise ValueError(
                f'{name} is {settings[name]!r}, which the {kind} query cannot use; it must be {unused!r}, or '
                'another kind be chosen'
            )
    used = {name: value for name, value in settings.items() if name in own}
    return query(classes=classes, dimensions=dimensions, images_per_group=images_per_group, **used)


def _along(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Give weights of the first axes of `values` as many axes as it has."""
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))


def _power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least `least`: to divide by it rounds nothing."""
    return 1 << (least - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Adder:
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
        scale = 2.0 ** math.floor(math.log2((2**31 - 1) / self.rows))
        whole = (values * scale).astype(jnp.int32)
        if len(values) <= self.spread.rows:  # all devices together have `rows` at most
            return self.counts(whole, own_class).astype(jnp.float32) / scale
        parts = [slice(start, start + self.rows) for start in range(0, len(values), self.rows)]
        sums = (self._here(whole[part], own_class[part]) for part in parts)
        return saturated_sum(sums, self.spread.axis).astype(jnp.float32) / scale

    def _here(self, values: jax.Array, own_class: jax.Array) -> jax.Array:
        """Add up the whole numbers of this device."""
        values = values.reshape((-1, *values.shape[own_class.ndim :]))
        return jax.ops.segment_sum(values, own_class.ravel(), self.classes + 1)[:-1]
