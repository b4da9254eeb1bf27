"""Agreement with independent code: Opacus's accountant, and the clipped gradients of jax_privacy.

Opacus has its own code for the Rényi divergences and the step from them to ε. jax_privacy sums clipped
gradients for the same purpose and differs in two ways, which the tests remove: it clips to the norm
C itself, where ours leaves 1e-5 of it for rounding; and it replaces single non-finite entries of a
gradient by zeros, where ours takes the whole gradient for zero.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.privacy import accounting
from dpp_jax.privacy.ledger import Entry, Ledger
from dpp_jax.privacy.mechanism import clipped_gradient_sum, clipped_sum

ROUNDING = 1e-5  # by which the bound on a norm is below C


@pytest.fixture(scope='module')
def opacus():
    """(history of (σ, q) in the order of the releases, δ) → ε at our orders."""
    accountants = pytest.importorskip('opacus.accountants')

    def epsilon(history, delta):
        accountant = accountants.RDPAccountant()
        # As `step` keeps it, which takes one release at a time.
        accountant.history = [(sigma, q, count) for sigma, q, count in history]
        return accountant.get_epsilon(delta, alphas=list(accounting.RDP_ORDERS))

    return epsilon


def random_histories(number, most_steps, seed):
    """Lists of (σ, q, count), and δ: parts of a run such as queries and steps, with ε up to about 100."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        history = []
        for _ in range(rng.integers(1, 5)):
            sigma = float(np.exp(rng.uniform(np.log(0.8), np.log(20))))
            q = 1.0 if rng.random() < 0.2 else float(np.exp(rng.uniform(np.log(1e-3), np.log(0.9))))
            history.append((sigma, q, int(np.exp(rng.uniform(0, np.log(most_steps))))))
        yield history, float(10 ** rng.uniform(-9, -3))


def test_epsilon_of_random_histories_equals_opacus(opacus):
    figures = []
    for history, delta in random_histories(25, 3000, seed=1):
        event = accounting.compose(accounting.subsampled_gaussian(*part) for part in history)
        figures.append(accounting.epsilon(event, delta))
        assert figures[-1] == pytest.approx(opacus(history, delta), rel=1e-6), (history, delta)
    assert min(figures) < 0.5 and max(figures) > 10


def test_epsilon_of_a_ledger_equals_opacus(opacus, tmp_path):
    """Release by release, the mechanisms in turn, as another run might interleave them."""
    for number, (history, delta) in enumerate(random_histories(3, 20, seed=2)):
        ledger = Ledger(tmp_path / str(number) / 'ledger.jsonl')
        releases = [(part, index) for part, (_, _, count) in enumerate(history) for index in range(count)]
        np.random.default_rng(3).shuffle(releases)
        for part, index in releases:
            sigma, q, _ = history[part]
            ledger.append(Entry(f'mechanism_{part}', index, sigma, q, 2.0, 'r'))
        one_by_one = [(*history[part][:2], 1) for part, _ in releases]
        assert ledger.epsilon(delta) == pytest.approx(opacus(one_by_one, delta), rel=1e-6)


@pytest.fixture(scope='module')
def clipped_grad():
    return pytest.importorskip('jax_privacy').clipped_grad


def zero_unless_finite(gradient):
    """What ours does to a gradient that has a non-finite entry."""
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
    return jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), gradient)


def random_case(seed, n=24):
    """Parameters of random structure, n examples of random size, which are real: 4 of 5 odd ones."""
    rng = np.random.default_rng(seed)

    def tree(depth):
        if depth == 0 or rng.random() < 0.3:
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
def test_clipped_sum_equals_jax_privacy(clipped_grad, seed):
    """Random pytrees, with padding and with rows that are not finite, in other microbatches."""
    params, examples, mask = random_case(seed)
    clip_norm = float(np.exp(np.random.default_rng(seed).uniform(-3, 3)))
    theirs = clipped_grad(
        loss,
        l2_clip_norm=clip_norm * (1 - ROUNDING),
        keep_batch_dim=False,
        microbatch_size=6,
        pre_clipping_transform=zero_unless_finite,
        return_grad_norms=True,
    )
    expected, auxiliary = jax.jit(theirs.fun)(params, examples, is_padding_example=~mask)
    total, sums = jax.jit(
        lambda p, x, m: clipped_gradient_sum(
            loss, p, x, m, clip_norm=clip_norm, microbatch=4, microbatches=6
        )
    )(params, examples, mask)
    assert jax.tree.structure(total) == jax.tree.structure(expected)
    assert_close(total, expected)
    norms = np.asarray(auxiliary.grad_norms)
    counted = norms[mask & np.isfinite(norms)]
    assert sums['norm'] == pytest.approx(counted.sum(), rel=1e-5)
    assert 0 < sums['clipped'] == np.sum(counted > clip_norm)
    assert sums['non_finite'] == 4 and sums['examples'] == mask.sum()
    assert theirs.sensitivity() < clip_norm

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, examples)
    in_one_go, our_norms = clipped_sum(gradients, mask, clip_norm)
    assert_close(in_one_go, expected)
    np.testing.assert_allclose(our_norms[np.isfinite(norms)], norms[np.isfinite(norms)], rtol=1e-5)
