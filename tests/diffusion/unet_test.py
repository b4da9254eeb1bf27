import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import unet, winograd

# Each program runs only a few times: compiling it well would take longer than all its runs.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make(size=8, **settings):
    defaults = {'multipliers': (1, 2), 'blocks': 1, 'attention_resolutions': (4,), 'width': 8}
    network = unet.UNet(1, 3, **{**defaults, **settings})
    x = jax.random.normal(jax.random.key(0), (2, size, size, 1))
    arguments = (x, jnp.array([-1.0, 0.5]), jnp.array([1, 3]))
    return network, arguments


@pytest.fixture(scope='module')
def tiny():
    network, arguments = make()
    return network, arguments, quick_jit(network.init)(jax.random.key(1), *arguments)


def test_fresh_network_is_almost_zero(tiny):
    """The last convolution starts at 1e-10 times its usual scale, as in DDPM."""
    network, arguments, variables = tiny
    output = quick_jit(network.apply)(variables, *arguments)
    assert output.shape == arguments[0].shape and output.dtype == jnp.float32
    assert 0 < np.abs(output).max() < 1e-3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def perturbed(variables):
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        structure, [leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    )


def test_images_do_not_see_each_other_and_label_and_noise_matter(tiny):
    network, (x, c_noise, label), variables = tiny
    apply = quick_jit(network.apply)
    variables = perturbed(variables)
    both = apply(variables, x, c_noise, label)
    other = apply(variables, x.at[1].set(9.0), c_noise, label)
    np.testing.assert_allclose(other[0], both[0], rtol=1e-5, atol=1e-6)
    for change in ((x, c_noise + 0.5, label), (x, c_noise, label - 1)):
        assert np.abs(apply(variables, *change) - both).max() > 1e-3


def test_bfloat16_activations_stay_near_float32(tiny):
    network, arguments, variables = tiny
    variables = perturbed(variables)
    half = make(dtype=jnp.bfloat16)[0]
    exact = quick_jit(network.apply)(variables, *arguments)
    rounded = quick_jit(half.apply)(variables, *arguments)
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    'size, settings, text',
    [
        (7, {}, 'image size is 7x7.*divisible by 2'),
        (10, {'multipliers': (1, 1, 1)}, 'image size is 10x10.*divisible by 4'),
        (8, {'width': 18}, 'group norm over 18 channels.*4 equal groups'),
        (8, {'attention_resolutions': (5,)}, r'attention_resolutions is \(5,\).*\[8, 4\]'),
    ],
)
def test_sizes_that_do_not_fit_are_named(size, settings, text):
    network, arguments = make(size, **settings)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(network.init, jax.random.key(0), *arguments)


def test_group_norm_normalizes_each_group():
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (2, 6, 6, 16))
    norm = unet.GroupNorm()
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    groups = np.asarray(y).reshape(2, 36, 4, 4)
    np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std((1, 3)), 1, atol=1e-4)


@pytest.mark.parametrize('form', ['products', 'library'])
def test_bfloat16_gradients_of_every_parameter_are_near_float32(form, monkeypatch):
    """Of 28x28 images: sums over so many pixels are lost if they are added up in bfloat16."""
    monkeypatch.setattr(winograd, '_prefers_products', lambda: form == 'products')
    found = {}
    for dtype in ('float32', 'bfloat16'):
        network, (x, *rest) = make(28, multipliers=(1,), attention_resolutions=(), dtype=jnp.dtype(dtype))
        variables = perturbed(quick_jit(network.init)(jax.random.key(1), x, *rest))

        def loss(params):
            return jnp.mean(jnp.square(network.apply({'params': params}, x, *rest) - x))

        found[dtype] = jax.tree_util.tree_leaves_with_path(quick_jit(jax.grad(loss))(variables['params']))
    for (path, wide), (_, narrow) in zip(*found.values()):
        name = jax.tree_util.keystr(path)
        assert narrow.dtype == jnp.float32
        if 'key' in name and 'bias' in name:
            continue  # softmax does not depend on it: both are rounding errors
        assert np.linalg.norm(narrow - wide) < 0.05 * np.linalg.norm(wide), name


def test_patches_lose_no_pixel_and_each_is_a_block():
    image = jnp.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    patches = unet._to_patches(image, 4)
    assert patches.shape == (2, 2, 2, 48)
    np.testing.assert_array_equal(patches[1, 0, 1], image[1, :4, 4:].reshape(-1))
    np.testing.assert_array_equal(unet._from_patches(patches, 4), image)


def test_a_network_with_patches_sees_all_pixels_and_gives_an_image():
    network, (x, *others) = make(size=16, patch=2)
    variables = perturbed(quick_jit(network.init)(jax.random.key(1), x, *others))
    apply = quick_jit(network.apply)
    output = apply(variables, x, *others)
    assert output.shape == x.shape
    for pixel in ((0, 0), (7, 9), (15, 15)):
        assert (apply(variables, x.at[0, *pixel].add(3.0), *others)[0] != output[0]).any()
    with pytest.raises(ValueError, match=r'with multipliers \(1, 2\) and patch 2 it must be divisible by 4'):
        make(size=10, patch=2)[0].init(jax.random.key(0), jnp.zeros((2, 10, 10, 1)), *others)
