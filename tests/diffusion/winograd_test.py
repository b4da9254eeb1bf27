"""The convolution against XLA's own in float64, forward and backward, in every form that is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import winograd


@pytest.fixture(params=['winograd', 'im2col', 'library'])
def form(request, monkeypatch):
    """As a CPU runs it, with many channels and with few, and as a GPU or a TPU does."""
    monkeypatch.setattr(winograd, '_prefers_products', lambda: request.param != 'library')
    monkeypatch.setattr(winograd, '_is_small', lambda kernel: request.param == 'im2col')
    return request.param


def reference(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST,
    )


def exactly(function, *arguments):
    """In float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*(jnp.asarray(a, jnp.float64) for a in arguments)))


def data(shape, features, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    kernel = rng.standard_normal((3, 3, shape[-1], features)).astype(np.float32)
    target = rng.standard_normal(shape[:-1] + (features,)).astype(np.float32)
    return x, kernel, target


def passes(function):
    """x, kernel, gradient of the output → output, and the gradients of x and of the kernel."""

    def call(x, kernel, target):
        y, backward = jax.vjp(function, x, kernel)
        return (y, *backward(target.astype(y.dtype)))

    return call


def assert_close(got, expected, tolerance=3e-6):
    """In the norm: relative to the whole array, which is what an update sees."""
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def assert_all_close(got, arguments, index=...):
    """What `passes` gave, or its part at `index`, against the reference's."""
    for one, expected in zip(got, exactly(passes(reference), *arguments), strict=True):
        assert_close(one[index], expected)


@pytest.mark.parametrize(
    'shape, features',
    [((2, 8, 8, 3), 5), ((1, 7, 5, 4), 1), ((3, 1, 1, 2), 2), ((1, 14, 28, 2), 3)],
)
def test_value_and_gradients(form, shape, features):
    arguments = data(shape, features)
    assert_all_close(jax.jit(passes(winograd.conv3x3))(*arguments), arguments)


def test_float64(form):
    arguments = data((2, 8, 6, 3), 5)
    for got, expected in zip(
        exactly(jax.jit(passes(winograd.conv3x3)), *arguments), exactly(passes(reference), *arguments)
    ):
        assert_close(got, expected, 1e-13)


def test_per_example_kernel_gradients_in_a_loop(form):
    """vmap over examples inside a scan: the form of DP-SGD."""
    x, kernel, target = data((6, 4, 6, 6, 3), 5)

    @jax.jit
    def scanned(x, kernel, target):
        per_example = jax.vmap(passes(winograd.conv3x3), in_axes=(0, None, 0))
        chunks = (x.reshape((3, 2) + x.shape[1:]), target.reshape((3, 2) + target.shape[1:]))
        _, out = jax.lax.scan(lambda c, ab: (c, per_example(ab[0], kernel, ab[1])), 0, chunks)
        return out

    got = scanned(x, kernel, target)
    for i in range(6):
        assert_all_close(got, (x[i], kernel, target[i]), (i // 2, i % 2))


@pytest.mark.parametrize('axes', [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0)])
def test_vmap_over_any_of_the_arguments(form, axes):
    x, kernel, target = data((3, 2, 6, 4, 3), 5)
    all_of_them = (x, np.stack([kernel, 2 * kernel, -kernel]), target)
    arguments = [a if axis == 0 else a[0] for a, axis in zip(all_of_them, axes)]
    got = jax.jit(jax.vmap(passes(winograd.conv3x3), axes))(*arguments)
    for i in range(3):
        assert_all_close(got, [a[i] if axis == 0 else a for a, axis in zip(arguments, axes)], i)


@pytest.mark.parametrize('is_with_kernels', [False, True])
def test_vmap_within_vmap(form, is_with_kernels):
    x, kernel, target = data((2, 3, 1, 4, 4, 3), 5)
    kernels = np.stack([kernel, -2 * kernel]) if is_with_kernels else kernel
    inner = jax.vmap(passes(winograd.conv3x3), (0, None, 0))
    outer = jax.vmap(inner, (0, 0 if is_with_kernels else None, 0))
    got = jax.jit(outer)(x, kernels, target)
    for i, j in np.ndindex(2, 3):
        one = kernels[i] if is_with_kernels else kernel
        assert_all_close(got, (x[i, j], one, target[i, j]), (i, j))


def test_what_is_not_finite_in_one_example_stays_there(form):
    """Images of several examples go through the same products; DP-SGD drops the bad one alone."""
    x, kernel, target = data((4, 2, 8, 8, 3), 5)
    x[1, 0, 3, 3, 1], x[2, 1, 5, 0, 0] = np.nan, np.inf
    got = jax.jit(jax.vmap(passes(winograd.conv3x3), (0, None, 0)))(x, kernel, target)
    for i in (0, 3):
        assert_all_close(got, (x[i], kernel, target[i]), i)
    for i in (1, 2):
        assert not np.isfinite(got[2][i]).all()


def test_vmap_within_a_gradient(form):
    """A mean over mapped images, then its gradient: sums of those of all images."""
    x, kernel, target = data((3, 1, 4, 4, 3), 5)

    @jax.jit
    def gradient(kernel, x, target):
        mapped = lambda kernel: jax.vmap(winograd.conv3x3, (0, None))(x, kernel)
        return jax.grad(lambda kernel: jnp.sum(mapped(kernel) * target))(kernel)

    expected = exactly(passes(reference), x[:, 0], kernel, target[:, 0])[2]
    assert_close(gradient(kernel, x, target), expected)


@pytest.mark.parametrize('is_mapped', [False, True])
def test_bfloat16_products_give_a_float32_kernel_gradient(form, is_mapped):
    x, kernel, target = data((4, 8, 8, 16), 16)
    narrow = jnp.asarray(x, jnp.bfloat16)
    if is_mapped:
        mapped = jax.vmap(passes(winograd.conv3x3), (0, None, 0))
        y, x_gradient, kernel_gradient = jax.jit(mapped)(narrow[:, None], kernel, target[:, None])
        y, x_gradient = y[:, 0], x_gradient[:, 0]
        assert kernel_gradient.shape == (4,) + kernel.shape
        kernel_gradient = kernel_gradient.sum(0)
    else:
        y, x_gradient, kernel_gradient = jax.jit(passes(winograd.conv3x3))(narrow, kernel, target)
    assert (y.dtype, x_gradient.dtype, kernel_gradient.dtype) == (
        jnp.bfloat16, jnp.bfloat16, jnp.float32,
    )  # fmt: skip
    expected = exactly(passes(reference), x, kernel, target)
    for got, one in zip((y, x_gradient, kernel_gradient), expected):
        assert_close(np.float32(got), one, 1e-2)
