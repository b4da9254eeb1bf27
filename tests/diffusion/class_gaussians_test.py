"""The denoiser around class moments: the best linear one, and nothing else where the network says nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.data.frequencies import Frequencies
from dpp_jax.diffusion import class_gaussians
from tests.conftest import make_tiny_config

CLASSES, SIDE, LEFT_OUT, REST = 3, 8, 4, 0.005


@pytest.fixture(scope='module', params=[(64, 1), (20, 1), (9, 2)])
def frequencies(request):
    count, down = request.param
    return Frequencies(image_shape=(SIDE, SIDE, 1), average_down=down, count=count)


@pytest.fixture(scope='module')
def vectors(frequencies):
    rng, k = np.random.default_rng(0), frequencies.count
    return np.linalg.qr(rng.normal(size=(CLASSES, k, k)))[0]


@pytest.fixture(scope='module')
def moments(frequencies, vectors):
    rng, k = np.random.default_rng(1), frequencies.count
    scales = rng.uniform(0.2, 1.0, (CLASSES, 1, k))
    scales[..., :LEFT_OUT] = 0
    means = rng.normal(size=(CLASSES, k))
    return ClassMoments(means.astype(np.float32), (vectors * scales).astype(np.float32), np.float32(REST))


@pytest.fixture(scope='module')
def covariances(frequencies, vectors, moments):
    """(classes, k, k) of frequencies: what is kept, and the same variance along all that is left out."""
    left_out = vectors[..., :LEFT_OUT]
    return moments.factors @ moments.factors.transpose(0, 2, 1) + REST * left_out @ left_out.transpose(
        0, 2, 1
    )


@pytest.mark.parametrize('sigma', [0.01, 0.5, 20.0])
def test_it_is_the_best_linear_denoiser_of_each_class(moments, frequencies, covariances, sigma):
    found = class_gaussians.of_moments(*moments, frequencies.synthesis)
    x = np.random.default_rng(1).normal(size=(CLASSES, SIDE, SIDE, 1)).astype(np.float32)
    denoised = found.denoise(x, np.full(CLASSES, sigma, np.float32), np.arange(CLASSES))
    outside = np.eye(SIDE**2) - frequencies.synthesis @ np.linalg.pinv(frequencies.synthesis)
    for label in range(CLASSES):
        inside = frequencies.synthesis @ covariances[label] @ frequencies.synthesis.T
        own = 4 * inside + 4 * REST * outside
        mean = 2 * frequencies.synthesis @ moments.means[label] - 1
        wanted = mean + own @ np.linalg.solve(own + sigma**2 * np.eye(SIDE**2), x[label].ravel() - mean)
        np.testing.assert_allclose(denoised[label].ravel(), wanted, rtol=1e-3, atol=1e-3)


def test_no_class_has_mean_and_covariance_of_all_classes(moments, frequencies, covariances):
    found = class_gaussians.of_moments(*moments, frequencies.synthesis)
    rng = np.random.default_rng(2)
    drawn = np.concatenate(
        [rng.multivariate_normal(mean, own, 20000) for mean, own in zip(moments.means, covariances)]
    )
    images = 2 * drawn @ frequencies.synthesis.T - 1
    scaled = found.basis @ found.vectors[-1]
    covariance = scaled @ np.diag(found.values[-1]) @ scaled.T
    np.testing.assert_allclose(found.means[-1], images.mean(0), atol=0.1)
    np.testing.assert_allclose(covariance, np.cov(images.T), atol=0.05 * np.abs(covariance).max())


def test_without_noise_an_image_stays_and_with_all_of_it_the_mean_is_left(moments, frequencies):
    found = class_gaussians.of_moments(*moments, frequencies.synthesis)
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
    gaussians, params = model.stand_in(), model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, *model.image_shape))
    sigma, label = jnp.array([0.1, 0.5, 2.0, 10.0]), jnp.arange(4) % model.classes
    # The last layer of a fresh network is next to 0.
    np.testing.assert_allclose(
        model.denoiser(params, gaussians)(x, sigma, label), gaussians.denoise(x, sigma, label), atol=1e-3
    )


def test_the_loss_does_not_depend_on_how_many_draws_go_at_once(model):
    gaussians, params = model.stand_in(), model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)
    image = jax.random.uniform(jax.random.key(1), model.image_shape, minval=-1)

    def gradient(**shape):
        loss = model.example_loss(draws=4, label_dropout=0.1, **shape)
        return jax.jit(jax.grad(lambda p: loss(p, image, 1, jax.random.key(2), gaussians=gaussians)))(params)

    for one, other in zip(*map(jax.tree.leaves, (gradient(), gradient(draws_at_once=2))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_moments_must_be_given_where_the_denoiser_is_around_them_and_nowhere_else(model):
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match='gaussians must be those of the class moments'):
        model.denoiser(params)
    with pytest.raises(ValueError, match='gaussians must be None'):
        build.model(make_tiny_config()).denoiser(params, model.stand_in())
