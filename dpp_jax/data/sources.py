"""A name → private images: uint8 arrays with integer labels.

Names are '<kind>' or '<kind>:<where>'. A kind is one entry of `_READERS`: how to describe a set
without reading a pixel, and how to read one split of it. Everything else (checks, averaging down)
is the same for all.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import gzip
import math
from pathlib import Path
from typing import Any
import zipfile
import zlib

import numpy as np

SPLITS = ('train', 'test')
_TFDS_BATCH = 4096  # images decoded by one call
# The classic MNIST files: their beginnings in a folder, and the magic number of each type.
_IDX_NAMES = {'train': 'train', 'test': 't10k'}
_IDX_MAGIC = {'images-idx3': 0x00000803, 'labels-idx1': 0x00000801}
_Summary = tuple[int, int, tuple[int, ...], int]  # train, test images; image shape; classes
# What NumPy, gzip and zipfile raise for a file that is not whole.
_DAMAGED = (ValueError, KeyError, TypeError, EOFError, zlib.error)
_DAMAGED += (gzip.BadGzipFile, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images in memory.

    Attributes:
        images: uint8 (N, H, W, C), 0..255.
        labels: int32 (N,), in [0, classes).
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What is known of a source without reading a pixel.

    Attributes:
        name: as it was asked for.
        train_images, test_images: how many.
        image_shape: (H, W, C), before any averaging down.
        classes: labels are 0 .. classes - 1.
    """

    name: str
    train_images: int
    test_images: int
    image_shape: tuple[int, int, int]
    classes: int


@dataclasses.dataclass(frozen=True)
class _Reader:
    """One kind of source. `where` is what follows the colon.

    Attributes:
        form: how the name is written, for error messages.
        describe: (where, data_dir) → what is known without reading a pixel.
        read: (where, split, data_dir) → images uint8 (N, H, W, C) or (N, H, W), labels (N,).
    """

    form: str
    describe: Callable[[str, str], _Summary]
    read: Callable[[str, str, str], tuple[np.ndarray, np.ndarray]]


def describe(source: str, *, data_dir: str = '') -> SourceInfo:
    """Size, shape and classes of a source; reads file headers and labels, never a pixel.

    Args:
        source: 'digits', 'tfds:<name>', 'idx:<folder>' or 'npz:<folder>'.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default.

    Raises:
        FileNotFoundError: the set is not there (or, with tfds, not prepared yet).
        ValueError: unknown source, or its files are not what they should be.
    """
    reader, where = _find(source)
    train, test, shape, classes = reader.describe(where, data_dir)
    return SourceInfo(source, train, test, shape if len(shape) == 3 else (*shape, 1), classes)


def load(
    source: str,
    split: str,
    *,
    data_dir: str = '',
    average_down: int = 1,
    classes: int | None = None,
) -> Images:
    """All images of one split.

    Args:
        source: 'digits', 'tfds:<name>', 'idx:<folder>' or 'npz:<folder>'.
        split: 'train' (the private images) or 'test'.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default. A set that is not
            prepared there is downloaded and prepared first.
        average_down: k, replaces blocks of k x k pixels by their mean, rounded.
        classes: how many the labels must have; None = as `describe` says.

    Raises:
        FileNotFoundError: the set is not there.
        ValueError: unknown source or split, damaged files, or images and labels that
            `check_images` refuses.
    """
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be one of {", ".join(SPLITS)}')
    reader, where = _find(source)
    images, labels = reader.read(where, split, data_dir)
    if images.ndim == 3:
        images = images[..., None]
    if classes is None:
        classes = describe(source, data_dir=data_dir).classes
    name = f'{source} ({split})'
    check_images(images, labels, classes=classes, name=name, every_class=split == 'train')
    return Images(_average_down(images, average_down, name), labels.astype(np.int32))


def check_images(
    images: np.ndarray, labels: np.ndarray, *, classes: int, name: str, every_class: bool = True
) -> None:
    """Raise a ValueError that says what is wrong with a set of labelled images.

    Args:
        images: must be uint8 (N, H, W, C), N ≥ 1.
        labels: must be integers (N,) in [0, classes).
        classes: ≥ 1.
        name: of the set, for the message.
        every_class: whether each class must have an image.
    """
    if classes < 1:
        raise ValueError(f'classes is {classes}; it must be at least 1')
    if images.size == 0:
        raise ValueError(f'{name} is empty: its shape is {images.shape}; it must hold images')
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f'the images of {name} are {images.dtype} of shape {images.shape}; they must be uint8 '
            'of shape (images, height, width, channels)'
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'the labels of {name} are {labels.dtype} of shape {labels.shape}; they must be '
            f'integers of shape ({len(images)},), one per image'
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'the labels of {name} go from {labels.min()} to {labels.max()}; they must lie in '
            f'0..{classes - 1}, for {classes} classes'
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0).tolist()
    if missing and every_class:
        raise ValueError(
            f'{name} has no image of class {", ".join(map(str, missing))}; each of the {classes} '
            'classes must have one'
        )


def _find(source: str) -> tuple[_Reader, str]:
    """The reader of a source, and where it shall look."""
    kind, _, where = source.partition(':')
    reader = _READERS.get(kind)
    if reader is None or bool(where) != (':' in reader.form) or source == f'{kind}:':
        allowed = ', '.join(reader.form for reader in _READERS.values())
        raise ValueError(f'the data source is {source!r}; it must be one of: {allowed}')
    return reader, where


def _average_down(images: np.ndarray, k: int, name: str) -> np.ndarray:
    """The mean of each k x k block, halves rounded up."""
    n, height, width, channels = images.shape
    if k < 1 or height % k or width % k:
        raise ValueError(
            f'average_down is {k}; it must be at least 1 and divide the image size of {name}, '
            f'{height} x {width}'
        )
    if k == 1:
        return images
    blocks = images.reshape(n, height // k, k, width // k, k, channels)
    return ((2 * blocks.sum((2, 4), dtype=np.uint32) + k * k) // (2 * k * k)).astype(np.uint8)


def _read_digits(where: str, split: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """1,797 images, 0..16 spread to 0..255; 80/20 train/test, stratified, always the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )[SPLITS.index(split)]
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images[indices], digits.target[indices]


def _describe_tfds(where: str, data_dir: str) -> _Summary:
    """From the files that describe a prepared set."""
    info = _tfds_builder(where, data_dir, prepare=False).info
    sizes = [info.splits[split].num_examples for split in SPLITS]
    return *sizes, info.features['image'].shape, info.features['label'].num_classes


def _read_tfds(where: str, split: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """Every image of a split, in the order of the files (array_record: without TensorFlow)."""
    builder = _tfds_builder(where, data_dir, prepare=True)
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f'tfds:{where} in {builder.data_path} is not in the array_record format; choose '
            f'another data_dir. {_how_to_prepare(where, data_dir)}'
        ) from error
    images, labels = [], []
    for start in range(0, len(records), _TFDS_BATCH):
        stop = min(start + _TFDS_BATCH, len(records))
        batch = records.__getitems__(list(range(start, stop)))
        images += [record['image'] for record in batch]
        labels += [record['label'] for record in batch]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f'the images of tfds:{where} differ in shape; all must have the same')
    return np.array(images), np.array(labels, np.int64)


def _tfds_builder(where: str, data_dir: str, *, prepare: bool) -> Any:
    """tensorflow-datasets' builder of a prepared set with the features and splits that we need."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(where, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"the data source is 'tfds:{where}'; tensorflow-datasets {tfds.__version__} knows no "
            f'such set and {data_dir or "its default folder"} holds none'
        ) from error
    if not builder.is_prepared():
        if not prepare:
            raise FileNotFoundError(
                f'tfds:{where} is not prepared in {builder.data_path}. ' + _how_to_prepare(where, data_dir)
            )
        _prepare_tfds(builder, where, data_dir)
    features, splits = set(builder.info.features), set(builder.info.splits)
    if not {'image', 'label'} <= features or not set(SPLITS) <= splits:
        raise ValueError(
            f'tfds:{where} has the features {sorted(features)} and the splits {sorted(splits)}; it '
            "must have the features 'image' and 'label' and the splits 'train' and 'test'"
        )
    return builder


def _prepare_tfds(builder: Any, where: str, data_dir: str) -> None:
    """Download and prepare; imports TensorFlow, which must not take the accelerator from JAX."""
    print(f'tfds:{where} is not prepared in {builder.data_path}: downloading it', flush=True)
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], 'GPU')
        builder.download_and_prepare(file_format='array_record')
    except Exception as error:
        raise FileNotFoundError(
            f'tfds:{where} could not be prepared in {builder.data_path}: {error!r}. '
            f'{_how_to_prepare(where, data_dir)}'
        ) from error


def _how_to_prepare(where: str, data_dir: str) -> str:
    """What to type on a machine with a network and TensorFlow."""
    arguments = f"'{where}'" + (f", data_dir='{data_dir}'" if data_dir else '')
    return (
        'Prepare it with: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({arguments}, file_format='array_record').download_and_prepare()\""
    )


def _describe_idx(where: str, data_dir: str) -> _Summary:
    """From the headers of the image files and the labels."""
    paths = (_idx_path(where, split, 'images-idx3') for split in SPLITS)
    shapes = [_idx_header(path, 'images-idx3') for path in paths]
    return _summary(f'idx:{where}', shapes, _idx_array(where, 'train', 'labels-idx1'))


def _read_idx(where: str, split: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """Two files of the four."""
    return _idx_array(where, split, 'images-idx3'), _idx_array(where, split, 'labels-idx1')


def _idx_path(where: str, split: str, kind: str) -> Path:
    """The plain or gzipped file."""
    plain = Path(where).expanduser() / f'{_IDX_NAMES[split]}-{kind}-ubyte'
    for path in (plain, plain.with_name(plain.name + '.gz')):
        if path.is_file():
            return path
    raise FileNotFoundError(f'idx:{where} needs the file {plain} or {plain}.gz; neither is there')


def _idx_header(path: Path, kind: str) -> tuple[int, ...]:
    """Sizes of all dimensions, the number of items first."""
    length = 4 * (2 if kind == 'labels-idx1' else 4)
    header = _bytes(path, length)
    magic = _IDX_MAGIC[kind]
    if len(header) < length or int.from_bytes(header[:4]) != magic:
        raise ValueError(
            f'{path} begins with {header[:4].hex() or "nothing"} and has {len(header)} of {length} '
            f'bytes of header; an idx file of this name begins with {magic:08x}'
        )
    return tuple(int.from_bytes(header[i : i + 4]) for i in range(4, length, 4))


def _idx_array(where: str, split: str, kind: str) -> np.ndarray:
    """The whole content of an idx file, uint8."""
    path = _idx_path(where, split, kind)
    sizes = _idx_header(path, kind)
    content = np.frombuffer(_bytes(path), np.uint8)[4 * (1 + len(sizes)) :]
    if len(content) != math.prod(sizes):
        raise ValueError(
            f'{path} has {len(content)} bytes after its header; for the sizes in it, {sizes}, it '
            f'must have {math.prod(sizes)}'
        )
    return content.reshape(sizes)


def _bytes(path: Path, length: int = -1) -> bytes:
    """The first `length` bytes of a file (-1: all), unpacked if it is gzipped."""
    with _reading(path), gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
        return file.read(length)


def _describe_npz(where: str, data_dir: str) -> _Summary:
    """From the headers of the image arrays and the labels."""
    shapes = [_npz_shape(_npz_path(where, split)) for split in SPLITS]
    return _summary(f'npz:{where}', shapes, _npz_array(_npz_path(where, 'train'), 'labels'))


def _read_npz(where: str, split: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """`images` and `labels` of one file."""
    path = _npz_path(where, split)
    return _npz_array(path, 'images'), _npz_array(path, 'labels')


def _npz_path(where: str, split: str) -> Path:
    """The file of one split."""
    path = Path(where).expanduser() / f'{split}.npz'
    if not path.is_file():
        raise FileNotFoundError(
            f'npz:{where} needs {path}, with the arrays images and labels; it is not there'
        )
    return path


def _npz_array(path: Path, name: str) -> np.ndarray:
    """One array of a file; the others are not read."""
    with _reading(path), np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def _npz_shape(path: Path) -> tuple[int, ...]:
    """The shape of `images`, from its header."""
    with _reading(path), zipfile.ZipFile(path) as archive, archive.open('images.npy') as file:
        if np.lib.format.read_magic(file) == (1, 0):
            return np.lib.format.read_array_header_1_0(file)[0]
        return np.lib.format.read_array_header_2_0(file)[0]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a damaged file become one that names it."""
    try:
        yield
    except _DAMAGED as error:
        allowed = 'a whole gzip file, or npz file with the arrays images and labels'
        raise ValueError(f'{path} cannot be read ({error}); it must be {allowed}') from error


def _summary(name: str, shapes: list[tuple[int, ...]], labels: np.ndarray) -> _Summary:
    """A reader's answer, from the shapes of train and test images and the train labels."""
    (train, *shape), (test, *test_shape) = shapes
    if shape != test_shape or len(shape) not in (2, 3):
        raise ValueError(
            f'the images of {name} have the shapes {shapes[0]} in train and {shapes[1]} in test; '
            'both must be (images, height, width) or (images, height, width, channels), of one size'
        )
    return train, test, tuple(shape), int(labels.max()) + 1 if labels.size else 0


_READERS = {
    'digits': _Reader('digits', lambda where, data_dir: (1437, 360, (8, 8, 1), 10), _read_digits),
    'tfds': _Reader('tfds:<name>', _describe_tfds, _read_tfds),
    'idx': _Reader('idx:<folder>', _describe_idx, _read_idx),
    'npz': _Reader('npz:<folder>', _describe_npz, _read_npz),
}
