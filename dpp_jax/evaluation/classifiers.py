"""Classifiers that say what synthetic images are worth: trained on them, tested on real ones.

A classifier chooses its weights on held-out images *of its own training set*. Nothing here takes a second
set of images while it trains, so real test images cannot take part in the choice. A new classifier is one
function, or one network in `networks`, and one entry in `CLASSIFIERS`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Protocol
import warnings

import flax.linen as nn
import jax
import numpy as np
import sklearn.exceptions
import sklearn.linear_model

from dpp_jax.data.images import check_images
from dpp_jax.evaluation import held_out, networks, trainer

_LOGISTIC_C = (0.001, 0.01, 0.1, 1.0)  # inverse regularization strengths to choose from
_LOGISTIC_ITERATIONS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained classifier.

    Attributes:
        image_shape: (H, W, C) of the images that it was trained on.
        held_out_accuracy: in [0, 1], on the held-out share of the images that it was trained on.
        selected: what the held-out images chose, such as 'epoch 7 of 50' or 'C = 0.01'.
        function: uint8 images (N, H, W, C) → classes, integers (N,).
    """

    image_shape: tuple[int, int, int]
    held_out_accuracy: float
    selected: str
    function: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return the classes, int32 (N,), of uint8 images (N, H, W, C).

        Raises:
            ValueError: images of another type, or of another shape than `image_shape`.
        """
        return self.function(check_images(images, name='images', image_shape=self.image_shape)).astype(
            np.int32
        )


class Train(Protocol):
    """A function that trains a classifier; the arguments are those of `train_classifier`."""

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        classes: int,
        key: jax.Array,
        settings: trainer.Settings,
        progress: trainer.Progress | None,
    ) -> Classifier: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of classifier.

    Attributes:
        title: its name for people.
        train: trains one.
    """

    title: str
    train: Train


def train_classifier(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    settings: trainer.Settings,
    progress: trainer.Progress | None = None,
) -> Classifier:
    """Train a classifier, and keep what does best on a held-out share of its own images.

    Args:
        name: one of `CLASSIFIERS`.
        images: uint8 (N, H, W, C).
        labels: integers (N,) in [0, classes), at least two of every class.
        classes: number of classes, at least 2.
        key: typed jax.random key; the same key gives the same classifier on the same hardware.
        settings: how to train a network; logistic regression uses `held_out` alone.
        progress: called with (done, total, note), done and total in steps (logistic regression: in fits).

    Raises:
        ValueError: an unknown name, or images or labels other than described.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f'classifier is {name!r}; it must be one of {", ".join(CLASSIFIERS)}')
    entry = CLASSIFIERS[name]
    return entry.train(images, labels, classes=classes, key=key, settings=settings, progress=progress)


def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share, in [0, 1], of images, uint8 (N, H, W, C), that get their label, integers (N,)."""
    return held_out.label_accuracy(classifier.predict(images), labels)


def _train_network(
    network: Callable[[int], nn.Module],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    settings: trainer.Settings,
    **rest: Any,
) -> Classifier:
    """Train a network; its epoch is chosen on the held-out images."""
    model = network(classes)
    trained = trainer.train(model, images, labels, settings=settings, **rest)
    return Classifier(
        image_shape=images.shape[1:],
        held_out_accuracy=trained.held_out_accuracy,
        selected=f'epoch {trained.epoch} of {settings.epochs}',
        function=lambda batch: trainer.apply(model, trained.params, batch)[0].argmax(axis=1),
    )


def _train_logistic(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    settings: trainer.Settings,
    progress: trainer.Progress | None,
) -> Classifier:
    """Scikit-learn's logistic regression; its C is chosen on the held-out images."""
    rng = held_out.random_generator(key)
    chosen, held = held_out.split(images, labels, classes=classes, share=settings.held_out, rng=rng)

    def flat(batch):
        return trainer.to_float(batch).reshape(len(batch), -1)

    pixels, held_pixels = flat(chosen.images), flat(held.images)
    best, best_accuracy = None, -1.0
    if progress is not None:
        progress(0, len(_LOGISTIC_C), '')
    for done, c in enumerate(_LOGISTIC_C, start=1):
        model = sklearn.linear_model.LogisticRegression(C=c, max_iter=_LOGISTIC_ITERATIONS)
        with warnings.catch_warnings():
            # A fit that stops early is one more candidate; the held-out images judge it.
            warnings.simplefilter('ignore', sklearn.exceptions.ConvergenceWarning)
            model.fit(pixels, chosen.labels)
        model_accuracy = held_out.label_accuracy(model.predict(held_pixels), held.labels)
        if model_accuracy > best_accuracy:
            best, best_accuracy = model, model_accuracy
        if progress is not None:
            progress(done, len(_LOGISTIC_C), f'C = {c:g}, held-out accuracy {model_accuracy:.3f}')
    return Classifier(
        image_shape=images.shape[1:],
        held_out_accuracy=best_accuracy,
        selected=f'C = {best.C:g}',
        function=lambda batch: best.predict(flat(batch)),
    )


CLASSIFIERS = {
    'logistic': Entry(title='logistic regression', train=_train_logistic),
    'mlp': Entry(title='MLP', train=functools.partial(_train_network, networks.Mlp)),
    'cnn': Entry(title="CNN (the paper's)", train=functools.partial(_train_network, networks.Cnn)),
}
