"""The synthetic images in forms that other programs read: PNG files, a set for TFDS, DPImageBench's file."""

from collections.abc import Sequence
from pathlib import Path
import re

import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.training import progress

_SHARD_BYTES = 64 * 2**20  # of pixels, in a file for TFDS
_LONGEST = 80  # letters of a folder's name
_IMAGES_AT_ONCE = 1000  # that are handed to TFDS
# Names that Windows keeps for itself, also with an ending.
_RESERVED = {'con', 'prn', 'aux', 'nul', *(f'{name}{n}' for name in ('com', 'lpt') for n in range(1, 10))}


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a name for the folder of each class, which any file system takes; all are different.

    Numbers get zeros in front, so that their order as texts is that of the labels.
    """
    if all(name.isdecimal() for name in names):
        width = max(map(len, names))
        names = [name.zfill(width) for name in names]
    found, taken = [], set()
    for label, name in enumerate(names):
        safe = re.sub(r'[^\w\-.,()+ ]', '_', name)[:_LONGEST].strip(' .') or 'class'
        if safe.partition('.')[0].casefold() in _RESERVED:
            safe = f'_{safe}'
        while safe.casefold() in taken:  # some file systems do not tell A from a
            safe = f'{safe}_{label}'
        taken.add(safe.casefold())
        found.append(safe)
    return found


def write_png_tree(folder: Path, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Write folder/<class name>/<number>.png for every image; the folder appears when it is complete."""
    names = folder_names(class_names)
    with files.whole_folder(folder) as unfinished:
        for label in np.unique(labels):
            (unfinished / names[label]).mkdir()
        with progress.bar(len(images), 'png files', 'image', compiles=False) as bar:
            for number, (image, label) in enumerate(zip(images, labels)):
                path = unfinished / names[label] / f'{number:07d}.png'
                path.write_bytes(files.png_with_note(path, image_grid.png(image)))
                bar.update()


def write_tfds(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    name: str,
    description: str,
) -> None:
    """Write a folder for `tfds.builder_from_directory`: split train, features image and label.

    In the array_record format, which is written and read without TensorFlow.

    Args:
        folder: appears when it is complete.
        images: (n, H, W, C) uint8.
        labels: (n,) integers.
        class_names: in the order of labels.
        name: of the set.
        description: of the set, for people.
    """
    import tensorflow_datasets as tfds

    note = files.note_of(folder / 'file')
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=images.shape[1:], dtype=np.uint8, encoding_format='png'),
            'label': tfds.features.ClassLabel(names=[' '.join(each.split()) for each in class_names]),
        }
    )
    with files.whole_folder(folder) as unfinished:
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=_tfds_name(name),
            version=tfds.core.Version('1.0.0'),
            data_dir=str(unfinished),
            module_name='',
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            description=f'{note}\n\n{description}' if note else description,
            features=features,
        )
        per_shard = max(1, _SHARD_BYTES // images[0].nbytes)
        writer = tfds.core.SequentialWriter(info, per_shard, file_format='array_record')
        writer.initialize_splits(['train'])
        with progress.bar(len(images), 'tfds', 'image', compiles=False) as bar:
            for start in range(0, len(images), _IMAGES_AT_ONCE):
                part = slice(start, start + _IMAGES_AT_ONCE)
                rows = zip(images[part], labels[part])
                examples = [{'image': image_grid.png(image), 'label': int(label)} for image, label in rows]
                writer.add_examples({'train': examples})
                bar.update(len(examples))
        writer.close_all()


def write_dpimagebench(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write folder/gen/gen.npz: `x` float32 (n, C, H, W) in [0, 1], and `y` int64 (n,).

    That is what the evaluation of DPImageBench reads. It multiplies pixels by 255 and cuts off the fraction,
    which gives the same whole numbers again.

    Args:
        folder: appears when it is complete.
        images: (n, H, W, C) uint8.
        labels: (n,) integers.
    """
    with files.whole_folder(folder) as unfinished:
        (unfinished / 'gen').mkdir()
        pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        files.write_npz(unfinished / 'gen' / 'gen.npz', x=pixels, y=labels.astype(np.int64))


def _tfds_name(name: str) -> str:
    """Return a name as tensorflow-datasets wants them: small letters, digits and underscores."""
    found = re.sub('[^a-z0-9]+', '_', name.lower()).strip('_') or 'images'
    return found if found[0].isalpha() else f'set_{found}'
