"""Samplers on data whose best denoiser is known in closed form."""

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


SETTINGS = {
    'steps': 5, 't_min': 0.002, 't_max': 80.0, 'rho': 7.0, 'guidance': 0.0,
    'guidance_min': 0.0, 'guidance_max': 1000.0, 's_churn': 0.0, 's_min': 0.0, 's_max': 50.0, 's_noise': 1.0,
}  # fmt: skip
# What each needs to sample well.
SAMPLERS = {
    'ddim': {'name': 'ddim', 'steps': 300},
    'heun': {'name': 'heun', 'steps': 40},
    'heun with churn': {'name': 'heun', 'steps': 80, 's_churn': 40.0},
    'dpmpp_2m': {'name': 'dpmpp_2m', 'steps': 40},
    'dpmpp_2m_sde': {'name': 'dpmpp_2m_sde', 'steps': 80},
}


def make(sampler_name, **changes):
    """(z, label) → images, by the exact denoiser."""
    settings = {'no_class': 2} | SETTINGS | SAMPLERS[sampler_name] | changes
    sample = sampler.make_sampler(**settings)
    return lambda z, label: sample(exact, z, label, noise=noise)


@pytest.mark.parametrize('name', SAMPLERS)
def test_samples_have_the_distribution_of_the_data(name):
    z = jax.random.normal(jax.random.key(0), (500, 4, 4, 1))
    label = jnp.arange(500) % 2
    images = np.asarray(jax.jit(make(name))(z, label))
    for y in (0, 1):
        part = images[np.arange(500) % 2 == y]
        assert part.mean() == pytest.approx(MEAN * y, abs=0.03)
        assert part.std() == pytest.approx(STD, rel=0.06)


def test_guidance_moves_away_from_no_class():
    z = jax.random.normal(jax.random.key(0), (200, 4, 4, 1))
    label = jnp.ones(200, jnp.int32)
    run = lambda g: np.mean(jax.jit(make('heun', no_class=0, guidance=g))(z, label))
    assert run(1.0) == pytest.approx(2 * MEAN, abs=0.05)  # 2 D(1) - D(0) has its mean at 2 MEAN
    assert run(0.0) == pytest.approx(MEAN, abs=0.05)


@pytest.mark.parametrize('name', SAMPLERS)
def test_jitted_equals_step_by_step(name):
    z = jax.random.normal(jax.random.key(1), (500, 4, 4, 1))
    label = jnp.zeros(500, jnp.int32)
    run = make(name, steps=5)
    with jax.disable_jit():
        one_by_one = run(z, label)
    np.testing.assert_allclose(jax.jit(run)(z, label), one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('steps', [7, 40, 333])
def test_no_noise_outside_the_range_of_churn(steps):
    """Its standard deviation is exactly 0 there, for any σ: a difference of squares may not be."""
    z = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    label = jnp.zeros(4, jnp.int32)
    sigmas, loud = sampler.sigma_steps(steps), lambda i: jnp.full(z.shape, 1e6)
    sample = lambda churn: jax.jit(
        lambda z: sampler.heun(exact, z, label, sigmas=sigmas, noise=loud, churn=churn)
    )(z)
    churned = sample(sampler.Churn(s_churn=10.0, s_min=100.0, s_max=200.0))
    np.testing.assert_allclose(churned, sample(sampler.Churn()), rtol=1e-5, atol=1e-6)


def rows_of_calls(**settings):
    """How many rows the network gets, and how many times."""
    rows = []

    def spy(x, sigma, label):
        rows.append(len(x))
        return exact(x, sigma, label)

    sample = sampler.make_sampler(no_class=1, **(SETTINGS | settings))
    with jax.disable_jit():
        sample(spy, jnp.zeros((5, 2, 2, 1)), jnp.zeros(5, jnp.int32), noise=lambda i: 0.0)
    return rows


@pytest.mark.parametrize(
    'name, evaluations', [('ddim', 4), ('heun', 7), ('dpmpp_2m', 4), ('dpmpp_2m_sde', 4)]
)
def test_the_network_sees_every_image_once_per_evaluation_and_twice_with_guidance(name, evaluations):
    """Heun's last step, down to σ = 0, is an Euler step."""
    assert rows_of_calls(name=name, steps=4) == [5] * evaluations
    assert rows_of_calls(name=name, steps=4, guidance=1.0) == [10] * evaluations


def test_heun_is_algorithm_2_of_edm():
    """Written out in float64 with NumPy, for one step with churn, one without, and the last."""
    z = np.random.default_rng(0).standard_normal((2, 2, 2, 1))
    label, churn = jnp.array([0, 1]), sampler.Churn(s_churn=1.5, s_min=1.0, s_max=50.0, s_noise=1.1)
    sigmas = np.array([40.0, 0.9, 0.1])
    epsilon = np.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
    denoise = lambda x, t: np.asarray(exact(x, np.full(2, t), np.array(label)))
    x, t = sigmas[0] * z, np.append(sigmas, 0.0)
    for i in range(3):
        gamma = 0.5 if 1.0 <= t[i] <= 50.0 else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * 1.1 * epsilon
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_prime) / 2
    got = sampler.heun(
        exact, jnp.float32(z), label,
        sigmas=np.float32(sigmas), noise=lambda i: jnp.float32(epsilon), churn=churn,
    )  # fmt: skip
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def error_on_the_path(name, steps):
    """Root mean square error of images against the exact end of the probability flow, from σ = 80 to 0."""
    z = jax.random.normal(jax.random.key(2), (500, 4, 4, 1))
    images = jax.jit(make(name, steps=steps))(z, jnp.ones(500, jnp.int32))
    wanted = MEAN + STD / np.hypot(STD, 80.0) * (80.0 * z - MEAN)
    return float(jnp.sqrt(jnp.mean((images - wanted) ** 2)))


def test_two_steps_of_history_are_of_second_order():
    """Twice the steps: about a quarter of the error; and with as many calls far less than by ddim."""
    coarse, fine = error_on_the_path('dpmpp_2m', 12), error_on_the_path('dpmpp_2m', 24)
    assert fine < coarse / 3
    assert fine < error_on_the_path('ddim', 24) / 3


def test_multistep_is_algorithm_2_of_dpm_solver_plus_plus():
    """Written out in float64 with NumPy: data prediction, α = 1, for the flow and for the SDE."""
    z = np.random.default_rng(0).standard_normal((2, 2, 2, 1))
    sigmas, label = np.array([40.0, 5.0, 0.9, 0.1]), jnp.array([0, 1])
    drawn = np.linspace(-1, 1, 8).reshape(2, 2, 2, 1)
    lambdas = -np.log(sigmas)
    denoise = lambda x, t: np.asarray(exact(x, np.full(2, t), np.array(label)))
    for is_stochastic in (False, True):
        x, before = sigmas[0] * z, None
        for i in range(3):
            now, h = denoise(x, sigmas[i]), lambdas[i + 1] - lambdas[i]
            d = now
            if i > 0:
                r = (lambdas[i] - lambdas[i - 1]) / h
                d = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
            before = now
            if is_stochastic:
                x = sigmas[i + 1] / sigmas[i] * np.exp(-h) * x + (1 - np.exp(-2 * h)) * d
                x = x + sigmas[i + 1] * np.sqrt(1 - np.exp(-2 * h)) * 1.1 * drawn
            else:
                x = sigmas[i + 1] / sigmas[i] * x - np.expm1(-h) * d
        got = sampler.multistep(
            exact, jnp.float32(z), label, sigmas=np.float32(sigmas), noise=lambda i: jnp.float32(drawn),
            churn=sampler.Churn(s_noise=1.1), is_stochastic=is_stochastic,
        )  # fmt: skip
        np.testing.assert_allclose(got, denoise(x, sigmas[3]), rtol=1e-4, atol=1e-4)


def test_guidance_in_an_interval_is_none_outside_of_it():
    z, label = jax.random.normal(jax.random.key(0), (50, 2, 2, 1)), jnp.ones(50, jnp.int32)
    run = lambda **settings: np.asarray(jax.jit(make('ddim', steps=9, no_class=0, **settings))(z, label))
    nowhere = run(guidance=1.0, guidance_min=100.0)
    np.testing.assert_allclose(nowhere, run(), rtol=1e-5, atol=1e-6)
    # Its bounds take in every level but the last.
    nearly = run(guidance=1.0, guidance_min=0.0021)
    np.testing.assert_allclose(nearly, run(guidance=1.0), atol=0.01)
    partly = run(guidance=1.0, guidance_min=0.1, guidance_max=2.0)
    assert nowhere.mean() + 0.05 < partly.mean() < nearly.mean() - 0.05


def test_guidance_in_an_interval_calls_the_network_once_elsewhere():
    settings = {'name': 'ddim', 'steps': 4, 'guidance': 1.0, 't_min': 1.0, 'rho': 1.0}
    assert rows_of_calls(**settings, guidance_max=30.0) == [5, 5, 5, 5, 5, 5]  # levels 80, 53.7, 27.3, 1


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="sampler is 'euler'; it must be one of .*'ddim', .*'heun'"):
        sampler.make_sampler('euler', no_class=1, **SETTINGS)


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
    sample = sampler.make_sampler('heun', no_class=1, **(SETTINGS | {'s_churn': 4.0}))
    with pytest.raises(ValueError, match='s_churn is 4.0'):
        sample(exact, jnp.zeros((1, 2, 2, 1)), jnp.zeros(1, jnp.int32))
    sample = sampler.make_sampler('dpmpp_2m_sde', no_class=1, **SETTINGS)
    with pytest.raises(ValueError, match='noise is None'):
        sample(exact, jnp.zeros((1, 2, 2, 1)), jnp.zeros(1, jnp.int32))
