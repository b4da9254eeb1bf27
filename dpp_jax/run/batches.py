"""The batches of a mechanism: who is in which, and which of its rows this process has."""

import dataclasses

import numpy as np

from dpp_jax.data.images import Images
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.poisson import PoissonSampler
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run.keys import Keys, MechanismKeys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of one mechanism, the same in every process.

    Attributes:
        sampler: draws units: images, or groups.
        share: the units of this process.
        members: (groups, m), as of `groups.choose`, of all groups; None: the unit is one image.
        own: (n,), numbers of the images that this process has, as of `groups.take`; None: all, or images are
            the unit.
    """

    sampler: PoissonSampler
    share: Share = WHOLE
    members: np.ndarray | None = None
    own: np.ndarray | None = None


def of_mechanism(
    private: Images, unit: Unit, share: Share, keys: Keys, own_keys: MechanismKeys, probability: float
) -> Batches:
    """Make the batches of a mechanism.

    Args:
        private: the images of this process's share, in the order of their numbers among all; the groups are
            those of all images.
        unit: of privacy.
        share: of this process.
        keys: of the run.
        own_keys: of the mechanism.
        probability: q.

    Raises:
        ValueError: the process does not have the images of its share.
    """
    members, own = keys.members(private.groups, unit.images_per_group), None
    if members is None:
        size = private.total
        expected, is_own = share.size(size), True
    else:
        size = len(members)
        kept, wanted = private.kept.numbers(), share.images(private.groups)
        expected, is_own = len(wanted), np.array_equal(kept, wanted)
        own = kept if share.count > 1 else None
    if len(private.images) != expected or not is_own:
        raise ValueError(
            f'process {share.index} of {share.count} has {len(private.images)} private images; it must have '
            f'the {expected} of its share'
        )
    sampler = PoissonSampler(
        size=size,
        probability=probability,
        key=own_keys.sampling,
        public_size=unit.size,
        drawing=own_keys.drawing,
    )
    return Batches(sampler=sampler, share=share, members=members, own=own)
