"""The name of a source → private images.

A name is '<kind>' or '<kind>:<where>', for example 'idx:/data/mnist'. Each kind is one class in a file
of this folder and one entry of `SOURCES`. Checks and average pooling are the same for all kinds.
"""

import numpy as np

from dpp_jax.data.images import Images, check_groups, check_images, check_labels
from dpp_jax.data.resize import average_pool
from dpp_jax.data.sources.digits import Digits
from dpp_jax.data.sources.idx import Idx
from dpp_jax.data.sources.npz import Npz
from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo
from dpp_jax.data.sources.tfds import Tfds

SOURCES: dict[str, type[Source]] = {'digits': Digits, 'tfds': Tfds, 'idx': Idx, 'npz': Npz}


def describe(source: str, *, data_dir: str = '') -> SourceInfo:
    """Return size, shape and classes of a source; reads file headers and labels, never a pixel.

    Args:
        source: 'digits', 'tfds:<name>', 'idx:<folder>' or 'npz:<folder>'.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default.

    Raises:
        FileNotFoundError: the set is not there, or tensorflow-datasets has not prepared it yet.
        ValueError: the source is unknown, or its files are damaged.
    """
    return _find(source, data_dir).describe()


def shape(source: str, split: str, *, data_dir: str = '') -> tuple[int | None, ...]:
    """Return (N, H, W, C) of the images of one split, before average pooling, from headers alone.

    None stands for what is not known. Arguments and errors are those of `load`.
    """
    return _find(source, data_dir).shape(_checked(split))


def near_groups(source: str, name: str, *, data_dir: str = '') -> np.ndarray | None:
    """Return whose each training image is, integers (N,); None where only the whole set tells.

    Arguments and errors are those of `load`.
    """
    found = _find(source, data_dir)
    groups = found.near_groups(name)
    if groups is None:
        return None
    return check_groups(groups, count=found.describe().train_images, name=f'{source}, {name}')


def load(
    source: str,
    split: str,
    *,
    data_dir: str = '',
    average_down: int = 1,
    classes: int | None = None,
    groups: str = '',
) -> Images:
    """Return all images of one split.

    Args:
        source: 'digits', 'tfds:<name>', 'idx:<folder>' or 'npz:<folder>'.
        split: 'train' (the private images) or 'test'.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default. A set that is not
            prepared there is downloaded and prepared first.
        average_down: k, replaces blocks of k x k pixels by their mean, rounded.
        classes: how many the labels must have; None = as `describe` says.
        groups: name of the array that says whose a training image is; '' = not asked for.

    Raises:
        FileNotFoundError: the set is not there.
        ValueError: the source or the split is unknown, files are damaged, `average_down` does not fit,
            or `check_images` or `check_labels` refuses what was read. A class may be empty: whether it is
            depends on single images, and must not decide whether anything is released.
    """
    found = _find(source, data_dir)
    images, labels = found.read(_checked(split))
    if images.ndim == 3:
        images = images[..., None]
    if classes is None:
        classes = found.describe().classes
    name = f'{source} ({split})'
    check_images(images, name=name)
    check_labels(labels, count=len(images), classes=classes, name=name, every_class=False)
    height, width = images.shape[1:3]
    if average_down < 1 or height % average_down or width % average_down:
        raise ValueError(
            f'average_down is {average_down}; it must be at least 1 and divide the image size of '
            f'{name}, {height} x {width}'
        )
    group_of = None
    if groups and split == 'train':
        group_of = check_groups(found.groups(split, groups), count=len(images), name=f'{name}, {groups}')
    return Images(images=average_pool(images, average_down), labels=labels.astype(np.int32), groups=group_of)


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be one of {", ".join(SPLITS)}')
    return split


def _find(source: str, data_dir: str) -> Source:
    """Return the source of this name."""
    kind, colon, where = source.partition(':')
    known = SOURCES.get(kind)
    if known is None or bool(colon) != (':' in known.form) or bool(colon) != bool(where):
        allowed = ', '.join(entry.form for entry in SOURCES.values())
        raise ValueError(f'the data source is {source!r}; it must be one of: {allowed}')
    return known(name=source, where=where, data_dir=data_dir)
