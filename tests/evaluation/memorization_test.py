"""Copies of training images are found; images that are as real ones are not."""

import numpy as np
import pytest

from dpp_jax.evaluation import memorization


def images(seed, number):
    return np.random.default_rng(seed).standard_normal((number, 16)).astype(np.float32)


def test_the_nearest_training_image_is_found():
    training, others = images(0, 50) + 100, images(1, 7) + 100
    distances, rows = memorization.nearest(others, training)
    direct = np.linalg.norm(others[:, None].astype(np.float64) - training[None], axis=2)
    np.testing.assert_array_equal(rows, direct.argmin(axis=1))
    np.testing.assert_allclose(distances, direct.min(axis=1), rtol=1e-12)
    copies, rows = memorization.nearest(training[[5, 3]], training)
    assert list(rows) == [5, 3] and list(copies) == [0, 0]


@pytest.mark.parametrize('copied, is_found', [(0, False), (20, True), (500, True)])
def test_copies_are_told_from_real_images(copied, is_found):
    training, made = images(0, 1000), images(1, 500)
    made[:copied] = training[:copied] + 0.01
    found = memorization.compare(
        memorization.nearest(made, training)[0], memorization.nearest(images(2, 400), training)[0]
    )
    assert (found['p_value'] < 1e-3) == is_found
    assert found['share_near'] >= copied / 500 and found['share_near_expected'] == pytest.approx(4 / 401)
    assert (found['median_ratio'] < 0.1) == (copied == 500)


def test_the_p_value_is_that_of_a_random_order():
    """At most α of sets that are as real ones have a p-value of α or less."""
    rng = np.random.default_rng(0)
    found = [memorization.compare(rng.random(60), rng.random(300))['p_value'] for _ in range(2000)]
    for level in (0.01, 0.1, 0.5):
        assert np.mean(np.array(found) <= level) < level + 4 * np.sqrt(level / 2000)
    assert np.mean(np.array(found) <= 0.5) > 0.2  # and not far fewer: it can find something
