"""The state of a training: one pytree, the averaged weights inside."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and returns.

    Attributes:
        step: () int32, how many steps were taken.
        params: weights of the network.
        ema_params: their exponential moving average, from which images are sampled.
        opt_state: of the optimizer.
    """

    step: jax.Array
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree


def create(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, with the average equal to the weights and a fresh optimizer."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.array, params),
        opt_state=optimizer.init(params),
    )


def apply_gradient(
    state: TrainState,
    gradient: PyTree,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """One update of weights and average.

    The average's decay warms up as min(ema_decay, (1 + n) / (10 + n)) at update n = 1, 2, ..., as
    in the PyTorch code, so that the first weights are soon forgotten.
    """
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    n = (state.step + 1).astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + n) / (10 + n))
    ema_params = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params)
    return TrainState(state.step + 1, params, ema_params, opt_state)
