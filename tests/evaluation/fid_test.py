"""Moments and the Fréchet distance against numpy, closed forms and scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg

from dpp_jax.evaluation import fid


@pytest.fixture(name='rng')
def _rng():
    return np.random.default_rng(0)


def random_gaussian(rng, dimension):
    factor = rng.standard_normal((dimension, 2 * dimension))
    return rng.standard_normal(dimension), factor @ factor.T / dimension


def test_moments_are_numpys(rng):
    features = rng.standard_normal((50, 7)).astype(np.float32)
    mean, covariance = fid.moments([features])
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.T.astype(np.float64)), atol=1e-13)


@pytest.mark.parametrize('sizes', [(50,), (1, 49), (17, 0, 33), (1,) * 50])
def test_moments_of_batches_are_those_of_all(rng, sizes):
    features = rng.standard_normal((50, 7)) + 5
    batches = np.split(features, np.cumsum(sizes)[:-1])
    mean, covariance = fid.moments(iter(batches))
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-10, atol=1e-12)


def test_moments_survive_a_mean_far_above_the_spread(rng):
    spread = rng.standard_normal((200, 3))
    _, covariance = fid.moments(np.array_split(spread + 1e7, 9))
    np.testing.assert_allclose(covariance, np.cov(spread.T), atol=1e-6)


@pytest.mark.parametrize(
    ('features', 'message'),
    [
        ([np.zeros((1, 3))], '1 samples'),
        ([np.zeros((0, 3))], '0 samples'),
        (np.zeros((4, 3)), r'shape \(3,\)'),
        ([np.zeros((4, 3)), np.zeros((4, 2))], '2 values per sample'),
        ([np.array([[0.0], [np.nan], [1.0]])], '1 samples that are not finite'),
        ([np.array([[0.0], [np.inf], [1.0]])], 'not finite'),
    ],
)
def test_moments_refuse(features, message):
    with pytest.raises(ValueError, match=message):
        fid.moments(features)


def test_distance_of_diagonal_gaussians_is_the_closed_form(rng):
    mean_1, mean_2 = rng.standard_normal((2, 6))
    std_1, std_2 = rng.uniform(0.1, 3, (2, 6))
    expected = np.sum((mean_1 - mean_2) ** 2) + np.sum((std_1 - std_2) ** 2)
    result = fid.frechet_distance(mean_1, np.diag(std_1**2), mean_2, np.diag(std_2**2))
    assert isinstance(result, float)
    assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('dimension', [1, 5, 40])
def test_distance_agrees_with_scipys_matrix_root(rng, dimension):
    mean_1, cov_1 = random_gaussian(rng, dimension)
    mean_2, cov_2 = random_gaussian(rng, dimension)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    expected = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1 + cov_2) - 2 * np.trace(root).real
    result = fid.frechet_distance(mean_1, cov_1, mean_2, cov_2)
    assert result == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(mean_2, cov_2, mean_1, cov_1) == pytest.approx(result, rel=1e-9)


@pytest.mark.parametrize('samples', [5, 500])
def test_distance_of_equal_gaussians_is_zero(rng, samples):
    # Five samples of 64 features: a covariance of rank four, where a naive matrix root fails.
    mean, covariance = fid.moments([100 * rng.standard_normal((samples, 64))])
    distance = fid.frechet_distance(mean, covariance, mean, covariance)
    assert 0 <= distance < 1e-6


def test_distance_of_singular_gaussians_with_no_common_direction():
    cov_1, cov_2 = np.diag([4.0, 0.0]), np.diag([0.0, 9.0])
    assert fid.frechet_distance(np.zeros(2), cov_1, np.zeros(2), cov_2) == pytest.approx(13)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), 'mean_1 has 2 values and mean_2 has 3'),
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), 'cov_1 has shape'),
        ((np.zeros(2), np.eye(2), np.full(2, np.nan), np.eye(2)), 'mean_2 has values'),
        ((np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), np.eye(2)), 'cov_1 has values'),
        ((np.zeros(2), np.array([[1, 1], [0, 1]]), np.zeros(2), np.eye(2)), 'symmetric'),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.diag([1, -1])), 'eigenvalue -1'),
    ],
)
def test_distance_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        fid.frechet_distance(*arguments)


@pytest.mark.parametrize('samples', [(30, 500), (500, 30), (30, 20)])
def test_few_images_of_many_features_have_the_distance_of_their_covariances(rng, samples):
    """Rank-deficient: 64 features. Against eigenvalues of the product of the covariances."""
    features = [rng.standard_normal((number, 64)) + shift for number, shift in zip(samples, (0, 0.5))]
    found = fid.distance(*map(fid.Gaussian.of_features, features))
    means, covs = zip(*(fid.moments([one]) for one in features))
    eigenvalues = np.linalg.eigvals(covs[0] @ covs[1])
    root = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(sum(covs)) - 2 * root
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(fid.frechet_distance(means[0], covs[0], means[1], covs[1]), rel=1e-9)


def test_spread_is_the_standard_error_of_fid(rng):
    """That of many sets of as many images."""
    reference = fid.Gaussian(mean=np.zeros(4), factor=np.eye(4))
    sets = rng.standard_normal((200, 400, 4)) + 0.3
    true = np.std([fid.distance(fid.Gaussian.of_features(one), reference) for one in sets])
    spreads = [fid.spread(one, reference, np.random.default_rng(number)) for number, one in enumerate(sets)]
    assert np.mean(spreads) == pytest.approx(true, rel=0.25)
    assert fid.spread(sets[0][:3], reference, rng) is None
