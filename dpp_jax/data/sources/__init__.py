"""The name of a source → private images.

A name is '<kind>' or '<kind>:<where>', for example 'idx:/data/mnist'. Each kind is one class in a file
of this folder and one entry of `SOURCES`. Preparation, checks and average pooling are the same for all kinds.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from dpp_jax.data.images import Images, check_groups, check_images, check_labels
from dpp_jax.data.preparation import AS_THEY_ARE, Preparation, prepare_arrays
from dpp_jax.data.resize import average_pool
from dpp_jax.data.sources.camelyon import Camelyon
from dpp_jax.data.sources.digits import Digits
from dpp_jax.data.sources.idx import Idx
from dpp_jax.data.sources.image_files import Folder, Zip
from dpp_jax.data.sources.npz import Npz
from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo, StoredSource
from dpp_jax.data.sources.tfds import Tfds
from dpp_jax.data.stored import StoredImages, memory_of_machine

# Which rows of a split are kept, see `load`.
AnyRows = slice | np.ndarray | Callable[[np.ndarray | None], slice | np.ndarray] | None
IN_MEMORY = ('auto', 'yes', 'no')
SOURCES: dict[str, type[Source]] = {
    'digits': Digits,
    'folder': Folder,
    'zip': Zip,
    'npz': Npz,
    'idx': Idx,
    'tfds': Tfds,
    'wilds-camelyon': Camelyon,
}


def describe(
    source: str, *, data_dir: str = '', processes: int = 1, preparation: Preparation = AS_THEY_ARE
) -> SourceInfo:
    """Return size, shape and classes of a source; reads file headers and labels, never a pixel.

    Args:
        source: a name of one of the forms in `SOURCES`.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default.
        processes: that keep a share each: what this machine's memory must hold.
        preparation: how the set is read; its image size and channels may be None.

    Raises:
        FileNotFoundError: the set is not there, or tensorflow-datasets has not prepared it yet.
        ValueError: the source is unknown, or files are damaged, all of which are named.
    """
    return _find(source, data_dir, slice(0, None, processes), preparation).describe()


def shape(
    source: str,
    split: str,
    *,
    data_dir: str = '',
    rows: AnyRows = None,
    preparation: Preparation = AS_THEY_ARE,
) -> tuple[int | None, ...]:
    """Return (N, H, W, C) of the prepared images of one split, before average pooling, from headers alone.

    None stands for what is not known, never for N. Arguments and errors are those of `load`.
    """
    kept = rows(None) if callable(rows) else rows  # with groups, about so many
    total, *found = _find(source, data_dir, kept, preparation).shape(_checked(split))
    return total, *preparation.shape(found)


def identity(
    source: str, split: str, *, data_dir: str = '', preparation: Preparation = AS_THEY_ARE
) -> list[str]:
    """Tell which files a split has; arguments and errors are those of `load`."""
    return _find(source, data_dir, preparation=preparation).identity(_checked(split))


def near_groups(
    source: str, name: str, *, data_dir: str = '', preparation: Preparation = AS_THEY_ARE
) -> np.ndarray | None:
    """Return whose each training image is, integers (N,); None where only the whole set tells.

    Arguments and errors are those of `load`.
    """
    found = _find(source, data_dir, preparation=preparation)
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
    rows: AnyRows = None,
    in_memory: str = 'yes',
    preparation: Preparation = AS_THEY_ARE,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Return the images of one split, or some of them: what is not kept is not in memory.

    Args:
        source: a name of one of the forms in `SOURCES`.
        split: 'train' (the private images) or 'test'.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default. A set that is not
            prepared there is downloaded and prepared first.
        average_down: k, replaces blocks of k x k pixels by their mean, rounded.
        classes: how many the labels must have; None = as `describe` says.
        groups: name of the array that says whose a training image is; '' = not asked for.
        rows: the numbers in the whole split of those that are kept, a slice or ascending integers; or a
            function that chooses them by the groups of all, integers (N,), or None; None = all.
        in_memory: 'yes'; 'no': images stay in files, and rows are read when they are needed; 'auto': they
            stay there if the source allows it and they are more than half of this machine's memory.
        preparation: what is done with each image, before `average_down`.
        progress: is told (images decoded, images in all), where that takes long; it may raise to stop.

    Raises:
        FileNotFoundError: the set is not there.
        ValueError: the source or the split is unknown, files cannot be used, `average_down` does not fit,
            `in_memory` is not possible, or `check_images` or `check_labels` refuses what was read. A class
            may be empty: whether it is depends on single images, and must not decide whether anything is
            released. Labels are those of the kept rows: of a share, another process may find nothing wrong.
    """
    found, name = _find(source, data_dir, None, preparation, progress), f'{source} ({_checked(split)})'
    group_of = found.groups(split, groups) if groups and split == 'train' else None
    kept = rows(group_of) if callable(rows) else rows
    found = dataclasses.replace(found, kept=kept)
    total, *image_shape = found.shape(split)
    if group_of is not None:
        group_of = check_groups(group_of, count=total, name=f'{name}, {groups}')
    stored = _stored(found, split, average_down, in_memory)
    if stored is None:
        images, labels = found.read(split)
    else:
        images, labels = stored, found.labels(split)
    if images.ndim == 3:
        images = images[..., None]
    if preparation.changes_images and not found.prepares:
        images = prepare_arrays(images, preparation)
    if classes is None:
        classes = dataclasses.replace(found, kept=slice(0)).describe().classes
    if not total or len(images):  # a share may be empty, a split not
        check_images(images, name=name)
        check_labels(labels, count=len(images), classes=classes, name=name, every_class=False)
    height, width = images.shape[1:3]
    if average_down < 1 or height % average_down or width % average_down:
        raise ValueError(
            f'average_down is {average_down}; it must be at least 1 and divide the image size of '
            f'{name}, {height} x {width}'
        )
    return Images(
        images=average_pool(images, average_down),
        labels=labels.astype(np.int32),
        groups=group_of,
        rows=None if rows is None else found.rows(total),
        stamp=None if stored is None else found.stamp(split),
    )


def _stored(found: Source, split: str, average_down: int, in_memory: str) -> StoredImages | None:
    """Return the images that stay in files; None: they are to be read into memory."""
    if in_memory not in IN_MEMORY:
        raise ValueError(f'in_memory is {in_memory!r}; it must be one of {", ".join(IN_MEMORY)}')
    if in_memory == 'no' and not isinstance(found, StoredSource):
        raise ValueError(
            f"config.data.in_memory is 'no'; for {found.name} it must be 'auto' or 'yes'. Only these sources "
            'are read row by row: '
            + ', '.join(kind.form for kind in SOURCES.values() if issubclass(kind, StoredSource))
        )
    if in_memory == 'yes' or not isinstance(found, StoredSource):
        return None
    stored = found.stored(split)
    is_large = stored.nbytes > memory_of_machine() / 2  # they are read before they are pooled
    return stored if in_memory == 'no' or is_large else None


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be one of {", ".join(SPLITS)}')
    return split


def _find(
    source: str,
    data_dir: str,
    kept: slice | np.ndarray | None = None,
    preparation: Preparation = AS_THEY_ARE,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Return the source of this name, of which these rows are kept."""
    kind, colon, where = source.partition(':')
    known = SOURCES.get(kind)
    if known is None or bool(colon) != (':' in known.form) or bool(colon) != bool(where):
        allowed = ', '.join(entry.form for entry in SOURCES.values())
        raise ValueError(f'the data source is {source!r}; it must be one of: {allowed}')
    if preparation.validation != 'unused' and not known.joins_validation:
        raise ValueError(
            f"config.data.validation is {preparation.validation!r}; it must be 'unused' for {source}"
        )
    return known(
        name=source, where=where, data_dir=data_dir, kept=kept, preparation=preparation, progress=progress
    )
