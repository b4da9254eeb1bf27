"""Gradient accumulation: means over many rows, a few rows at a time.

A gradient through a loop keeps what every turn computed. Here each part's gradient is finished before the
next part starts, and only their sum is kept. On a CPU this also keeps activations in its cache.

`optax.microbatching` sums in the same way. Differentiated, it keeps every turn's activations (925 instead of
90 MiB with 32 draws of a 28x28 image), so that the custom derivative below would stay.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def count(rows: int, at_once: int) -> int:
    """Return the smallest number of equal parts of `rows` rows with at most `at_once` (>= 1) in each."""
    return next(n for n in range(max(1, math.ceil(rows / at_once)), rows + 1) if rows % n == 0)


def mean(function: Callable[[PyTree, PyTree, PyTree], jax.Array], parts: int) -> Callable:
    """Return (params, shared, rows) → mean over equal parts of `rows` of function(params, shared, part).

    Args:
        function: (params, shared, part of rows) → scalar.
        parts: how many; the leading axes of `rows` must be divisible by it.

    Returns:
        a function that can be differentiated once, by `params` alone: the gradient by `shared` and
        `rows` is taken to be 0.
    """
    if parts == 1:
        return function

    def over_parts(evaluate, shared, rows):
        chunks = jax.tree.map(
            lambda leaf: leaf.reshape((parts, leaf.shape[0] // parts) + leaf.shape[1:]), rows
        )
        take = lambda i: jax.tree.map(lambda leaf: leaf[i], chunks)
        add = lambda i, total: jax.tree.map(jnp.add, total, evaluate(shared, take(i)))
        zeros = jax.tree.map(
            lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(evaluate, shared, take(0))
        )
        total = jax.lax.fori_loop(0, parts, add, zeros)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    @jax.custom_vjp
    def value(params, shared, rows):
        return over_parts(lambda *of_part: function(params, *of_part), shared, rows)

    def forward(params, shared, rows):
        evaluate = lambda *of_part: jax.value_and_grad(function)(params, *of_part)
        return over_parts(evaluate, shared, rows)

    def backward(gradient, cotangent):
        return jax.tree.map(lambda leaf: cotangent * leaf, gradient), None, None

    value.defvjp(forward, backward)
    return value
