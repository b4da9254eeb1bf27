"""The same few images at several steps of fine-tuning: how it changes what the model makes.

From averaged weights on the way. Each is post-processing of the steps before it, which the ledger names.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages.generate import sampling
from dpp_jax.training import devices, hosts, progress, tensorboard
from dpp_jax.training.state import FlatParams

_IMAGES_PER_CLASS, _MOST_CLASSES = 2, 10


def run(
    workdir: WorkDir,
    sample: Callable,
    key: Callable[[], jax.Array],
    *,
    released,
    last_step: int,
    classes: int,
    class_names: Sequence[str],
    at_once: int,
) -> None:
    """Write release/over_finetuning.npz and .png, if there are snapshots; then these are not needed any more.

    Args:
        workdir: to read from and write to; in process 0.
        sample: a `sampling.sample_function`.
        key: gives that of the noise, the same for all steps.
        released: averaged weights of the released model with what its denoiser is around, on the devices.
        last_step: after which they are.
        classes: number of classes.
        class_names: of them.
        at_once: images that go through the sampler together on a device.
    """
    has_picture = hosts.from_first(workdir.over_finetuning.exists)
    steps = hosts.from_first(lambda: sorted(artefacts.snapshots(workdir)))
    if steps and not has_picture:
        labels = np.repeat(np.arange(min(classes, _MOST_CLASSES), dtype=np.int32), _IMAGES_PER_CLASS)
        numbers = sampling.image_numbers(labels, classes)
        flat, own_key, found = FlatParams.of(devices.first(released[0])), key(), []
        with progress.bar(len(steps) + 1, 'snapshots', 'step') as bar:
            for step in [*steps, None]:
                params = released
                if step is not None:
                    vector = hosts.from_first(lambda step=step: _read(workdir, step, flat.vector))
                    weights = jax.tree.unflatten(jax.tree.structure(flat), [vector]).tree()
                    params = devices.replicate(weights), released[1]
                images = sampling.sample_images(
                    sample, params, own_key, numbers, batch_size=len(numbers), at_once=at_once
                )
                found.append(images)
                bar.update()
        hosts.at_first(lambda: _save(workdir, np.stack(found), labels, [*steps, last_step], class_names))
    hosts.at_first(lambda: files.remove_folder(workdir.snapshots))


def show(workdir: WorkDir, name: str, pictures: Mapping[int, np.ndarray]) -> None:
    """Show pictures in TensorBoard beside the scalars of fine-tuning.

    Args:
        workdir: to write to. Without scalars, as after --stage=clean, nothing is written.
        name: of what they show.
        pictures: step → uint8 (height, width, C).
    """
    if workdir.metrics('finetune').exists():
        tensorboard.write_pictures(workdir.metrics('finetune'), {name: pictures})


def _read(workdir: WorkDir, step: int, like: np.ndarray) -> np.ndarray:
    """Read the averaged weights after a step of fine-tuning, (P,) float32."""
    path = artefacts.snapshots(workdir)[step]
    advice = f'Delete {workdir.snapshots}: only a picture is made of it'
    vector = files.read_npz(path, advice).get('vector')
    if vector is None or vector.shape != like.shape or vector.dtype != like.dtype:
        raise ValueError(f'{path} does not belong to this network. {advice}')
    return vector


def _save(
    workdir: WorkDir, images: np.ndarray, labels: np.ndarray, steps: list[int], class_names: Sequence[str]
) -> None:
    """Write images (steps, n, H, W, C): in the picture a row for each image, a column for each step."""
    rows = np.moveaxis(images, 0, 1).reshape((-1, *images.shape[2:]))
    picture = image_grid.beside_rows(
        image_grid.grid(rows, len(steps)), [class_names[label] for label in labels]
    )
    files.write_bytes(workdir.over_finetuning.with_suffix('.png'), image_grid.png(picture))
    files.write_npz(
        workdir.over_finetuning,
        images=images,
        labels=labels,
        steps=np.array(steps, np.int32),
        class_names=np.array(class_names),
    )
    columns = min(len(labels), _IMAGES_PER_CLASS * 5)
    show(
        workdir,
        'over finetuning',
        {step: image_grid.grid(of_step, columns) for step, of_step in zip(steps, images)},
    )
