"""Parameters as one vector: the same numbers, the same names on disk, and one leaf for all that follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpp_jax.training import checkpoint
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


def test_arrays_on_a_device_compile_nothing(tree, compilations):
    """A program for every array, twice at every resume, would cost more than the vector saves."""
    on_device = jax.device_put(tree)
    flat = jax.device_put(FlatParams.of(tree))
    before = compilations.count
    assert_equal(FlatParams.of(on_device).tree(), tree)
    assert_equal(flat.tree(), tree)
    assert compilations.count == before


def test_a_gradient_has_every_leafs_gradient_in_its_place(tree):
    def loss(params, x):
        return jnp.sum(x * params['conv']['kernel']) * params['scale'] + jnp.sum(params['norm'] ** 3)

    of_flat = jax.vmap(jax.grad(lambda flat, x: loss(flat.tree(), x)), (None, 0))
    of_tree = jax.vmap(jax.grad(loss), (None, 0))
    xs = np.arange(2, dtype=np.float32)
    assert_equal(of_flat(FlatParams.of(tree), xs).tree(), of_tree(tree, xs))


def test_checkpoints_hold_the_arrays_by_their_names(tree, tmp_path):
    """So also those of runs that were begun when the state was made of trees."""
    optimizer = optax.adam(1e-3)
    average = jax.tree.map(lambda leaf: leaf + 1, tree)
    moments = jax.tree.map(lambda leaf: np.asarray(leaf + 2), optimizer.init(tree))
    with checkpoint.TrainingStore(tmp_path) as store:
        store.save(5, state_lib.TrainState(np.int32(5), tree, average, moments))
    with checkpoint.TrainingStore(tmp_path) as store:
        state = store.restore(state_lib.create(jax.tree.map(np.zeros_like, tree), optimizer))
    assert isinstance(state.params, FlatParams) and state.step == 5
    assert_equal(state.weights(), {'params': tree, 'ema_params': average})
    assert_equal(state.opt_state[0].mu.tree(), moments[0].mu)
    assert_equal(state.opt_state[0].nu.tree(), moments[0].nu)


def test_arrays_that_are_not_alike_are_refused(tree):
    with pytest.raises(ValueError, match="dtypes .'float32', 'int32'.; they must have one"):
        FlatParams.of(tree | {'steps': np.arange(3, dtype=np.int32)})
    with pytest.raises(ValueError, match='dtypes none; they must have one'):
        FlatParams.of({})
