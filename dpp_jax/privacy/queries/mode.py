"""The query for the most frequent gray values."""

import dataclasses
import math

import jax.numpy as jnp

from dpp_jax.privacy import checks, groups
from dpp_jax.privacy.queries.common import Query, along, power_of_two


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
        most = power_of_two(self.images_per_group)  # votes of one group for a bin
        votes = [
            adder.exact(along(weights, values) * (values == b) / most, own_class) for b in range(self.bins)
        ]
        return most * jnp.stack(votes, axis=-1)

    def estimate(self, noisy, expected_size):
        """Return bin / (bins - 1): the first bin is black, the last white."""
        del expected_size
        return jnp.argmax(noisy, axis=-1).astype(jnp.float32) / (self.bins - 1)
