"""The frequency query: noisy means of random Fourier features, to which a generator can be fitted."""

import dataclasses
import functools
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

_FEATURES_AT_ONCE = 2**21  # values in memory
_DIRECTIONS_KEY = 0  # public: the same directions in every run
_MOST_DIMENSIONS = 2**16  # values of an image: so that products of whole numbers are exact
_MOST_DIRECTIONS = 2**28  # features times values: half a gigabyte of directions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyQuery(Query):
    """Mean of random Fourier features of every class (Rahimi & Recht 2007; as DP-MERF, Harder et al. 2021).

    With pixels x in [0, 1], h = `bandwidth` √d and F/2 public directions w_j, N(0, I / h²) but for rounding,
    an image adds

        φ(x) = √(2/F) (cos w_1·x, ..., sin w_1·x, ...)

    to its class. The norm of φ(x) is 1, whatever the image; φ(x)·φ(y) is near exp(-|x - y|² / 2 h²), so the
    mean of φ says where the images of a class are (its kernel mean embedding).

    Attributes:
        features: F, an even whole number in [2, 100,000].
        bandwidth: of the Gaussian kernel, over √d, in [1e-3, 1e3].
        class_counts: 'public': sums are divided by q N / classes; 'noisy': by the noisy count of the class,
            one more coordinate w = 0.2; contributions are then divided by √(1 + w²).
    """

    features: int = 10_000
    bandwidth: float = 0.366
    class_counts: str = 'public'

    def __post_init__(self):
        super().__post_init__()
        is_even = checks.is_whole(self.features, 2) and self.features % 2 == 0 and self.features <= 100_000
        checks.require('features', self.features, is_even, 'an even whole number in [2, 100000]')
        is_exact = self.dimensions <= _MOST_DIMENSIONS
        checks.require('dimensions', self.dimensions, is_exact, f'at most {_MOST_DIMENSIONS}')
        most = _MOST_DIRECTIONS // self.dimensions
        allowed = f'at most {most}, for images of {self.dimensions} values'
        checks.require('features', self.features, self.features <= most, allowed)
        is_width = checks.is_number(self.bandwidth, 1e-3, 1e3)
        checks.require('bandwidth', self.bandwidth, is_width, 'a number in [0.001, 1000]')
        is_known = self.class_counts in ('public', 'noisy')
        checks.require('class_counts', self.class_counts, is_known, "'public' or 'noisy'")

    @property
    def sensitivity(self) -> float:
        return 1.0 if self._counts_are_noisy else float(self.images_per_group or 1)

    @property
    def _counts_are_noisy(self) -> bool:
        return self.class_counts == 'noisy'

    @property
    def _weights(self) -> tuple[float, float]:
        """Weights of features and count in a contribution: their squares add up to 1."""
        count = COUNT_WEIGHT if self._counts_are_noisy else 0.0
        rest = math.hypot(1, count)
        return 1 / rest, count / rest

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Compute φ of images (..., d) float32 in [0, 1]: (..., F) float32."""
        return self._waves(255 * pixels)

    def _waves(self, pixels: jax.Array) -> jax.Array:
        """Compute φ of images (..., d) float32 in 0..255. Of whole numbers the products are exact."""
        directions, unit = _directions(self.features // 2, self.dimensions)
        products = jnp.matmul(pixels, jnp.asarray(directions), precision=jax.lax.Precision.HIGHEST)
        angles = as_it_is(products) * (unit / (255 * self.bandwidth * math.sqrt(self.dimensions)))
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return as_it_is(waves) * math.sqrt(2 / self.features)

    def _sums_of_images(self, images, labels, mask, adder):
        return self._sums_of_groups(images[:, None], labels[:, None], mask[:, None], adder)

    def _sums_of_groups(self, images, labels, mask, adder):
        # No coordinate of a unit's contribution is longer than Δ.
        most = power_of_two(round(self.sensitivity))
        bound = self._group_bound(adder.rows)
        factor = bound / (self.sensitivity * most)
        of_features, of_count = (factor * weight for weight in self._weights)

        def values_of(images, labels, mask):
            waves = self._waves(images.reshape((*mask.shape, -1)).astype(jnp.float32))
            counts = jnp.full((*mask.shape, 1), of_count, jnp.float32)
            each = jnp.concatenate([of_features * as_it_is(waves), counts], axis=-1)
            each = jnp.where(along(mask, each), each, 0)
            if mask.shape[1] > 1:
                each = groups.sum_by_class(each, labels, mask)
            # What is clipped is what is added up. An image alone is longer by rounding only, and a group
            # where counts are public likewise.
            each = as_it_is(each)
            norms = jnp.sqrt(sum_in_order(jnp.square(each).reshape((len(mask), -1))))
            weights, _ = clip_weights(norms[:, None], mask.any(axis=1), bound / most)
            each = along(as_it_is(weights)[:, None], each) * each
            return as_it_is(each), jnp.where(mask, labels, self.classes)

        at_once = max(1, _FEATURES_AT_ONCE // (labels.shape[1] * self.features))
        total = most * adder.exact_of_parts(values_of, images, labels, mask, at_once=at_once)
        sums, counts = total[:, :-1], total[:, -1]
        return (sums, counts) if self._counts_are_noisy else (sums,)

    def counts(self, noisy):
        return noisy[1] / self._weights[1] if self._counts_are_noisy else None

    def estimate(self, noisy, expected_size):
        """Return the mean features, (classes, F) float32."""
        counts = self.counts(noisy)
        # Fewer than one image in a class of the sample: whatever is divided by is as good as any.
        sizes = expected_size / self.classes if counts is None else jnp.maximum(counts, 1)[:, None]
        return noisy[0] / (sizes * self._weights[0])

    def noise(self, noise_multiplier: float, images: float) -> float:
        """Compute the standard deviation of noise in each value of `estimate`, of a class of so many."""
        return noise_multiplier * self.sensitivity / (images * self._weights[0])


@functools.lru_cache(maxsize=2)
def _directions(count: int, dimensions: int) -> tuple[np.ndarray, float]:
    """Return the public directions, the same in every run: whole numbers (d, F/2) float32, and their unit.

    Times the unit they are normal with variance 1, rounded. They are so small that float32 adds up their
    products with pixels 0..255 without error: in any order the same sum, on any machine.
    """
    generator = np.random.Generator(np.random.Philox(key=_DIRECTIONS_KEY))
    normal = generator.standard_normal((dimensions, count), np.float32)
    room = 2**24 / 255 - dimensions / 2  # of the absolute sum of whole numbers, before they are rounded
    unit = 2.0 ** math.ceil(math.log2(float(np.abs(normal).sum(axis=0, dtype=np.float64).max()) / room))
    return np.round(normal / np.float32(unit)), unit
