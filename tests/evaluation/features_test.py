"""The feature network on real digits: its FID orders sets of images as it should; it can be saved."""

import json

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from dpp_jax.evaluation import features, fid


@pytest.fixture(name='digits', scope='module')
def _digits():
    data = load_digits()
    return (data.images[..., None] * 255 / 16).astype(np.uint8), data.target


def fid_of(network, images_a, images_b):
    """FID of two sets of images, all at once."""
    return fid.frechet_distance(
        *fid.moments([network.features(images_a)]), *fid.moments([network.features(images_b)])
    )


def train(digits, seed=0, epochs=6, **settings):
    return features.train_feature_network(
        *digits, **{'classes': 10} | settings, key=jax.random.key(seed), epochs=epochs
    )


@pytest.fixture(name='network', scope='module')
def _network(digits):
    return train(digits)


def load(path):
    with np.load(path) as file:
        return features.FeatureNetwork.from_arrays(dict(file), source=path)


def test_network_learns_the_classes_and_says_what_it_is(network):
    assert network.held_out_accuracy > 0.8
    assert 'real training images' in network.name and 'not Inception' in network.name


def test_features_do_not_depend_on_the_batches(network, digits):
    images = digits[0][:100]
    result = network.features(images)
    assert result.shape == (100, features.FEATURES) and result.dtype == np.float32
    np.testing.assert_allclose(result, network.features(images, batch_size=7), atol=1e-4)
    assert np.std(result, axis=0).min() > 1e-3  # no feature is dead


def test_fid_orders_sets_of_images(network, digits):
    images, labels = digits
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    half, other_half = images[order[::2]], images[order[1::2]]
    noisy = np.clip(half + rng.normal(0, 60, half.shape), 0, 255).astype(np.uint8)
    noisier = np.clip(half + rng.normal(0, 120, half.shape), 0, 255).astype(np.uint8)
    pure_noise = rng.integers(0, 256, half.shape).astype(np.uint8)

    same = fid_of(network, half, half)
    real = fid_of(network, half, other_half)
    assert same < 1e-6
    assert 0 < real
    levels = [fid_of(network, other_half, x) for x in (half, noisy, noisier, pure_noise)]
    assert levels == sorted(levels)
    assert levels[0] == pytest.approx(real, rel=1e-6)
    assert levels[1] > 3 * real and levels[3] > 30 * real
    assert fid_of(network, images[labels < 5], images[labels >= 5]) > 30 * real


def test_same_key_same_features(network, digits):
    again = train(digits)
    images = digits[0][:50]
    np.testing.assert_array_equal(network.features(images), again.features(images))
    other = train(digits, seed=1, epochs=1)
    assert not np.allclose(network.features(images), other.features(images))


def test_saved_network_is_the_same(network, digits, tmp_path):
    path = tmp_path / 'features.npz'
    np.savez(path, **network.to_arrays())
    loaded = load(path)
    assert loaded.name == network.name and loaded.image_shape == network.image_shape
    assert loaded.held_out_accuracy == network.held_out_accuracy
    images = digits[0][:50]
    np.testing.assert_array_equal(loaded.features(images), network.features(images))
    assert loaded.classes == 10


def test_a_file_of_an_earlier_version_is_read(network, digits, tmp_path):
    # As version 1 wrote it: a header in JSON, and the weights under their names.
    header = {
        'format': 'dpp_jax feature network 1', 'classes': 10, 'image_shape': [8, 8, 1],
        'held_out_accuracy': 0.5, 'name': 'an older one',
    }  # fmt: skip
    arrays = {
        f'{layer}/{part}': value
        for layer, parts in network.params.items()
        for part, value in parts.items()
    }  # fmt: skip
    np.savez(tmp_path / 'old.npz', header=json.dumps(header), **arrays)
    loaded = load(tmp_path / 'old.npz')
    assert (loaded.name, loaded.image_shape) == ('an older one', (8, 8, 1))
    images = digits[0][:50]
    np.testing.assert_array_equal(loaded.features(images), network.features(images))


def test_arrays_of_something_else_are_refused(network):
    arrays = network.to_arrays()
    later = np.array(str(arrays['header']).replace('network 1', 'network 2'))
    for foreign in ({'images': np.zeros(3)}, {**arrays, 'header': later}, {'header': np.array('[]')}):
        with pytest.raises(ValueError, match='old.npz is not a saved feature network'):
            features.FeatureNetwork.from_arrays(foreign, source='old.npz')


def test_bad_images_are_refused(network, digits):
    images, labels = digits
    with pytest.raises(ValueError, match=r'\(8, 7, 1\).*must have shape \(8, 8, 1\)'):
        network.features(images[:, :, :7])
    with pytest.raises(ValueError, match='1 samples'):
        fid_of(network, images[:1], images)
    with pytest.raises(ValueError, match='7 private images.*at least 8'):
        features.train_feature_network(images[:7], labels[:7], classes=10, key=jax.random.key(0), epochs=1)


@pytest.mark.parametrize('labels', ['one class', 'one image of a class'])
def test_without_classes_to_tell_apart_it_learns_rotations(digits, labels):
    images = digits[0][:1000]
    labels = np.zeros(1000, int) if labels == 'one class' else np.arange(1000) == 0
    network = train((images, labels), classes=labels.max() + 1, epochs=10)
    assert network.held_out_accuracy > 0.5  # chance is 0.25
    assert 'rotations' in network.name and not network.tells_classes and network.classes == 4
    again = features.FeatureNetwork.from_arrays(network.to_arrays(), source='memory')
    assert not again.tells_classes
    rng = np.random.default_rng(0)
    noisy = np.clip(images + rng.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    assert fid_of(network, images, noisy) > 3 * fid_of(network, images[::2], images[1::2])


def test_images_are_turned_by_quarters():
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    turned = features.turned(np.repeat(image, 4, axis=0), np.arange(4))[..., 0]
    assert [list(one.ravel()) for one in turned] == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
