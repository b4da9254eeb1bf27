"""The network whose features FID compares: a small classifier, trained on the real training images.

FID is defined by the features of an Inception network. This one needs no download and takes images of any
size. But its FID means something only within one data set and one trained network; `name`, shown beside
every FID, says so.
"""

import dataclasses
import json
import os
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from dpp_jax.data.images import check_images
from dpp_jax.evaluation import networks, trainer

FEATURES = 64
_LEARNING_RATE = 1e-3

_NAME = (
    f'small CNN ({FEATURES} features) trained on the real training images; '
    'not Inception: compare only within one data set and seed'
)
_FORMAT = 'dpp_jax feature network 1'


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A trained `networks.Cnn`, used for its hidden values.

    Attributes:
        classes: number of classes that it was trained on.
        image_shape: (H, W, C) of the images that it takes.
        held_out_accuracy: in [0, 1], on the held-out share of the images that it was trained on.
        params: the weights, arrays by name.
        name: what the features are, to be shown beside every FID.
    """

    classes: int
    image_shape: tuple[int, int, int]
    held_out_accuracy: float
    params: dict[str, Any] = dataclasses.field(repr=False)
    name: str = _NAME

    def features(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Return the values before the last ReLU: a Gaussian describes them better than those after it.

        Args:
            images: uint8 (N, H, W, C), N ≥ 1, of `image_shape`.
            batch_size: images at once; changes memory and time, and results only by rounding.

        Returns:
            float32 (N, 64).

        Raises:
            ValueError: images of another type or shape.
        """
        images = check_images(images, name='images', image_shape=self.image_shape)
        return trainer.apply(networks.Cnn(self.classes, FEATURES), self.params, images, batch_size)[1]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for an npz file: the weights by name, and the rest as JSON in `header`."""
        header = {
            'format': _FORMAT,
            'classes': self.classes,
            'image_shape': list(self.image_shape),
            'held_out_accuracy': self.held_out_accuracy,
            'name': self.name,
        }
        arrays = flax.traverse_util.flatten_dict(self.params, sep='/')
        return {'header': np.array(json.dumps(header)), **arrays}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], *, source: str | os.PathLike) -> 'FeatureNetwork':
        """Return the network that `to_arrays` gave these arrays.

        Args:
            arrays: all arrays of the file.
            source: where they come from, for the error message.

        Raises:
            ValueError: the arrays are those of something else.
        """
        weights = dict(arrays)
        try:
            header = json.loads(str(weights.pop('header')))
            saved_as = header.pop('format')
            if saved_as != _FORMAT:
                raise ValueError(f'format is {saved_as!r}; it must be {_FORMAT!r}')
            params = flax.traverse_util.unflatten_dict(weights, sep='/')
            return cls(**{**header, 'image_shape': tuple(header['image_shape'])}, params=params)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f'{source} is not a saved feature network: {error!r}') from error


def train_feature_network(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    epochs: int,
    progress: trainer.Progress | None = None,
) -> FeatureNetwork:
    """Train the feature network on the real training images.

    Its features, and every FID computed with them, come from private images without any guarantee: they
    belong in `private/`.

    Args:
        images: uint8 (N, H, W, C), the real training images; sides of any length.
        labels: integers (N,) in [0, classes), at least two of every class.
        classes: number of classes, at least 2.
        key: typed jax.random key; the same key gives the same network on the same hardware.
        epochs: passes over the images that are not held out.
        progress: called with (done, total, note), done and total in steps.

    Raises:
        ValueError: images or labels other than described.
    """
    settings = trainer.Settings(epochs=epochs, learning_rate=_LEARNING_RATE)
    trained = trainer.train(
        networks.Cnn(classes, FEATURES), images, labels, key=key, settings=settings, progress=progress
    )
    return FeatureNetwork(
        classes=classes,
        image_shape=images.shape[1:],
        held_out_accuracy=trained.held_out_accuracy,
        params=trained.params,
    )
