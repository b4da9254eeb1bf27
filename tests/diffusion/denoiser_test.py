"""What every denoiser must satisfy, whatever its network; the numbers are in interop/pytorch_test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import denoiser

KINDS = list(denoiser.DENOISERS)
SIGMA = np.float32([0.02, 0.3, 1.0, 5.0, 70.0])
LABEL = jnp.arange(5)


def clean_and_noise():
    clean = jax.random.uniform(jax.random.key(0), (5, 4, 6, 2), minval=-1.0)
    return clean, jax.random.normal(jax.random.key(1), clean.shape)


@pytest.mark.parametrize('kind', KINDS)
def test_a_perfect_network_gives_the_clean_image(kind):
    x, n = clean_and_noise()
    s = SIGMA[:, None, None, None]
    target = {
        'edm': (s**2 * x - s * n / 3) / (s * 3**-0.5 * jnp.sqrt(s**2 + 1 / 3)),
        'vp': n,  # ε
        've': -n,  # σ times the score
        'v': (s * x - n) / jnp.sqrt(1 + s**2),  # sin φ x - cos φ ε = -v, with tan φ = σ
    }[kind]
    denoise = denoiser.make_kind(kind).denoiser(lambda scaled, c_noise, label: target)
    errors = np.abs(denoise(x + s * n, SIGMA, LABEL) - x).max((1, 2, 3))
    assert np.all(errors < 1e-6 * (SIGMA + 10))  # x is a difference of terms as large as σ


@pytest.mark.parametrize('kind', KINDS)
def test_rows_and_labels_reach_the_network_in_their_place(kind):
    seen = {}

    def network(x, c_noise, label):
        seen.update(x=x, c_noise=c_noise, label=label)
        return jnp.zeros_like(x)

    x, n = clean_and_noise()
    s = SIGMA[:, None, None, None]
    out = denoiser.make_kind(kind).denoiser(network)(x + s * n, SIGMA, LABEL)
    assert out.shape == x.shape and out.dtype == jnp.float32
    assert seen['c_noise'].shape == (5,) and np.all(np.diff(seen['c_noise']) > 0)
    np.testing.assert_array_equal(seen['label'], LABEL)
    for row in range(5):  # a scalar per row, and only that
        ratio = seen['x'][row] / (x + s * n)[row]
        np.testing.assert_allclose(ratio, np.full_like(ratio, ratio.ravel()[0]), rtol=1e-5)


@pytest.mark.parametrize('sigma_data', [0.5, 3**-0.5, 2.0])
def test_edm_inputs_and_targets_have_unit_variance(sigma_data):
    """Which is how EDM derives its scalings (appendix B.6), for Gaussian data."""
    shape = (5, 100, 100, 1)
    x = sigma_data * jax.random.normal(jax.random.key(0), shape)
    noisy = x + SIGMA[:, None, None, None] * jax.random.normal(jax.random.key(1), shape)
    seen = {}

    def network(scaled, c_noise, label):
        seen['input'] = scaled
        return jnp.full_like(scaled, seen.get('output', 0.0))

    denoise = denoiser.make_kind('edm', sigma_data=sigma_data).denoiser(network)
    skipped = denoise(noisy, SIGMA, LABEL)
    seen['output'] = 1.0
    out = denoise(noisy, SIGMA, LABEL) - skipped  # c_out
    np.testing.assert_allclose(np.std(seen['input'], axis=(1, 2, 3)), 1, rtol=0.05)
    np.testing.assert_allclose(np.std((x - skipped) / out, axis=(1, 2, 3)), 1, rtol=0.05)


@pytest.mark.parametrize('kind', KINDS)
def test_the_weight_makes_errors_of_the_network_count_equally(kind):
    """An error of 1 in the network's output is one of c_out in the image."""
    one = denoiser.make_kind(kind)
    np.testing.assert_allclose(one.weight(SIGMA) * one.c_out(SIGMA) ** 2, 1, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_noise_levels_of_training_are_positive_finite_and_weighted(kind):
    one = denoiser.make_kind(kind)
    sigma = np.asarray(one.sample_sigma(jax.random.key(2), 20000))
    assert sigma.shape == (20000,) and sigma.dtype == np.float32
    assert np.all(np.isfinite(sigma)) and np.all(sigma > 0)
    assert np.all(np.asarray(one.weight(sigma)) > 0)
    if kind == 'edm':
        assert np.log(sigma).mean() == pytest.approx(-1.2, abs=0.05)
        assert np.log(sigma).std() == pytest.approx(1.2, abs=0.05)


def test_vp_time_is_the_inverse_of_vp_sigma():
    t = np.linspace(0.01, 1, 50)
    np.testing.assert_allclose(denoiser.vp_time(denoiser.vp_sigma(t)), t, rtol=1e-4)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"denoiser is 'edn'; it must be one of \['edm'"):
        denoiser.make_kind('edn')
