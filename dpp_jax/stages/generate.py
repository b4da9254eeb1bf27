"""Stage `generate`: labelled synthetic images. Post-processing: it costs no privacy."""

import collections
from collections.abc import Callable
from pathlib import Path
import shutil
import zipfile

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.data import image_grid
from dpp_jax.diffusion import microbatch as parts_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.run import folder as workdir_lib
from dpp_jax.run import sizes
from dpp_jax.training import checkpoint, devices, progress

PICTURE_COLUMNS = 12
_SETTINGS = 'settings.json'
_MOVE = 'move {folder} away: the same command then makes new images from the released model'
_IN_FLIGHT = 2  # batches: an accelerator goes on while the older one is written to the disk


def files(config: ConfigDict, workdir: workdir_lib.WorkDir) -> dict[str, Path]:
    """Purpose of the images → file: 'images' for FID and use, 'classifier_images' if separate."""
    folder = workdir.release / 'synthetic'
    names = ['images']
    if config.generate.separate_classifier_images:
        names.append('classifier_images')
    return {name: folder / f'{name}.npz' for name in names}


def check(config: ConfigDict, workdir: workdir_lib.WorkDir) -> None:
    """Raise a ValueError if the images that are there, or begun, were made with other settings."""
    folder = workdir.release / 'synthetic'
    path = folder / _SETTINGS
    if not path.exists():
        return
    recorded = workdir_lib.read_json(path, f'Restore it; or {_MOVE.format(folder=folder)}')
    found = workdir_lib.differences(recorded, _settings(config), workdir_lib.FREE_SETTINGS)
    if found:
        raise ValueError(
            f'{files(config, workdir)["images"]} was made, or begun, with other settings:\n  '
            + '\n  '.join(found)
            + f'\nUse those settings; or {_MOVE.format(folder=folder)}.'
        )


def _settings(config: ConfigDict) -> dict:
    """The settings of a set of images, by their full names."""
    return workdir_lib.flatten({'generate': config.generate})


def identity(config: ConfigDict, workdir: workdir_lib.WorkDir) -> dict[str, list[int]] | None:
    """Name of every file → checksums of its arrays; None if it cannot be read. Takes no time."""
    found = {}
    for name, path in files(config, workdir).items():
        try:
            with zipfile.ZipFile(path) as file:
                found[name] = [member.CRC for member in file.infolist()]
        except workdir_lib.DAMAGE:
            return None
    return found


def load(path: Path) -> dict[str, np.ndarray]:
    """`images` (n, H, W, C) uint8 and `labels` (n,) of one of `files`."""
    return workdir_lib.load_npz(path, 'Run --stage=generate: it makes a damaged file again')


def is_done(config: ConfigDict, workdir: workdir_lib.WorkDir) -> bool:
    png_tree = workdir.release / 'synthetic' / 'png'
    if config.generate.png_tree and not png_tree.exists():
        return False
    return all(_is_whole(path) for path in files(config, workdir).values())


def _is_whole(path: Path) -> bool:
    """Whether all of `path` is there, by its checksums. The same keys make a damaged file again.

    Files appear when they are complete, but not every file system keeps that order when power fails.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is None:
                return True
    except (*workdir_lib.DAMAGE, NotImplementedError):  # of a compression that zipfile does not know
        pass
    print(f'{path} is damaged; --stage=generate makes it again', flush=True)
    return False


def run(
    config: ConfigDict,
    workdir: workdir_lib.WorkDir,
    model: Model,
    samplers: dict[str, Callable],
) -> None:
    """Sample every set of images with the averaged weights of the fine-tuned model.

    `samplers` maps 'images' (and 'classifier_images') to (denoise, z, label, noise) → images.
    """
    params = devices.replicate(load_weights(workdir, model)['ema_params'])
    _record(config, workdir)
    settings = {'images': config.generate.sampler, 'classifier_images': config.generate.classifier_sampler}
    for name, path in files(config, workdir).items():
        if _is_whole(path):
            continue
        if name == 'images':  # they may come from other keys than those in the tree
            shutil.rmtree(workdir.release / 'synthetic' / 'png', ignore_errors=True)
        key = workdir.keys(f'generate/{name}', config.seed).noise
        at_once = images_at_once(config, settings[name])
        images = _sample_all(
            sample_function(model, samplers[name], at_once),
            params,
            key,
            total=config.generate.images,
            batch_size=config.generate.batch_size,
            at_once=at_once,
            parts=path.parent / f'.parts_{name}',
            title='generate' if name == 'images' else 'generate (2)',
        )
        labels = image_labels(np.arange(len(images)), model.classes)
        picture = image_grid.rows_by_class(images, labels, model.classes, PICTURE_COLUMNS)
        workdir_lib.write_bytes(path.with_suffix('.png'), image_grid.png(picture))
        workdir_lib.write_npz(path, images=images, labels=labels)
        shutil.rmtree(path.parent / f'.parts_{name}', ignore_errors=True)
    if config.generate.png_tree:
        write_png_tree(workdir.release / 'synthetic' / 'png', **load(files(config, workdir)['images']))


def _record(config: ConfigDict, workdir: workdir_lib.WorkDir) -> None:
    """Bind the images to the settings that make them, before the first one is there."""
    path = workdir.release / 'synthetic' / _SETTINGS
    if not path.exists():
        workdir_lib.write_json(path, _settings(config))


def load_weights(workdir: workdir_lib.WorkDir, model: Model) -> dict:
    """`params` and `ema_params` of the fine-tuned model; errors as of `checkpoint.load_model`."""
    shapes = model.shapes()
    return checkpoint.load_model(
        workdir.release / 'model' / 'finetune', {'params': shapes, 'ema_params': shapes}
    )


def images_at_once(config: ConfigDict, sampler: ConfigDict) -> int:
    """How many images go through a sampler together; with guidance the network takes each twice."""
    images = sizes.choose(config).images
    return max(1, images // 2) if sampler.guidance else images


def image_labels(index: np.ndarray, classes: int) -> np.ndarray:
    """Label of image number `index`: the classes in turn, so that every prefix is balanced."""
    return (index % classes).astype(np.int32)


def sample_function(model: Model, sampler: Callable, at_once: int) -> Callable:
    """(params, index (n,) int32, key) → (n, H, W, C) uint8, for devices.

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
) -> np.ndarray:
    """Images 0 .. total - 1, going on after the parts that an interrupted run left."""
    per_device = min(batch_size, -(-total // devices.count()))
    groups = -(-per_device // at_once)
    batch = devices.count() * groups * -(-per_device // groups)  # groups of equal size
    done = _read_parts(parts)
    start = sum(len(part) for part in done)
    # A CPU gains nothing by a second batch, and whoever kills the process would lose two.
    in_flight, at_most = collections.deque(), 1 if jax.default_backend() == 'cpu' else _IN_FLIGHT

    def keep_oldest():
        first, rows = in_flight.popleft()
        images = devices.collect(rows)[: total - first]
        workdir_lib.write_npz(parts / f'{first:010d}.npz', images=images)
        done.append(images)
        bar.update(len(images))

    with progress.bar(total, title, 'image', start) as bar:
        for first in range(start, total, batch):
            index = np.arange(first, first + batch, dtype=np.int32)
            in_flight.append((first, sample(params, devices.deal(index), key)))
            if len(in_flight) == at_most:
                keep_oldest()
        while in_flight:
            keep_oldest()
    return np.concatenate(done)[:total]


def _read_parts(folder: Path) -> list[np.ndarray]:
    """The parts in order, as far as none is missing or damaged."""
    parts, expected = [], 0
    for path in sorted(folder.glob('[0-9]*.npz')):
        if int(path.stem) != expected:
            break
        try:
            with np.load(path) as data:
                parts.append(data['images'])
        except workdir_lib.DAMAGE:
            print(f'{path} is damaged; it is made again', flush=True)
            break
        expected += len(parts[-1])
    return parts


def write_png_tree(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """folder/<class>/<number>.png for every image; the folder appears when it is complete."""
    temporary = workdir_lib.unfinished(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    for label in np.unique(labels):
        (temporary / str(label)).mkdir(parents=True)
    with progress.bar(len(images), 'png files', 'image') as bar:
        for number, (image, label) in enumerate(zip(images, labels)):
            (temporary / str(label) / f'{number:07d}.png').write_bytes(image_grid.png(image))
            bar.update()
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
