"""Stage `generate`: labeled synthetic images. Post-processing: it costs no privacy."""

import collections
from collections.abc import Callable
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.diffusion import microbatch as parts_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.sizes import Sizes
from dpp_jax.training import devices, hosts, progress

PICTURE_COLUMNS = 12
_IN_FLIGHT = 2  # batches: an accelerator goes on while the older one is written to the disk


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    images: artefacts.SyntheticImages,
    model: Model,
    samplers: dict[str, Callable],
    sizes: Sizes,
) -> None:
    """Sample every set of images with the averaged weights of the fine-tuned model.

    Args:
        config: the settings.
        workdir: to read the model from.
        keys: of the run.
        images: where they go; process 0 alone writes there.
        model: whose weights are loaded.
        samplers: 'images' and 'classifier_images' → (denoise, z, label, noise) → images.
        sizes: what is in work at once.
    """
    settings = config.generate
    params = devices.replicate(
        hosts.from_first(lambda: artefacts.weights(workdir, 'finetune', model.shapes())['ema_params'])
    )
    hosts.at_first(images.record)
    guidance = {'images': settings.sampler, 'classifier_images': settings.classifier_sampler}
    for name, path in images.paths.items():
        if hosts.from_first(functools.partial(images.is_whole, path)):
            continue
        if name == 'images' and hosts.is_first():  # they may come from other keys than those in the tree
            files.remove_folder(images.png_tree)
        # With guidance the network takes each image twice.
        at_once = max(1, sizes.images // 2) if guidance[name].guidance else sizes.images
        unfinished = path.parent / f'.parts_{name}'
        pixels = _sample_all(
            sample_function(model, samplers[name], at_once),
            params,
            keys.of_part(f'generate/{name}').random,
            total=settings.images,
            batch_size=settings.batch_size,
            at_once=at_once,
            parts=unfinished,
            title='generate' if name == 'images' else 'generate (2)',
        )
        hosts.at_first(functools.partial(_save, path, pixels, model.classes, unfinished))
    if settings.png_tree:
        hosts.at_first(lambda: write_png_tree(images.png_tree, **images.load(images.paths['images'])))


def _save(path: Path, pixels: np.ndarray, classes: int, unfinished: Path) -> None:
    """Write images with labels and a picture; the parts that they were made of are not needed any more."""
    labels = image_labels(np.arange(len(pixels)), classes)
    picture = image_grid.rows_by_class(pixels, labels, classes, PICTURE_COLUMNS)
    files.write_bytes(path.with_suffix('.png'), image_grid.png(picture))
    files.write_npz(path, images=pixels, labels=labels)
    files.remove_folder(unfinished)


def image_labels(index: np.ndarray, classes: int) -> np.ndarray:
    """Return the labels of images by number: the classes in turn, so that every prefix is balanced."""
    return (index % classes).astype(np.int32)


def sample_function(model: Model, sampler: Callable, at_once: int) -> Callable:
    """Make (params, index (n,) int32, key) → (n, H, W, C) uint8, for devices.

    At most `at_once` images, in equal groups, go through the sampler together.

    All randomness of an image comes from its index, so that neither the batch size nor the number
    of devices nor a restart changes it (but for rounding).
    """

    def sample_group(params, index, key):
        image_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

        def noise(number):
            return jax.vmap(
                lambda image_key: jax.random.normal(jax.random.fold_in(image_key, number), model.image_shape)
            )(image_keys)

        images = sampler(
            model.denoiser(params), noise(0), index % model.classes, noise=lambda i: noise(i + 1)
        )
        return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def sample(params, index, key):
        groups = index.reshape(parts_lib.count(index.size, at_once), -1)
        images = jax.lax.map(lambda group: sample_group(params, group, key), groups)
        return images.reshape((-1,) + model.image_shape)

    return devices.parallel(sample, in_axes=(0, 0, None))


def sample_images(
    sample: Callable, params, key: jax.Array, index: np.ndarray, *, batch_size: int, at_once: int
) -> np.ndarray:
    """Sample the images of these numbers, (n,) → uint8 (n, H, W, C), by a `sample_function`."""
    batch, done = _whole_batch(len(index), batch_size, at_once), []
    for first in range(0, len(index), batch):
        rows = np.resize(index[first : first + batch], batch).astype(np.int32)  # the last are repeated
        done.append(devices.collect(sample(params, devices.deal(rows), key)))
    return np.concatenate(done)[: len(index)]


def _whole_batch(total: int, batch_size: int, at_once: int) -> int:
    """Return how many images all devices sample in a call: groups of equal size."""
    per_device = min(batch_size, -(-total // devices.count()))
    groups = -(-per_device // at_once)
    return devices.count() * groups * -(-per_device // groups)


def _sample_all(
    sample: Callable,
    params,
    key: jax.Array,
    *,
    total: int,
    batch_size: int,
    at_once: int,
    parts: Path,
    title: str,
) -> np.ndarray | None:
    """Sample images 0 .. total - 1, after the parts that an interrupted run left.

    Every process samples its rows of each batch; process 0 has all of them in the end, the others nothing.
    """
    batch = _whole_batch(total, batch_size, at_once)
    done = _read_parts(parts) if hosts.is_first() else []
    start = hosts.from_first(lambda: sum(len(part) for part in done))
    # A CPU gains nothing by a second batch, and whoever kills the process would lose two.
    in_flight, at_most = collections.deque(), 1 if jax.default_backend() == 'cpu' else _IN_FLIGHT

    def keep_oldest():
        first, rows = in_flight.popleft()
        images = devices.collect(rows)[: total - first]
        if hosts.is_first():
            done.append(images)
        # The others wait: for a store it may take long.
        hosts.at_first(lambda: files.write_npz(parts / f'{first:010d}.npz', images=images))
        bar.update(len(images))

    with progress.bar(total, title, 'image', start) as bar:
        for first in range(start, total, batch):
            index = np.arange(first, first + batch, dtype=np.int32)
            in_flight.append((first, sample(params, devices.deal(index), key)))
            if len(in_flight) == at_most:
                keep_oldest()
        while in_flight:
            keep_oldest()
    return np.concatenate(done)[:total] if done else None


def _read_parts(folder: Path) -> list[np.ndarray]:
    """Read the parts in order, as far as none is missing or damaged."""
    parts, expected = [], 0
    for path in (folder / name for name in files.names(folder) if name.endswith('.npz')):
        if int(path.stem) != expected:
            break
        try:
            parts.append(files.read_npz(path, '')['images'])
        except (ValueError, KeyError):
            print(f'{path} is damaged; making it again', flush=True)
            break
        expected += len(parts[-1])
    return parts


def write_png_tree(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write folder/<class>/<number>.png for every image; the folder appears when it is complete."""
    with files.whole_folder(folder) as unfinished:
        for label in np.unique(labels):
            (unfinished / str(label)).mkdir()
        with progress.bar(len(images), 'png files', 'image', compiles=False) as bar:
            for number, (image, label) in enumerate(zip(images, labels)):
                path = unfinished / str(label) / f'{number:07d}.png'
                path.write_bytes(files.png_with_note(path, image_grid.png(image)))
                bar.update()
