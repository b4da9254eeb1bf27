"""Samplers on data whose best denoiser is known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import sampler

MEAN, STD = 0.3, 0.5


def exact(x, sigma, label):
    """E[image | noisy image] for pixels N(MEAN · label, STD²)."""
    variance = sigma[:, None, None, None] ** 2
    mean = MEAN * label[:, None, None, None]
    return mean + STD**2 / (STD**2 + variance) * (x - mean)


def noise(i):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (500, 4, 4, 1))


SAMPLERS = {
    'ddim': functools.partial(sampler.ddim, sigmas=sampler.sigma_steps(300)),
    'heun': functools.partial(sampler.heun, sigmas=sampler.sigma_steps(40)),
    'heun with churn': functools.partial(
        sampler.heun, sigmas=sampler.sigma_steps(80), s_churn=40.0, s_max=50.0, noise=noise
    ),
}


@pytest.mark.parametrize('name', SAMPLERS)
def test_samples_have_the_distribution_of_the_data(name):
    z = jax.random.normal(jax.random.key(0), (500, 4, 4, 1))
    label = jnp.arange(500) % 2
    images = np.asarray(jax.jit(lambda z, y: SAMPLERS[name](exact, z, y, no_class=2))(z, label))
    for y in (0, 1):
        part = images[np.arange(500) % 2 == y]
        assert part.mean() == pytest.approx(MEAN * y, abs=0.03)
        assert part.std() == pytest.approx(STD, rel=0.06)


def test_guidance_moves_away_from_no_class():
    z = jax.random.normal(jax.random.key(0), (200, 4, 4, 1))
    label = jnp.ones(200, jnp.int32)
    run = lambda g: np.mean(SAMPLERS['heun'](exact, z, label, no_class=0, guidance=g))
    assert run(1.0) == pytest.approx(2 * MEAN, abs=0.05)  # 2 D(1) - D(0) has its mean at 2 MEAN
    assert run(0.0) == pytest.approx(MEAN, abs=0.05)


@pytest.mark.parametrize('name', SAMPLERS)
def test_jitted_equals_step_by_step(name):
    z = jax.random.normal(jax.random.key(1), (500, 4, 4, 1))
    label = jnp.zeros(500, jnp.int32)
    settings = {'sigmas': sampler.sigma_steps(5), 'no_class': 1}
    run = lambda z: SAMPLERS[name](exact, z, label, **settings)
    with jax.disable_jit():
        one_by_one = run(z)
    np.testing.assert_allclose(jax.jit(run)(z), one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('steps', [7, 40, 333])
def test_no_noise_outside_the_range_of_churn(steps):
    """Its standard deviation is exactly 0 there, for any σ: a difference of squares may not be."""
    z = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    label = jnp.zeros(4, jnp.int32)
    sample = lambda **churn: jax.jit(
        lambda z: sampler.heun(exact, z, label, sigmas=sampler.sigma_steps(steps), no_class=1, **churn)
    )(z)
    out_of_reach = {'s_churn': 10.0, 's_min': 100.0, 's_max': 200.0}
    churned = sample(**out_of_reach, noise=lambda i: jnp.full(z.shape, 1e6))
    np.testing.assert_allclose(churned, sample(), rtol=1e-5, atol=1e-6)


def test_guidance_zero_calls_the_network_once_per_step():
    rows = []

    def spy(x, sigma, label):
        rows.append(len(x))
        return exact(x, sigma, label)

    z = jnp.zeros((5, 2, 2, 1))
    sampler.ddim(spy, z, jnp.zeros(5, jnp.int32), sigmas=sampler.sigma_steps(4), no_class=1)
    assert set(rows) == {5}


def test_noise_levels_fall_from_t_max_to_t_min():
    t = sampler.sigma_steps(18, t_min=0.01, t_max=50.0, rho=5.0)
    assert t.dtype == np.float32 and t.shape == (18,)
    assert t[0] == pytest.approx(50.0) and t[-1] == pytest.approx(0.01)
    assert np.all(np.diff(t) < 0)
    np.testing.assert_allclose(np.diff(t ** np.float32(0.2)), np.diff(t**0.2)[0], rtol=1e-3)
    assert len(sampler.sigma_steps(1)) == 1


@pytest.mark.parametrize(
    'arguments, text',
    [
        ({'steps': 0}, 'steps is 0'),
        ({'steps': 5, 't_min': 0.0}, 't_min is 0.0'),
        ({'steps': 5, 't_min': 3.0, 't_max': 2.0}, 't_min is 3.0 and t_max 2.0'),
    ],
)
def test_settings_out_of_range_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        sampler.sigma_steps(**arguments)


def test_churn_without_noise_is_refused():
    z = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match='s_churn is 4.0'):
        sampler.heun(
            exact, z, jnp.zeros(1, jnp.int32), sigmas=sampler.sigma_steps(4), no_class=1, s_churn=4.0
        )
