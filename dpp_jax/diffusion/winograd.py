"""3x3 convolution whose every pass is made of matrix products on a CPU, and whose kernel gradient always is.

DP-SGD needs the gradient of every example's kernel. Under vmap the kernel gradient of `lax.conv` becomes
a grouped convolution (13 GFLOP/s against 34 as a batched matrix product, on a 2-core CPU), and a CPU's
matrix products are nearly twice as fast as its convolutions. GPUs and TPUs are at their best with
`lax.conv` forward and for the input's gradient; there the kernel's gradient is one product, of the input's three
shifted columns with the three shifted rows of the output's gradient, because it waits for memory and
not for arithmetic. What follows is for a CPU.

The usual form, "im2col", multiplies the nine shifted views of the input with the kernel: nine copies of
the input, as costly on a CPU as the product itself. It is used where there are few channels. Otherwise this is
Winograd's F(m×m, 3×3) (Lavin & Gray 2016, arXiv 1509.09308): along each axis m neighbouring outputs take
m + 2 products instead of 3 m,

    y = A ((G K) ∘ (B d)),

with d the m + 2 inputs under them; along both axes there are (m + 2)² products over the channels, each with
1 / m² of the pixels. m is 4, or 2 where 4 needs more padding (14 pixels): a quarter, or 4 / 9, of the
multiplications, and 36 / 16, or 4, copies of the input instead of nine. They are made as m + 2 batched products,
one for each term along the rows: operands of a few images then fit in a core's cache. One batch of all
of them does not fit; a product for each makes four to five times as many operations to compile. Transposed, the
same steps are the backward pass, and both gradients share what was made of the output's gradient. The entries of
A, B and G are small numbers; in float32 the rounding of a pass is 2e-6 to 3e-6 of its norm for m = 4 (a plain
sum: 2e-7).

In the shapes below (i, j) number the terms along rows and columns, and a group is the images whose kernel
gradient is summed: under DP-SGD one example's noised copies.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax.experimental import xla_metadata
import jax.numpy as jnp
import numpy as np

_ROWS, _COLUMNS = -3, -2  # axes of (..., H, W, C)


@dataclasses.dataclass(frozen=True)
class _Winograd:
    """F(m, 3) along one axis: the matrices of the module's text, with n = m + 2.

    Attributes:
        outputs: A, (m, n).
        kernel: G, (n, 3).
        inputs: B, (n, n).
    """

    outputs: np.ndarray
    kernel: np.ndarray
    inputs: np.ndarray

    @property
    def size(self) -> int:
        """m."""
        return len(self.outputs)


_TWO = _Winograd(
    outputs=np.array([[1, 1, 1, 0],
                      [0, 1, -1, -1]]),
    kernel=np.array([[2, 0, 0],
                     [1, 1, 1],
                     [1, -1, 1],
                     [0, 0, 2]]) / 2,
    inputs=np.array([[1, 0, -1, 0],
                     [0, 1, 1, 0],
                     [0, -1, 1, 0],
                     [0, 1, 0, -1]]),
)  # fmt: skip
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
    """'Same' convolution with stride 1. It can be differentiated once, in reverse mode, and mapped (vmap).

    Args:
        x: (n, H, W, C), of any float dtype; it is that of the products.
        kernel: (3, 3, C, D), of the same dtype or a wider one; its gradient has its dtype.

    Returns:
        (n, H, W, D), of x's dtype.
    """
    if not _prefers_products():
        return _library(x, kernel.astype(x.dtype))
    return _im2col(x, kernel) if _is_small(kernel) else _winograd(kernel, x[None])[0]


def _forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _backward(kept, g):
    x, kernel = kept
    if _prefers_products():
        if _is_small(kernel):
            return _im2col_backward(x, kernel, g)
        x_gradient, kernel_gradient = _winograd_backward(kernel, x[None], g[None])
        return x_gradient[0], kernel_gradient[0]
    x_gradient = _library(g, jnp.swapaxes(kernel.astype(x.dtype)[::-1, ::-1], 2, 3))
    # Columns of the input with rows of the output's gradient: one product is all nine.
    columns = jnp.concatenate([_shift(x, -1, _COLUMNS), x, _shift(x, 1, _COLUMNS)], axis=-1)
    rows = jnp.concatenate([_shift(g, 1, _ROWS), g, _shift(g, -1, _ROWS)], axis=-1)
    nine = _over_pixels(columns, rows, kernel.dtype)
    channels, features = kernel.shape[2:]
    return x_gradient, nine.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)


conv3x3.defvjp(_forward, _backward)


def _prefers_products() -> bool:
    """Whether the backend is slow at convolutions."""
    return jax.default_backend() == 'cpu'


def _is_small(kernel) -> bool:
    """Whether there is so little to multiply that one product is as fast as many, and sooner compiled."""
    channels, features = kernel.shape[2:]
    return channels <= 16 and channels * features <= 128


def _im2col(x, kernel):
    return _views(x) @ kernel.astype(x.dtype).reshape(-1, kernel.shape[-1])


def _im2col_backward(x, kernel, g):
    of_input = _im2col(g, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
    return of_input, _over_pixels(_views(x), g, kernel.dtype).reshape(kernel.shape)


def _views(x):
    """(n, H, W, C) → (n, H, W, 9 C): every pixel's 3x3 neighbours, zeros from outside."""
    in_rows = [_shift(x, by, _ROWS) for by in (-1, 0, 1)]
    return jnp.concatenate([_shift(row, by, _COLUMNS) for row in in_rows for by in (-1, 0, 1)], axis=-1)


def _over_pixels(x, g, dtype):
    """Σ over images and pixels of x gᵀ: (n, H, W, C), (n, H, W, D) → (C, D)."""
    return jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        g.reshape(-1, g.shape[-1]),
        (((0,), (0,)), ((), ())),
        preferred_element_type=dtype,
    )


def _library(x, kernel):
    """The backend's own convolution."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _separate(function: Callable) -> Callable:
    """`function` (of arrays), which the compiler neither fuses with its surroundings nor repeats.

    XLA:CPU computes what precedes a transform (normalisation and SiLU, say) again in each of the transform's parts:
    a seventh of the training step. Barriers for optimisation are gone before it fuses; calls stay.
    """
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*arrays):
        with xla_metadata.set_xla_metadata(inlineable='false'):
            return compiled(*arrays)

    return call


@_separate
def _kept(arrays):
    """Computed once, however many read them."""
    return arrays


def _of_groups(function: Callable) -> Callable:
    """`function(kernel, *images)`, images (groups, n, H, W, channels): its vmap is one call with more groups.

    JAX's own rule would put the new axis before the terms. A batched product needs the terms first, so that XLA
    would transpose, that is copy, every operand.
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
    """(3, 3, C, D), (groups, n, H, W, C) → (groups, n, H, W, D)."""
    form = _forms(x)
    pairs = zip(_inputs(form, x), _matrices(form, kernel, x.dtype))
    return _outputs(form, [part @ matrices for part, matrices in pairs], x)


@_of_groups
@_separate
def _winograd_backward(kernel, x, g):
    """Gradients of x and, for each group, of the kernel.

    (3, 3, C, D), (groups, n, H, W, C), (groups, n, H, W, D) → (groups, n, H, W, C), (groups, 3, 3, C, D).
    """
    form = _forms(x)
    gradients = _outputs_transposed(form, g)
    pairs = zip(gradients, _matrices(form, kernel, x.dtype))
    of_inputs = [part @ jnp.swapaxes(matrices, 1, 2) for part, matrices in pairs]
    of_matrices = [
        _over_pixels_of_groups(part, gradient, groups=len(x), dtype=kernel.dtype)
        for part, gradient in zip(_inputs(form, x), gradients)
    ]
    return _inputs_transposed(form, of_inputs, x), _matrices_transposed(form, of_matrices)


@dataclasses.dataclass(frozen=True)
class _Forms:
    """The transform along each axis."""

    rows: _Winograd
    columns: _Winograd

    @property
    def terms(self) -> tuple[int, int]:
        """Products along each axis: (i, j)."""
        return len(self.rows.inputs), len(self.columns.inputs)

    @property
    def kernel_transform(self) -> np.ndarray:
        """G along both axes: (i j, 9)."""
        return np.kron(self.rows.kernel, self.columns.kernel)


def _forms(x) -> _Forms:
    """The larger one, unless it needs more padding or more digits than x has."""

    def along(axis):
        size = x.shape[axis]
        fits = -size % _FOUR.size == -size % _TWO.size
        return _FOUR if fits and x.dtype.itemsize >= 4 else _TWO

    return _Forms(along(_ROWS), along(_COLUMNS))


def _inputs(form: _Forms, x):
    """B d along both axes: (..., H, W, C) → list over i of (j, pixels, C)."""
    halfway = _kept(jnp.stack(_inputs_along(_COLUMNS, form.columns, x)))
    return [_flat(part) for part in _inputs_along(_ROWS, form.rows, halfway)]


def _outputs_transposed(form: _Forms, g):
    """Aᵀ along both axes: (..., H, W, D) → list over i of (j, pixels, D)."""
    along = lambda axis, one, x: _combine(one.outputs.T, _split(x, one.size, axis))
    halfway = _kept(jnp.stack(along(_COLUMNS, form.columns, g)))
    return [_flat(part) for part in along(_ROWS, form.rows, halfway)]


def _outputs(form: _Forms, products, x):
    """A along both axes: list over i of (j, pixels, D) → (..., H, W, D) with x's other axes."""
    halfway = _kept(_outputs_along(_ROWS, form.rows, _unflat(form, products, x)))
    return _crop(_outputs_along(_COLUMNS, form.columns, list(halfway)), x)


def _inputs_transposed(form: _Forms, gradients, x):
    """Bᵀ along both axes: list over i of (j, pixels, C) → (..., H, W, C) with x's other axes."""
    halfway = _kept(_inputs_along_transposed(_ROWS, form.rows, _unflat(form, gradients, x)))
    return _crop(_inputs_along_transposed(_COLUMNS, form.columns, list(halfway)), x)


def _flat(part):
    """(j, ..., C) → (j, pixels, C)."""
    return part.reshape(len(part), -1, part.shape[-1])


def _unflat(form: _Forms, parts, x):
    """Of each part: (j, pixels, C) → (j, groups, n, H / m, W / m', C)."""
    tiles = (-(-x.shape[_ROWS] // form.rows.size), -(-x.shape[_COLUMNS] // form.columns.size))
    return [part.reshape(part.shape[:1] + x.shape[:_ROWS] + tiles + part.shape[-1:]) for part in parts]


def _over_pixels_of_groups(part, gradient, *, groups: int, dtype):
    """Σ over the pixels of every group: (j, pixels, C), (j, pixels, D) → (j, groups, C, D)."""
    grouped = lambda x: x.reshape(len(x), groups, -1, x.shape[-1])
    return jnp.einsum('jgpc,jgpd->jgcd', grouped(part), grouped(gradient), preferred_element_type=dtype)


def _matrices(form: _Forms, kernel, dtype):
    """G K along both axes: (3, 3, C, D) → (i, j, C, D)."""
    matrices = form.kernel_transform.astype(kernel.dtype) @ kernel.reshape(9, -1)
    return matrices.reshape(form.terms + kernel.shape[2:]).astype(dtype)


def _matrices_transposed(form: _Forms, gradients):
    """The transpose: list over i of (j, groups, C, D) → (groups, 3, 3, C, D)."""
    halfway = jnp.stack(_combine(form.rows.kernel.T, gradients), axis=2)
    return jnp.stack(_combine(form.columns.kernel.T, list(halfway)), axis=2)


def _inputs_along(axis: int, form: _Winograd, x) -> list[jax.Array]:
    """B d for every m pixels of an axis: an array → m + 2 of them, with 1 / m of the axis."""
    inside = _split(x, form.size, axis)
    before, after = _shift(inside[-1], -1, axis), _shift(inside[0], 1, axis)
    return _combine(form.inputs, [before, *inside, after])


def _inputs_along_transposed(axis: int, form: _Winograd, parts):
    """m + 2 arrays → one, with m times the axis."""
    before, *inside, after = _combine(form.inputs.T, parts)
    inside[-1] += _shift(before, 1, axis)
    inside[0] += _shift(after, -1, axis)
    return _join(inside, axis)


def _outputs_along(axis: int, form: _Winograd, parts):
    """A: m + 2 arrays → one, with m times the axis."""
    return _join(_combine(form.outputs, parts), axis)


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """matrix (i, j) times j arrays: i arrays."""

    def row(factors):
        terms = [
            part if factor == 1 else float(factor) * part
            for factor, part in zip(factors, parts, strict=True)
            if factor
        ]
        return sum(terms[1:], start=terms[0])

    return [row(factors) for factors in matrix]


def _split(x, size: int, axis: int):
    """Pixels 0, size, 2 size, ... of an axis, then 1, size + 1, ...; zeros beyond the last."""
    axis %= x.ndim
    x = _pad(x, 0, -x.shape[axis] % size, axis)
    groups = x.reshape(x.shape[:axis] + (-1, size) + x.shape[axis + 1 :])
    return [jax.lax.index_in_dim(groups, j, axis + 1, keepdims=False) for j in range(size)]


def _join(parts, axis: int):
    """The inverse of `_split`, padding included."""
    shape = parts[0].shape
    axis %= len(shape)
    together = jnp.stack(parts, axis=axis + 1)
    return together.reshape(shape[:axis] + (-1,) + shape[axis + 1 :])


def _crop(y, x):
    """y without the padding that x did not have."""
    return y[..., : x.shape[_ROWS], : x.shape[_COLUMNS], :]


def _shift(x, by: int, axis: int):
    """y[p] = x[p + by] along an axis, zeros from outside."""
    size = x.shape[axis]
    inside = jax.lax.slice_in_dim(x, max(by, 0), size + min(by, 0), axis=axis)
    return _pad(inside, max(-by, 0), max(by, 0), axis)


def _pad(x, before: int, after: int, axis: int):
    """Zeros around an axis. Not `jnp.pad`, a jitted function: `_separate` would separate it, too."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, after, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
