"""Scores against a direct computation of their definitions, and in the order in which they should be."""

import itertools

import numpy as np
import pytest

from dpp_jax.evaluation import scores


def rng():
    return np.random.default_rng(0)


def test_kid_is_the_mean_over_subsets_of_the_unbiased_estimate():
    x, y = rng().standard_normal((2, 12, 5)).astype(np.float32)
    found = scores.kid(x, y + 1, rng())
    generator, direct = rng(), []
    kernel = lambda a, b: (float(a.astype(np.float64) @ b.astype(np.float64)) / 5 + 1) ** 3
    for _ in range(50):
        a, b = x[generator.choice(12, 6, replace=False)], (y + 1)[generator.choice(12, 6, replace=False)]
        within = [np.mean([kernel(p, q) for p, q in itertools.permutations(s, 2)]) for s in (a, b)]
        direct.append(sum(within) - 2 * np.mean([kernel(p, q) for p in a for q in b]))
    assert found.value == pytest.approx(np.mean(direct), rel=1e-9)
    assert found.spread == pytest.approx(np.std(direct, ddof=1), rel=1e-9) and found.images == 12


def test_kid_of_one_distribution_is_zero_on_average_and_small_sets_do_not_bias_it():
    sets = rng().standard_normal((40, 2, 30, 8))
    found = [scores.kid(x, y, rng()).value for x, y in sets]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(40)
    assert scores.kid(sets[0, 0], sets[0, 1] + 1, rng()).value > 0.5


def test_inception_score_is_its_definition():
    logits = rng().standard_normal((50, 4)) * 3
    found = scores.inception_score(logits, rng())
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    parts = np.array_split(p[rng().permutation(50)], 10)
    direct = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(axis=0))) for q in part])) for part in parts]
    assert found.value == pytest.approx(np.mean(direct)) and found.spread == pytest.approx(
        np.std(direct, ddof=1)
    )
    sure = np.eye(5)[np.arange(1000) % 5] * 100
    assert scores.inception_score(sure, rng()).value == pytest.approx(5, rel=0.05)
    assert scores.inception_score(np.zeros((20, 5)), rng()).value == pytest.approx(1)


def direct_share(judged, manifold):
    """Share of points that lie in the ball of some point of the other set, up to its third neighbor."""
    radius = [np.sort([np.linalg.norm(p - q) for q in manifold])[3] for p in manifold]
    return np.mean([any(np.linalg.norm(p - q) <= r for q, r in zip(manifold, radius)) for p in judged])


@pytest.mark.parametrize('block', [1, 2**24], ids=['row by row', 'at once'])
def test_precision_and_recall_are_their_definition(monkeypatch, block):
    monkeypatch.setattr(scores, '_BLOCK', block)
    made, real = rng().standard_normal((40, 2)) * 0.5 + 0.5, rng().standard_normal((60, 2))
    found = scores.precision_recall(made, real, rng())
    assert found['precision'].value == pytest.approx(direct_share(made, real))
    assert found['recall'].value == pytest.approx(direct_share(real, made))
    assert found['precision'].images == 40 and found['recall'].spread > 0


def test_precision_falls_with_strange_images_and_recall_with_missing_ones():
    real = rng().standard_normal((300, 4))
    same, few, strange = real + 0.01, real[real[:, 0] > 0], np.concatenate([real[:150], real[:150] + 50])
    of = lambda made: {
        name: score.value for name, score in scores.precision_recall(made, real, rng()).items()
    }
    assert of(same)['precision'] == of(same)['recall'] == 1
    assert of(few)['precision'] == 1 and of(few)['recall'] < 0.8
    assert of(strange)['precision'] == 0.5


def test_too_few_images_are_refused():
    few = np.zeros((3, 2))
    for call in (
        lambda: scores.kid(few, few, rng()),
        lambda: scores.inception_score(few, rng()),
        lambda: scores.precision_recall(few, few, rng()),
    ):
        with pytest.raises(ValueError, match='3 .*needs? at least'):
            call()
