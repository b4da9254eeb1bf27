"""Clipping of per-example gradients and the sum that DP-SGD releases (Abadi et al. 2016).

Formal guarantee. Σ_i min(1, C / |g_i|) g_i changes by at most C in L2 norm if one example's contribution
counts as nothing (zero-out, N fixed) or one example is added or removed, and by at most 2 C if one is
replaced, whatever the gradients are:

| the example's gradient g | what it adds to the sum |
|---|---|
| |g| <= C | g |
| |g| > C | g scaled to norm C |
| norm or loss is not finite | 0 |
| row of padding | 0, whatever the row holds |

One example's gradient must not depend on the others: the loss sees one example alone.

The sum is exact. A float32 sum is not: its rounding depends on all that was added before, so that one
example may move it by more than C (crafted gradients: 1.25 C for 4,096 examples, 5 C for 16,384). Clipped
gradients are therefore cut to whole multiples of a unit (`Grid`), towards zero, so that no norm grows, and
added as integers: in any order, over microbatches and devices, with the same result. What is left of
rounding is paid for: C is shrunk by a bound on it. Unit and bound follow from a public number of rows, never
from who is in a batch; the sum of a batch with more rows is cut to the range of an int32 (`join_halves`),
and its rounding is paid for up to that number.

Several devices may share an example (`Team`). Each has a part of its noise draws and thus a part of its
gradient: the parts are averaged first, and the norm is that of the whole. Only then is it clipped. Each
device clips and adds up a slice of its own, so that a team adds the example once.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Halves = tuple[jax.Array, jax.Array]  # (high, low), int32: high · 2^16 + low, low in [0, 2^16)
# Relative error of a float32 norm, a sum over up to millions of squares, and of scaling by it: far less.
_NORM_ERROR = 1e-5
_FLOAT_ERROR = 2.0**-24  # relative, of rounding to float32
_LARGEST = 2**31 - 1  # of int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The unit in which clipped gradients are added up as int32, and the bound that pays for rounding.

    Attributes:
        clip_norm: C > 0.
        rows: how many rows an int32 has room for, over all devices, ≥ 1: a public constant.
    """

    clip_norm: float
    rows: int

    @property
    def steps(self) -> float:
        """Units in C: the largest power of two with which no sum of `rows` values overflows."""
        return 2.0 ** math.floor(math.log2(_LARGEST / self.rows))

    @property
    def bound(self) -> float:
        """The norm that gradients are clipped to: C, less what rounding may add.

        `decode` rounds twice. Each time it moves the sum by at most 2^-24 of its norm, which is at most
        `rows` · C for that many rows; and a neighbor's sum as much the other way.
        """
        return self.clip_norm * (1 - _NORM_ERROR - 4 * self.rows * _FLOAT_ERROR)

    def encode(self, values: jax.Array) -> jax.Array:
        """Cut float32 values in [-C, C] to whole units, towards zero: int32."""
        return (values * (self.steps / self.clip_norm)).astype(jnp.int32)

    def decode(self, units: jax.Array) -> jax.Array:
        """Return a sum of units as float32."""
        return units.astype(jnp.float32) * (self.clip_norm / self.steps)


def add_to_halves(total: Halves, part: jax.Array) -> Halves:
    """Add an int32 array exactly, as long as `total` is below 2^47: 2^15 times what an int32 holds."""
    low = total[1] + (part & 0xFFFF)
    return total[0] + (part >> 16) + (low >> 16), low & 0xFFFF


def join_halves(total: Halves, axis: str | None = None) -> jax.Array:
    """Return the sum of halves as int32, of all devices of a named axis (below 2^15), cut to its range.

    Where nothing is cut, the sum is exact. Cutting brings no two sums further apart, in any coordinate: the
    sensitivity stays.
    """
    high, low = total if axis is None else jax.lax.psum(total, axis)
    high, low = high + (low >> 16), low & 0xFFFF
    ends = jnp.where(high < 0, jnp.int32(-(2**31)), jnp.int32(2**31 - 1))
    return jnp.where((high >= -(2**15)) & (high < 2**15), (high << 16) | low, ends)


def saturated_sum(parts: Iterable[jax.Array], axis: str | None = None) -> jax.Array:
    """Add int32 arrays, of all devices of a named axis, as if without bounds; cut to the range of int32."""
    first, *others = parts
    total = add_to_halves((jnp.zeros_like(first), jnp.zeros_like(first)), first)
    return join_halves(functools.reduce(add_to_halves, others, total), axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Team:
    """Devices that share each example: neighbors on a named axis, `size` of them in each team.

    Device r of a team (0 <= r < size) holds slice r of every gradient: coordinates [r p, (r + 1) p) of each
    leaf, p = P / size rounded up, with zeros behind the last one.

    Attributes:
        axis: name of the devices' axis, the same as of pmap.
        size: g, divides the number of devices.
    """

    axis: str
    size: int

    @property
    def place(self) -> jax.Array:
        """The place r of this device in its team, () int32."""
        return jax.lax.axis_index(self.axis) % self.size

    def sum(self, values: jax.Array) -> jax.Array:
        """Add up what the devices of this device's team hold: the same on all of them."""
        return jax.lax.psum(values, self.axis, axis_index_groups=self._teams)

    def own_slices(self, parts: PyTree) -> PyTree:
        """Average leaves (n, ...) over the team → this device's slice of each, (n, p)."""

        def of_leaf(leaf):
            flat = leaf.reshape(len(leaf), -1)
            flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % self.size)))
            scattered = jax.lax.psum_scatter(
                flat, self.axis, scatter_dimension=1, axis_index_groups=self._teams, tiled=True
            )
            return scattered / self.size

        return jax.tree.map(of_leaf, parts)

    def slice_shape(self, shape: tuple[int, ...]) -> tuple[int]:
        """Return (p,) of a leaf of this shape."""
        return (math.ceil(math.prod(shape) / self.size),)

    def in_place(self, own: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Put a device's slice (p,) into zeros of the leaf's shape: over a team they add up to the leaf."""
        whole = jnp.zeros(len(own) * self.size, own.dtype)
        whole = jax.lax.dynamic_update_slice(whole, own, (self.place * len(own),))
        return whole[: math.prod(shape)].reshape(shape)

    @property
    def _teams(self) -> list[list[int]]:
        devices = jax.lax.psum(1, self.axis)
        if devices % self.size:
            raise ValueError(f'a team has {self.size} devices; it must divide their number, {devices}')
        return [list(range(first, first + self.size)) for first in range(0, devices, self.size)]


def clip_weights(
    gradients: PyTree, mask: jax.Array, bound: float, team: Team | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute the factors that bound every example's gradient, and the norms before.

    Args:
        gradients: leaves (n, ...), one gradient per example.
        mask: (n,) bool, False for padding.
        bound: > 0.
        team: of devices, each with a slice of every gradient; None: whole gradients.

    Returns:
        weights (n,) float32: min(1, bound / norm), and 0 for padding and for non-finite norms;
        norms (n,) float32 as they are.
    """
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(gradients)
    ]
    total = sum(squares)
    norms = jnp.sqrt(total if team is None else team.sum(total))
    counts = mask & jnp.isfinite(norms)
    return jnp.where(counts, bound / jnp.maximum(norms, bound), 0.0), norms


def clipped_sum(
    gradients: PyTree, mask: jax.Array, grid: Grid, team: Team | None = None
) -> tuple[PyTree, jax.Array]:
    """Sum the clipped gradients of the unmasked examples; see the table in the module's text.

    Args:
        gradients, mask, team: as of `clip_weights`.
        grid: C, and the unit of the sum.

    Returns:
        the sum (leaves without the example axis, int32, in units of the grid), and the norms (n,) before
        clipping.
    """
    weights, norms = clip_weights(gradients, mask, grid.bound, team)

    def weighted_sum(leaf):
        # 0 · NaN is NaN: rows that do not count are replaced, not multiplied.
        each = weights.reshape((-1,) + (1,) * (leaf.ndim - 1))
        rows = jnp.where(each > 0, leaf, 0).astype(jnp.float32)
        return jnp.sum(grid.encode(each * rows), axis=0)

    return jax.tree.map(weighted_sum, gradients), norms


def clipped_gradient_sum(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    examples: PyTree,
    mask: jax.Array,
    *,
    grid: Grid,
    microbatch: int,
    microbatches: jax.Array | int,
    team: Team | None = None,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Sum the clipped per-example gradients, with `microbatch` gradients in memory at a time.

    With a team, the example's loss is the mean of what `loss` is on its devices, and the results are to be
    added up over all devices: each of them returns its part.

    Args:
        loss: (params, one example) -> scalar. Each example's gradient is bounded separately, so
            the loss must not let examples see each other.
        params: of the model.
        examples: leaves (n, ...), n divisible by `microbatch`.
        mask: (n,) bool, False for padding.
        grid: C, the sensitivity of the result, and the unit of the sum.
        microbatch: examples whose gradients exist at once.
        microbatches: how many of the n / microbatch microbatches are visited (traced, so that a
            small batch takes less time without a new compilation). The rest must be padding.
        team: of devices with the same examples, mask and `microbatches`, each with a loss of its own; None:
            every device has its own examples.

    An example whose loss or gradient is not finite, on any device of a team, counts as zero.

    Returns:
        the sum, shaped as params, int32 in units of the grid; and sums over the examples WITHOUT a
        guarantee, which must stay in private/: loss, norm, clipped (how many), non_finite (how many),
        examples (how many).

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
        if team is not None:
            losses, gradients = team.sum(losses) / team.size, team.own_slices(gradients)
        part, norms = clipped_sum(gradients, chunk_mask & jnp.isfinite(losses), grid, team)
        finite = chunk_mask & jnp.isfinite(norms) & jnp.isfinite(losses)
        news = {
            'loss': jnp.sum(jnp.where(finite, losses, 0)),
            'norm': jnp.sum(jnp.where(finite, norms, 0)),
            'clipped': jnp.sum(finite & (norms > grid.clip_norm)).astype(jnp.float32),
            'non_finite': jnp.sum(chunk_mask & ~finite).astype(jnp.float32),
            'examples': jnp.sum(chunk_mask).astype(jnp.float32),
        }
        return jax.tree.map(jnp.add, (total, sums), (part, news))

    shape_of = (lambda leaf: leaf.shape) if team is None else (lambda leaf: team.slice_shape(leaf.shape))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(shape_of(leaf), jnp.int32), params)
    names = ('loss', 'norm', 'clipped', 'non_finite', 'examples')
    start = (zeros, {name: jnp.zeros((), jnp.float32) for name in names})
    total, sums = jax.lax.fori_loop(0, microbatches, visit, start)
    if team is None:
        return total, sums
    whole = jax.tree.map(lambda own, leaf: team.in_place(own, leaf.shape), total, params)
    return whole, jax.tree.map(lambda value: jnp.where(team.place == 0, value, 0), sums)
