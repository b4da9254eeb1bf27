"""Sets of tensorflow-datasets, read without TensorFlow."""

from collections.abc import Collection, Iterator, Sequence
import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dpp_jax.data.rows import Rows
from dpp_jax.data.sources.source import SPLITS, SourceInfo, StoredSource
from dpp_jax.data.stored import StoredImages

_BATCH = 4096  # images decoded by one call
# Packages that decode images, of which tensorflow-datasets takes the first that is there.
_DECODERS = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'pillow')
_SECONDS_TO_CONNECT = 5  # to a server; tensorflow-datasets itself would try for minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(StoredSource):
    """A set with the features `image` and `label` and the splits train and test, in array_record files."""

    form = 'tfds:<name>'
    has_groups = True

    def describe(self) -> SourceInfo:
        info = self._prepared(prepare=False).info
        train, test = (info.splits[split].num_examples for split in SPLITS)
        return SourceInfo(
            name=self.name,
            train_images=train,
            test_images=test,
            image_shape=info.features['image'].shape,
            classes=info.features['label'].num_classes,
        )

    def shape(self, split: str) -> tuple[int | None, ...]:
        info = self._prepared(prepare=True).info
        return (info.splits[split].num_examples, *info.features['image'].shape)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        records = self._records(self._prepared(prepare=True), split)
        rows = self.rows(len(records))
        reader = _Reader(self.name, records)
        images = np.empty((len(rows), *reader.shape), reader.dtype)
        labels = np.empty(len(rows), np.int64)
        for places, batch in _batches(records, rows):
            images[places] = reader.images_of(batch)
            labels[places] = [record['label'] for record in batch]
        return images, labels

    def stored(self, split: str) -> StoredImages:
        records = self._records(self._prepared(prepare=True), split)
        rows, reader = self.rows(len(records)), _Reader(self.name, records)
        whose = rows.numbers()
        return StoredImages(
            lambda numbers: reader.read(whose[numbers]), (len(rows), *reader.shape), reader.dtype
        )

    def labels(self, split: str) -> np.ndarray:
        records = self._records(self._prepared(prepare=True), split, with_images=False)
        labels = np.empty(len(self.rows(len(records))), np.int64)
        for places, batch in _batches(records, self.rows(len(records))):
            labels[places] = [record['label'] for record in batch]
        return labels

    def identity(self, split: str) -> list[str]:
        from etils import epath

        builder = self._prepared(prepare=True)
        paths = map(epath.Path, builder.info.splits[split].filepaths)
        files = [f'{path.name} {path.stat().length}' for path in paths]
        return [builder.info.full_name, *files, *(f'{name} {_version(name)}' for name in _DECODERS)]

    def stamp(self, split: str) -> str:
        from etils import epath

        # What decodes is told, too: of some formats, two libraries make different pixels.
        told: list[Any] = [(name, _version(name)) for name in _DECODERS]
        for path in map(epath.Path, self._prepared(prepare=True).info.splits[split].filepaths):
            found = path.stat()
            told.append((path.name, found.length, found.mtime))
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def groups(self, split: str, name: str) -> np.ndarray:
        builder = self._prepared(prepare=True)
        feature = builder.info.features
        try:
            for part in name.split('/'):
                feature = feature[part]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'config.data.groups is {name!r}; it must be a feature of {self.name}, which has '
                f'{sorted(builder.info.features)}'
            ) from error
        records = self._records(builder, split, with_images=False)
        found = []
        for _, batch in _batches(records, Rows(len(records))):
            for record in batch:
                for part in name.split('/'):
                    record = record[part]
                found.append(record)
        return np.array(found)

    def _records(self, builder: Any, split: str, *, with_images: bool = True) -> Any:
        """Return the records of a split, to be read by their numbers; `with_images` decodes these."""
        from tensorflow_datasets import decode

        try:
            decoders = None if with_images else {'image': decode.SkipDecoding()}
            return builder.as_data_source(split=split, decoders=decoders)
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
        _check(self.name, 'features', builder.info.features, ('image', 'label'))
        if not builder.is_prepared():
            if not prepare:
                raise FileNotFoundError(
                    f'{self.name} is not prepared in {builder.data_path}. {self._how_to_prepare()}'
                )
            self._prepare(builder)
        _check(self.name, 'splits', builder.info.splits, SPLITS)
        return builder

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


class _Reader:
    """Reads images of records; all must have the shape of the first one."""

    def __init__(self, name: str, records: Any):
        self._name, self._records = name, records
        first = records[0]['image']
        self.shape, self.dtype = first.shape, first.dtype

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Return the images of these records, (n, H, W, C)."""
        images = np.empty((len(numbers), *self.shape), self.dtype)
        for places, batch in _batches(self._records, Rows(len(self._records), numbers)):
            images[places] = self.images_of(batch)
        return images

    def images_of(self, batch: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the images of decoded records, (n, H, W, C)."""
        images = [record['image'] for record in batch]
        if any(image.shape != self.shape for image in images):
            raise ValueError(f'the images of {self._name} differ in shape; all must have the same')
        return np.stack(images)


def _batches(records: Any, rows: Rows) -> Iterator[tuple[slice, Sequence[dict[str, Any]]]]:
    """Read rows, some at once: yields their places among them, and the decoded records."""
    for start in range(0, len(rows), _BATCH):
        numbers = rows.numbers(start, start + _BATCH)
        yield slice(start, start + len(numbers)), records.__getitems__(numbers.tolist())


def _check(name: str, kind: str, found: Collection[str] | None, wanted: tuple[str, ...]) -> None:
    """Refuse a set without the features or splits that are needed."""
    if not set(wanted) <= set(found or ()):
        raise ValueError(
            f'{name} has the {kind} {sorted(found or ())}; it must have the {kind} '
            f'{" and ".join(map(repr, wanted))}'
        )


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
