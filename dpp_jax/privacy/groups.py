"""The unit of privacy: one image, or a group of images (all images of a person).

A set is cut into groups by an integer beside each image. Neighbors differ in one group: all its images count
as nothing (zero-out), it is added or removed, or another group, of any size, is in its place. What makes a
group one unit:

| where | what is done |
|---|---|
| before anything else | at most m images of a group are kept (`choose`); release/ never sees the others |
| sampling | each group joins a batch by its own coin, with all its kept images (`fetch`) |
| query | a group's contribution is the sum of its images', clipped to the sensitivity as a whole |
| DP-SGD | a group's gradient is the sum of its images' gradients, clipped to C as a whole |

So one group changes a sum by at most what one image does where images are the unit, and the same accountant
counts. With m = 1, and each image a group, both units are the same.

One image more, less or other in a group changes the group's contribution from one vector within the bound to
another: that is "another group in the place of one", and has the ε of `replace_one`.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.privacy import checks, shares

IMAGE, GROUP = 'image', 'group'
UNITS = (IMAGE, GROUP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What is counted, by public numbers.

    Attributes:
        images: number of private images, > 0.
        groups: number of groups, > 0; None: the unit is one image.
        images_per_group: m, of which a group's sum is made at most, > 0; None: likewise.

    Raises:
        ValueError: a field is out of range, or only one of the last two is set.
    """

    images: int
    groups: int | None = None
    images_per_group: int | None = None

    def __post_init__(self):
        is_group = self.groups is not None or self.images_per_group is not None
        for name in ('images', 'groups', 'images_per_group') if is_group else ('images',):
            value = getattr(self, name)
            checks.require(name, value, checks.is_whole(value, 1), 'a whole number, at least 1')

    @property
    def name(self) -> str:
        """As ledgers record it."""
        return IMAGE if self.groups is None else GROUP

    def words(self) -> str:
        """For people."""
        if self.groups is None:
            return 'one image'
        return (
            f'one group; {self.groups:,} groups, of at most {self.images_per_group} image(s) each that count'
        )

    @property
    def size(self) -> int:
        """How many units there are: images or groups."""
        return self.groups or self.images

    @property
    def used_images(self) -> int:
        """How many images a sum over all units has: what a noisy sum is divided by, times q.

        Images and not groups: sum over number is then the mean of an image, whatever the unit.
        """
        return self.images if self.groups is None else min(self.images, self.groups * self.images_per_group)

    @property
    def places(self) -> int:
        """Places for images in the rows of all units; a group with fewer images leaves some free."""
        return self.size * (self.images_per_group or 1)


def choose(groups: np.ndarray, images_per_group: int, key: int) -> np.ndarray:
    """Choose the images of every group that are used.

    A group's choice depends on the key, the group's number and its own images' places, never on other groups.

    Args:
        groups: (N,) integers, the group that each image belongs to.
        images_per_group: m ≥ 1.
        key: 128 bits, the same for the whole run. The guarantee holds for any choice, also a known one.

    Returns:
        (groups, m) int64: numbers of images, ascending, and then -1 where a group has fewer. Groups are in
        the order of their numbers.
    """
    names, group_of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    images = np.argsort(group_of, kind='stable')
    members = np.full((len(names), images_per_group), -1, np.int64)
    for row, (name, start, end) in enumerate(zip(names, ends - counts, ends)):
        own = images[start:end]
        if len(own) > images_per_group:
            # Philox is counter-based: every group has random numbers of its own.
            counter = np.array([0, 0, 0, int(name) % 2**64], np.uint64)  # negative numbers, too
            generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
            own = np.sort(own[generator.permutation(len(own))[:images_per_group]])
        members[row, : len(own)] = own
    return members


def numbers(
    members: np.ndarray,
    indices: np.ndarray,
    capacity: int,
    share: shares.Share = shares.WHOLE,
    rows: int | None = None,
) -> np.ndarray:
    """Return the numbers of the images of a share's groups of a batch.

    Args:
        members: (groups, m), as `choose` returns it.
        indices: (n,), which groups are in the batch, of all shares.
        capacity, rows: in groups, as of `shares.pad`.
        share: whose groups are asked for.

    Returns:
        (size, m) int64; -1 in places of nobody.
    """
    units, mask = shares.pad(indices, capacity, share, rows)
    return np.where(mask[:, None], members[units], -1)


def take(
    arrays: Mapping[str, np.ndarray], images: np.ndarray, own: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Take the rows of images; places of nobody hold zeros, as those of padding.

    Args:
        arrays: name → (n, ...), one row per private image that is here.
        images: (size, m), as `numbers` returns it.
        own: (n,), ascending: the numbers of the images that are here; None: all are.

    Returns:
        name → (size, m, ...).
    """
    is_there = images >= 0
    places = images[is_there] if own is None else np.searchsorted(own, images[is_there])
    taken = {}
    for name, array in arrays.items():
        taken[name] = np.zeros((*images.shape, *array.shape[1:]), array.dtype)
        if len(places):  # a process may have no image at all
            taken[name][is_there] = array[places]
    return taken


def fetch(
    arrays: Mapping[str, np.ndarray],
    members: np.ndarray,
    indices: np.ndarray,
    capacity: int,
    share: shares.Share = shares.WHOLE,
    rows: int | None = None,
    own: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fetch the images of a share's groups of a batch.

    Args:
        arrays, own: as of `take`.
        members, indices, capacity, share, rows: as of `numbers`.

    Returns:
        name → (size, m, ...), and the mask (size, m) of the places that hold an image.
    """
    images = numbers(members, indices, capacity, share, rows)
    return take(arrays, images, own), images >= 0


def sum_by_class(values: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Add up each group's values of the same class.

    Args:
        values: (n, m, ...) float32.
        labels: (n, m).
        mask: (n, m), False for places of nobody.

    Returns:
        shaped as `values`: where an image is the first of its class in its group, the sum of that class;
        zeros elsewhere. So the norm of a group's row is that of its sums of all classes.
    """
    same = _of_one_class(labels, mask)
    is_first = jnp.argmax(same, axis=2) == jnp.arange(mask.shape[1])
    chosen = jnp.where(is_first[:, :, None] & same, 1.0, 0.0)
    # What rounding adds does no harm: the result is clipped as it is.
    return jnp.einsum('nij,nj...->ni...', chosen, values, precision=jax.lax.Precision.HIGHEST)


def norms_of_votes(values: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the norm of each group's histograms, of which each image and pixel adds one to a bin.

    The square counts how often two images of one class have the same bin: the histograms are never made.

    Args:
        values: (n, m, ...) int32, the bins.
        labels, mask: (n, m), as of `sum_by_class`.

    Returns:
        (n,) float32.
    """
    flat = values.reshape((*mask.shape, -1))
    alike = jax.lax.map(lambda i: jnp.sum(flat == flat[:, i, None], axis=2), jnp.arange(mask.shape[1]))
    of_images = jnp.sum(jnp.where(_of_one_class(labels, mask), jnp.moveaxis(alike, 0, 1), 0), axis=2)
    return jnp.sqrt(_sum(of_images))


def _sum(counts: jax.Array) -> jax.Array:
    """Add up int32 ≥ 0 along the last axis, float32: in two halves, as an int32 may not hold their sum."""
    high, low = jnp.sum(counts >> 12, axis=-1), jnp.sum(counts & 0xFFF, axis=-1)
    return high.astype(jnp.float32) * 2**12 + low.astype(jnp.float32)


def _of_one_class(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Whether two images of a group, (n, m, m), are there and have one class."""
    return (labels[:, :, None] == labels[:, None, :]) & mask[:, :, None] & mask[:, None, :]
