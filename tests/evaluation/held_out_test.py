"""The held-out share: of every class, whole, and drawn by the key."""

import jax
import numpy as np
import pytest

from dpp_jax.evaluation import held_out


def split(labels, share, seed=0):
    images = np.arange(labels.size, dtype=np.uint8).reshape(-1, 1, 1, 1)  # each is its own number
    rng = held_out.random_generator(jax.random.key(seed))
    return held_out.split(images, labels, classes=4, share=share, rng=rng)


def test_split_holds_out_the_share_of_every_class_and_loses_no_image():
    labels = np.repeat(np.arange(4), [2, 10, 51, 100])
    train, held = split(labels, 0.1)
    numbers = np.concatenate([train.images, held.images]).ravel()
    np.testing.assert_array_equal(np.sort(numbers), np.arange(labels.size))
    for part in (train, held):
        np.testing.assert_array_equal(part.labels, labels[part.images.ravel()])
    np.testing.assert_array_equal(np.bincount(held.labels), [1, 1, 5, 10])
    np.testing.assert_array_equal(np.bincount(split(labels, 0.9)[1].labels), [1, 9, 46, 90])


def test_the_key_chooses_what_is_held_out():
    labels = np.repeat(np.arange(4), 50)
    one, same, other = (split(labels, 0.2, seed)[1].images for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_label_accuracy():
    assert held_out.label_accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match=r'shape \(2,\).*shape \(3,\)'):
        held_out.label_accuracy(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match='at least 1'):
        held_out.label_accuracy(np.zeros(0), np.zeros(0))
