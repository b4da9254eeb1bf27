"""Noise of the Gaussian mechanism: normal, of the right size, independent, fresh in every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey

MECHANISM = GaussianMechanism(
    name='test', noise_multiplier=3.0, sampling_probability=0.1, sensitivity=2.0
)  # σ Δ = 6


def noisy_sum(seed, **options):
    """Releases of their only argument, a sum, with noise."""
    return MECHANISM.noisy(
        lambda total: (total, None),
        NoiseKey(identifier=f'key-{seed}', keys=jax.random.split(jax.random.key(seed), 4)),
        then=lambda noisy, *_: noisy,
        **options,
    )


@pytest.fixture(scope='module')
def noise():
    """Noise in 20,000 steps: leaves (20000, ...)."""
    total = {'kernel': jnp.zeros((3, 3, 2, 4)), 'bias': jnp.zeros(8), 'scale': jnp.zeros(())}
    steps = noisy_sum(7, compiled=lambda program: program)
    draw = jax.vmap(steps.program, in_axes=(None, None, 0))
    return jax.tree.map(
        np.asarray, jax.jit(draw)(total, steps.noise_key.keys, np.arange(20000, dtype=np.int32))
    )


def test_noise_of_every_parameter_is_normal_with_std_sigma_times_sensitivity(noise, statistics):
    for leaf in noise.values():
        statistics.assert_normal(leaf, 6.0)
        columns = leaf.reshape(len(leaf), -1) / 6.0
        smallest = stats.kstest(columns, 'norm', axis=0).pvalue.min()
        assert smallest * columns.shape[1] > statistics.FALSE_ALARM


def test_noise_is_independent_between_parameters(noise, statistics):
    statistics.assert_unrelated(np.concatenate([x.reshape(len(x), -1) for x in noise.values()], 1) / 6.0)


def test_noise_is_independent_between_steps_and_keys_and_the_same_if_repeated(statistics):
    zeros = jnp.zeros(30000)
    steps, of_another_key = noisy_sum(8), noisy_sum(9)
    noises = [steps(number, zeros)[0] for number in range(30)]
    others = [of_another_key(number, zeros)[0] for number in range(30)]
    statistics.assert_unrelated(np.stack(noises + others, 1) / 6.0)
    np.testing.assert_array_equal(steps(4, zeros)[0], noises[4])


def test_noise_does_not_depend_on_the_total():
    release = noisy_sum(9)
    alone, _ = release(0, jnp.zeros(1000))
    total = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 100
    np.testing.assert_allclose(release(0, total)[0] - total, alone, atol=1e-4)


def test_a_sum_that_draws_has_noise_that_is_independent_of_its_draws(statistics):
    """The sum is its own unit noise: noise and draws of every step are unrelated."""
    release = MECHANISM.noisy(
        lambda key, zeros: (zeros, jax.random.normal(key, zeros.shape)),
        NoiseKey(identifier='key', keys=jax.random.split(jax.random.key(10), 4)),
        then=lambda noisy, drawn, _: (noisy / 6.0, drawn),
        is_random=True,
    )
    columns = [column for number in range(15) for column in release(number, jnp.zeros(30000))[0]]
    statistics.assert_unrelated(np.stack(columns, 1))
