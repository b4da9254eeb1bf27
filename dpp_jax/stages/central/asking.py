"""Ask a query of the private images, as often as the budget has it."""

from collections.abc import Callable
import functools

import numpy as np

from dpp_jax.data.images import Images
from dpp_jax.privacy import groups, poisson
from dpp_jax.privacy.budget import Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.queries import Query, Spread
from dpp_jax.privacy.shares import Share
from dpp_jax.run import batches as batches_lib
from dpp_jax.run.keys import Keys
from dpp_jax.training import devices, hosts, progress


def answers(
    keys: Keys,
    ledger: Ledger | None,
    private: Images,
    *,
    query: Query,
    releases: Releases,
    unit: Unit,
    share: Share,
    prepare: Callable[[np.ndarray], np.ndarray],
) -> list[tuple]:
    """Return the query's noisy (estimate, counts) of every release, on the host.

    Args:
        keys: of the run.
        ledger: gets every release before its answer is used; None but in process 0.
        private: the private images, of this process's share.
        query: what is asked.
        releases: the budget's, of this query.
        unit: of privacy.
        share: the units of this process.
        prepare: of images (..., H, W, C) uint8, each by itself, what the query gets.
    """
    mechanism = releases.mechanism
    own_keys = keys.of_mechanism(mechanism.name, ledger)
    batches = batches_lib.of_mechanism(private, unit, share, keys, own_keys, mechanism.sampling_probability)
    sampler, arrays = batches.sampler, {'images': private.images, 'labels': private.labels}
    rows = sampler.capacity(1)
    capacity = sampler.capacity(len(devices.local()), share.count)
    ask = query.noisy(
        mechanism,
        own_keys.noise,
        mechanism.sampling_probability * unit.used_images,
        rows,
        spread=Spread(rows=capacity // len(devices.local()), axis=devices.AXIS),
        compiled=lambda release: devices.parallel(release, in_axes=(0, 0, None, None)),
        with_counts=True,
    )
    fetch = poisson.fetch
    if batches.members is not None:
        fetch = functools.partial(groups.fetch, members=batches.members, own=batches.own)
    found = []
    with progress.bar(releases.count, 'central', 'query') as bar:
        for number in range(releases.count):
            batch, mask = fetch(
                arrays, indices=sampler.indices(number), capacity=capacity, share=share, rows=rows
            )
            batch['images'] = prepare(batch['images'])
            answer, entry = ask(number, *devices.deal_own((batch, mask)))
            hosts.at_first(lambda entry=entry: ledger.append(entry))
            found.append(devices.first(answer))
            bar.update()
    return found
