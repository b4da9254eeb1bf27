"""Noise of the Gaussian mechanism: normal, of the right size, independent, fresh in every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpp_jax.privacy.mechanism import GaussianMechanism


@pytest.fixture(scope='module')
def noise():
    """Noise of σ·Δ = 6 in 20,000 steps: leaves (20000, ...)."""
    mechanism = GaussianMechanism('test', 3.0, 0.1, 2.0, 'r')
    total = {'kernel': jnp.zeros((3, 3, 2, 4)), 'bias': jnp.zeros(8), 'scale': jnp.zeros(())}

    def draw(step):
        return mechanism.privatise(total, jax.random.fold_in(jax.random.key(7), step))

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(np.arange(20000)))


def test_noise_of_every_parameter_is_normal_with_std_sigma_times_sensitivity(noise, statistics):
    for leaf in noise.values():
        statistics.assert_normal(leaf, 6.0)
        columns = leaf.reshape(len(leaf), -1) / 6.0
        smallest = stats.kstest(columns, 'norm', axis=0).pvalue.min()
        assert smallest * columns.shape[1] > statistics.FALSE_ALARM


def test_noise_is_independent_between_parameters(noise, statistics):
    statistics.assert_unrelated(np.concatenate([x.reshape(len(x), -1) for x in noise.values()], 1) / 6.0)


def test_noise_is_independent_between_steps_and_the_same_if_repeated(statistics):
    mechanism = GaussianMechanism('test', 3.0, 0.1, 2.0, 'r')
    draw = jax.jit(mechanism.privatise)
    key = jax.random.key(8)
    noises = [draw(jnp.zeros(30000), jax.random.fold_in(key, step)) for step in range(30)]
    statistics.assert_unrelated(np.stack(noises, 1) / 6.0)
    np.testing.assert_array_equal(draw(jnp.zeros(30000), jax.random.fold_in(key, 4)), noises[4])


def test_noise_does_not_depend_on_the_total():
    draw = jax.jit(GaussianMechanism('test', 3.0, 0.1, 2.0, 'r').privatise)
    alone = draw(jnp.zeros(1000), jax.random.key(9))
    total = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 100
    np.testing.assert_allclose(draw(total, jax.random.key(9)) - total, alone, atol=1e-4)
