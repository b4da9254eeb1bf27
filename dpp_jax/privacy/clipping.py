"""Clipping of per-example gradients and the sum that DP-SGD releases (Abadi et al. 2016).

Formal guarantee. Σ_i min(1, C / |g_i|) g_i changes by at most C in L2 norm if one example's contribution
counts as nothing (zero-out, N fixed) or one example is added or removed, and by at most 2 C if one is
replaced, whatever the gradients are:

| the example's gradient g_i | what it adds to the sum |
|---|---|
| |g_i| <= C | g_i |
| |g_i| > C | g_i scaled to norm C; the bound is shrunk by 1e-5 for the rounding of float32 norms |
| norm or loss is not finite | 0 |
| row of padding | 0, whatever the row holds |

One example's gradient must not depend on the others: the loss sees one example alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
# The norm is a float32 sum over up to millions of squares, with a relative error far below this;
# shrinking the bound by as much keeps the true norm of a clipped gradient below C.
_ROUNDING = 1e-5


def clip_weights(gradients: PyTree, mask: jax.Array, clip_norm: float) -> tuple[jax.Array, jax.Array]:
    """Compute the factors that bound every example's gradient, and the norms before.

    Args:
        gradients: leaves (n, ...), one gradient per example.
        mask: (n,) bool, False for padding.
        clip_norm: C > 0.

    Returns:
        weights (n,) float32: min(1, C / norm), and 0 for padding and for non-finite norms;
        norms (n,) float32 as they are.
    """
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(gradients)
    ]
    norms = jnp.sqrt(sum(squares))
    bound = clip_norm * (1 - _ROUNDING)
    counts = mask & jnp.isfinite(norms)
    return jnp.where(counts, bound / jnp.maximum(norms, bound), 0.0), norms


def clipped_sum(gradients: PyTree, mask: jax.Array, clip_norm: float) -> tuple[PyTree, jax.Array]:
    """Sum the clipped gradients of the unmasked examples; see the table in the module's text.

    Args: as of `clip_weights`.

    Returns:
        the sum (leaves without the example axis, float32) and the norms (n,) before clipping.
    """
    weights, norms = clip_weights(gradients, mask, clip_norm)

    def weighted_sum(leaf):
        # 0 · NaN is NaN: rows that do not count are replaced, not multiplied.
        counts = (weights > 0).reshape((-1,) + (1,) * (leaf.ndim - 1))
        rows = jnp.where(counts, leaf, 0).astype(jnp.float32)
        # In full float32: by default GPUs and TPUs round the factors, and the norm may exceed C.
        return jnp.tensordot(weights, rows, axes=1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(weighted_sum, gradients), norms


def clipped_gradient_sum(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    examples: PyTree,
    mask: jax.Array,
    *,
    clip_norm: float,
    microbatch: int,
    microbatches: jax.Array | int,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Sum the clipped per-example gradients, with `microbatch` gradients in memory at a time.

    Args:
        loss: (params, one example) -> scalar. Each example's gradient is bounded separately, so
            the loss must not let examples see each other.
        params: of the model.
        examples: leaves (n, ...), n divisible by `microbatch`.
        mask: (n,) bool, False for padding.
        clip_norm: C > 0, the sensitivity of the result.
        microbatch: examples whose gradients exist at once.
        microbatches: how many of the n / microbatch microbatches are visited (traced, so that a
            small batch takes less time without a new compilation). The rest must be padding.

    An example whose loss or gradient is not finite counts as zero.

    Returns:
        the sum, shaped as params; and sums over the examples WITHOUT a guarantee, which must stay in
        private/: loss, norm, clipped (how many), non_finite (how many), examples (how many).

    Raises:
        ValueError: n is not divisible by `microbatch`.
    """
    size = mask.shape[0]
    if size % microbatch:
        raise ValueError(f'microbatch is {microbatch}; it must divide the number of rows, {size}')
    chunks = jax.tree.map(
        lambda leaf: jnp.asarray(leaf).reshape((size // microbatch, microbatch) + leaf.shape[1:]),
        (examples, mask),
    )
    per_example = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))

    def visit(index, carry):
        total, sums = carry
        chunk, chunk_mask = jax.tree.map(lambda leaf: leaf[index], chunks)
        losses, gradients = per_example(params, chunk)
        part, norms = clipped_sum(gradients, chunk_mask & jnp.isfinite(losses), clip_norm)
        finite = chunk_mask & jnp.isfinite(norms) & jnp.isfinite(losses)
        news = {
            'loss': jnp.sum(jnp.where(finite, losses, 0)),
            'norm': jnp.sum(jnp.where(finite, norms, 0)),
            'clipped': jnp.sum(finite & (norms > clip_norm)).astype(jnp.float32),
            'non_finite': jnp.sum(chunk_mask & ~finite).astype(jnp.float32),
            'examples': jnp.sum(chunk_mask).astype(jnp.float32),
        }
        return jax.tree.map(jnp.add, (total, sums), (part, news))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    names = ('loss', 'norm', 'clipped', 'non_finite', 'examples')
    start = (zeros, {name: jnp.zeros((), jnp.float32) for name in names})
    return jax.lax.fori_loop(0, microbatches, visit, start)
