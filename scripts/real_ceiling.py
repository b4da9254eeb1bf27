"""What classifiers reach that are trained on real images: the ceiling of what synthetic ones can be worth.

    python -m scripts.real_ceiling --source=shapes --classifiers=logistic,mlp,cnn,resnet18 --epochs=10
    python -m scripts.real_ceiling --source=idx:MNIST --classifiers=resnet18 --train=10000 --epochs=2

One line for each: accuracy on the test images, seconds for each step of training. A tenth of the
training images is held out, as `evaluate` does. `shapes` are made here, like a small set of MedMNIST: gray
disks, squares and crosses of 28x28 pixels, of any place, size and brightness, under noise.
"""

import time

from absl import app, flags
import jax
import numpy as np

from dpp_jax.data import sources
from dpp_jax.data.images import Images
from dpp_jax.evaluation import classifiers, trainer
from dpp_jax.training import devices

_SOURCE = flags.DEFINE_string('source', 'shapes', "'shapes', or as config.data.source.")
_CLASSIFIERS = flags.DEFINE_list('classifiers', list(classifiers.CLASSIFIERS), 'Which ones.')
_TRAIN = flags.DEFINE_integer('train', 2000, 'The first so many images of the training set.', lower_bound=20)
_TEST = flags.DEFINE_integer('test', 2000, 'The first so many images of the test set.', lower_bound=1)
_EPOCHS = flags.DEFINE_integer('epochs', 10, 'Of the networks.', lower_bound=1)
_RATE = flags.DEFINE_float('learning_rate', 1e-3, 'Of Adam.', lower_bound=0.0)
_SEED = flags.DEFINE_integer('seed', 0, 'Of initial weights and order.')
_NOISE = 40.0  # standard deviation, in gray levels


def shapes(number: int, seed: int) -> Images:
    """Return disks, squares and crosses, (number, 28, 28, 1), with labels 0, 1 and 2."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number, dtype=np.int32) % 3
    y, x = np.mgrid[:28, :28]
    radius = rng.uniform(4, 8, (number, 1, 1))
    center = rng.uniform(9, 19, (2, number, 1, 1))
    dy, dx = np.abs(y - center[0]), np.abs(x - center[1])
    is_cross = (np.minimum(dy, dx) <= radius / 3) & (np.maximum(dy, dx) <= radius)
    kinds = [np.hypot(dy, dx) <= radius, np.maximum(dy, dx) <= 0.9 * radius, is_cross]
    inside = np.choose(labels[:, None, None], kinds)
    dark, bright = rng.uniform(30, 100, (number, 1, 1)), rng.uniform(60, 150, (number, 1, 1))
    gray = dark + bright * inside + rng.normal(0, _NOISE, inside.shape)
    return Images(images=np.clip(gray, 0, 255).astype(np.uint8)[..., None], labels=labels)


def load(source: str, split: str, number: int) -> Images:
    """Return the first images of a split."""
    if source == 'shapes':
        return shapes(number, seed=sources.SPLITS.index(split))
    return sources.load(source, split, rows=slice(0, number, 1))


def line(kind: str, train: Images, test: Images, classes: int, settings: trainer.Settings, seed: int) -> str:
    """Train one classifier; return its line of the table."""
    steps = []  # (done, time)
    classifier = classifiers.train_classifier(
        kind,
        train.images,
        train.labels,
        classes=classes,
        key=jax.random.key(seed),
        settings=settings,
        progress=lambda done, total, note: steps.append((done, time.monotonic())),
    )
    seconds = steps[-1][1] - steps[0][1]
    accuracy = classifiers.accuracy(classifier, test.images, test.labels)
    # The first call compiles; with one call there is no other.
    own = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(steps[1:], steps[2:]) if b[0] > a[0]]
    step = f'{np.median(own):.3f}' if own else '-'
    return f'{kind:<10} {100 * accuracy:6.2f} %  {step:>8} s/step  {seconds:8.1f} s in all  {classifier.name}'


def main(_) -> None:
    devices.keep_compiled_programs()
    source = _SOURCE.value
    train, test = load(source, 'train', _TRAIN.value), load(source, 'test', _TEST.value)
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    settings = trainer.Settings(epochs=_EPOCHS.value, learning_rate=_RATE.value)
    print(
        f'{source}: {len(train.images):,} training and {len(test.images):,} test images of '
        f'{train.images.shape[1:]}, {classes} classes; {settings}; {devices.kind()}'
    )
    for kind in _CLASSIFIERS.value:
        print(line(kind, train, test, classes, settings, _SEED.value), flush=True)


if __name__ == '__main__':
    app.run(main)
