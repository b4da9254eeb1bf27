"""The classifiers on real handwritten digits, and what each of them promises."""

import functools
import inspect
import re

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from dpp_jax.evaluation import classifiers, held_out, networks, residual, trainer

SMALL = ('logistic', 'mlp', 'cnn')
FAST = (*SMALL, 'resnet')


@pytest.fixture(autouse=True)
def _resnet(monkeypatch):
    """A residual network with few blocks and channels: statistics of batches take part."""
    network = functools.partial(residual.ResNet, blocks=(1, 1), width=8)
    monkeypatch.setitem(classifiers.CLASSIFIERS, 'resnet', classifiers._of_network('ResNet', network))


@pytest.fixture(name='digits', scope='module')
def _digits():
    """Train images, train labels, test images, test labels."""
    data = load_digits()
    images = (data.images[..., None] * 255 / 16).astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    return split[0], split[2], split[1], split[3]


def train(name, images, labels, *, classes=10, seed=0, progress=None, **settings):
    return classifiers.train_classifier(
        name,
        images,
        labels,
        classes=classes,
        key=jax.random.key(seed),
        settings=trainer.Settings(**{'epochs': 3} | settings),
        progress=progress,
    )


@pytest.mark.parametrize('name', FAST)
def test_digits_are_learned(digits, name):
    images, labels, test_images, test_labels = digits
    classifier = train(name, images, labels, epochs=12, learning_rate=2e-3)
    assert classifiers.accuracy(classifier, test_images, test_labels) > 0.93
    assert classifier.held_out_accuracy > 0.9
    predicted = classifier.predict(test_images)
    assert predicted.shape == test_labels.shape and predicted.dtype == np.int32


@pytest.mark.parametrize('name', FAST)
def test_same_key_same_classifier(digits, name):
    images, labels, test_images, _ = digits
    one, two = (train(name, images[:400], labels[:400], seed=3) for _ in range(2))
    assert one.held_out_accuracy == two.held_out_accuracy
    np.testing.assert_array_equal(one.predict(test_images), two.predict(test_images))


def test_another_key_is_another_classifier(digits):
    images, labels, test_images, _ = digits
    one, two = (train('mlp', images, labels, seed=seed) for seed in (0, 1))
    assert (one.predict(test_images) != two.predict(test_images)).any()


def test_selection_sees_nothing_but_the_training_images(digits):
    assert set(inspect.signature(classifiers.train_classifier).parameters) == {
        'name', 'images', 'labels', 'classes', 'key', 'settings', 'progress'
    }  # fmt: skip
    # Images whose labels are all wrong: high held-out accuracy, hardly a right answer on real ones.
    images, labels, test_images, test_labels = digits
    for name in ('mlp', 'logistic'):
        classifier = train(name, images, (labels + 1) % 10, epochs=8, learning_rate=2e-3)
        assert classifier.held_out_accuracy > 0.85
        assert classifiers.accuracy(classifier, test_images, test_labels) < 0.1


def test_the_best_epoch_is_kept(digits):
    images, labels, _, _ = digits
    notes = []
    # A learning rate that makes the accuracy jump up and down.
    classifier = train(
        'mlp', images, labels, epochs=12, learning_rate=0.3, ema_decay=0.0,
        progress=lambda done, total, note: notes.append(note),
    )  # fmt: skip
    # The note of an epoch tells the accuracy after the epoch before it; the last, after the last.
    seen = [float(note.split()[-1]) for note in notes if ',' in note]
    assert len(seen) == 12 and max(seen) > min(seen)
    kept = int(re.fullmatch(r'epoch (\d+) of 12', classifier.name).group(1))
    assert round(classifier.held_out_accuracy, 3) == seen[kept - 1] == max(seen)
    assert seen[kept:].count(max(seen)) == 0  # of equals, the last
    # The weights kept are the ones that had this accuracy.
    rng = held_out.random_generator(jax.random.key(0))
    _, held = held_out.split(images, labels, classes=10, share=0.1, rng=rng)
    accuracy = classifiers.accuracy(classifier, held.images, held.labels)
    assert accuracy == pytest.approx(classifier.held_out_accuracy)


@pytest.mark.parametrize('name', ['mlp', 'logistic'])
def test_progress_rises_to_its_total(digits, name):
    images, labels, _, _ = digits
    calls = []
    train(name, images, labels, epochs=2, batch_size=8, progress=lambda *args: calls.append(args))
    done, totals, notes = zip(*calls)
    assert list(done) == sorted(done) and done[0] == 0 < done[1]
    assert set(totals) == {done[-1]}
    assert 'held-out accuracy' in notes[-1]


def test_batch_larger_than_the_set(digits):
    images, labels, _, _ = digits
    classifier = train('mlp', images[:60], labels[:60], batch_size=5000, epochs=2)
    assert classifier.predict(images[:5]).shape == (5,)


def test_two_classes_and_color():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 100, (60, 4, 5, 3)).astype(np.uint8)
    images[labels == 1, ..., 2] += 100
    for name in SMALL:
        classifier = train(name, images, labels, classes=2, epochs=40, learning_rate=3e-3)
        assert classifiers.accuracy(classifier, images, labels) > 0.9, name


LABELS = np.arange(20, dtype=np.int32) % 4
IMAGES = np.zeros((20, 4, 4, 1), np.uint8)


@pytest.mark.parametrize('name', ['cnn', 'logistic'])
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'labels': LABELS + 1}, r'labels go from 1 to 4; they must lie in 0\.\.3'),
        ({'labels': LABELS - 1}, 'from -1 to 2'),
        ({'labels': np.where(LABELS == 2, 3, LABELS)}, 'no image has class 2'),
        ({'labels': LABELS * 1.0}, 'labels are float64'),
        ({'labels': LABELS[:5]}, 'labels are int32 of shape'),
        ({'images': IMAGES / 255}, 'images are float64'),
        ({'images': IMAGES[..., 0]}, 'images are uint8 of shape'),
        ({'images': IMAGES[:0], 'labels': LABELS[:0]}, 'at least one image'),
        ({'images': IMAGES[:7], 'labels': LABELS[:7]}, '1 image has class 3; each class needs at least 2'),
        ({'classes': 1}, 'classes is 1'),
    ],
)
def test_bad_images_are_refused(name, changes, message):
    arguments = {'images': IMAGES, 'labels': LABELS, 'classes': 4} | changes
    with pytest.raises(ValueError, match=message):
        train(name, **arguments)


def test_a_new_classifier_is_one_function_and_one_entry(monkeypatch):
    def fit_constant(images, labels, *, judge, **rest):
        for number in (1, 2, 2, 3):
            function = lambda batch, number=number: np.full(len(batch), number)
            judge(classifiers.Classifier(image_shape=images.shape[1:], name=f'{number}', function=function))

    entry = classifiers.Entry(title='always one', fit=fit_constant, candidates=lambda settings: 4)
    monkeypatch.setitem(classifiers.CLASSIFIERS, 'constant', entry)
    labels = np.append(LABELS, [2] * 20)
    classifier = train('constant', np.zeros((40, 4, 4, 1), np.uint8), labels, classes=4)
    assert classifier.name == '2' and classifiers.accuracy(classifier, IMAGES, LABELS) == 0.25


@pytest.mark.parametrize('name', ['logistic', 'mlp', 'resnet'])
def test_a_judge_sees_as_many_candidates_as_are_promised_and_they_learn_from_all_images(digits, name):
    images, labels, test_images, test_labels = digits
    seen = []

    def judge(candidate):
        seen.append((candidate.name, classifiers.accuracy(candidate, test_images, test_labels)))
        return ''

    settings = trainer.Settings(epochs=7, candidates=3, learning_rate=3e-3)
    arguments = dict(classes=10, key=jax.random.key(0), settings=settings, judge=judge)
    classifiers.fit(name, images[:400], labels[:400], **arguments)
    assert len(seen) == classifiers.candidates(name, settings) == (4 if name == 'logistic' else 3)
    if name != 'logistic':
        assert [candidate for candidate, _ in seen] == [f'epoch {n} of 7' for n in (3, 5, 7)]
    assert seen[-1][1] > 0.4
    # One image of a class is enough: none is held out.
    classifiers.fit(name, images[:40], np.r_[9, np.arange(39) % 9], **arguments)


def as_paper(name, images, labels, *, epochs=3):
    settings = trainer.Settings(epochs=epochs, learning_rate=3e-3, is_even=False)
    return classifiers.train_as_paper(
        name, images, labels, classes=10, key=jax.random.key(0), settings=settings
    )


def test_as_in_the_paper_logistic_regression_and_mlp_are_those_of_scikit_learn_on_all_images(digits):
    images, labels, test_images, test_labels = digits
    images, labels = images[:150], labels[:150]
    flat = lambda batch: batch.reshape(len(batch), -1) / np.float32(127.5) - 1
    same = LogisticRegression(C=1.0, max_iter=50_000).fit(flat(images), labels)
    found = as_paper('logistic', images, labels)
    np.testing.assert_array_equal(found.predict(test_images), same.predict(flat(test_images)))
    assert found.name == 'C = 1' and found.held_out_accuracy is None
    mlp = as_paper('mlp', images, labels)
    assert classifiers.accuracy(mlp, test_images, test_labels) > 0.8
    assert int(re.fullmatch(r'epoch (\d+)', mlp.name)[1]) > 20  # until its loss stops


def test_the_papers_mlp_has_the_settings_that_scikit_learn_has_by_itself(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(MLPClassifier, 'fit', lambda self, *_: seen.append(self.get_params()))
    with pytest.raises(AttributeError):  # it is not fitted
        as_paper('mlp', *digits[:2])
    usual = MLPClassifier(max_iter=1000).get_params()
    assert {name for name in usual if seen[0][name] != usual[name]} == {'random_state'}


def test_as_in_the_paper_the_cnn_is_what_its_last_epoch_leaves(digits):
    images, labels, test_images, _ = digits
    images, labels = images[:200], labels[:200]
    found = as_paper('cnn', images, labels)
    assert found.name == 'epoch 3 of 3' and found.held_out_accuracy is None
    key, kept = jax.random.key(0), []
    trainer.fit(
        networks.Cnn(10, as_pytorch=True), images, labels, key=key, rng=held_out.random_generator(key),
        settings=trainer.Settings(epochs=3, learning_rate=3e-3, is_even=False),
        judge=lambda epoch, averages: kept.append(averages.params) or '',
    )  # fmt: skip
    logits, _ = trainer.apply(networks.Cnn(10, as_pytorch=True), kept[-1], test_images)
    np.testing.assert_array_equal(found.predict(test_images), logits.argmax(axis=1))
    # One image of a class is enough: none is held out. Others than the paper's three there are not.
    as_paper('logistic', images[:40], np.r_[9, np.arange(39) % 9])
    with pytest.raises(ValueError, match="'resnet18'; it must be one of logistic, mlp, cnn"):
        as_paper('resnet18', images, labels)


def test_a_confusion_matrix_has_a_row_for_each_class():
    found = classifiers.confusion(np.array([0, 1, 1, 1], np.int32), np.array([0, 0, 0, 2], np.int32), 3)
    np.testing.assert_array_equal(found, [[1, 2, 0], [0, 0, 0], [0, 1, 0]])


def test_unknown_classifiers_and_foreign_images_are_refused(digits):
    images, labels, _, _ = digits
    with pytest.raises(ValueError, match="classifier is 'forest'; it must be one of logistic, mlp, cnn"):
        train('forest', images, labels)
    classifier = train('logistic', images[:200], labels[:200])
    with pytest.raises(ValueError, match=r'\(4, 4, 1\).*must have shape \(8, 8, 1\)'):
        classifier.predict(IMAGES)
