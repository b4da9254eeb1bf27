"""Agreement with independent code: Opacus's accountant, and the clipped gradients of jax_privacy.

Opacus has its own code for the Rényi divergences and for the step from them to ε. At fractional orders
dp_accounting, which computes ours, adds the terms of an alternating series without their signs: an upper
bound that is up to some per cent above Opacus, never below. At whole orders both are exact.

jax_privacy sums clipped gradients for the same purpose. It differs in two ways, which the test removes:
it clips to the norm C itself, where ours leaves 1e-5 of it for rounding; and it replaces the non-finite
entries of a gradient by zeros, where ours counts such a gradient as zero.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax_privacy
import numpy as np
from opacus import accountants
import pytest

from dpp_jax.privacy import accounting, budget
from dpp_jax.privacy.clipping import Grid, clipped_gradient_sum, clipped_sum
from dpp_jax.privacy.ledger import Entry, Ledger

# Opacus says that more orders might give less, jax_privacy calls what optax will rename.
pytestmark = pytest.mark.filterwarnings('ignore:Optimal order', 'ignore:optax.global_norm')
ROUNDING = 1e-5  # by which our bound on a norm is below C
WHOLE_ORDERS = tuple(order for order in accounting.RDP_ORDERS if order.is_integer())


def opacus(history, delta, orders):
    """Opacus's ε of a list of (σ, q, count)."""
    accountant = accountants.RDPAccountant()
    accountant.history = history  # as `step`, which takes one release at a time, keeps it
    return accountant.get_epsilon(delta, alphas=list(orders))


def random_histories(number, most, seed):
    """Lists of (σ, q, count), and δ: one to four mechanisms, such as queries and steps."""
    rng = np.random.default_rng(seed)

    def between(low, high):
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    for _ in range(number):
        parts = range(rng.integers(1, 5))
        rates = [1.0 if rng.random() < 0.2 else between(1e-3, 0.9) for _ in parts]
        yield [(between(0.8, 20), q, int(between(1, most))) for q in rates], between(1e-9, 1e-3)


def compose(history):
    return accounting.compose(accounting.subsampled_gaussian(*part) for part in history)


def test_epsilon_of_random_histories_equals_opacus_at_whole_orders(monkeypatch):
    monkeypatch.setattr(accounting, 'RDP_ORDERS', WHOLE_ORDERS)
    figures = []
    for history, delta in random_histories(40, 3000, seed=1):
        figures.append(accounting.epsilon(compose(history), delta))
        expected = opacus(history, delta, WHOLE_ORDERS)
        assert figures[-1] == pytest.approx(expected, rel=1e-9), (history, delta)
    assert min(figures) < 0.1 and np.median(figures) > 1 and max(figures) > 100


def test_epsilon_of_random_histories_is_never_below_opacus():
    """And fractional orders, where ours is an upper bound, may only help."""
    helped = 0
    for history, delta in random_histories(40, 3000, seed=1):
        epsilon = accounting.epsilon(compose(history), delta)
        lower = opacus(history, delta, accounting.RDP_ORDERS)
        upper = opacus(history, delta, WHOLE_ORDERS)
        assert lower * (1 - 1e-9) <= epsilon <= upper * (1 + 1e-9), (history, delta)
        helped += epsilon < upper * (1 - 1e-4)
    assert helped > 10


def test_epsilon_of_a_ledger_equals_opacus(tmp_path, monkeypatch):
    """Release by release, the mechanisms in any order."""
    monkeypatch.setattr(accounting, 'RDP_ORDERS', WHOLE_ORDERS)
    for number, (history, delta) in enumerate(random_histories(4, 20, seed=2)):
        ledger = Ledger(tmp_path / str(number) / 'ledger.jsonl')
        releases = [(part, index) for part in range(len(history)) for index in range(history[part][2])]
        np.random.default_rng(3).shuffle(releases)
        for part, index in releases:
            sigma, q, _ = history[part]
            ledger.append(Entry(f'mechanism_{part}', index, sigma, q, 2.0, 'r'))
        one_by_one = [(*history[part][:2], 1) for part, _ in releases]
        expected = opacus(one_by_one, delta, WHOLE_ORDERS)
        total = budget.total_event(budget.group(ledger.entries))
        assert accounting.epsilon(total, delta) == pytest.approx(expected, rel=1e-9)


def zero_unless_finite(gradient):
    """What ours does to a gradient that has a non-finite entry."""
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
    return jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), gradient)


def random_case(seed, n=24):
    """Parameters of random structure, n examples of random size, which are real: 4 of 5 odd ones."""
    rng = np.random.default_rng(seed)

    def tree(depth):
        if depth == 0:
            return tuple(rng.integers(1, 6, rng.integers(0, 4)))
        parts = [tree(depth - 1) for _ in range(rng.integers(1, 4))]
        return parts if rng.random() < 0.5 else {f'part_{i}': part for i, part in enumerate(parts)}

    def is_shape(node):
        return isinstance(node, tuple)

    shapes = {'first': (3, 2), 'rest': tree(2)}
    params = jax.tree.map(lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=is_shape)
    sizes = np.exp(rng.uniform(np.log(1e-3), np.log(1e6), n))

    def rows(param):
        values = rng.standard_normal((n, *param.shape)) * sizes.reshape((n,) + (1,) * param.ndim)
        return values.astype(np.float32)

    examples = jax.tree.map(rows, params)
    odd = rng.permutation(n)[:5]
    for row, value in zip(odd, (np.nan, np.inf, -np.inf, 1e30, np.nan)):
        examples['first'][row, 1, 1] = value  # 1e30 is finite, its square is not
    mask = rng.random(n) < 0.7
    mask[odd[:4]], mask[odd[4]] = True, False
    return params, examples, mask


def loss(params, example):
    """A loss whose gradient is as large as the example, and not linear in the parameters."""
    products = jax.tree.map(lambda p, x: jnp.sum(jnp.sin(p) * x), params, example)
    return sum(jax.tree.leaves(products))


def assert_close(ours, theirs):
    """Relative to the norm of the whole sum, closer than what is left for rounding."""
    ours, theirs = (np.float64(jax.flatten_util.ravel_pytree(tree)[0]) for tree in (ours, theirs))
    assert np.linalg.norm(theirs) > 0
    assert np.linalg.norm(ours - theirs) < ROUNDING / 5 * np.linalg.norm(theirs)


@pytest.mark.parametrize('seed', range(5))
def test_clipped_sum_equals_jax_privacy(seed):
    """Random pytrees, with padding and with rows that are not finite, in other microbatches."""
    params, examples, mask = random_case(seed)
    clip_norm = float(np.exp(np.random.default_rng(seed).uniform(-3, 3)))
    grid = Grid(clip_norm=clip_norm, rows=len(mask))
    theirs = jax_privacy.clipped_grad(
        loss,
        l2_clip_norm=grid.bound,
        keep_batch_dim=False,
        microbatch_size=6,
        pre_clipping_transform=zero_unless_finite,
        return_grad_norms=True,
    )
    expected, auxiliary = jax.jit(lambda p, x, padding: theirs(p, x, is_padding_example=padding))(
        params, examples, ~mask
    )
    units, sums = jax.jit(
        lambda p, x, m: clipped_gradient_sum(loss, p, x, m, grid=grid, microbatch=4, microbatches=6)
    )(params, examples, mask)
    total = jax.tree.map(grid.decode, units)
    assert jax.tree.structure(total) == jax.tree.structure(expected)
    assert_close(total, expected)
    norms = np.asarray(auxiliary.grad_norms)
    counted = norms[mask & np.isfinite(norms)]
    assert sums['norm'] == pytest.approx(counted.sum(), rel=1e-5)
    assert 0 < sums['clipped'] == np.sum(counted > clip_norm)
    assert sums['non_finite'] == 4 and sums['examples'] == mask.sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, examples)
    in_one_go, our_norms = clipped_sum(gradients, mask, grid)
    jax.tree.map(np.testing.assert_array_equal, in_one_go, units)  # in any order the same bits
    np.testing.assert_allclose(our_norms[np.isfinite(norms)], norms[np.isfinite(norms)], rtol=1e-5)
