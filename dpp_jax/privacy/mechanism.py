"""The Gaussian mechanism on sums, and the sum that DP-SGD releases.

Formal guarantee. Two sets of private examples are neighbours if one has one example more (add or
remove one). A sum of vectors of norm at most Δ changes by at most Δ between neighbours. Adding normal
noise of standard deviation σ·Δ to every coordinate, once, is the Gaussian mechanism with noise
multiplier σ. Whatever is done with the noisy sum afterwards (division by a public constant, Adam,
averaging of weights) is post-processing.

Two assumptions stand behind this. Arithmetic is float32: normal draws have its granularity and end
(see `normal`), and sums are rounded, which adds to their change between
neighbours (docs/privacy.md, "Floating point"). And an example's own random draws (noise levels of its loss) do
not depend on who else is in the batch: they must come from secret keys and the example's own number.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from dpp_jax.privacy import ledger

PyTree = Any
# The norm is a float32 sum over up to millions of squares, with a relative error far below this;
# shrinking the bound by as much keeps the true norm of a clipped gradient below C.
_ROUNDING = 1e-5
_DRAWS = 4  # whose sum is a noise value


@dataclasses.dataclass(frozen=True)
class GaussianMechanism:
    """A Poisson-sampled Gaussian mechanism: the noise and the ledger entry come from one object.

    Attributes:
        name: as the ledger records it.
        noise_multiplier: σ = noise std / sensitivity, > 0.
        sampling_probability: q of the Poisson sample that the sum is taken over.
        sensitivity: Δ, the bound on the L2 norm of one example's contribution.
        randomness: public identifier of the secret keys in use (see `ledger.Entry`).
    """

    name: str
    noise_multiplier: float
    sampling_probability: float
    sensitivity: float
    randomness: str

    def __post_init__(self):
        self.entry(0)  # checks every field

    def recorded(self, release: Callable) -> Callable:
        """A release with its ledger entry.

        Args:
            release: adds this mechanism's noise once, to one sum over a fresh Poisson sample.

        Returns:
            (index, *arguments) → (release(*arguments), entry number `index`). The entry must be in
            the ledger before the value is used.
        """
        return lambda index, *arguments: (release(*arguments), self.entry(index))

    def entry(self, index: int) -> ledger.Entry:
        """What the ledger must hold before release number `index` is used."""
        return ledger.Entry(
            mechanism=self.name,
            index=index,
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            sensitivity=self.sensitivity,
            randomness=self.randomness,
        )

    def privatise(self, total: PyTree, key: jax.Array) -> PyTree:
        """`total` (float arrays) plus independent normal noise of std σ·Δ in every coordinate."""
        flat, unflatten = jax.flatten_util.ravel_pytree(total)
        # One long draw: a draw per leaf takes several times as long to compile.
        noise = normal(key, flat.shape)
        return unflatten(flat + self.noise_multiplier * self.sensitivity * noise)


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit normal noise, float32: half the sum of four draws of `jax.random.normal`.

    One draw has 2^23 values, of which 17 lie above 4.6, and none above 5.22 or below -5.42. In the course of a
    training a value beyond the ends, which only a neighbour's contribution explains, would be more
    likely than the δ of the paper's settings. Half the sum of four ends beyond 10 standard deviations,
    and its values lie as close as float32 has them (Holohan & Braghin 2021, "Secure random sampling in
    differential privacy").
    """
    return jax.random.normal(key, (_DRAWS, *shape)).sum(0) / math.sqrt(_DRAWS)


def clip_weights(gradients: PyTree, mask: jax.Array, clip_norm: float) -> tuple[jax.Array, jax.Array]:
    """Factors that bound every example's gradient, and the norms before.

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
    """Σ_i min(1, C / |g_i|) g_i over the unmasked examples with a finite gradient.

    Sensitivity C under add or remove one, whatever the gradients are.

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
    """Sum of clipped per-example gradients, `microbatch` examples in memory at a time.

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
        the sum, shaped as params; and sums over the examples that are NOT private and must stay
        in private/: loss, norm, clipped (how many), non_finite (how many), examples (how many).
    """
    size = mask.shape[0]
    if size % microbatch:
        raise ValueError(f'{size} examples are not divisible by microbatch {microbatch}')
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
