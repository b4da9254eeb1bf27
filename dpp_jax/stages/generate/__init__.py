"""Stage `generate`: labeled synthetic images. Post-processing: it costs no privacy."""

from collections.abc import Callable, Sequence
import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.diffusion.class_gaussians import ClassGaussians
from dpp_jax.diffusion.model import Model
from dpp_jax.pages import card, release_page, settings_text
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.sizes import Sizes
from dpp_jax.stages.generate import exports, moments, over_finetuning, sampling
from dpp_jax.training import devices, hosts

PICTURE_COLUMNS = 12
# Keys of what is drawn from the class moments, by purpose of the images.
_MOMENTS_KEYS = {'images': 'generate/moments', 'classifier_images': 'generate/classifier_moments'}
# For programs that sample themselves.
image_labels, sample_function = sampling.image_labels, sampling.sample_function
sample_images = sampling.sample_images


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    images: artefacts.SyntheticImages,
    model: Model,
    gaussians: Callable[[], ClassGaussians | None],
    samplers: dict[str, Callable],
    sizes: Sizes,
    class_names: Sequence[str],
    last_step: int,
    privacy: dict[str, Any],
    drawing: artefacts.Drawing | None = None,
) -> None:
    """Sample every set of images with the averaged weights of the fine-tuned model, and write the page.

    With `generate.moments_share`, some images of every set are drawn from the class moments instead.

    Args:
        config: the settings.
        workdir: to read the model from.
        keys: of the run.
        images: where they go; process 0 alone writes there.
        model: whose weights are loaded.
        gaussians: gives what its denoiser is around.
        samplers: 'images', 'classifier_images' and 'over_finetuning' → (denoise, z, label, noise) → images.
        sizes: what is in work at once.
        class_names: in the order of labels.
        last_step: of fine-tuning.
        privacy: the statement, see `run.statement`.
        drawing: how images are drawn from the class moments; None: there are none.
    """
    settings = config.generate
    # First: it may refuse.
    labels = hosts.from_first(lambda: default_labels(config, workdir, settings.images))
    draw = None
    if settings.moments_share:
        draw = functools.partial(drawing.draw, hosts.from_first(lambda: drawing.load(workdir)))
    of_moments = moments.places(labels, model.classes, settings.moments_share)
    numbers = sampling.image_numbers(labels, model.classes)[~of_moments]
    weights = hosts.from_first(lambda: artefacts.weights(workdir, 'finetune', model.shapes())['ema_params'])
    params = devices.replicate((weights, gaussians()))
    over_finetuning.run(
        workdir,
        sampling.sample_function(model, samplers['over_finetuning'], sizes.images),
        lambda: keys.of_part('generate/over_finetuning').random,
        released=params,
        last_step=last_step,
        classes=model.classes,
        class_names=class_names,
        at_once=sizes.images,
    )
    hosts.at_first(images.record)
    guidance = {'images': settings.sampler, 'classifier_images': settings.classifier_sampler}
    for name, path in images.paths.items():
        if hosts.from_first(functools.partial(images.is_whole, path)):
            continue
        if name == 'images' and hosts.is_first():  # they may come from other keys than those in other forms
            for folder in images.exports.values():
                files.remove_folder(folder)
        # With guidance the network takes each image twice.
        at_once = max(1, sizes.images // 2) if guidance[name].guidance else sizes.images
        unfinished = path.parent / f'.parts_{name}'
        pixels = sampling.sample_all(
            sampling.sample_function(model, samplers[name], at_once),
            params,
            keys.of_part(f'generate/{name}').random,
            numbers,
            batch_size=settings.batch_size,
            at_once=at_once,
            parts=unfinished,
            title='generate' if name == 'images' else 'generate (2)',
        )
        show = functools.partial(over_finetuning.show, workdir, f'synthetic {name.replace("_", " ")}')
        key = keys.of_part(_MOMENTS_KEYS[name]).order if draw else None
        arrays = functools.partial(_arrays, pixels, labels, of_moments, draw, key)
        save = functools.partial(_save, path, arrays, class_names, unfinished)
        hosts.at_first(lambda show=show, save=save: show({last_step: save()}))
    hosts.at_first(lambda: _export(config, workdir, images, class_names, privacy))


def default_labels(config: ConfigDict, workdir: WorkDir, total: int) -> np.ndarray:
    """Return the labels of so many images, as `generate.class_counts` says.

    Args:
        config: the settings.
        workdir: of the query's counts.
        total: number of images.

    Returns:
        (total,) int32; in every beginning the classes have about the shares that they have in all. Of
        `generate.images` labels, each class has two at least.

    Raises:
        ValueError: the counts of the query are asked for, and not there.
    """
    settings, classes = config.generate, config.data.classes
    if settings.class_counts == 'balanced':
        return image_labels(np.arange(total), classes)
    shares = np.array(settings.class_shares, np.float64)
    if settings.class_counts == 'query':
        counts = artefacts.central_images(workdir).get('counts')
        if counts is None:
            raise ValueError(
                f"config.generate.class_counts is 'query', but {workdir.central_images} holds no counts: an "
                "earlier version released none. It must be 'balanced' or 'shares'"
            )
        # The noise may leave less than nothing of a class, and of all.
        shares = np.maximum(counts.sum(axis=0, dtype=np.float64), 0)
        shares = shares if shares.any() else np.ones(classes)
    return sampling.labels_by_share(total, sampling.with_two_of_each(shares, settings.images))


def _arrays(
    pixels: np.ndarray, labels: np.ndarray, of_moments: np.ndarray, draw: Callable | None, key: int | None
) -> dict[str, np.ndarray]:
    """Return what is written: images with labels and, if others are among the model's, where each comes from.

    Args:
        pixels: (m, H, W, C) uint8, of the model.
        labels: (n,) integers, of all.
        of_moments: (n,) bool, which images are drawn from the class moments.
        draw: how, see `moments.fill`; None: none is.
        key: 128 bits.
    """
    if draw is None:
        return {'images': pixels, 'labels': labels}
    images = moments.fill(pixels, of_moments, labels, draw, key)
    return {'images': images, 'labels': labels, 'source': of_moments.astype(np.uint8)}


def _save(
    path: Path, arrays: Callable[[], dict[str, np.ndarray]], class_names: Sequence[str], unfinished: Path
) -> np.ndarray:
    """Write images with labels and a picture; the parts that they were made of are not needed any more.

    Returns:
        The picture, uint8 (height, width, C).
    """
    found = arrays()
    shown = found['images'], found['labels'], len(class_names), PICTURE_COLUMNS, class_names
    picture = image_grid.rows_by_class(*shown)
    files.write_bytes(path.with_suffix('.png'), image_grid.png(picture))
    files.write_npz(path, **found, class_names=np.array(class_names))
    files.remove_folder(unfinished)
    return picture


def _export(
    config: ConfigDict,
    workdir: WorkDir,
    images: artefacts.SyntheticImages,
    class_names: Sequence[str],
    privacy: dict[str, Any],
) -> None:
    """Write the images in the other forms that are asked for, the card, and the page."""
    data = images.load(images.paths['images'])
    arrays = data['images'], data['labels'], class_names
    if config.generate.png_tree and not files.is_whole(images.png_tree):
        exports.write_png_tree(images.png_tree, *arrays)
    if config.generate.tfds and not files.is_whole(images.tfds):
        # No ε: what is released later may change it.
        origin = settings_text.drawn_from(data)
        description = (
            f'{len(data["images"]):,} synthetic images ({config.name}), {origin} with differential privacy. '
            'What holds: privacy_statement.md of the run'
        )
        exports.write_tfds(images.tfds, *arrays, name=config.name, description=description)
    if config.generate.dpimagebench and not files.is_whole(images.dpimagebench):
        exports.write_dpimagebench(images.dpimagebench, *arrays[:2])
    write_pages(workdir, images, class_names, privacy)


def write_pages(
    workdir: WorkDir, images: artefacts.SyntheticImages, class_names: Sequence[str], privacy: dict[str, Any]
) -> None:
    """Write card and page of release/, which say what the statement `privacy` says."""
    card.write(workdir, images, class_names, privacy)
    release_page.write(workdir, images, class_names, privacy)
