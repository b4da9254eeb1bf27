"""Classifiers that say what synthetic images are worth: trained on them, tested on real ones.

A classifier has candidates: epochs of its training, or strengths of its regularization. `train_classifier`
chooses one on held-out images *of its own training set*; who has another judge trains on all images and looks
at each candidate (`fit`). Nothing here takes a second set of images, so real test images cannot take part in
the choice. A new classifier is one function, or one network in `networks` or `residual`, and one entry in
`CLASSIFIERS`.

`train_as_paper` trains the paper's three as its PyTorch code does: on all images, and nothing chooses.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, Protocol
import warnings

import flax.linen as nn
import jax
import numpy as np
import sklearn.exceptions
import sklearn.linear_model
import sklearn.neural_network

from dpp_jax.data.images import check_images, check_labels
from dpp_jax.evaluation import held_out, networks, residual, trainer

# What selects a candidate: a held-out share of the synthetic images, or noisy counts of private ones.
SYNTHETIC, PRIVATE_NOISY = 'synthetic', 'private_noisy'
SELECTIONS = (SYNTHETIC, PRIVATE_NOISY)

# Inverse regularization strengths to choose from; of equals the last is kept, the most regularized.
_LOGISTIC_C = (1.0, 0.1, 0.01, 0.001)
_LOGISTIC_ITERATIONS = 300
# The paper's: iterations at most, and passes of its MLP over the images, which stops when its loss does.
_PAPER_ITERATIONS, _PAPER_PASSES = 50_000, 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained classifier.

    Attributes:
        image_shape: (H, W, C) of the images that it was trained on.
        name: which candidate it is, such as 'epoch 7 of 50' or 'C = 0.01'.
        function: uint8 images (N, H, W, C) → classes, integers (N,).
        held_out_accuracy: in [0, 1], on the held-out share of its own images; None: nothing was held out.
    """

    image_shape: tuple[int, int, int]
    name: str
    function: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    held_out_accuracy: float | None = None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return the classes, int32 (N,), of uint8 images (N, H, W, C).

        Raises:
            ValueError: images of another type, or of another shape than `image_shape`.
        """
        return self.function(check_images(images, name='images', image_shape=self.image_shape)).astype(
            np.int32
        )


# Looks at a candidate, and says something of it for the progress bar, which people see.
Judge = Callable[[Classifier], str]


class Fit(Protocol):
    """A function that shows a judge the candidates in a fixed order; the arguments are those of `fit`."""

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        classes: int,
        key: jax.Array,
        rng: np.random.Generator,
        settings: trainer.Settings,
        judge: Judge,
        progress: trainer.Progress | None,
    ) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of classifier.

    Attributes:
        title: its name for people.
        fit: trains one.
        candidates: how many candidates it has with these settings.
        is_random: whether its key matters where nothing is held out.
    """

    title: str
    fit: Fit
    candidates: Callable[[trainer.Settings], int]
    is_random: bool = True


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
    """Train a classifier, and keep what does best on held-out images of its own (of equals, the last).

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
    entry, rng = _entry(name, CLASSIFIERS), held_out.random_generator(key)
    chosen, held = held_out.split(images, labels, classes=classes, share=settings.held_out, rng=rng)
    best = None

    def judge(candidate: Classifier) -> str:
        nonlocal best
        found = accuracy(candidate, held.images, held.labels)
        if best is None or found >= best.held_out_accuracy:
            best = dataclasses.replace(candidate, held_out_accuracy=found)
        return f'held-out accuracy {found:.3f}'

    entry.fit(
        chosen.images, chosen.labels, classes=classes, key=key, rng=rng, settings=settings, judge=judge,
        progress=progress,
    )  # fmt: skip
    return best


def fit(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    settings: trainer.Settings,
    judge: Judge,
    progress: trainer.Progress | None = None,
) -> None:
    """Train a classifier on all images, and show each candidate to a judge: `candidates(name, ...)` of them.

    Args:
        judge: looks at a candidate.
        others: as of `train_classifier`; one image of every class is enough.

    Raises:
        ValueError: an unknown name, or images or labels other than described.
    """
    _fit(
        _entry(name, CLASSIFIERS), images, labels, classes=classes, key=key, settings=settings, judge=judge,
        progress=progress,
    )  # fmt: skip


def train_as_paper(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    settings: trainer.Settings,
    progress: trainer.Progress | None = None,
) -> Classifier:
    """Train a classifier as the paper's PyTorch code does, on all images; it is what the training ends with.

    Args:
        name: one of `AS_PAPER`.
        settings: how to train the CNN; the other two have their own.
        others: as of `train_classifier`; one image of every class is enough.

    Raises:
        ValueError: an unknown name, or images or labels other than described.
    """
    last = None

    def judge(candidate: Classifier) -> str:
        nonlocal last
        last = candidate
        return ''

    _fit(
        _entry(name, AS_PAPER), images, labels, classes=classes, key=key, settings=settings, judge=judge,
        progress=progress,
    )  # fmt: skip
    return last


def _fit(
    entry: Entry, images: np.ndarray, labels: np.ndarray, *, classes: int, key: jax.Array, **rest: Any
) -> None:
    """Check the images, and train on all of them."""
    images = check_images(images, name='training set')
    labels = check_labels(labels, count=len(images), classes=classes, name='training set').astype(np.int32)
    entry.fit(images, labels, classes=classes, key=key, rng=held_out.random_generator(key), **rest)


def candidates(name: str, settings: trainer.Settings) -> int:
    """Return how many candidates a classifier has: a public number.

    Raises:
        ValueError: an unknown name.
    """
    return _entry(name, CLASSIFIERS).candidates(settings)


def trainings(name: str, seeds: int) -> int:
    """Return how many of so many trainings on all images differ: one, if nothing is random.

    Raises:
        ValueError: an unknown name.
    """
    return seeds if _entry(name, CLASSIFIERS).is_random else 1


def _entry(name: str, known: Mapping[str, Entry]) -> Entry:
    if name not in known:
        raise ValueError(f'classifier is {name!r}; it must be one of {", ".join(known)}')
    return known[name]


def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share, in [0, 1], of images, uint8 (N, H, W, C), that get their label, integers (N,)."""
    return held_out.label_accuracy(classifier.predict(images), labels)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each class, a row, by their predicted class, a column: int64 (classes, classes).

    Args:
        predicted, labels: integers (N,) in [0, classes).
        classes: number of classes.
    """
    pairs = np.asarray(labels, np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _fit_network(
    network: Callable[[int], nn.Module],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    settings: trainer.Settings,
    judge: Judge,
    **rest: Any,
) -> None:
    """Train a network; its candidates are epochs."""
    model = network(classes)

    def judge_epoch(epoch: int, averages: trainer.Averages) -> str:
        def predict(batch: np.ndarray) -> np.ndarray:
            logits, _ = trainer.apply(model, averages.params, batch, statistics=averages.statistics)
            return logits.argmax(axis=1)

        name = f'epoch {epoch} of {settings.epochs}'
        return judge(Classifier(image_shape=images.shape[1:], name=name, function=predict))

    trainer.fit(model, images, labels, settings=settings, judge=judge_epoch, **rest)


def _fit_logistic(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    rng: np.random.Generator,
    settings: trainer.Settings,
    judge: Judge,
    progress: trainer.Progress | None,
    strengths: Sequence[float] = _LOGISTIC_C,
    iterations: int = _LOGISTIC_ITERATIONS,
) -> None:
    """Scikit-learn's logistic regression; its candidates are strengths of the regularization."""
    del classes, key, rng, settings  # nothing is random
    if progress is not None:
        progress(0, len(strengths), '')
    for done, c in enumerate(strengths, start=1):
        model = sklearn.linear_model.LogisticRegression(C=c, max_iter=iterations)
        name = f'C = {c:g}'
        found = judge(dataclasses.replace(_fit_sklearn(model, images, labels), name=name))
        if progress is not None:
            progress(done, len(strengths), ', '.join(filter(None, [name, found])))


def _fit_paper_mlp(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    rng: np.random.Generator,
    settings: trainer.Settings,
    judge: Judge,
    progress: trainer.Progress | None,
) -> None:
    """The paper's MLP: scikit-learn's, which has 100 hidden units, no dropout, and an L2 penalty of 1e-4.

    Adam with learning rate 1e-3 and batches of 200, until its loss has not become smaller for ten passes.
    """
    del classes, key, settings  # it has its own
    if progress is not None:
        progress(0, 1, '')
    model = sklearn.neural_network.MLPClassifier(
        hidden_layer_sizes=(100,),
        alpha=1e-4,
        learning_rate_init=1e-3,
        max_iter=_PAPER_PASSES,
        random_state=int(rng.integers(2**32)),
    )
    trained = _fit_sklearn(model, images, labels)
    judge(dataclasses.replace(trained, name=f'epoch {model.n_iter_}'))
    if progress is not None:
        progress(1, 1, '')


def _fit_sklearn(model: Any, images: np.ndarray, labels: np.ndarray) -> Classifier:
    """Fit a classifier of scikit-learn to pixels in [-1, 1]."""

    def flat(batch):
        return trainer.to_float(batch).reshape(len(batch), -1)

    with warnings.catch_warnings():
        # A fit that stops early is one like others: it is judged by its answers.
        warnings.simplefilter('ignore', sklearn.exceptions.ConvergenceWarning)
        model.fit(flat(images), labels)
    predict = lambda batch: model.predict(flat(batch))
    return Classifier(image_shape=images.shape[1:], name=type(model).__name__, function=predict)


def _of_network(title: str, network: Callable[[int], nn.Module]) -> Entry:
    return Entry(
        title=title,
        fit=functools.partial(_fit_network, network),
        candidates=lambda settings: len(settings.judged_epochs),
    )


CLASSIFIERS = {
    'logistic': Entry(
        title='logistic regression',
        fit=_fit_logistic,
        candidates=lambda settings: len(_LOGISTIC_C),
        is_random=False,
    ),
    'mlp': _of_network('MLP', networks.Mlp),
    'cnn': _of_network("CNN (the paper's)", networks.Cnn),
    'resnet18': _of_network('ResNet-18', residual.ResNet),
    'resnext29': _of_network('ResNeXt-29 (8x64d)', residual.ResNeXt),
    'wrn40_4': _of_network('WRN-40-4', residual.WideResNet),
}

# The paper's three, as its PyTorch code trains them.
AS_PAPER = {
    'logistic': Entry(
        title=CLASSIFIERS['logistic'].title,
        fit=functools.partial(_fit_logistic, strengths=(1.0,), iterations=_PAPER_ITERATIONS),
        candidates=lambda settings: 1,
        is_random=False,
    ),
    'mlp': Entry(title=CLASSIFIERS['mlp'].title, fit=_fit_paper_mlp, candidates=lambda settings: 1),
    'cnn': _of_network(CLASSIFIERS['cnn'].title, functools.partial(networks.Cnn, as_pytorch=True)),
}
