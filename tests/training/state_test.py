"""Parameters as one vector: the same numbers, by the same names on disk, and one leaf for all that follows."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpp_jax.training import state as state_lib
from dpp_jax.training.state import FlatParams


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {'conv': {'kernel': array(3, 3, 1, 4), 'bias': array(4)}, 'scale': array(), 'norm': array(5)}


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_tree_comes_back_inside_and_outside_of_traced_functions(tree):
    flat = FlatParams.of(tree)
    assert flat.vector.shape == (46,) and len(jax.tree.leaves(flat)) == 1
    assert_equal(flat.tree(), tree)
    assert_equal(jax.jit(lambda flat: flat.tree())(flat), tree)
    assert_equal(jax.jit(FlatParams.of)(tree).tree(), tree)


def test_axes_in_front_stay_in_front(tree):
    """As of per-example gradients, or of devices."""
    flat = FlatParams.of(tree)
    several = jax.tree.map(lambda vector: np.stack([vector, 2 * vector]), flat)
    assert_equal(several.tree(), jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), tree))
    assert_equal(jax.vmap(lambda one: one.tree())(several), several.tree())


def test_a_gradient_has_every_leafs_gradient_in_its_place(tree):
    def loss(params, x):
        return jnp.sum(x * params['conv']['kernel']) * params['scale'] + jnp.sum(params['norm'] ** 3)

    of_flat = jax.vmap(jax.grad(lambda flat, x: loss(flat.tree(), x)), (None, 0))
    of_tree = jax.vmap(jax.grad(loss), (None, 0))
    xs = np.arange(2, dtype=np.float32)
    assert_equal(of_flat(FlatParams.of(tree), xs).tree(), of_tree(tree, xs))


def test_saved_by_names_whatever_the_vectors_order(tree):
    """A checkpoint is that of a state whose weights and moments are trees."""
    optimizer = optax.adam(1e-3)
    state = jax.tree.map(np.asarray, state_lib.create(tree, optimizer))
    saved = flax.serialization.to_state_dict(state)
    assert_equal(saved['params'], tree)
    assert_equal(
        saved['opt_state'],
        jax.tree.map(np.asarray, flax.serialization.to_state_dict(optimizer.init(tree))),
    )
    zeros = jax.tree.map(np.zeros_like, state)
    assert_equal(flax.serialization.from_state_dict(zeros, saved), state)
    assert_equal(state.weights(), {'params': tree, 'ema_params': tree})


def test_arrays_that_are_not_alike_are_refused(tree):
    with pytest.raises(ValueError, match="dtypes of parameters are .'float32', 'int32'.; there must be one"):
        FlatParams.of(tree | {'steps': np.arange(3, dtype=np.int32)})
    with pytest.raises(ValueError, match='there must be one'):
        FlatParams.of({})
