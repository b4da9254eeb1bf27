"""3x3 convolution whose every pass is a matrix product on a CPU, and whose kernel gradient always is.

DP-SGD needs the gradient of every example's kernel. Under vmap the kernel gradient of `lax.conv` becomes
a grouped convolution (13 GFLOP/s against 34 as a batched matrix product, on a 2-core CPU), and a CPU's
matrix products are nearly twice as fast as its convolutions. GPUs and TPUs are at their best with
`lax.conv` forward and for the input's gradient; there the kernel's gradient is one product, of the input's three
shifted columns with the three shifted rows of the output's gradient, because it waits for memory and
not for arithmetic. What follows is for a CPU.

The usual form, "im2col", multiplies the nine shifted views of the input with the kernel: nine copies of
the input, as costly on a CPU as the product itself. Here rows and columns of the kernel are apart. Of the
rows i,

    y[h] = Σ_i z_i[h + i],   z_i[h, w] = Σ_j x[h, w + j] K[i, j],

so one product with all three rows side by side gives three parts, which are added shifted. Along the
columns m outputs in a row take m + 2 products instead of 3 m (Winograd's F(m, 3); Lavin & Gray 2016,
arXiv 1509.09308): with d the m + 2 inputs under them,

    (z[w], ..., z[w + m - 1]) = A ((G K) ∘ (B d)).

m is 4 where the width allows it, otherwise 2: half, or two thirds, of the multiplications, and much fewer
bytes than im2col's. Transposed, the same steps are the backward pass, and both gradients share what was made
of the output's gradient. The entries of A, B and G are at most 8, 5 and 1, and rounding in float32 is that of the plain sum
for m = 2 and three times that for m = 4: below 1e-6.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax.experimental import xla_metadata
import jax.numpy as jnp
import numpy as np

_ROWS, _COLUMNS = 1, 2  # axes of (n, H, W, C)


@dataclasses.dataclass(frozen=True)
class _Winograd:
    """F(m, 3): the matrices of the module's text, with n = m + 2.

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
    """'Same' convolution with stride 1.

    Args:
        x: (n, H, W, C), of any float dtype; it is that of the products.
        kernel: (3, 3, C, D), of the same dtype or a wider one; its gradient has its dtype.

    Returns:
        (n, H, W, D), of x's dtype.
    """
    if not _prefers_products():
        return _library(x, kernel.astype(x.dtype))
    return _winograd(x, kernel)


def _forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _backward(kept, g):
    x, kernel = kept
    if _prefers_products():
        return _winograd_backward(x, kernel, g)
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
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _separate(function: Callable) -> Callable:
    """`function` (of arrays), which the compiler neither fuses with its surroundings nor repeats.

    XLA:CPU would compute what is before a transform once for each of its terms.
    """
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*arrays):
        with xla_metadata.set_xla_metadata(inlineable='false'):
            return compiled(*arrays)

    return call


@_separate
def _winograd(x, kernel):
    rows, columns = _forms(x)
    products = [
        part @ matrix
        for part, matrix in zip(_inputs(rows, columns, x), _matrices(rows, columns, kernel, x.dtype))
    ]
    y = [_outputs_1d(rows, some, _ROWS) for some in _groups(products, columns)]
    return _crop(_outputs_1d(columns, _kept(y), _COLUMNS), x)


@_separate
def _winograd_backward(x, kernel, g):
    rows, columns = _forms(x)
    halfway = _kept(_combine(columns.outputs.T, _split(g, columns.size, _COLUMNS)))
    gradients = [
        part for some in halfway for part in _combine(rows.outputs.T, _split(some, rows.size, _ROWS))
    ]
    matrices = _matrices(rows, columns, kernel, x.dtype)
    of_inputs = [part @ m.T for part, m in zip(gradients, matrices)]
    of_matrices = [
        _over_pixels(part, gradient, kernel.dtype)
        for part, gradient in zip(_inputs(rows, columns, x), gradients)
    ]
    halfway = [_inputs_1d_transposed(rows, some, _ROWS) for some in _groups(of_inputs, columns)]
    x_gradient = _inputs_1d_transposed(columns, _kept(halfway), _COLUMNS)
    return _crop(x_gradient, x), _matrices_transposed(rows, columns, of_matrices)


@_separate
def _kept(arrays):
    return arrays


def _forms(x) -> tuple[_Winograd, _Winograd]:
    """For rows and columns: the larger one, unless it needs more padding or more digits than x has."""

    def along(axis):
        size = x.shape[axis]
        fits = -size % _FOUR.size == -size % _TWO.size
        return _FOUR if fits and x.dtype.itemsize >= 4 else _TWO

    return along(_ROWS), along(_COLUMNS)


def _groups(parts, columns) -> list:
    """The parts of each column form's term."""
    size = len(parts) // (columns.size + 2)
    return [parts[i : i + size] for i in range(0, len(parts), size)]


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


def _inputs(rows, columns, x):
    halfway = _kept(_inputs_1d(columns, x, _COLUMNS))
    return [part for some in halfway for part in _inputs_1d(rows, some, _ROWS)]


def _inputs_1d(form, x, axis):
    """B d for every m columns: (n, H, W, C) → m + 2 of (n, H, W / m, C)."""
    columns = _split(x, form.size, axis)
    before, after = _shift(columns[-1], -1, axis), _shift(columns[0], 1, axis)
    return _combine(form.inputs, [before, *columns, after])


def _inputs_1d_transposed(form, parts, axis):
    """The transpose: m + 2 of (n, H, W / m, C) → (n, H, W, C), W a multiple of m."""
    before, *columns, after = _combine(form.inputs.T, parts)
    columns[-1] += _shift(before, 1, axis)
    columns[0] += _shift(after, -1, axis)
    return _join(columns, axis)


def _outputs_1d(form, parts, axis):
    return _join(_combine(form.outputs, parts), axis)


def _matrices(rows, columns, kernel, dtype):
    """G K, with the kernel's rows side by side: (3, 3, C, D) → m + 2 of (C, 3 D)."""
    halfway = _combine(columns.kernel, [kernel[:, j] for j in range(3)])
    return [
        part.astype(dtype) for some in halfway for part in _combine(rows.kernel, [some[i] for i in range(3)])
    ]


def _matrices_transposed(rows, columns, gradients):
    """The transpose: m + 2 of (C, 3 D) → (3, 3, C, D)."""
    halfway = [jnp.stack(_combine(rows.kernel.T, some)) for some in _groups(gradients, columns)]
    return jnp.stack(_combine(columns.kernel.T, halfway), axis=1)


def _split(x, size: int, axis: int):
    """Columns 0, size, 2 size, ..., then columns 1, size + 1, ...; zeros beyond the last."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, widths)
    shape = x.shape[:axis] + (-1, size) + x.shape[axis + 1 :]
    return [jax.lax.index_in_dim(x.reshape(shape), j, axis + 1, keepdims=False) for j in range(size)]


def _join(columns, axis: int):
    """The inverse of `_split`."""
    shape = columns[0].shape
    together = jnp.stack(columns, axis=axis + 1)
    return together.reshape(shape[:axis] + (-1,) + shape[axis + 1 :])


def _crop(y, x):
    return y[:, : x.shape[_ROWS], : x.shape[_COLUMNS]]


def _shift(x, by: int, axis: int):
    """y[p] = x[p + by] along an axis, zeros from outside."""
    size = x.shape[axis]
    inside = jax.lax.slice_in_dim(x, max(by, 0), size + min(by, 0), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (max(-by, 0), max(by, 0))
    return jnp.pad(inside, widths)
