"""The frequency query: one release. What is made of it, stage `pretrain` makes."""

from collections.abc import Callable

from ml_collections import ConfigDict

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.privacy.budget import FREQUENCY, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.queries import FrequencyQuery
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages.central import asking
from dpp_jax.training import hosts


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger | None,
    private: Images,
    before_release: Callable[[], object],
    *,
    query: FrequencyQuery,
    releases: Releases,
    unit: Unit,
    share: Share = WHOLE,
) -> None:
    """Ask the query and save its noisy answer in release/.

    Args:
        config: as of the other queries; nothing of it is needed.
        workdir: to write to.
        keys: of the run.
        ledger: gets the query before its answer is used; None but in process 0.
        private: the private images, of this process's share.
        before_release: called when the ledger holds the query and nothing of it is in release/.
        query: what is asked.
        releases: the budget's query.
        unit: of privacy.
        share: the units of this process.
    """
    del config
    ((embedding, counts),) = asking.answers(
        keys,
        ledger,
        private,
        query=query,
        releases=releases,
        unit=unit,
        share=share,
        prepare=lambda images: images,
    )
    released = {'embedding': embedding} | ({} if counts is None else {'counts': counts})

    def release():
        arrays = artefacts.all_arrays(released)
        keys.bind_release(FREQUENCY, arrays)
        before_release()
        digests.note(workdir, 'frequency.npz', arrays)
        files.write_npz(workdir.frequency, **released)

    hosts.at_first(release)
