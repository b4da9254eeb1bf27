"""The convolution against XLA's own, forward and backward, in every form in which it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import conv


def reference(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST,
    )


def data(shape, features, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    kernel = rng.standard_normal((3, 3, shape[-1], features)).astype(np.float32)
    target = rng.standard_normal(shape[:-1] + (features,)).astype(np.float32)
    return x, kernel, target


def gradients(function):
    return jax.grad(lambda x, k, target: jnp.sum(function(x, k) * target), argnums=(0, 1))


@pytest.mark.parametrize('shape, features', [((2, 8, 8, 3), 5), ((1, 7, 5, 4), 1), ((3, 1, 1, 2), 2)])
def test_value_and_gradients(shape, features):
    arguments = data(shape, features)
    np.testing.assert_allclose(
        conv.conv3x3(*arguments[:2]), reference(*arguments[:2]), rtol=1e-4, atol=1e-4
    )
    for got, expected in zip(
        jax.jit(gradients(conv.conv3x3))(*arguments), gradients(reference)(*arguments)
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-4)


def test_per_example_kernel_gradients_in_a_loop():
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
        expected = gradients(reference)(x[i], kernel, target[i])
        np.testing.assert_allclose(x_gradients[i // 2, i % 2], expected[0], rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(
            kernel_gradients[i // 2, i % 2], expected[1], rtol=1e-4, atol=5e-4
        )
