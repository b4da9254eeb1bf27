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
columns two outputs take four products instead of six (Winograd's F(2, 3); Lavin & Gray 2016,
arXiv 1509.09308): with d the four inputs under a pair of outputs,

    (z[w], z[w + 1]) = A ((G K) ∘ (B d)).

Every pass then needs two thirds of the multiplications, and moves less than half of im2col's bytes. Transposed,
the same steps are the backward pass, and both gradients share what was made of the output's gradient. The entries of
B and A are 0 and ±1, so that rounding is that of the plain sum.
"""

import jax
import jax.numpy as jnp

_ROWS, _COLUMNS = 1, 2  # axes of (n, H, W, C)


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
    products = [
        _add_rows(part @ matrix)
        for part, matrix in zip(_inputs(_even(x)), _matrices(kernel, x.dtype))
    ]
    return _outputs(products)[:, :, : x.shape[_COLUMNS]]


def _forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _backward(kept, g):
    x, kernel = kept
    if not _prefers_products():
        x_gradient = _library(g, jnp.swapaxes(kernel.astype(x.dtype)[::-1, ::-1], 2, 3))
        # Columns of the input with rows of the output's gradient: one product is all nine.
        columns = jnp.concatenate(
            [_shift(x, -1, _COLUMNS), x, _shift(x, 1, _COLUMNS)], axis=-1
        )
        nine = _over_pixels(columns, _spread_rows(g), kernel.dtype)
        channels, features = kernel.shape[2:]
        return x_gradient, nine.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)
    gradients = [_spread_rows(part) for part in _outputs_transposed(_even(g))]
    matrices = _matrices(kernel, x.dtype)
    x_gradient = _inputs_transposed([part @ m.T for part, m in zip(gradients, matrices)])
    of_matrices = [
        _over_pixels(part, gradient, kernel.dtype)
        for part, gradient in zip(_inputs(_even(x)), gradients)
    ]
    return (
        x_gradient[:, :, : x.shape[_COLUMNS]],
        _matrices_transposed(of_matrices, kernel.shape),
    )


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


def _inputs(x):
    """B d for every pair of columns: (n, H, W, C), W even → four of (n, H, W / 2, C)."""
    first, second = _columns(x)
    before, after = _shift(second, -1, _COLUMNS), _shift(first, 1, _COLUMNS)
    return before - second, first + second, second - first, first - after


def _inputs_transposed(parts):
    """Bᵀ: four of (n, H, W / 2, C) → (n, H, W, C)."""
    a, b, c, d = parts
    return _pairs(b - c + d - _shift(d, -1, _COLUMNS), b + c - a + _shift(a, 1, _COLUMNS))


def _outputs(products):
    """A: four of (n, H, W / 2, D) → (n, H, W, D)."""
    a, b, c, d = products
    return _pairs(a + b + c, b - c - d)


def _outputs_transposed(g):
    """Aᵀ: (n, H, W, D) → four of (n, H, W / 2, D)."""
    first, second = _columns(g)
    return first, first + second, first - second, -second


def _matrices(kernel, dtype):
    """G K, with the kernel's rows side by side: (3, 3, C, D) → four of (C, 3 D)."""
    left, middle, right = kernel[:, 0], kernel[:, 1], kernel[:, 2]
    both = left + right
    transformed = left, (both + middle) / 2, (both - middle) / 2, right
    channels, features = kernel.shape[2:]
    return [
        part.transpose(1, 0, 2).reshape(channels, 3 * features).astype(dtype)
        for part in transformed
    ]


def _matrices_transposed(gradients, shape):
    """Four of (C, 3 D) → (3, 3, C, D)."""
    channels, features = shape[2:]
    a, b, c, d = (
        part.reshape(channels, 3, features).transpose(1, 0, 2) for part in gradients
    )
    both = (b + c) / 2
    return jnp.stack([a + both, (b - c) / 2, both + d], axis=1)


def _add_rows(parts):
    """(n, H, W, 3 D) → (n, H, W, D): the parts of the kernel's rows, each shifted, added."""
    above, here, below = jnp.split(parts, 3, axis=-1)
    return _shift(above, -1, _ROWS) + here + _shift(below, 1, _ROWS)


def _spread_rows(g):
    """The transpose of `_add_rows`."""
    return jnp.concatenate([_shift(g, 1, _ROWS), g, _shift(g, -1, _ROWS)], axis=-1)


def _even(x):
    """With a column of zeros if their number is odd."""
    odd = x.shape[_COLUMNS] % 2
    return jnp.pad(x, ((0, 0), (0, 0), (0, odd), (0, 0))) if odd else x


def _columns(x):
    """The first and the second column of every pair."""
    n, height, width, channels = x.shape
    pairs = x.reshape(n, height, width // 2, 2, channels)
    return pairs[:, :, :, 0], pairs[:, :, :, 1]


def _pairs(first, second):
    """The inverse of `_columns`."""
    n, height, half, channels = first.shape
    return jnp.stack([first, second], axis=3).reshape(n, height, 2 * half, channels)


def _shift(x, by: int, axis: int):
    """y[p] = x[p + by] along an axis, zeros from outside."""
    size = x.shape[axis]
    inside = jax.lax.slice_in_dim(x, max(by, 0), size + min(by, 0), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (max(-by, 0), max(by, 0))
    return jnp.pad(inside, widths)
