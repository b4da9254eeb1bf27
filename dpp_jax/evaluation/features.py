"""Features for the Fréchet distance between sets of images (FID).

FID is defined with the features of an Inception network. Here they come from a small classifier
trained on the real training images: it needs no download and fits any image size, but its numbers
mean something only within one data set and one trained network; `name` says so wherever an FID is
shown. Another extractor, such as Inception, needs only `name` and `features`.
"""

from collections.abc import Iterator
import dataclasses
import json
import os
from typing import Protocol

import flax.traverse_util
import jax
import numpy as np

from dpp_jax.evaluation import classifiers
from dpp_jax.evaluation import fid as fid_lib

FEATURES = 64

_NAME = (
    f'small CNN ({FEATURES} features) trained on the real training images; '
    'not Inception: compare only within one data set and seed'
)
_FORMAT = 'dpp_jax feature network 1'


class FeatureExtractor(Protocol):
    """What `fid` needs.

    Attributes:
        name: what the features are, to be shown beside every FID.
    """

    name: str

    def features(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """float32 (N, D) for uint8 images (N, H, W, C)."""
        ...


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A trained CNN (`classifiers.Cnn` with 64 hidden values) used for its hidden values.

    Attributes:
        classes: number of classes that it was trained on.
        image_shape: (H, W, C) of the images that it takes.
        held_out_accuracy: in [0, 1], on the held-out share of the images it was trained on.
        params: the weights.
        name: what the features are, to be shown beside every FID.
    """

    classes: int
    image_shape: tuple[int, int, int]
    held_out_accuracy: float
    params: dict = dataclasses.field(repr=False)
    name: str = _NAME

    def features(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """The values before the last ReLU: a Gaussian describes them better than those after it.

        Args:
            images: uint8 (N, H, W, C) of the trained size, N ≥ 1.
            batch_size: images at once; changes memory and time, not the result beyond rounding.

        Returns:
            float32 (N, 64).

        Raises:
            ValueError: images of another type or size.
        """
        images = fid_lib.check_images(images, self.image_shape)
        network = classifiers.Cnn(self.classes, FEATURES)
        return classifiers.apply_network(network, self.params, images, batch_size)[1]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the network as an npz file of exactly that name; whole or not at all."""
        header = {
            'format': _FORMAT,
            'classes': self.classes,
            'image_shape': list(self.image_shape),
            'held_out_accuracy': self.held_out_accuracy,
            'name': self.name,
        }
        arrays = flax.traverse_util.flatten_dict(jax.device_get(self.params), sep='/')
        partial = f'{os.fspath(path)}.partial'
        with open(partial, 'wb') as file:
            np.savez(file, header=json.dumps(header), **arrays)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'FeatureNetwork':
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a saved feature network.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop('header')))
            if header.pop('format') != _FORMAT:
                raise KeyError('format')
            header['image_shape'] = tuple(header['image_shape'])
        except FileNotFoundError:
            raise
        except Exception as error:  # a broken archive fails in many ways
            raise ValueError(f'{path} is not a saved feature network: {error!r}') from error
        return cls(**header, params=flax.traverse_util.unflatten_dict(arrays, sep='/'))


def train_feature_network(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.9999,
    held_out: float = 0.1,
    progress: classifiers.Progress | None = None,
) -> FeatureNetwork:
    """Trains the feature network on the real training images.

    Its features and every FID computed with them are functions of private images without any
    guarantee: they belong in `private/`.

    Args:
        images: uint8 (N, H, W, C), the real training images; sides of any length.
        labels: integers (N,) in [0, classes), at least two of every class.
        classes, key, epochs, ...: as in `classifiers.train_classifier`.

    Raises:
        ValueError: as in `classifiers.train_classifier`.
    """
    params, held_out_accuracy, _ = classifiers.train_network(
        classifiers.Cnn(classes, FEATURES), images, labels, key=key, epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate, ema_decay=ema_decay,
        held_out=held_out, progress=progress,
    )  # fmt: skip
    return FeatureNetwork(classes, tuple(np.shape(images)[1:]), held_out_accuracy, params)


def fid(
    network: FeatureExtractor,
    images_a: np.ndarray,
    images_b: np.ndarray,
    *,
    batch_size: int = 256,
) -> float:
    """Fréchet distance between the features of two sets of images (Heusel et al. 2017).

    It is biased upwards for few images, so compare only numbers from sets of the same sizes.

    Args:
        network: gives the features and their name.
        images_a, images_b: uint8 (N, H, W, C), at least two images each.
        batch_size: images at once.

    Returns:
        A number ≥ 0, symmetric in the two sets.

    Raises:
        ValueError: fewer than two images, or images that the network does not take.
    """
    moments_a = fid_lib.moments(_feature_batches(network, images_a, batch_size))
    moments_b = fid_lib.moments(_feature_batches(network, images_b, batch_size))
    return fid_lib.frechet_distance(*moments_a, *moments_b)


def _feature_batches(network, images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The features batch by batch, so that those of all images need not be in memory at once."""
    for start in range(0, len(images), batch_size):
        yield network.features(images[start : start + batch_size], batch_size)
