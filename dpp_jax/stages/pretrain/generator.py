"""Fit the generator of images to the answer of the frequency query: post-processing, once."""

from collections.abc import Callable

from flax import traverse_util
import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.data.generator import Generator
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.training import hosts, progress

_SHOWN = 10  # images of each class, in the picture
_IMAGES, _LEARNING_RATE = 320, 2e-3  # of a step
_IN_FLIGHT = 10  # steps


def run(
    config: ConfigDict, workdir: WorkDir, keys: Keys, *, generator: Generator, embed: Callable, class_names=()
) -> None:
    """Save the generator's weights and a picture of its images in release/, unless they are there.

    Args:
        config: the settings.
        workdir: to read from and write to.
        keys: of the run.
        generator: is fitted.
        embed: pixels (n, d) in [0, 1] → the features (n, F) whose means were released.
        class_names: for the picture.
    """
    classes, own_keys = config.data.classes, keys.of_part('pretrain/generator')

    def release():
        if workdir.generator.exists():
            return
        embedding = artefacts.frequency(workdir)
        weights = fit(generator, embed, embedding, own_keys.random, config.pretrain.generator_steps)
        labels = np.repeat(np.arange(classes), _SHOWN)
        images = generator.draw(weights, labels, own_keys.order, 0)
        picture = image_grid.rows_by_class(images, labels, classes, _SHOWN, class_names)
        released = traverse_util.flatten_dict(weights, sep='/')
        digests.note(workdir, 'generator.npz', artefacts.all_arrays(released))
        files.write_npz(workdir.generator, **released)
        files.write_bytes(workdir.generator.with_suffix('.png'), image_grid.png(picture))

    hosts.at_first(release)


def fit(generator: Generator, embed: Callable, embedding: np.ndarray, key: jax.Array, steps: int) -> dict:
    """Fit a generator to mean features (classes, F); return its weights."""
    start, step = generator.fitting(embed, steps=steps, learning_rate=_LEARNING_RATE, images=_IMAGES)
    first, key = jax.random.split(key)
    state = start(first)
    with progress.bar(steps, 'generator', 'step', meets=False) as bar:
        for number in range(steps):
            state = step(state, jax.random.fold_in(key, number), embedding)
            if number % _IN_FLIGHT == 0:
                jax.block_until_ready(state)  # so that the bar tells the truth
            bar.update()
    return jax.tree.map(np.asarray, state[0])
