"""A network of our own whose features FID compares: a small classifier, trained on the real training images.

FID is defined by the features of an Inception network (`inception`). This one needs no download, is fast, and
takes images of any size. But its FID means something only within one data set and one trained network;
`name`, shown beside every FID, says so. Where labels tell nothing apart, it learns how an image was turned
(Gidaris et al. 2018) instead of its class.
"""

import dataclasses
import json
import os
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from dpp_jax.data.images import check_images
from dpp_jax.evaluation import held_out, networks, trainer

FEATURES = 64
_LEARNING_RATE = 1e-3

_NAME = (
    f'small CNN ({FEATURES} features) trained on the real training images; '
    'not Inception: compare only within one data set and seed'
)
_NAME_OF_ROTATIONS = _NAME.replace(
    'trained on the real training images', 'trained to tell four rotations of the real training images apart'
)
_ROTATIONS = 4
_FORMAT = 'dpp_jax feature network 1'
_IMAGES_AT_ONCE = 256  # on a device


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A trained `networks.Cnn`, used for its hidden values.

    Attributes:
        classes: number of classes that it was trained on.
        image_shape: (H, W, C) of the images that it takes.
        held_out_accuracy: in [0, 1], on the held-out share of the images that it was trained on.
        params: the weights, arrays by name.
        name: what the features are, to be shown beside every FID.
        tells_classes: whether the logits are of the images' classes; else they are of four rotations.
    """

    classes: int
    image_shape: tuple[int, int, int]
    held_out_accuracy: float
    params: dict[str, Any] = dataclasses.field(repr=False)
    name: str = _NAME
    tells_classes: bool = True

    images_at_once = _IMAGES_AT_ONCE

    def features(self, images: np.ndarray, batch_size: int = _IMAGES_AT_ONCE) -> np.ndarray:
        """Return the values before the last ReLU: a Gaussian describes them better than those after it.

        Args:
            images: uint8 (N, H, W, C), N ≥ 1, of `image_shape`.
            batch_size: images at once; changes memory and time, and results only by rounding.

        Returns:
            float32 (N, 64).

        Raises:
            ValueError: images of another type or shape.
        """
        return self.outputs(images, batch_size)[1]

    def outputs(self, images: np.ndarray, batch_size: int = _IMAGES_AT_ONCE) -> tuple[np.ndarray, np.ndarray]:
        """Return logits, float32 (N, classes), and features, see `features`."""
        images = check_images(images, name='images', image_shape=self.image_shape)
        return trainer.apply(networks.Cnn(self.classes, FEATURES), self.params, images, batch_size)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for an npz file: the weights by name, and the rest as JSON in `header`."""
        header = {
            'format': _FORMAT,
            'classes': self.classes,
            'image_shape': list(self.image_shape),
            'held_out_accuracy': self.held_out_accuracy,
            'name': self.name,
            'tells_classes': self.tells_classes,
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


def why_no_network(images: int) -> str | None:
    """Say why no feature network can be trained on so many images, whatever their labels; None if one can."""
    if images >= 2 * _ROTATIONS:
        return None
    return f'there are {images} private images; the small CNN of FID needs at least {2 * _ROTATIONS}'


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

    It learns their classes; with one class, or fewer than two images of a class, each image is turned by a
    random one of 0, 90, 180 and 270 degrees, and the network learns which. Its features, and every FID
    computed with them, come from private images without any guarantee: they belong in `private/`.

    Args:
        images: uint8 (N, H, W, C), the real training images; sides of any length; turned ones are square.
        labels: integers (N,) in [0, classes).
        classes: number of classes, at least 1.
        key: typed jax.random key; the same key gives the same network on the same hardware.
        epochs: passes over the images that are not held out.
        progress: called with (done, total, note), done and total in steps.

    Raises:
        ValueError: images or labels other than described.
    """
    left_out = why_no_network(len(images))
    if left_out:
        raise ValueError(left_out)
    tells_classes = bool(classes > 1 and np.bincount(labels, minlength=classes).min() >= 2)
    if not tells_classes:
        classes, labels = _ROTATIONS, held_out.random_generator(key).permutation(len(images)) % _ROTATIONS
        images = turned(images, labels)
    settings = trainer.Settings(epochs=epochs, learning_rate=_LEARNING_RATE)
    trained = trainer.train(
        networks.Cnn(classes, FEATURES), images, labels, key=key, settings=settings, progress=progress
    )
    return FeatureNetwork(
        classes=classes,
        image_shape=images.shape[1:],
        held_out_accuracy=trained.held_out_accuracy,
        params=trained.params,
        name=_NAME if tells_classes else _NAME_OF_ROTATIONS,
        tells_classes=tells_classes,
    )


def turned(images: np.ndarray, quarters: np.ndarray) -> np.ndarray:
    """Return square images (N, S, S, C), each turned by its number of quarters, integers (N,) in 0..3."""
    found = np.empty_like(images)
    for quarter in range(_ROTATIONS):
        found[quarters == quarter] = np.rot90(images[quarters == quarter], quarter, axes=(1, 2))
    return found
