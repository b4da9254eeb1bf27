"""The model's functions of its parameters agree with each other, and registered networks fit into it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import denoiser, loss
from dpp_jax.diffusion import model as model_lib

DRAWS = 4


@pytest.fixture(scope='module')
def params(tiny_model):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, tiny_model.shapes())


@pytest.fixture(scope='module')
def example(tiny_model):
    image = jax.random.uniform(jax.random.key(0), tiny_model.image_shape, minval=-1.0)
    return image, jnp.int32(3), jax.random.key(1)


@pytest.mark.parametrize('name', model_lib.NETWORKS)
def test_networks_give_images_of_their_input_s_shape(name):
    network = model_lib.NETWORKS[name](
        image_channels=3, classes=4, width=8, multipliers=(1,), blocks=1, attention_resolutions=()
    )
    kind = denoiser.make_kind('edm')
    model = model_lib.Model(network=network, image_shape=(8, 8, 3), classes=4, kind=kind)
    x, sigma, label = jnp.zeros((2, 8, 8, 3)), jnp.ones(2), jnp.array([0, model.classes])
    output = jax.eval_shape(lambda p: model.denoiser(p)(x, sigma, label), model.shapes())
    assert output.shape == x.shape and output.dtype == jnp.float32


def test_shapes_are_those_of_fresh_parameters(tiny_model):
    fresh = tiny_model.init(jax.random.key(0))
    describe = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(describe, fresh) == jax.tree.map(describe, tiny_model.shapes())
    assert model_lib.size(fresh) == sum(np.size(leaf) for leaf in jax.tree.leaves(fresh))


@pytest.mark.parametrize('at_once', [None, 2, 1])
def test_the_example_s_loss_is_the_mean_of_its_errors_in_any_parts(tiny_model, params, example, at_once):
    image, label, key = example
    settings = {'draws': DRAWS, 'label_dropout': 0.5}
    drawn = tiny_model.drawing(**settings)(label, key)
    expected = jax.jit(tiny_model.errors)(params, image, drawn)
    assert expected.shape == (DRAWS,)
    example_loss = tiny_model.example_loss(**settings, draws_at_once=at_once)
    np.testing.assert_allclose(jax.jit(example_loss)(params, *example), expected.mean(), rtol=1e-5)


def test_shares_of_the_draws_have_the_mean_of_all_of_them(tiny_model, params, example):
    """Each a loss of its own, of draws that do not depend on how many shares there are."""
    settings = {'draws': 4, 'label_dropout': 0.5}
    whole = jax.jit(tiny_model.example_loss(**settings))(params, *example)
    of_share = jax.jit(tiny_model.example_loss(**settings, shares=2))
    found = [of_share(params, *example, share) for share in range(2)]
    np.testing.assert_allclose(np.mean(found), whole, rtol=1e-5)
    assert abs(found[0] - found[1]) > 1e-3 * whole
    with pytest.raises(ValueError, match='shares is 3; it must divide the draws, 4'):
        tiny_model.example_loss(**settings, shares=3)


def test_errors_of_several_images_are_those_of_each(tiny_model, params):
    images = jax.random.uniform(jax.random.key(0), (2,) + tiny_model.image_shape, minval=-1.0)
    draw = tiny_model.drawing(draws=1, label_dropout=0.0)
    drawn = [draw(jnp.int32(i), jax.random.key(i)) for i in range(2)]
    errors = jax.jit(tiny_model.errors)
    together = errors(params, images, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *drawn))
    alone = [errors(params, image, one)[0] for image, one in zip(images, drawn)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_dropped_label_is_no_class(tiny_model, example):
    _, label, key = example
    labels, _, _ = tiny_model.drawing(draws=8, label_dropout=1.0)(label, key)
    assert set(np.array(labels)) == {tiny_model.classes}


def test_the_kind_of_denoiser_decides_the_loss(tiny_model, params, example):
    """Each with its own noise levels and weights."""
    image, label, key = example
    values = []
    for kind in map(denoiser.make_kind, denoiser.DENOISERS):
        model = dataclasses.replace(tiny_model, kind=kind)
        drawn = model.drawing(draws=2, label_dropout=0.0)(label, key)
        value = jax.jit(model.errors)(params, image, drawn)
        np.testing.assert_allclose(value, loss.errors(kind, model.denoiser(params), image, drawn), rtol=1e-3)
        values.append(float(value.mean()))
    assert len(set(values)) == len(values)
