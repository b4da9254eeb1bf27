"""Clipping: no example adds more than the clip norm to the sum, whatever its gradient is."""

import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.privacy.clipping import Grid, clip_weights, clipped_gradient_sum, clipped_sum, saturated_sum

ROOT = Path(__file__).resolve().parents[2]


def float_sum(gradients, mask, clip_norm, rows=None):
    """The sum as float32, and the norms."""
    grid = Grid(clip_norm=clip_norm, rows=rows or len(mask))
    units, norms = clipped_sum(gradients, mask, grid)
    return jax.tree.map(grid.decode, units), norms


def norm(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves))


def random_gradients(n, scale, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'a': (scale * rng.standard_normal((n, 7, 3))).astype(np.float32),
        'b': {'c': (scale * rng.standard_normal((n, 11))).astype(np.float32)},
    }


@pytest.mark.parametrize('scale', [1e-20, 1e-3, 0.1, 1.0, 1e4, 1e12, 1e18])
def test_clipped_gradient_is_never_longer_than_the_bound(scale):
    for clip_norm in (1e-3, 1.0, 50.0):
        gradients = random_gradients(1, scale)
        total, norms = float_sum(gradients, np.array([True]), clip_norm)
        assert norm(total) <= clip_norm
        if norm(gradients) < 0.99 * clip_norm:  # short ones stay as they are
            unit = clip_norm / Grid(clip_norm=clip_norm, rows=1).steps
            np.testing.assert_allclose(total['a'], gradients['a'][0], rtol=1e-6, atol=unit)
        elif scale < 1e18:  # and long ones keep their direction and have the full length
            assert norm(total) > 0.9999 * clip_norm


def test_sum_of_neighboring_sets_differs_by_at_most_the_bound():
    """Add one example: far above C, far below, duplicated, or not a number at all."""
    clip_norm = 0.7
    base = random_gradients(6, 1.0)
    total, _ = float_sum(base, np.ones(6, bool), clip_norm, rows=7)
    odd = random_gradients(5, 1.0, seed=1)
    odd['a'][0] *= 1e15
    odd['a'][1] *= 1e-15
    odd['b']['c'][2] = base['b']['c'][0]
    odd['a'][3, 0, 0] = np.nan
    odd['b']['c'][4, 5] = np.inf
    for i in range(5):
        more = jax.tree.map(lambda x, y: np.concatenate([x, y[i : i + 1]]), base, odd)
        other, _ = float_sum(more, np.ones(7, bool), clip_norm)
        change = norm(jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), other, total))
        assert change <= clip_norm
        assert np.isfinite(norm(other))
        if i >= 3:
            assert change == 0


def quadratic_loss(params, example):
    return jnp.sum((params['w'] @ example['x'] - example['y']) ** 2) + jnp.sum(params['b'] * 0.3)


@pytest.fixture(scope='module')
def quadratic():
    rng = np.random.default_rng(2)
    params = {'w': rng.standard_normal((3, 4)).astype(np.float32), 'b': np.ones(2, np.float32)}
    examples = {
        'x': rng.standard_normal((24, 4)).astype(np.float32),
        'y': rng.standard_normal((24, 3)).astype(np.float32),
    }
    return params, examples


def pushed_past_a_power_of_two(n):
    """Gradients (n, 1) with which a float32 sum of one after the other drifts, if the first is there.

    With it the sum is beyond a power of two, where float32 has half as many values: of the pairs that
    follow, which nearly cancel, each then adds a whole step.
    """
    half = 2 ** int(np.log2(n // 2))
    step = half * 2.0**-24  # of float32 below `half`
    pairs = np.resize([1.2 * step, -0.9 * step], n - 1 - half)
    return np.concatenate([[1.0], np.full(half - 1, 1.0), [0.2], pairs]).astype(np.float32)[:, None]


@pytest.mark.parametrize('n', [4096, 16384])
def test_crafted_gradients_move_the_sum_by_the_bound_at_most(n):
    """Added up in float32 they move it by 1.25 C and 5 C."""
    gradients, everybody = pushed_past_a_power_of_two(n), np.ones(n, bool)
    moved = []
    for mask in (everybody, np.arange(n) > 0):
        total, _ = float_sum({'w': gradients}, mask, 1.0)
        moved.append(np.float64(total['w'][0]))
    assert 0.99 < moved[0] - moved[1] <= 1
    in_turn = [np.cumsum(rows, dtype=np.float32)[-1] for rows in (gradients, gradients[1:])]
    assert in_turn[0] - in_turn[1] > 1.2  # what a float32 sum does


@pytest.mark.parametrize('n', [1, 2, 3, 1000, 4096, 100_000])
def test_no_sum_overflows_and_what_rounding_adds_is_paid_for(n):
    """The longest gradients there are, all in one direction; the whole sum is met to 2^-24 of itself."""
    grid = Grid(clip_norm=0.3, rows=n)
    row = np.float32([0.3 * 0.6, -0.3 * 0.8])
    units, _ = clipped_sum({'w': np.tile(row, (n, 1))}, np.ones(n, bool), grid)
    one, _ = clipped_sum({'w': row[None]}, np.ones(1, bool), grid)
    np.testing.assert_array_equal(np.int64(units['w']), n * np.int64(one['w']))
    rounding = norm({'w': grid.decode(units['w'])}) - norm({'w': np.float64(units['w']) * 0.3 / grid.steps})
    longest = norm({'w': np.float64(one['w']) * 0.3 / grid.steps})
    assert longest + 2 * abs(rounding) <= 0.3
    assert grid.bound > 0.3 * (1 - 2e-5 - n * 2.0**-22)


def test_the_sum_is_the_same_bits_in_any_order_and_any_parts():
    gradients, rng = random_gradients(50, 3.0), np.random.default_rng(5)
    grid = Grid(clip_norm=1.0, rows=50)
    expected, _ = clipped_sum(gradients, np.ones(50, bool), grid)
    order = rng.permutation(50)
    shuffled = jax.tree.map(lambda leaf: leaf[order], gradients)
    parts = [
        clipped_sum(jax.tree.map(lambda leaf: leaf[rows], shuffled), np.ones(len(rows), bool), grid)[0]
        for rows in (slice(0, 7), slice(7, 8), slice(8, 50))
        for rows in [np.arange(50)[rows]]
    ]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, total, expected)


def exact_then_cut(parts):
    return np.clip(np.int64(parts).sum(0), -(2**31), 2**31 - 1)


@pytest.mark.parametrize('most', [3, 2**15, 2**29, 2**31 - 1])
def test_a_sum_beyond_int32_is_cut_and_every_other_one_exact(most):
    rng = np.random.default_rng(most)
    parts = rng.integers(-most, most, (17, 1000), endpoint=True).astype(np.int32)
    parts[:, :40] = most * np.sign(rng.integers(0, 2, 40) - 0.5).astype(np.int32)
    parts[1:, 40:80] = 0  # one part alone
    np.testing.assert_array_equal(saturated_sum(jnp.asarray(parts)), exact_then_cut(parts))
    # The same of eight devices, of which each has some.
    of_devices = jax.pmap(lambda own: saturated_sum(own, 'devices'), axis_name='devices')(
        parts[:16].reshape(8, 2, -1)
    )
    np.testing.assert_array_equal(of_devices, np.tile(exact_then_cut(parts[:16]), (8, 1)))


GRID = Grid(clip_norm=2.0, rows=24)


def test_microbatches_equal_a_plain_loop_over_examples(quadratic):
    params, examples = quadratic
    mask = np.arange(24) < 17
    expected = jax.tree.map(lambda p: np.zeros(p.shape, np.float64), params)
    norms = []
    for i in range(17):
        gradient = jax.grad(quadratic_loss)(params, jax.tree.map(lambda x: x[i], examples))
        norms.append(norm(gradient))
        factor = min(1.0, 2.0 / norms[-1])
        expected = jax.tree.map(lambda e, g: e + factor * np.float64(g), expected, gradient)
    for microbatch in (1, 3, 8, 24):
        total, sums = jax.jit(
            lambda p, e, m, k: clipped_gradient_sum(
                quadratic_loss, p, e, m, grid=GRID, microbatch=microbatch, microbatches=k
            )
        )(params, examples, mask, -(-17 // microbatch))
        total = jax.tree.map(GRID.decode, total)
        jax.tree.map(lambda t, e: np.testing.assert_allclose(t, e, rtol=2e-5), total, expected)
        assert sums['examples'] == 17 and sums['non_finite'] == 0
        assert sums['clipped'] == np.sum(np.array(norms) > 2.0)
        np.testing.assert_allclose(sums['norm'], np.sum(norms), rtol=1e-5)


def test_an_example_with_a_non_finite_gradient_counts_as_zero_and_is_counted(quadratic):
    params, examples = quadratic
    broken = {**examples, 'x': examples['x'].copy()}
    broken['x'][5] = np.nan
    mask = np.ones(24, bool)
    without = mask.copy()
    without[5] = False
    arguments = dict(grid=GRID, microbatch=8, microbatches=3)
    total, sums = clipped_gradient_sum(quadratic_loss, params, broken, mask, **arguments)
    expected, _ = clipped_gradient_sum(quadratic_loss, params, examples, without, **arguments)
    jax.tree.map(lambda t, e: np.testing.assert_allclose(t, e, rtol=1e-6), total, expected)
    assert sums['non_finite'] == 1 and np.isfinite(sums['loss'])


def test_empty_batch_sums_to_zero(quadratic):
    params, examples = quadratic
    total, sums = clipped_gradient_sum(
        quadratic_loss,
        params,
        examples,
        np.zeros(24, bool),
        grid=GRID,
        microbatch=8,
        microbatches=0,
    )
    assert norm(total) == 0 and sums['examples'] == 0


def test_an_example_with_a_lost_loss_counts_as_zero_even_if_its_gradient_is_finite():
    def loss(params, example):
        # Added outside of the gradient's reach, as an overflow in a metric would be.
        return jnp.sum(params * example['x']) + jax.lax.stop_gradient(example['offset'])

    params = jnp.ones(3)
    examples = {'x': jnp.eye(3), 'offset': jnp.array([0.0, jnp.inf, jnp.nan])}
    total, sums = clipped_gradient_sum(
        loss, params, examples, jnp.ones(3, bool), grid=GRID, microbatch=3, microbatches=1
    )
    np.testing.assert_array_equal(GRID.decode(total), [1, 0, 0])
    assert sums['non_finite'] == 2 and sums['loss'] == 1


NORM_OF_LONG_VECTORS = """
import jax, numpy as np
from dpp_jax.privacy.clipping import Grid, clipped_sum, saturated_sum

rng = np.random.default_rng(0)
rows = (np.full(2_000_000, 0.1), rng.standard_normal(2_000_000), rng.random(2_000_000) ** 8)
rows = np.stack(rows).astype(np.float32)
exact = np.linalg.norm(rows.astype(np.float64), axis=1)
grid = Grid(clip_norm=1.0, rows=3)
clip = jax.jit(lambda rows, mask: clipped_sum({'w': rows}, mask, grid))
for row in range(3):
    units, norms = clip(rows, np.arange(3) == row)
    total = {'w': grid.decode(units['w'])}
    assert np.abs(norms / exact - 1).max() < 5e-6, (norms, exact)
    assert 0.9999 < np.linalg.norm(np.asarray(total['w'], np.float64)) <= 1
"""


@pytest.mark.parametrize('flags', [None, ''], ids=['flags_of_the_tests', 'flags_of_a_user'])
def test_norm_of_millions_of_numbers_is_as_exact_as_the_clip_bound_supposes(flags):
    """One weight vector, one sum: added up one after the other it would be off by a percent."""
    if flags is None:
        exec(NORM_OF_LONG_VECTORS, {})
        return
    environment = {**os.environ, 'XLA_FLAGS': flags}
    subprocess.run([sys.executable, '-c', NORM_OF_LONG_VECTORS], env=environment, check=True, cwd=ROOT)


@pytest.mark.parametrize(
    'values',
    [
        np.ones(100_000),  # a sum of squares in bfloat16 would stop growing at 256
        np.r_[300.0, np.full(90_000, 1.0)],  # and lose every small one beside a large one
        np.r_[1e18, np.full(1000, 1e-18)],
        np.full(1000, 1e-18),
        np.geomspace(1e-10, 1e10, 2001) * (-1) ** np.arange(2001),
    ],
    ids=['many', 'one large', 'extremes', 'tiny', 'all sizes'],
)
def test_bound_holds_for_bfloat16_gradients_of_any_magnitude(values):
    gradients = {'w': jnp.asarray(values, jnp.bfloat16)[None]}
    exact = norm({'w': np.float64(gradients['w'])})
    grid = Grid(clip_norm=1.0, rows=1)
    units, norms = jax.jit(lambda g: clipped_sum(g, np.array([True]), grid))(gradients)
    total = jax.tree.map(grid.decode, units)
    assert total['w'].dtype == norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, exact, rtol=1e-5)
    assert norm(total) <= 1
    # A vector of a unit in each coordinate and less is lost, and so is that much of any other.
    lost = np.sqrt(len(values)) / grid.steps
    np.testing.assert_allclose(norm(total), min(1, exact), rtol=2e-5, atol=lost)


def test_rows_of_padding_have_weight_zero_whatever_they_hold():
    gradients = {'w': jnp.array([[3.0, 4.0], [jnp.nan, 0.0], [0.0, 0.0], [1e30, 1.0]])}
    weights, norms = clip_weights(gradients, np.zeros(4, bool), 1.0)
    np.testing.assert_array_equal(weights, np.zeros(4))
    assert norms[0] == 5
    total, _ = float_sum(gradients, np.zeros(4, bool), 1.0)
    np.testing.assert_array_equal(total['w'], np.zeros(2))


def test_rows_that_are_no_whole_microbatches_are_refused(quadratic):
    params, examples = quadratic
    with pytest.raises(ValueError, match='microbatch is 7; it must divide the number of rows, 24'):
        clipped_gradient_sum(
            quadratic_loss, params, examples, np.ones(24, bool), grid=GRID, microbatch=7, microbatches=3
        )
