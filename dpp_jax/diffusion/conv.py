"""3x3 convolution whose every pass is a matrix product on a CPU, and whose kernel gradient always is.

DP-SGD needs the gradient of every example's kernel. Under vmap the kernel gradient of `lax.conv` becomes
a grouped convolution (13 GFLOP/s against 34 as a batched matrix product, on a 2-core CPU), and XLA:CPU
runs any convolution inside a loop some 90 times slower than outside, while matrix products keep their
speed. GPUs and TPUs are at their best with `lax.conv` forward and for the input's gradient.

The usual form, "im2col", multiplies the nine shifted views of the input with the kernel: nine copies of
the input, as costly on a CPU as the product itself. Here the two directions are separated. With rows i and
columns j of the kernel,

    y[h, w] = Σ_j z_j[h, w + j],   z_j[h, w] = Σ_i x[h + i, w] K[i, j],

so three copies of the input (shifted along h) give three parts z_j by one product with a (3 C, 3 D)
matrix, which are added shifted along w. Transposed, the same two steps are the backward pass, and both
gradients share three copies of the output's gradient. The work is that of the convolution, the traffic
two thirds of im2col's forward and five ninths in all; no rounding is added.
"""

import jax
import jax.numpy as jnp

_ROWS, _COLUMNS = 1, 2  # axes of (n, H, W, C)
_AHEAD, _BACK = (-1, 0, 1), (1, 0, -1)  # shifts of the kernel's places, and of their transposes


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """'Same' convolution with stride 1.

    Args:
        x: (n, H, W, C), of any float dtype; it is that of the products.
        kernel: (3, 3, C, D), of the same dtype or a wider one; its gradient has its dtype.

    Returns:
        (n, H, W, D), of x's dtype.
    """
    kernel = kernel.astype(x.dtype)
    if not _prefers_products():
        return _library(x, kernel)
    parts = _spread(x, _AHEAD, _ROWS) @ _as_matrix(kernel)
    return _gather(parts, _AHEAD, _COLUMNS)


def _forward(x, kernel):
    return conv3x3(x, kernel), (x, kernel)


def _backward(kept, g):
    x, kernel = kept
    channels, features = kernel.shape[2:]
    narrow = kernel.astype(x.dtype)
    g_parts = _spread(g, _BACK, _COLUMNS)
    if _prefers_products():
        x_gradient = _gather(g_parts @ _as_matrix(narrow).T, _BACK, _ROWS)
    else:
        x_gradient = _library(g, jnp.swapaxes(narrow[::-1, ::-1], 2, 3))
    matrix_gradient = jax.lax.dot_general(
        _spread(x, _AHEAD, _ROWS).reshape(-1, 3 * channels),
        g_parts.reshape(-1, 3 * features),
        (((0,), (0,)), ((), ())),
        preferred_element_type=kernel.dtype,
    )
    kernel_gradient = matrix_gradient.reshape(3, channels, 3, features).transpose(0, 2, 1, 3)
    return x_gradient, kernel_gradient


conv3x3.defvjp(_forward, _backward)


def _prefers_products() -> bool:
    """Whether the backend is slow at convolutions."""
    return jax.default_backend() == 'cpu'


def _library(x, kernel):
    """The backend's own convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _as_matrix(kernel):
    """(3, 3, C, D) → (3 C, 3 D): kernel rows and input channels by kernel columns and features."""
    _, _, channels, features = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(3 * channels, 3 * features)


def _shift(x, by: int, axis: int):
    """y[p] = x[p + by] along an axis, zeros from outside."""
    if by == 0:
        return x
    size = x.shape[axis]
    inside = jax.lax.slice_in_dim(x, max(by, 0), size + min(by, 0), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (max(-by, 0), max(by, 0))
    return jnp.pad(inside, widths)


def _spread(x, shifts, axis: int):
    """(n, H, W, C) → (n, H, W, 3 C): the image shifted three ways along an axis."""
    return jnp.concatenate([_shift(x, by, axis) for by in shifts], axis=-1)


def _gather(parts, shifts, axis: int):
    """(n, H, W, 3 C) → (n, H, W, C): three parts, each shifted along an axis, added."""
    return sum(_shift(part, by, axis) for part, by in zip(jnp.split(parts, 3, axis=-1), shifts))
