import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import denoiser, loss


def test_weighted_errors_by_hand():
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
        got = loss.weighted_errors(shrink, images, labels, sigma, noise, loss.edm_levels().weight)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize('kind', ['edm', 'vp', 've', 'v'])
def test_a_network_of_zeros_has_the_loss_that_theory_gives(kind):
    """The weights are 1 / c_out², so a network F = 0 has the mean square of its target as loss.

    For an image of zeros the target (x - c_skip (x + n)) / c_out is computable: it is checked by its
    expectation over many draws.
    """
    zero = lambda x, c_noise, label: jnp.zeros_like(x)
    denoise = denoiser.make_denoiser(kind, zero)
    image = jnp.zeros((8, 8, 1))
    make = loss.make_loss(kind)
    value = make(denoise, image, jnp.int32(0), jax.random.key(0), draws=4000, label_dropout=0.1, no_class=3)
    sigma = loss.LEVELS[kind]().sample(jax.random.key(1), 200000)
    weight = loss.LEVELS[kind]().weight(sigma)
    ratio = {
        'edm': (1 / 3) / (sigma**2 + 1 / 3) * sigma,
        'vp': sigma,
        've': sigma,
        'v': sigma / (sigma**2 + 1),
    }[kind]
    assert value == pytest.approx(float(jnp.mean(weight * ratio**2)), rel=0.1)


@pytest.mark.parametrize('kind', ['edm', 'vp', 've', 'v'])
def test_noise_levels_are_positive_finite_and_weighted(kind):
    levels = loss.LEVELS[kind]()
    sigma = np.asarray(levels.sample(jax.random.key(2), 20000))
    assert np.all(np.isfinite(sigma)) and np.all(sigma > 0)
    assert np.all(np.asarray(levels.weight(sigma)) > 0)
    if kind == 'edm':
        assert np.log(sigma).mean() == pytest.approx(-1.2, abs=0.05)
        assert np.log(sigma).std() == pytest.approx(1.2, abs=0.05)


def test_labels_are_dropped_at_the_stated_rate_per_draw():
    seen = {}

    def spy(x, sigma, label):
        seen['label'] = label
        return x

    loss.make_loss('edm')(
        spy,
        jnp.zeros((2, 2, 1)),
        jnp.int32(4),
        jax.random.key(0),
        draws=20000,
        label_dropout=0.1,
        no_class=10,
    )
    share = np.mean(np.asarray(seen['label']) == 10)
    assert share == pytest.approx(0.1, abs=0.01)
    assert set(np.unique(seen['label'])) == {4, 10}


def test_more_draws_estimate_the_same_value_with_less_variance():
    zero = lambda x, sigma, label: jnp.zeros_like(x)
    keys = jax.random.split(jax.random.key(0), 200)

    def values(draws):
        run = lambda key: loss.make_loss('edm')(
            zero, jnp.ones((4, 4, 1)), jnp.int32(0), key, draws=draws, label_dropout=0.0, no_class=1
        )
        return np.asarray(jax.jit(jax.vmap(run))(keys))

    few, many = values(2), values(32)
    assert many.std() < few.std() / 2
    assert few.mean() == pytest.approx(many.mean(), rel=0.5)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match=r"loss is 'edn'; it must be one of \['edm'"):
        loss.make_loss('edn')


@pytest.mark.parametrize('kind', ['edm', 'vp', 've', 'v'])
def test_the_key_decides_everything_also_under_vmap_and_jit(kind):
    halve = lambda x, sigma, label: x / 2 + label[:, None, None, None]
    image = jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0)
    call = lambda key: loss.make_loss(kind)(
        halve, image, jnp.int32(1), key, draws=3, label_dropout=0.5, no_class=2
    )
    keys = jax.random.split(jax.random.key(1), 4)
    values = [float(call(key)) for key in keys]
    assert values[0] == float(call(keys[0])) and len(set(values)) == 4
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(keys), values, rtol=1e-4)


def test_settings_of_the_noise_levels_reach_the_loss():
    """With std 0 every draw has σ = exp(mean), so the error of D = x is w σ² on average."""
    value = loss.make_loss('edm', mean=0.5, std=0.0, sigma_data=2.0)(
        lambda x, sigma, label: x,
        jnp.zeros((8, 8, 3)),
        jnp.int32(0),
        jax.random.key(0),
        draws=50,
        label_dropout=0.0,
        no_class=1,
    )
    assert value == pytest.approx((np.e + 4) / 4, rel=0.05)
