"""The query for class moments: mean and second moment of vectors, around a point that is public already."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.privacy import checks, groups
from dpp_jax.privacy.clipping import clip_weights
from dpp_jax.privacy.queries.common import (
    COUNT_WEIGHT,
    Query,
    along,
    as_it_is,
    power_of_two,
    sum_in_order,
)

# Of a contribution's squared norm, that its mean has; the second moment has the rest.
MEAN_SHARE = 0.2
OFF_DIAGONAL = math.sqrt(2)  # weight of a product that stands for two equal ones
_PRODUCTS_AT_ONCE = 2**19  # values in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsQuery(Query):
    """Mean and second moment of every class, where an image is a vector of d numbers.

    With w = vector - center of its class, scaled down to norm B, and u = w / B, an image adds

        (√f u,  √(1 - f) v(u uᵀ)),  f = `MEAN_SHARE`,

    to its class: v has the diagonal and, times √2, what is above it, so that its norm is the Frobenius norm
    |u uᵀ| = |u|² ≤ 1. The norm is √(f |u|² + (1 - f) |u|⁴) ≤ 1, attained where |w| ≥ B. Equal noise on every
    coordinate of v is isotropic in the space of symmetric matrices.

    The center depends on no private image but through what was released before. A vector that is not finite
    counts as the center.

    Attributes:
        clip_norm: B in [1e-6, 1e6].
        class_counts: 'public': sums are divided by q N / classes; 'noisy': by the noisy count of the class,
            one more coordinate w = 0.2; contributions are then divided by √(1 + w²).
        center: (classes, d) finite float32; None: zeros.
    """

    clip_norm: float = 2.5
    class_counts: str = 'public'
    center: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        is_norm = checks.is_number(self.clip_norm, 1e-6, 1e6)
        checks.require('clip_norm', self.clip_norm, is_norm, 'a number in [1e-6, 1e6]')
        is_known = self.class_counts in ('public', 'noisy')
        checks.require('class_counts', self.class_counts, is_known, "'public' or 'noisy'")
        shape = (self.classes, self.dimensions)
        is_center = self.center is None or (
            isinstance(self.center, np.ndarray)
            and self.center.shape == shape
            and self.center.dtype == np.float32
            and bool(np.isfinite(self.center).all())
        )
        checks.require('center', self.center, is_center, f'finite float32 {shape}, or not set')

    @property
    def sensitivity(self) -> float:
        return 1.0 if self._counts_are_noisy else float(self.images_per_group or 1)

    @property
    def _counts_are_noisy(self) -> bool:
        return self.class_counts == 'noisy'

    @property
    def _weights(self) -> tuple[float, float, float]:
        """Weights of mean, second moment and count in a contribution: their squares add up to 1."""
        count = COUNT_WEIGHT if self._counts_are_noisy else 0.0
        rest = math.hypot(1, count)
        return math.sqrt(MEAN_SHARE) / rest, math.sqrt(1 - MEAN_SHARE) / rest, count / rest

    def _sums_of_images(self, images, labels, mask, adder):
        return self._sums_of_groups(images[:, None], labels[:, None], mask[:, None], adder)

    def _sums_of_groups(self, images, labels, mask, adder):
        # No coordinate of a unit's contribution is longer than Δ.
        most = power_of_two(round(self.sensitivity))
        bound = self._group_bound(adder.rows)

        def values_of(images, labels, mask):
            unit = self._unit_vectors(images, labels, mask)
            # A smaller norm pays for all rounding.
            each = self._contributions(unit, mask, bound / (self.sensitivity * most))
            if mask.shape[1] > 1:
                # What is clipped is what is added up, with all rounding. With public counts no group is
                # longer than Δ but by rounding.
                each = as_it_is(groups.sum_by_class(each, labels, mask))
                norms = jnp.sqrt(sum_in_order(jnp.square(each).reshape((len(mask), -1))))
                weights, _ = clip_weights(norms[:, None], mask.any(axis=1), bound / most)
                each = along(weights[:, None], each) * each
            return as_it_is(each), jnp.where(mask, labels, self.classes)

        width = labels.shape[1] * self.dimensions * (self.dimensions + 3) // 2
        at_once = max(1, _PRODUCTS_AT_ONCE // width)
        total = most * adder.exact_of_parts(values_of, images, labels, mask, at_once=at_once)
        means, seconds, counts = jnp.split(total, (self.dimensions, total.shape[1] - 1), axis=1)
        return (means, seconds, counts[:, 0]) if self._counts_are_noisy else (means, seconds)

    def _unit_vectors(self, images: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute u of every image, (n, m, d), of norm 1 at most; zeros of nobody."""
        vectors = images.reshape((*mask.shape, -1)).astype(jnp.float32)
        if self.center is not None:
            vectors = vectors - jnp.asarray(self.center)[jnp.minimum(labels, self.classes - 1)]
        norms = jnp.sqrt(sum_in_order(jnp.square(vectors)))
        scales, _ = clip_weights(norms.reshape((-1, 1)), mask.ravel(), self.clip_norm * (1 - 1e-5))
        scales = as_it_is(along(scales.reshape(mask.shape), vectors))
        # 0 · NaN is NaN: what does not count is replaced.
        return as_it_is(scales / self.clip_norm * jnp.where(scales > 0, vectors, 0))

    def _contributions(self, unit: jax.Array, mask: jax.Array, factor: float) -> jax.Array:
        """Compute `factor` times what each image adds to its class, (n, m, d + d (d + 1) / 2 + 1)."""
        rows, columns = np.triu_indices(self.dimensions)
        of_mean, of_second, of_count = (factor * weight for weight in self._weights)
        each = np.where(rows == columns, of_second, OFF_DIAGONAL * of_second).astype(np.float32)
        products = each * (unit[..., rows] * unit[..., columns])
        return jnp.concatenate([of_mean * unit, products, of_count * along(mask, unit)[..., :1]], axis=-1)

    def counts(self, noisy):
        return noisy[2] / self._weights[2] if self._counts_are_noisy else None

    def estimate(self, noisy, expected_size):
        """Return mean (classes, d) and second moment (classes, d, d) of vectors minus center."""
        of_mean, of_second, _ = self._weights
        counts, (rows, columns) = self.counts(noisy), np.triu_indices(self.dimensions)
        # Fewer than one image in a class of the sample: whatever is divided by is as good as any.
        sizes = expected_size / self.classes if counts is None else jnp.maximum(as_it_is(counts), 1)[:, None]
        inverse = as_it_is(1 / jnp.asarray(sizes, jnp.float32))
        each = np.where(rows == columns, 1, 1 / OFF_DIAGONAL) * (self.clip_norm**2 / of_second)
        means = as_it_is(noisy[0] * inverse) * (self.clip_norm / of_mean)
        off = as_it_is(noisy[1] * inverse) * each.astype(np.float32)
        whole = jnp.zeros((self.classes, self.dimensions, self.dimensions), jnp.float32)
        return means, whole.at[:, rows, columns].set(off).at[:, columns, rows].set(off)

    def noise(self, noise_multiplier: float, images: float) -> tuple[float, float]:
        """Compute the standard deviations of noise in `estimate`, for a class of so many images.

        Returns:
            of each value of the mean; and of each value off the diagonal of the second moment, τ: on the
            diagonal it is √2 τ.
        """
        of_mean, of_second, _ = self._weights
        noise = noise_multiplier * self.sensitivity * self.clip_norm / images
        return noise / of_mean, noise * self.clip_norm / of_second * math.sqrt(0.5)
