import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import denoiser, loss

EDM = denoiser.make_kind('edm')


def mean_error(kind, denoise, image, label, key, **settings):
    """Both steps: the mean loss of an image's draws."""
    return loss.errors(kind, denoise, image, loss.draw(kind, key, image.shape, label, **settings)).mean()


def test_errors_by_hand():
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (4, 4, 1)).astype(np.float32)
    noise = rng.standard_normal((3, 4, 4, 1)).astype(np.float32)
    sigma = np.array([0.1, 1.0, 10.0], np.float32)
    shrink = lambda x, sigma, label: x / (1 + sigma[:, None, None, None]) + label[:, None, None, None]
    labels = np.array([0, 1, 2])
    expected = []
    for k in range(3):
        output = (image + sigma[k] * noise[k]) / (1 + sigma[k]) + labels[k]
        weight = (sigma[k] ** 2 + 1 / 3) / (sigma[k] ** 2 / 3)
        expected.append(weight * np.mean((output - image) ** 2))
    for images in (image, np.stack([image] * 3)):
        got = loss.errors(EDM, shrink, images, (labels, sigma, noise))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize('kind', list(denoiser.DENOISERS))
def test_a_network_of_zeros_has_the_loss_that_theory_gives(kind):
    """The weights are 1 / c_out², so a network F = 0 has the mean square of its target as loss.

    For an image of zeros the target (x - c_skip (x + n)) / c_out is computable: it is checked by its
    expectation over many draws.
    """
    zero = lambda x, c_noise, label: jnp.zeros_like(x)
    one = denoiser.make_kind(kind)
    value = mean_error(
        one,
        one.denoiser(zero),
        jnp.zeros((8, 8, 1)),
        jnp.int32(0),
        jax.random.key(0),
        draws=4000,
        label_dropout=0.1,
        no_class=3,
    )
    sigma = one.sample_sigma(jax.random.key(1), 200000)
    weight = one.weight(sigma)
    ratio = {
        'edm': (1 / 3) / (sigma**2 + 1 / 3) * sigma,
        'vp': sigma,
        've': sigma,
        'v': sigma / (sigma**2 + 1),
    }[kind]
    assert value == pytest.approx(float(jnp.mean(weight * ratio**2)), rel=0.1)


def test_labels_are_dropped_at_the_stated_rate_per_draw():
    labels, _, _ = loss.draw(
        EDM, jax.random.key(0), (2, 2, 1), jnp.int32(4), draws=20000, label_dropout=0.1, no_class=10
    )
    assert np.mean(labels == 10) == pytest.approx(0.1, abs=0.01)
    assert set(np.unique(labels)) == {4, 10}


def test_more_draws_estimate_the_same_value_with_less_variance():
    zero = lambda x, sigma, label: jnp.zeros_like(x)
    keys = jax.random.split(jax.random.key(0), 200)

    def values(draws):
        run = lambda key: mean_error(
            EDM, zero, jnp.ones((4, 4, 1)), jnp.int32(0), key, draws=draws, label_dropout=0.0, no_class=1
        )
        return np.asarray(jax.jit(jax.vmap(run))(keys))

    few, many = values(2), values(32)
    assert many.std() < few.std() / 2
    assert few.mean() == pytest.approx(many.mean(), rel=0.5)


@pytest.mark.parametrize('kind', list(denoiser.DENOISERS))
def test_the_key_decides_everything_also_under_vmap_and_jit(kind):
    halve = lambda x, sigma, label: x / 2 + label[:, None, None, None]
    image = jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0)
    one = denoiser.make_kind(kind)
    call = lambda key: mean_error(
        one, halve, image, jnp.int32(1), key, draws=3, label_dropout=0.5, no_class=2
    )
    keys = jax.random.split(jax.random.key(1), 4)
    values = [float(call(key)) for key in keys]
    assert values[0] == float(call(keys[0])) and len(set(values)) == 4
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(keys), values, rtol=1e-4)


def test_settings_of_the_kind_reach_the_loss():
    """With std 0 every draw has σ = exp(mean), so the error of D = x is w σ² on average."""
    value = mean_error(
        denoiser.make_kind('edm', p_mean=0.5, p_std=0.0, sigma_data=2.0),
        lambda x, sigma, label: x,
        jnp.zeros((8, 8, 3)),
        jnp.int32(0),
        jax.random.key(0),
        draws=50,
        label_dropout=0.0,
        no_class=1,
    )
    assert value == pytest.approx((np.e + 4) / 4, rel=0.05)
