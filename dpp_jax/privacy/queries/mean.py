"""The query for mean images."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from dpp_jax.privacy import checks, groups
from dpp_jax.privacy.clipping import clip_weights
from dpp_jax.privacy.queries.common import COUNT_WEIGHT, Query, along, power_of_two


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
            centered = along(weights.reshape(mask.shape), centered) * centered
        pixels = groups.sum_by_class(centered, labels, mask)
        counts = groups.sum_by_class(mask.astype(jnp.float32), labels, mask)
        weighted = (self.count_weight or 0.0) * counts
        weights, _ = clip_weights((pixels, weighted), mask.any(axis=1), self._group_bound(adder.rows))
        weights = weights[:, None]
        own_class = jnp.where(counts > 0, labels, self.classes)
        # Of one class, a group's pixels are at most `most` each, and so are its images.
        most = power_of_two(self.images_per_group)
        total = adder.exact(along(weights, pixels) * pixels / most, own_class)
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
