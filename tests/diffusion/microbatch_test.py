"""Parts change memory, not results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import microbatch


@pytest.mark.parametrize(
    ('rows', 'at_once', 'expected'), [(32, 32, 1), (32, 8, 4), (32, 5, 8), (7, 3, 7), (4, 100, 1)]
)
def test_count_is_the_fewest_equal_parts_that_fit(rows, at_once, expected):
    assert microbatch.count(rows, at_once) == expected


def loss(params, shift, rows):
    return jnp.mean(jnp.tanh(rows['x'] @ params['w'] + shift) * rows['y'][:, None]) ** 2


@pytest.fixture(scope='module')
def arguments():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {'w': normal(3, 2)}, normal(2), {'x': normal(5, 12, 3), 'y': normal(5, 12)}


@pytest.mark.parametrize('number', [1, 2, 4, 12])
def test_value_and_gradient_per_example_are_means_over_the_parts(arguments, number):
    """Under vmap, inside a jitted loop: as DP-SGD calls it."""
    params, shift, rows = arguments
    per_example = jax.vmap(jax.value_and_grad(microbatch.mean(loss, number)), (None, None, 0))
    values, gradients = jax.jit(per_example)(params, shift, rows)
    for i in range(5):
        pieces = [
            jax.tree.map(lambda leaf: leaf[i].reshape((number, -1) + leaf.shape[2:])[k], rows)
            for k in range(number)
        ]
        expected = [jax.value_and_grad(loss)(params, shift, piece) for piece in pieces]
        np.testing.assert_allclose(values[i], np.mean([v for v, _ in expected]), rtol=1e-5)
        np.testing.assert_allclose(
            gradients['w'][i], np.mean([g['w'] for _, g in expected], axis=0), rtol=1e-4, atol=1e-7
        )


def test_only_one_part_is_in_memory():
    """Bytes that the compiled gradient needs: a sixteenth of the rows, a small part of the memory."""
    weights = np.ones((256, 256), np.float32)
    rows = np.ones((4096, 256), np.float32)

    def deep(params, _, rows):
        for _ in range(4):
            rows = jnp.tanh(rows @ params)
        return jnp.mean(rows)

    def bytes_needed(number):
        gradient = jax.jit(jax.grad(microbatch.mean(deep, number)))
        return gradient.lower(weights, None, rows).compile().memory_analysis().temp_size_in_bytes

    assert bytes_needed(16) < bytes_needed(1) / 4
