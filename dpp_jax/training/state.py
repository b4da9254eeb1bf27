"""The state of a training: one pytree, the averaged weights inside."""

import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


@jax.tree_util.register_pytree_node_class
class FlatParams:
    """Parameters, or anything shaped as they are, as one vector.

    A network has some 200 arrays. Clipping, noise, Adam and the average treat all their numbers alike: on one
    vector they are a few long operations instead of a thousand short ones, each of them compiled and started.
    A pytree with one leaf; checkpoints hold the arrays by their names (`tree`).

    Not `jax.flatten_util.ravel_pytree`: outside of jit it compiles a program for every shape, and its inverse
    takes no axes in front.

    Attributes:
        vector: (..., P), all numbers in the order of `jax.tree.leaves`, of the arrays' dtype (a network's is
            float32). `jax.vmap`, pmap and gradients make a FlatParams of it, with their axes in front.
    """

    def __init__(self, vector: jax.Array, layout: tuple):
        self.vector, self._layout = vector, layout  # layout: tree structure, shapes of its leaves

    @classmethod
    def of(cls, tree: PyTree) -> 'FlatParams':
        """Return the tree's arrays (of one dtype), one after the other.

        Raises:
            ValueError: there are no arrays, or they are of several dtypes.
        """
        leaves, structure = jax.tree.flatten(tree)
        dtypes = sorted({str(leaf.dtype) for leaf in leaves})
        if len(dtypes) != 1:
            raise ValueError(f'parameters have dtypes {dtypes or "none"}; they must have one')
        library, leaves = _on_host_unless_traced(leaves)
        vector = library.concatenate([leaf.reshape(-1) for leaf in leaves])
        return cls(vector, (structure, tuple(leaf.shape for leaf in leaves)))

    def tree(self) -> PyTree:
        """Return the arrays as the network takes them; axes in front of the vector's stay in front.

        Outside of traced functions they are NumPy arrays, views of the vector.
        """
        structure, shapes = self._layout
        library, (vector,) = _on_host_unless_traced([self.vector])
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        # The gradient of a split is one concatenation; that of slices is a padded vector for each, and a sum.
        parts = library.split(vector, ends[:-1], axis=-1)
        leading = vector.shape[:-1]
        return structure.unflatten([part.reshape(leading + shape) for part, shape in zip(parts, shapes)])

    def tree_flatten(self):
        return (self.vector,), self._layout

    @classmethod
    def tree_unflatten(cls, layout, leaves):
        return cls(*leaves, layout)


def _on_host_unless_traced(arrays: list) -> tuple:
    """Return jnp or NumPy, and the arrays for it: outside of jit, JAX would compile a program for each."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return jnp, arrays
    return np, [np.asarray(array) for array in arrays]


flax.serialization.register_serialization_state(
    FlatParams,
    lambda params: flax.serialization.to_state_dict(params.tree()),
    lambda template, saved: FlatParams.of(flax.serialization.from_state_dict(template.tree(), saved)),
)


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and returns.

    Attributes:
        step: () int32, how many steps were taken.
        params: weights of the network, (P,) float32.
        ema_params: the same of their exponential moving average, from which images are sampled.
        opt_state: of the optimizer, which sees `params` as they are here.
    """

    step: jax.Array
    params: FlatParams
    ema_params: FlatParams
    opt_state: PyTree

    def weights(self) -> dict[str, PyTree]:
        """Return what the training is for: `params` and `ema_params` as the network takes them."""
        return {'params': self.params.tree(), 'ema_params': self.ema_params.tree()}


def create(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Return step 0 from the network's parameters, with the average equal to them and a fresh optimizer.

    On the host; weights and average share their memory until `devices.replicate` copies them.
    """
    flat = FlatParams.of(params)
    return TrainState(
        step=np.zeros((), np.int32),
        params=flat,
        ema_params=flat,
        opt_state=jax.device_get(optimizer.init(flat)),
    )


def apply_gradient(
    state: TrainState,
    gradient: FlatParams,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Return the state after one update of weights and average.

    The average's decay warms up as min(ema_decay, (1 + n) / (10 + n)) at update n = 1, 2, ..., as in the
    PyTorch implementation, so that the first weights are soon forgotten.
    """
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = averaged(state.ema_params, params, state.step + 1, ema_decay)
    return TrainState(state.step + 1, params, ema_params, opt_state)


def averaged(average: PyTree, new: PyTree, n: jax.Array, ema_decay: float) -> PyTree:
    """Return the average after update number n ≥ 1, () int32, whose result is `new`; see `apply_gradient`."""
    n = n.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + n) / (10 + n))
    # `optax.incremental_update` rounds otherwise: a quarter of the weights would have another last bit.
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), average, new)
