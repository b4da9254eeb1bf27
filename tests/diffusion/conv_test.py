"""The convolution against XLA's own in float64, forward and backward, in every form that is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import conv


@pytest.fixture(params=['winograd', 'im2col', 'library'])
def form(request, monkeypatch):
    """As a CPU runs it, with many channels and with few, and as a GPU or a TPU does."""
    monkeypatch.setattr(conv, '_prefers_products', lambda: request.param != 'library')
    monkeypatch.setattr(conv, '_is_small', lambda kernel: request.param == 'im2col')
    return request.param


def reference(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST,
    )


def exactly(function, *arguments):
    """In float64."""
    with jax.enable_x64(True):
        return jax.tree.map(
            np.asarray, function(*(jnp.asarray(a, jnp.float64) for a in arguments))
        )


def data(shape, features, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    kernel = rng.standard_normal((3, 3, shape[-1], features)).astype(np.float32)
    target = rng.standard_normal(shape[:-1] + (features,)).astype(np.float32)
    return x, kernel, target


def gradients(function):
    return jax.grad(lambda x, k, target: jnp.sum(function(x, k) * target), argnums=(0, 1))


def assert_close(got, expected, tolerance=1e-6):
    """In the norm: relative to the whole array, which is what an update sees."""
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    'shape, features',
    [((2, 8, 8, 3), 5), ((1, 7, 5, 4), 1), ((3, 1, 1, 2), 2), ((1, 14, 28, 2), 3)],
)
def test_value_and_gradients(form, shape, features):
    arguments = data(shape, features)
    assert_close(jax.jit(conv.conv3x3)(*arguments[:2]), exactly(reference, *arguments[:2]))
    got = jax.jit(gradients(conv.conv3x3))(*arguments)
    for one, expected in zip(got, exactly(gradients(reference), *arguments)):
        assert_close(one, expected)


def test_per_example_kernel_gradients_in_a_loop(form):
    """vmap over examples inside a scan: the form of DP-SGD."""
    x, kernel, target = data((6, 4, 6, 6, 3), 5)

    @jax.jit
    def scanned(x, kernel, target):
        per_example = jax.vmap(gradients(conv.conv3x3), in_axes=(0, None, 0))
        chunks = (x.reshape((3, 2) + x.shape[1:]), target.reshape((3, 2) + target.shape[1:]))
        _, out = jax.lax.scan(lambda c, ab: (c, per_example(ab[0], kernel, ab[1])), 0, chunks)
        return out

    x_gradients, kernel_gradients = scanned(x, kernel, target)
    for i in range(6):
        expected = exactly(gradients(reference), x[i], kernel, target[i])
        assert_close(x_gradients[i // 2, i % 2], expected[0])
        assert_close(kernel_gradients[i // 2, i % 2], expected[1])


def test_bfloat16_products_give_a_float32_kernel_gradient(form):
    x, kernel, target = data((4, 8, 8, 16), 16)
    narrow = jnp.asarray(x, jnp.bfloat16)
    assert conv.conv3x3(narrow, kernel).dtype == jnp.bfloat16
    x_gradient, kernel_gradient = jax.jit(gradients(conv.conv3x3))(narrow, kernel, target)
    assert (x_gradient.dtype, kernel_gradient.dtype) == (jnp.bfloat16, jnp.float32)
    expected = exactly(gradients(reference), x, kernel, target)
    assert_close(np.float32(x_gradient), expected[0], 1e-2)
    assert_close(kernel_gradient, expected[1], 1e-2)


@pytest.mark.parametrize(
    'axes', [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0)]
)
def test_vmap_over_any_of_the_arguments(form, axes):
    x, kernel, target = data((3, 2, 6, 4, 3), 5)
    kernels = np.stack([kernel, 2 * kernel, -kernel])
    all_of_them = (x, kernels, target)
    arguments = [a if axis == 0 else a[0] for a, axis in zip(all_of_them, axes)]
    got = jax.jit(jax.vmap(gradients(conv.conv3x3), axes))(*arguments)
    for i in range(3):
        one = [a[i] if axis == 0 else a for a, axis in zip(arguments, axes)]
        for result, expected in zip(got, exactly(gradients(reference), *one)):
            assert_close(result[i], expected, 5e-6)


def test_vmap_within_vmap(form):
    x, kernel, target = data((2, 3, 1, 4, 4, 3), 5)
    inner = jax.vmap(gradients(conv.conv3x3), (0, None, 0))
    got = jax.jit(jax.vmap(inner, (0, None, 0)))(x, kernel, target)
    for i, j in np.ndindex(2, 3):
        for result, expected in zip(got, exactly(gradients(reference), x[i, j], kernel, target[i, j])):
            assert_close(result[i, j], expected, 5e-6)
