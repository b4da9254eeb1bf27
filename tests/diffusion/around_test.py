"""The denoiser around class moments: the best linear one, and nothing else where the network says nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.data.frequencies import Frequencies
from dpp_jax.diffusion import around
from tests.conftest import make_tiny_config

CLASSES, SIDE, REST = 3, 8, 0.005


@pytest.fixture(scope='module', params=[(64, 1), (20, 1), (9, 2)])
def frequencies(request):
    count, down = request.param
    return Frequencies(image_shape=(SIDE, SIDE, 1), average_down=down, count=count)


@pytest.fixture(scope='module')
def moments(frequencies):
    rng, k = np.random.default_rng(0), frequencies.count
    factors = rng.normal(size=(CLASSES, k, k)) / k
    means = rng.normal(size=(CLASSES, k))
    return ClassMoments(means.astype(np.float32), factors.astype(np.float32), np.float32(REST))


def covariance_of_images(moments, frequencies, label):
    """(d, d), of values in [-1, 1]: what `ClassMoments.draw` has before anything is cut off."""
    factor = 2 * frequencies.synthesis @ moments.factors[label].astype(np.float64)
    return factor @ factor.T


@pytest.mark.parametrize('sigma', [0.01, 0.5, 20.0])
def test_it_is_the_best_linear_denoiser_of_each_class(moments, frequencies, sigma):
    found = around.of_moments(*moments, frequencies.synthesis)
    x = np.random.default_rng(1).normal(size=(CLASSES, SIDE, SIDE, 1)).astype(np.float32)
    denoised = found.denoise(x, np.full(CLASSES, sigma, np.float32), np.arange(CLASSES))
    for label in range(CLASSES):
        own = covariance_of_images(moments, frequencies, label) + 4 * REST * np.eye(SIDE**2)
        mean = 2 * frequencies.synthesis @ moments.means[label] - 1
        wanted = mean + own @ np.linalg.solve(own + sigma**2 * np.eye(SIDE**2), x[label].ravel() - mean)
        np.testing.assert_allclose(denoised[label].ravel(), wanted, rtol=2e-4, atol=2e-4)


def test_no_class_has_mean_and_covariance_of_all_classes(moments, frequencies):
    found = around.of_moments(*moments, frequencies.synthesis)
    rng = np.random.default_rng(2)
    labels = np.arange(30000) % CLASSES
    normal = rng.normal(size=(len(labels), frequencies.count, 1))
    drawn = moments.means[labels] + (moments.factors[labels] @ normal)[..., 0]
    images = 2 * drawn @ frequencies.synthesis.T - 1
    scaled = found.basis @ found.vectors[-1]
    covariance = scaled @ np.diag(found.values[-1] - 4 * REST) @ scaled.T
    np.testing.assert_allclose(found.means[-1], images.mean(0), atol=0.1)
    np.testing.assert_allclose(covariance, np.cov(images.T), atol=0.06 * np.abs(covariance).max())


def test_without_noise_an_image_stays_and_with_all_of_it_the_mean_is_left(moments, frequencies):
    found = around.of_moments(*moments, frequencies.synthesis)
    x = np.random.default_rng(3).normal(size=(CLASSES, SIDE, SIDE, 1)).astype(np.float32)
    labels = np.arange(CLASSES)
    np.testing.assert_allclose(found.denoise(x, np.full(CLASSES, 1e-4), labels), x, atol=1e-3)
    far = found.denoise(1e4 * x, np.full(CLASSES, 1e5), labels)
    np.testing.assert_allclose(far.reshape(CLASSES, -1), found.means[:CLASSES], atol=1e-2)


@pytest.fixture(scope='module')
def model():
    return build.model(
        make_tiny_config(moments__enabled=True, moments__frequencies=10, model__around='moments')
    )


def test_a_network_that_says_nothing_leaves_the_linear_denoiser(model):
    told, params = model.stand_in(), model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, *model.image_shape))
    sigma, label = jnp.array([0.1, 0.5, 2.0, 10.0]), jnp.arange(4) % model.classes
    # The last layer of a fresh network is next to 0.
    np.testing.assert_allclose(
        model.denoiser(params, told)(x, sigma, label), told.denoise(x, sigma, label), atol=1e-3
    )


def test_the_loss_does_not_depend_on_how_many_draws_go_at_once(model):
    told, params = model.stand_in(), model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)
    image = jax.random.uniform(jax.random.key(1), model.image_shape, minval=-1)

    def gradient(**shape):
        loss = model.example_loss(draws=4, label_dropout=0.1, **shape)
        return jax.jit(jax.grad(lambda p: loss(p, image, 1, jax.random.key(2), told=told)))(params)

    for one, other in zip(*map(jax.tree.leaves, (gradient(), gradient(draws_at_once=2))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_moments_that_are_not_told_are_missed(model):
    with pytest.raises(ValueError, match='not told'):
        model.denoiser(model.init(jax.random.key(0)))
