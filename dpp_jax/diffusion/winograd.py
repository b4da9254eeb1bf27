"""3x3 convolution made of matrix products on a CPU; its kernel gradient is one on every backend.

How it goes on a CPU, by Winograd's F(m×m, 3×3) (Lavin & Gray 2016, arXiv 1509.09308):
1. Along an axis, m neighboring outputs y come from the m + 2 inputs d under them as y = A ((G K) ∘ (B d)).
2. Along both axes these are (m + 2)² products over the channels, each with 1 / m² of the pixels: for m = 4 a
   quarter of the multiplications of nine products, and copies of the input 36 / 16 times its size, not nine.
3. Forward: `_inputs` (B), batched products with `_matrices` (G), `_outputs` (A).
4. Backward: Aᵀ of the output's gradient, once. It times Gᵀ K, then Bᵀ, is the input's gradient.
   B d times it, then Gᵀ, is the kernel's.
5. Under vmap (DP-SGD), examples become groups: they share the products, and each has its kernel gradient.

With few channels it is "im2col" instead: nine shifted views of the input times the kernel. Other backends use
their own convolution, but not for the kernel's gradient: under vmap that would be a slow grouped convolution.

In the shapes below (i, j) number the terms along rows and columns, and a group is the images whose kernel
gradient is summed: under DP-SGD one example's noised images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.experimental import xla_metadata
import jax.numpy as jnp
import numpy as np

_ROWS, _COLUMNS = -3, -2  # axes of (..., H, W, C)


class _Winograd(NamedTuple):
    """F(m, 3) along one axis: the matrices of the module's text."""

    outputs: np.ndarray  # A, (m, m + 2)
    kernel: np.ndarray  # G, (m + 2, 3)
    inputs: np.ndarray  # B, (m + 2, m + 2)

    @property
    def size(self) -> int:  # m
        return len(self.outputs)


class _Forms(NamedTuple):
    """The transform along each axis."""

    rows: _Winograd
    columns: _Winograd


_TWO = _Winograd(
    outputs=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    kernel=np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
    inputs=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
)
_FOUR = _Winograd(
    outputs=np.array([[1, 1, 1, 1, 1, 0],
                      [0, 1, -1, 2, -2, 0],
                      [0, 1, 1, 4, 4, 0],
                      [0, 1, -1, 8, -8, 1]]),
    kernel=np.array([[6, 0, 0],
                     [-4, -4, -4],
                     [-4, 4, -4],
                     [1, 2, 4],
                     [1, -2, 4],
                     [0, 0, 24]]) / 24,
    inputs=np.array([[4, 0, -5, 0, 1, 0],
                     [0, -4, -4, 1, 1, 0],
                     [0, 4, -4, -1, 1, 0],
                     [0, -2, -1, 2, 1, 0],
                     [0, 2, -1, -2, 1, 0],
                     [0, 4, 0, -5, 0, 1]]),
)  # fmt: skip


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the 'same' convolution with stride 1: (n, H, W, C), (3, 3, C, D) → (n, H, W, D).

    It can be differentiated once, in reverse mode, and mapped (vmap).

    Args:
        x: of any float dtype; products and result have it, too.
        kernel: of the same dtype or a wider one; its gradient has its dtype.
    """
    if not _prefers_products():
        return _library(x, kernel.astype(x.dtype))
    return _im2col(x, kernel) if _is_small(kernel) else _winograd(kernel, x[None])[0]


def _backward(kept, g):
    x, kernel = kept
    if not _prefers_products():
        return _library_backward(x, kernel, g)
    if _is_small(kernel):
        return _im2col_backward(x, kernel, g)
    x_gradient, kernel_gradient = _winograd_backward(kernel, x[None], g[None])
    return x_gradient[0], kernel_gradient[0]


conv3x3.defvjp(lambda x, kernel: (conv3x3(x, kernel), (x, kernel)), _backward)


def _prefers_products() -> bool:
    """Whether the backend is slow at convolutions."""
    return jax.default_backend() == 'cpu'


def _is_small(kernel) -> bool:
    """Whether there is so little to multiply that one product is as fast as many, and sooner compiled."""
    channels, features = kernel.shape[2:]
    return channels <= 16 and channels * features <= 128


def _library(x, kernel):
    """Return the backend's own convolution."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _library_backward(x, kernel, g):
    """Return gradients of x and of the kernel; the latter as one product, which waits for memory alone."""
    x_gradient = _library(g, jnp.swapaxes(kernel.astype(x.dtype)[::-1, ::-1], 2, 3))
    # Columns of the input with rows of the output's gradient: one product is all nine.
    columns = jnp.concatenate([_shift(x, -1, _COLUMNS), x, _shift(x, 1, _COLUMNS)], axis=-1)
    rows = jnp.concatenate([_shift(g, 1, _ROWS), g, _shift(g, -1, _ROWS)], axis=-1)
    nine = _over_pixels(columns, rows, kernel.dtype)
    channels, features = kernel.shape[2:]
    return x_gradient, nine.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)


def _im2col(x, kernel):
    return _views(x) @ kernel.astype(x.dtype).reshape(-1, kernel.shape[-1])


def _im2col_backward(x, kernel, g):
    of_input = _im2col(g, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
    return of_input, _over_pixels(_views(x), g, kernel.dtype).reshape(kernel.shape)


def _views(x):
    """Return every pixel's 3x3 neighbors, zeros from outside: (n, H, W, C) → (n, H, W, 9 C)."""
    in_rows = [_shift(x, by, _ROWS) for by in (-1, 0, 1)]
    return jnp.concatenate([_shift(row, by, _COLUMNS) for row in in_rows for by in (-1, 0, 1)], axis=-1)


def _over_pixels(x, g, dtype):
    """Return Σ over images and pixels of x gᵀ: (n, H, W, C), (n, H, W, D) → (C, D)."""
    return jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        g.reshape(-1, g.shape[-1]),
        (((0,), (0,)), ((), ())),
        preferred_element_type=dtype,
    )


def _separate(function: Callable) -> Callable:
    """Return `function` (of arrays) such that XLA neither fuses it with its surroundings nor repeats it.

    XLA:CPU computes what precedes a transform (normalization and SiLU, say) again in each part of it.
    Optimization barriers are gone before it fuses; calls stay.
    """
    compiled = jax.jit(function)

    def call(*arrays):
        with xla_metadata.set_xla_metadata(inlineable='false'):
            return compiled(*arrays)

    return call


@_separate
def _kept(arrays):
    """Return the arrays, computed once however many read them."""
    return arrays


def _of_groups(function: Callable) -> Callable:
    """Return `function(kernel, *images)`, images (groups, n, H, W, channels), whose vmap adds groups.

    JAX's own rule would put the new axis before the terms. A batched product needs the terms first, so XLA
    would copy every operand.
    """
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def of_batch(size, is_batched, kernel, *images):
        if is_batched[0]:  # each has its own kernel: no product to share
            axes = [0 if batched else None for batched in is_batched]
            results = jax.vmap(function, axes)(kernel, *images)
        else:
            together = [
                (x if batched else jnp.broadcast_to(x, (size,) + x.shape)).reshape((-1,) + x.shape[-4:])
                for x, batched in zip(images, is_batched[1:])
            ]
            split = lambda result: result.reshape((size, -1) + result.shape[1:])
            results = jax.tree.map(split, call(kernel, *together))
        return results, jax.tree.map(lambda _: True, results)

    return call


@_of_groups
@_separate
def _winograd(kernel, x):
    """Return the convolution: (3, 3, C, D), (groups, n, H, W, C) → (groups, n, H, W, D).

    For each i there is one product, batched over j: its operands for a few images fit in a core's cache.
    Those of one batch of all (i, j) do not, and a product for each is four times as much to compile.
    """
    form = _forms(x)
    pairs = zip(_inputs(form, x), _matrices(form, kernel, x.dtype))
    return _outputs(form, [part @ matrices for part, matrices in pairs], x)


@_of_groups
@_separate
def _winograd_backward(kernel, x, g):
    """Return the gradients of x and, for each group, of the kernel.

    (3, 3, C, D), (groups, n, H, W, C), (groups, n, H, W, D) → (groups, n, H, W, C), (groups, 3, 3, C, D).
    """
    form = _forms(x)
    gradients = _outputs_transposed(form, g)
    pairs = zip(gradients, _matrices(form, kernel, x.dtype))
    of_inputs = [part @ jnp.swapaxes(matrices, 1, 2) for part, matrices in pairs]
    grouped = lambda part: part.reshape(len(part), len(x), -1, part.shape[-1])  # (j, groups, pixels, ...)
    of_matrices = [
        jnp.einsum('jgpc,jgpd->jgcd', grouped(part), grouped(gradient), preferred_element_type=kernel.dtype)
        for part, gradient in zip(_inputs(form, x), gradients)
    ]
    return _inputs_transposed(form, of_inputs, x), _matrices_transposed(form, of_matrices)


def _forms(x) -> _Forms:
    """Return F(4, 3), or F(2, 3) where 4 needs more padding (14 pixels) or more digits than x has.

    With m = 4, float32 rounds a pass by 2e-6 to 3e-6 of its norm (a plain sum: 2e-7).
    """
    fits = lambda size: -size % _FOUR.size == -size % _TWO.size and x.dtype.itemsize >= 4
    return _Forms(*(_FOUR if fits(x.shape[axis]) else _TWO for axis in (_ROWS, _COLUMNS)))


def _inputs(form: _Forms, x):
    """Return B d along both axes: (..., H, W, C) → list over i of (j, pixels, C)."""
    halfway = _kept(jnp.stack(_inputs_along(_COLUMNS, form.columns, x)))
    return [_flat(part) for part in _inputs_along(_ROWS, form.rows, halfway)]


def _inputs_transposed(form: _Forms, gradients, x):
    """Return Bᵀ along both axes: list over i of (j, pixels, C) → (..., H, W, C) with x's other axes."""
    halfway = _kept(_inputs_along_transposed(_ROWS, form.rows, _unflat(form, gradients, x)))
    return _crop(_inputs_along_transposed(_COLUMNS, form.columns, list(halfway)), x)


def _outputs(form: _Forms, products, x):
    """Return A along both axes: list over i of (j, pixels, D) → (..., H, W, D) with x's other axes."""
    along = lambda axis, one, parts: _join(_combine(one.outputs, parts), axis)
    halfway = _kept(along(_ROWS, form.rows, _unflat(form, products, x)))
    return _crop(along(_COLUMNS, form.columns, list(halfway)), x)


def _outputs_transposed(form: _Forms, g):
    """Return Aᵀ along both axes: (..., H, W, D) → list over i of (j, pixels, D)."""
    along = lambda axis, one, x: _combine(one.outputs.T, _split(x, one.size, axis))
    halfway = _kept(jnp.stack(along(_COLUMNS, form.columns, g)))
    return [_flat(part) for part in along(_ROWS, form.rows, halfway)]


def _flat(part):
    """Put all pixels on one axis: (j, ..., C) → (j, pixels, C)."""
    return part.reshape(len(part), -1, part.shape[-1])


def _unflat(form: _Forms, parts, x):
    """Undo `_flat` for parts with x's other axes: (j, pixels, C) → (j, groups, n, H / m, W / m', C)."""
    tiles = (-(-x.shape[_ROWS] // form.rows.size), -(-x.shape[_COLUMNS] // form.columns.size))
    return [part.reshape(part.shape[:1] + x.shape[:_ROWS] + tiles + part.shape[-1:]) for part in parts]


def _matrices(form: _Forms, kernel, dtype):
    """Return G K along both axes: (3, 3, C, D) → (i, j, C, D)."""
    both_axes = np.kron(form.rows.kernel, form.columns.kernel)  # (i j, 9)
    matrices = both_axes.astype(kernel.dtype) @ kernel.reshape(9, -1)
    return matrices.reshape((len(form.rows.kernel), -1) + kernel.shape[2:]).astype(dtype)


def _matrices_transposed(form: _Forms, gradients):
    """Return Gᵀ along both axes: list over i of (j, groups, C, D) → (groups, 3, 3, C, D)."""
    halfway = jnp.stack(_combine(form.rows.kernel.T, gradients), axis=2)
    return jnp.stack(_combine(form.columns.kernel.T, list(halfway)), axis=2)


def _inputs_along(axis: int, form: _Winograd, x) -> list[jax.Array]:
    """Return B d for every m pixels of an axis: an array → m + 2 of them, with 1 / m of the axis."""
    inside = _split(x, form.size, axis)
    before, after = _shift(inside[-1], -1, axis), _shift(inside[0], 1, axis)
    return _combine(form.inputs, [before, *inside, after])


def _inputs_along_transposed(axis: int, form: _Winograd, parts):
    """Return Bᵀ times them: m + 2 arrays → one, with m times the axis."""
    before, *inside, after = _combine(form.inputs.T, parts)
    inside[-1] += _shift(before, 1, axis)
    inside[0] += _shift(after, -1, axis)
    return _join(inside, axis)


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Return matrix (i, j) times j arrays: i arrays."""
    times = lambda factor, part: part if factor == 1 else float(factor) * part

    def row(factors):
        terms = [times(factor, part) for factor, part in zip(factors, parts, strict=True) if factor]
        return sum(terms[1:], start=terms[0])

    return [row(factors) for factors in matrix]


def _split(x, size: int, axis: int):
    """Return pixels 0, size, 2 size, ... of an axis, then 1, size + 1, ...; zeros beyond the last."""
    axis %= x.ndim
    x = _pad(x, 0, -x.shape[axis] % size, axis)
    groups = x.reshape(x.shape[:axis] + (-1, size) + x.shape[axis + 1 :])
    return [jax.lax.index_in_dim(groups, j, axis + 1, keepdims=False) for j in range(size)]


def _join(parts, axis: int):
    """Return the inverse of `_split`, padding included."""
    shape = parts[0].shape
    axis %= len(shape)
    together = jnp.stack(parts, axis=axis + 1)
    return together.reshape(shape[:axis] + (-1,) + shape[axis + 1 :])


def _crop(y, x):
    """Return y without the padding that x did not have."""
    return y[..., : x.shape[_ROWS], : x.shape[_COLUMNS], :]


def _shift(x, by: int, axis: int):
    """Return y[p] = x[p + by] along an axis, zeros from outside."""
    size = x.shape[axis]
    inside = jax.lax.slice_in_dim(x, max(by, 0), size + min(by, 0), axis=axis)
    return _pad(inside, max(-by, 0), max(by, 0), axis)


def _pad(x, before: int, after: int, axis: int):
    """Put zeros around an axis. Not `jnp.pad`, a jitted function: `_separate` would separate it, too."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, after, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
