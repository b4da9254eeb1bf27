"""Sets of tensorflow-datasets, read without TensorFlow."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dpp_jax.data import split as split_lib
from dpp_jax.data.preparation import Preparation, prepare_array
from dpp_jax.data.rows import Rows
from dpp_jax.data.sources.source import SPLITS, SourceInfo, StoredSource
from dpp_jax.data.stored import StoredImages

_BATCH = 4096  # images decoded by one call
# Packages that decode images, of which tensorflow-datasets takes the first that is there.
_DECODERS = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'pillow')
_SECONDS_TO_CONNECT = 5  # to a server; tensorflow-datasets itself would try for minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(StoredSource):
    """A set in array_record files; `image_key` and `label_key` name its features.

    Private images are its split train, with validation if that is asked for. Test images are its split test;
    without one, its validation part; without both, images of train that are drawn by their numbers.
    """

    form = 'tfds:<name>[/<config>][:<version>]'
    has_groups = True
    prepares = True
    joins_validation = True

    def describe(self) -> SourceInfo:
        builder = self._prepared(prepare=False)
        parts = {split: self._part(builder, split) for split in SPLITS}
        classes, names = self._classes(builder)
        shape = _feature(builder, self.preparation.image_key).shape
        height, width, channels = shape
        is_known = None not in (height, width)
        return SourceInfo(
            name=self.name,
            train_images=parts['train'].count,
            test_images=parts['test'].count,
            image_shape=(height, width, channels or 3),
            classes=classes,
            class_names=names,
            sides=(min(height, width),) * 3 if is_known else None,
            notes=tuple(f'{split}: {part.words}' for split, part in parts.items() if part.words),
        )

    def shape(self, split: str) -> tuple[int | None, ...]:
        builder = self._prepared(prepare=True)
        return (self._part(builder, split).count, *_feature(builder, self.preparation.image_key).shape)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        records = self._records(self._prepared(prepare=True), split)
        rows = self.rows(len(records))
        reader = _Reader(self.name, records, self.preparation)
        images = np.empty((len(rows), *reader.shape), reader.dtype)
        labels = np.empty(len(rows), np.int64)
        for places, batch in _batches(records, rows):
            images[places] = reader.images_of(batch)
            labels[places] = self._labels_of(batch)
        return images, labels

    def stored(self, split: str) -> StoredImages:
        records = self._records(self._prepared(prepare=True), split)
        rows, reader = self.rows(len(records)), _Reader(self.name, records, self.preparation)
        whose = rows.numbers()
        return StoredImages(
            lambda numbers: reader.read(whose[numbers]), (len(rows), *reader.shape), reader.dtype
        )

    def labels(self, split: str) -> np.ndarray:
        records = self._records(self._prepared(prepare=True), split, with_images=False)
        labels = np.empty(len(self.rows(len(records))), np.int64)
        for places, batch in _batches(records, self.rows(len(records))):
            labels[places] = self._labels_of(batch)
        return labels

    def _labels_of(self, batch: Sequence[dict[str, Any]]) -> list[int]:
        key = self.preparation.label_key
        return [int(_value(record, key)) if key else 0 for record in batch]

    def identity(self, split: str) -> list[str]:
        builder = self._prepared(prepare=True)
        files = [f'{path.name} {path.stat().length}' for path in self._paths(builder, split)]
        return [builder.info.full_name, *files, *(f'{name} {_version(name)}' for name in _DECODERS)]

    def stamp(self, split: str) -> str:
        # What decodes and resizes is told, too: of some formats, two libraries make different pixels.
        told: list[Any] = [(name, _version(name)) for name in _DECODERS]
        told += [self.preparation.pixels, self.preparation.image_key]
        builder = self._prepared(prepare=True)
        part = self._part(builder, split)
        told += [part.split, None if part.numbers is None else part.numbers.tolist()]
        for path in self._paths(builder, split):
            found = path.stat()
            told.append((path.name, found.length, found.mtime))
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def _paths(self, builder: Any, split: str) -> list:
        """Return the files of a split, as epath's paths."""
        from etils import epath

        names = self._part(builder, split).split.split('+')
        return [epath.Path(path) for name in names for path in builder.info.splits[name].filepaths]

    def _part(self, builder: Any, split: str) -> '_Part':
        """Say which records one of `SPLITS` has."""
        splits, asked = builder.info.splits, self.preparation
        validation = next((name for name in ('validation', 'val', 'valid') if name in splits), None)
        joins = validation is not None and asked.validation == 'train'
        train = f'train+{validation}' if joins else 'train'
        total = sum(splits[name].num_examples for name in train.split('+'))
        if 'test' in splits:
            if split == 'test':
                return _Part(split='test', count=splits['test'].num_examples)
            unused = f'the split {validation!r} is not used. To make its images private, set data.validation'
            words = f"{unused} to 'train'" if validation and not joins else ''
            return _Part(split=train, count=total, words=words)
        if validation and not joins:
            if split == 'test':
                count, words = splits[validation].num_examples, f'the split {validation!r}: there is no other'
                return _Part(split=validation, count=count, words=words)
            return _Part(split=train, count=total)
        if not asked.is_listing_public:
            raise ValueError(
                f'{self.name} has no split test. Its records have no names by which each could be drawn '
                "alone, as dp.unit 'group' and other relations than 'zero_out' need. Write its images to a "
                "folder, or set config.dp.relation to 'zero_out' and config.dp.unit to 'image'"
            )
        chosen = split_lib.numbers_of_test(total, share=asked.test_share, seed=asked.split_seed)
        numbers = np.flatnonzero(chosen == (split == 'test'))
        drawn = (
            f'{asked.test_share:.0%} of the split train, by a hash of data.split_seed = {asked.split_seed}'
        )
        words = f'{drawn} and their numbers: there is no split test' if split == 'test' else ''
        return _Part(split=train, count=len(numbers), numbers=numbers, words=words)

    def _classes(self, builder: Any) -> tuple[int, tuple[str, ...]]:
        """Return the number of classes, and their names if they have any."""
        key = self.preparation.label_key
        if not key:
            return 1, ()
        feature = _feature(builder, key)
        if hasattr(feature, 'num_classes'):
            names = tuple(feature.names or ())
            return feature.num_classes, () if names == tuple(map(str, range(len(names)))) else names
        if getattr(feature, 'np_dtype', None) in (bool, np.bool_):
            return 2, ('False', 'True')
        raise ValueError(
            f'config.data.label_key is {key!r}, {feature!r} of {self.name}; it must be a feature with '
            "classes, or of truth values, or '' (one class)"
        )

    def groups(self, split: str, name: str) -> np.ndarray:
        builder = self._prepared(prepare=True)
        if _feature(builder, name) is None:
            raise ValueError(
                f'config.data.groups is {name!r}; it must be a feature of {self.name}, which has '
                f'{sorted(builder.info.features)}'
            )
        records = self._records(builder, split, with_images=False)
        found = []
        for _, batch in _batches(records, Rows(len(records))):
            found += [_value(record, name) for record in batch]
        return np.array(found)

    def _records(self, builder: Any, split: str, *, with_images: bool = True) -> Any:
        """Return the records of a split, to be read by their numbers; `with_images` decodes these."""
        from tensorflow_datasets import decode

        try:
            decoders = None
            if not with_images:
                decoders = decode.SkipDecoding()
                for part in reversed(self.preparation.image_key.split('/')):
                    decoders = {part: decoders}
            part = self._part(builder, split)
            records = builder.as_data_source(split=part.split, decoders=decoders)
            return records if part.numbers is None else _Chosen(records, part.numbers)
        except NotImplementedError as error:
            raise ValueError(
                f'{self.name} in {builder.data_path} is not in the array_record format; choose '
                f'another data_dir. {self._how_to_prepare()}'
            ) from error

    def _prepared(self, *, prepare: bool) -> Any:
        """Return the builder of a prepared set; `prepare` downloads and prepares it if need be."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self.where, data_dir=self.data_dir or None)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f'the data source is {self.name!r}; tensorflow-datasets {tfds.__version__} knows no '
                f'such set and {self.data_dir or "its default folder"} holds none'
            ) from error
        self._check_features(builder)
        if not builder.is_prepared():
            if not prepare:
                raise FileNotFoundError(
                    f'{self.name} is not prepared in {builder.data_path}. {self._how_to_prepare()}'
                )
            self._prepare(builder)
        if 'train' not in builder.info.splits:
            raise ValueError(
                f"{self.name} has the splits {sorted(builder.info.splits)}; it must have the split 'train'"
            )
        return builder

    def _check_features(self, builder: Any) -> None:
        """Refuse a set without the features that are needed: before it is downloaded."""
        problems = []
        for name in ('image_key', 'label_key'):
            key = getattr(self.preparation, name)
            if (key or name == 'image_key') and _feature(builder, key) is None:
                problems.append(
                    f'config.data.{name} is {key!r}; {self.name} has the features '
                    f'{_names(builder.info.features)}'
                )
        if problems:
            raise ValueError('\n'.join(problems))

    def _prepare(self, builder: Any) -> None:
        """Download and prepare the set; imports TensorFlow, which must not take JAX's accelerator."""
        print(f'{self.name} is not prepared in {builder.data_path}: downloading it', flush=True)
        try:
            _check_network(builder)
            import tensorflow as tf

            tf.config.set_visible_devices([], 'GPU')
            builder.download_and_prepare(file_format='array_record')
        except Exception as error:
            raise FileNotFoundError(
                f'{self.name} could not be prepared in {builder.data_path}: {error!r}. '
                f'{self._how_to_prepare()}'
            ) from error

    def _how_to_prepare(self) -> str:
        """Return what to type on a machine with a network and TensorFlow."""
        arguments = f"'{self.where}'" + (f", data_dir='{self.data_dir}'" if self.data_dir else '')
        return (
            'Prepare it with: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({arguments}, file_format='array_record').download_and_prepare()\""
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """Which records are private, or test images.

    Attributes:
        split: as tensorflow-datasets calls it; two are joined by '+'.
        count: number of records.
        numbers: of the split's records, those that are meant; None: all.
        words: what a user must know of it.
    """

    split: str
    count: int
    numbers: np.ndarray | None = None
    words: str = ''


class _Chosen:
    """Some records of a split, in its order."""

    def __init__(self, records: Any, numbers: np.ndarray):
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._records[int(self._numbers[number])]

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[dict[str, Any]]:
        return self._records.__getitems__(self._numbers[np.asarray(numbers, int)].tolist())


class _Reader:
    """Reads images of records and prepares them; else all must have the shape of the first one."""

    def __init__(self, name: str, records: Any, preparation: Preparation):
        self._name, self._records, self._preparation = name, records, preparation
        first = self._prepared(records[0])
        self.shape, self.dtype = first.shape, first.dtype

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Return the images of these records, (n, H, W, C)."""
        images = np.empty((len(numbers), *self.shape), self.dtype)
        for places, batch in _batches(self._records, Rows(len(self._records), numbers)):
            images[places] = self.images_of(batch)
        return images

    def images_of(self, batch: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the images of decoded records, (n, H, W, C)."""
        images = list(map(self._prepared, batch))
        if any(image.shape != self.shape for image in images):
            raise ValueError(
                f'the images of {self._name} differ in shape; all must have the same, or config.data.fit '
                "must be 'crop' or 'pad'"
            )
        return np.stack(images)

    def _prepared(self, record: dict[str, Any]) -> np.ndarray:
        image = _value(record, self._preparation.image_key)
        return prepare_array(image, self._preparation) if self._preparation.changes_images else image


def _value(record: dict[str, Any], key: str) -> Any:
    """Return what a record has under a key, whose parts are separated by '/'."""
    for part in key.split('/'):
        record = record[part]
    return record


def _feature(builder: Any, key: str) -> Any:
    """Return the feature under a key, whose parts are separated by '/'; None: there is none."""
    feature = builder.info.features
    try:
        for part in key.split('/'):
            feature = feature[part]
    except (KeyError, TypeError):
        return None
    return feature


def _names(features: Any, above: str = '') -> list[str]:
    """Return the names of all features, those within others as 'outer/inner'."""
    found = []
    for name in sorted(features):
        is_folder = hasattr(features[name], 'keys')
        found += _names(features[name], f'{above}{name}/') if is_folder else [f'{above}{name}']
    return found


def _batches(records: Any, rows: Rows) -> Iterator[tuple[slice, Sequence[dict[str, Any]]]]:
    """Read rows, some at once: yields their places among them, and the decoded records."""
    for start in range(0, len(rows), _BATCH):
        numbers = rows.numbers(start, start + _BATCH)
        yield slice(start, start + len(numbers)), records.__getitems__(numbers.tolist())


def _version(package: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check_network(builder: Any) -> None:
    """Refuse a download at once where the server cannot be reached, unless files were downloaded before."""
    import requests

    url = next((url for url in builder.url_infos or () if url.startswith('http')), None)
    if url is None or (Path(builder.data_path).parents[1] / 'downloads').exists():
        return
    try:
        requests.get(url, stream=True, timeout=_SECONDS_TO_CONNECT).close()  # any answer will do
    except requests.RequestException as error:
        raise ConnectionError(f'{url} cannot be reached: {type(error).__name__}') from error
