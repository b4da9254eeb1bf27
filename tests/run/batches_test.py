"""A mechanism's batches: what each process must have, and the drawing that its keys were made for."""

import numpy as np
import pytest

from dpp_jax.data.images import Images
from dpp_jax.data.rows import Rows
from dpp_jax.privacy import poisson
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.shares import Share
from dpp_jax.run import batches
from dpp_jax.run.keys import Keys

COUNT = 30
PEOPLE = np.random.default_rng(1).integers(100, 112, COUNT)


def make(folder, images, share, groups=None, rows=None):
    keys = Keys(folder / 'keys.json', None)
    own_keys = keys.of_mechanism('dp_sgd', Ledger(folder / 'ledger.jsonl'))
    private = Images(
        images=np.zeros((images, 2, 2, 1), np.uint8),
        labels=np.zeros(images, np.int32),
        groups=groups,
        rows=Rows(COUNT, share.images(groups) if rows is None else rows),
    )
    size = {} if groups is None else {'groups': 20, 'images_per_group': 2}
    made = batches.of_mechanism(private, Unit(images=25, **size), share, keys, own_keys, 0.3)
    assert made.sampler.drawing == own_keys.drawing == poisson.COUNT
    return made


@pytest.mark.parametrize('groups', [None, PEOPLE], ids=['images', 'groups'])
def test_every_process_draws_from_the_number_of_all_units_which_need_not_be_the_public_one(tmp_path, groups):
    units = COUNT if groups is None else len(np.unique(groups))
    one = make(tmp_path, COUNT, Share(), groups)
    assert (one.sampler.size, one.own) == (units, None)
    numbers = []
    for index in range(4):
        share = Share(index, 4)
        size = (
            len(range(index, COUNT, 4))
            if groups is None
            else np.isin(groups, np.unique(groups)[index::4]).sum()
        )
        part = make(tmp_path, size, share, groups)
        assert part.sampler == one.sampler
        numbers.append(part.own)
        with pytest.raises(
            ValueError, match=f'process {index} of 4 has {size + 1} private .* the {size} of its'
        ):
            make(tmp_path, size + 1, share, groups)
        if groups is not None:  # as many, but others
            with pytest.raises(ValueError, match=f'process {index} of 4 has .* private images'):
                make(tmp_path, size, share, groups, np.arange(size))
    if groups is not None:
        np.testing.assert_array_equal(np.sort(np.concatenate(numbers)), np.arange(COUNT))
