"""Sets of tensorflow-datasets, read without TensorFlow."""

from collections.abc import Collection
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo

_BATCH = 4096  # images decoded by one call
_SECONDS_TO_CONNECT = 5  # to a server; tensorflow-datasets itself would try for minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(Source):
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
        builder = self._prepared(prepare=True)
        try:
            records = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise ValueError(
                f'{self.name} in {builder.data_path} is not in the array_record format; choose '
                f'another data_dir. {self._how_to_prepare()}'
            ) from error
        images, labels = [], []
        for start in range(0, len(records), _BATCH):
            stop = min(start + _BATCH, len(records))
            batch = records.__getitems__(list(range(start, stop)))
            images += [record['image'] for record in batch]
            labels += [record['label'] for record in batch]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f'the images of {self.name} differ in shape; all must have the same')
        return np.array(images), np.array(labels, np.int64)

    def groups(self, split: str, name: str) -> np.ndarray:
        from tensorflow_datasets import decode

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
        records = builder.as_data_source(split=split, decoders={'image': decode.SkipDecoding()})
        found = []
        for start in range(0, len(records), _BATCH):
            for record in records.__getitems__(list(range(start, min(start + _BATCH, len(records))))):
                for part in name.split('/'):
                    record = record[part]
                found.append(record)
        return np.array(found)

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


def _check(name: str, kind: str, found: Collection[str] | None, wanted: tuple[str, ...]) -> None:
    """Refuse a set without the features or splits that are needed."""
    if not set(wanted) <= set(found or ()):
        raise ValueError(
            f'{name} has the {kind} {sorted(found or ())}; it must have the {kind} '
            f'{" and ".join(map(repr, wanted))}'
        )


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
