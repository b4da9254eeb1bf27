"""The frequency query: one release, and a generator of images that is fitted to it."""

from collections.abc import Callable, Sequence

from flax import traverse_util
import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.data.generator import Generator
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
from dpp_jax.training import hosts, progress

_SHOWN = 10  # images of each class, in the picture
_IMAGES, _LEARNING_RATE = 320, 2e-3  # of a step of the generator's fit


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger | None,
    private: Images,
    before_release: Callable[[], object],
    *,
    query: FrequencyQuery,
    generator: Generator,
    releases: Releases,
    unit: Unit,
    share: Share = WHOLE,
    class_names: Sequence[str] = (),
) -> None:
    """Ask the query, fit the generator, and save both and a picture in release/.

    Args:
        config: the settings.
        workdir: to write to.
        keys: of the run.
        ledger: gets the query before its answer is used; None but in process 0.
        private: the private images, of this process's share.
        before_release: called when the ledger holds the query and nothing of it is in release/.
        query: what is asked.
        generator: is fitted.
        releases: the budget's query.
        unit: of privacy.
        share: the units of this process.
        class_names: for the picture.
    """
    classes = config.data.classes
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
    own_keys = keys.of_part('frequency/generator')

    def release():
        weights = fit(query, generator, embedding, own_keys.random, config.frequency.generator_steps)
        released = {'embedding': embedding} | ({} if counts is None else {'counts': counts})
        flat = traverse_util.flatten_dict(weights, sep='/')
        released |= {f'{artefacts.GENERATOR}{name}': np.asarray(leaf) for name, leaf in flat.items()}
        labels = np.repeat(np.arange(classes), _SHOWN)
        images = generator.draw(weights, labels, own_keys.order, 0)
        picture = image_grid.rows_by_class(images, labels, classes, _SHOWN, class_names)
        arrays = artefacts.all_arrays(released)
        keys.bind_release(FREQUENCY, arrays)
        before_release()
        digests.note(workdir, 'frequency.npz', arrays)
        files.write_npz(workdir.frequency, **released)
        files.write_bytes(workdir.frequency.with_suffix('.png'), image_grid.png(picture))

    hosts.at_first(release)


def fit(query: FrequencyQuery, generator: Generator, embedding: np.ndarray, key: jax.Array, steps: int):
    """Fit the generator to mean features (classes, F): post-processing. Return its weights."""
    start, step = generator.fitting(
        embedding, query.embed, steps=steps, learning_rate=_LEARNING_RATE, images=_IMAGES
    )
    first, key = jax.random.split(key)
    state = start(first)
    with progress.bar(steps, 'generator', 'step', meets=False) as bar:
        for number in range(steps):
            state = step(state, jax.random.fold_in(key, number))
            if number % 10 == 9:
                jax.block_until_ready(state)  # so that the bar tells the truth
            bar.update()
    return jax.tree.map(np.asarray, state[0])
