"""Class moments from noisy ones, and the images drawn from them."""

import numpy as np
import pytest

from dpp_jax.data import class_moments
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.data.frequencies import Frequencies

K = 40
REST = np.float32(0.01)  # no image is drawn with it


def symmetric_noise(rng, classes=1):
    """Noise as the query has it: off the diagonal of std 1, on it of std √2."""
    square = rng.standard_normal((classes, K, K))
    return (square + np.swapaxes(square, 1, 2)) / np.sqrt(2)


def fitted(seconds, tau, shifts=None, mean_noise=0.0):
    classes = len(seconds)
    shifts = np.zeros((classes, K)) if shifts is None else shifts
    noise = {'mean_noise': np.full(classes, mean_noise), 'second_noise': np.full(classes, tau)}
    return class_moments.fit(np.zeros((classes, K)), shifts, seconds, **noise)


def covariance(moments):
    return moments.factors @ np.swapaxes(moments.factors, 1, 2)


@pytest.mark.parametrize('tau', [0.02, 0.5])
def test_what_stands_out_keeps_its_size_and_noise_alone_gives_nothing(tau):
    """Of rank two, at 3 and 2 times the least that stands out: right without the bias that noise gives."""
    rng = np.random.default_rng(1)
    true = np.array([3.0, 2.0]) * tau * np.sqrt(K)
    basis = np.linalg.qr(rng.standard_normal((K, 2)))[0]
    seconds = (basis * true) @ basis.T + tau * symmetric_noise(rng, 40)
    found = np.linalg.eigvalsh(covariance(fitted(seconds, tau)))[:, ::-1]
    np.testing.assert_allclose(found[:, :2].mean(axis=0), true, rtol=0.07)
    biased = np.linalg.eigvalsh(seconds)[:, ::-1][:, :2].mean(axis=0)
    assert (
        biased[1] > 1.15 * true[1] and (np.abs(biased - true) > 2 * np.abs(found[:, :2].mean(0) - true)).all()
    )
    assert np.mean(found[:, 2] > 1e-6 * true[1]) < 0.3
    nothing = np.linalg.eigvalsh(covariance(fitted(tau * symmetric_noise(rng, 40), tau)))
    assert np.mean(nothing[:, -1] > 0) < 0.3


def test_the_error_falls_with_the_noise():
    rng = np.random.default_rng(2)
    true = np.diag(2.0 ** -np.arange(K))
    noise = symmetric_noise(rng)
    errors = [
        np.linalg.norm(covariance(fitted(true + tau * noise, tau))[0] - true) for tau in (0.05, 0.01, 0.002)
    ]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    assert errors[0] < 0.5 * np.linalg.norm(0.05 * noise)  # what is cut off was noise


def test_the_variance_that_noise_hides_is_known_all_the_same():
    rng = np.random.default_rng(4)
    true = np.diag([1.0, 0.5, *np.full(K - 2, 0.01)])
    found = fitted(true + 0.02 * symmetric_noise(rng, 20), 0.02)
    assert np.any(found.factors != 0, axis=1).sum(axis=1).mean() < 4  # 0.01 is far below the edge, 0.25
    np.testing.assert_allclose(found.rest, 0.01, rtol=0.15)


def test_a_class_without_images_does_not_decide_what_is_left_out():
    """Its sums are divided by 1: all of them is noise."""
    rng = np.random.default_rng(5)
    counts = np.array([1000.0, 1.0])
    tau = 2 / counts
    seconds = 0.01 * np.eye(K) + tau[:, None, None] * symmetric_noise(rng, 2)
    found = class_moments.fit(
        np.zeros((2, K)), np.zeros((2, K)), seconds, mean_noise=np.zeros(2), second_noise=tau
    )
    # The noise of its own trace is 0.0005; that of both together, if they counted alike, 0.2.
    np.testing.assert_allclose(found.rest, 0.01, rtol=0.3)


def test_a_shift_is_shrunk_where_it_is_noise_and_leaves_the_second_moment():
    rng = np.random.default_rng(3)
    noise = 0.1 * rng.standard_normal(K)
    far = np.full(K, 2.0)
    found = fitted(
        np.stack([np.zeros((K, K)), np.outer(far, far)]), 1e-3, np.stack([noise, far + noise]), 0.1
    )
    assert np.linalg.norm(found.means[0]) < 0.5 * np.linalg.norm(noise)
    np.testing.assert_allclose(found.means[1], far, atol=0.4)
    # Of the noise in the shift is left what nobody can tell from variance.
    assert np.trace(covariance(found)[1]) < 0.2 * np.sum(far**2)


def test_images_have_the_mean_and_covariance_of_their_class_and_batches_are_their_own():
    frequencies = Frequencies(image_shape=(4, 4, 1), average_down=1, count=6)
    rng = np.random.default_rng(4)
    means = frequencies.coefficients(rng.integers(110, 140, (2, 4, 4, 1), np.uint8))
    moments = ClassMoments(means, np.float32(0.02 * rng.standard_normal((2, 6, 6))), REST)
    labels = np.arange(20_000) % 2
    images = moments.draw(frequencies, labels, 7, 0)
    assert images.shape == (20_000, 4, 4, 1) and images.dtype == np.uint8
    for label in range(2):
        found = frequencies.coefficients(images[labels == label])
        np.testing.assert_allclose(found.mean(0), means[label], atol=3e-3)
        np.testing.assert_allclose(np.cov(found.T), covariance(moments)[label], atol=2e-4)
    np.testing.assert_array_equal(images, moments.draw(frequencies, labels, 7, 0))
    for other in (moments.draw(frequencies, labels, 7, 1), moments.draw(frequencies, labels, 8, 0)):
        assert np.mean(other == images) < 0.2


def test_what_leaves_the_gray_range_is_cut():
    frequencies = Frequencies(image_shape=(4, 4, 1), average_down=2, count=1)
    bright = ClassMoments(np.full((1, 1), 9.0, np.float32), np.zeros((1, 1, 1), np.float32), REST)
    dark = bright._replace(means=-bright.means)
    assert (bright.draw(frequencies, np.zeros(3, int), 1, 0) == 255).all()
    assert (dark.draw(frequencies, np.zeros(3, int), 1, 0) == 0).all()
