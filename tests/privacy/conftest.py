"""What tests with statistical power ask of samples.

Seeds are fixed, so every run sees the same draws. If they were not, every check here would fail a
correct program with a probability below FALSE_ALARM. The samples are so large that noise of 2 % less
or a sampling probability 1 % off do fail.
"""

import types

import numpy as np
import pytest
from scipy import stats

FALSE_ALARM = 1e-6


def assert_plausible(distribution, value, tests=1):
    """`value`, the most extreme of `tests`, is in neither tail of `distribution`."""
    value = np.asarray(value)
    tails = np.minimum(distribution.cdf(value), distribution.sf(value))
    assert 2 * tests * tails.min() > FALSE_ALARM


def assert_normal(values, std):
    """`values` are like independent draws from N(0, std²)."""
    z = np.ravel(values).astype(np.float64) / std
    assert stats.kstest(z, 'norm').pvalue > FALSE_ALARM
    # Sees errors of the scale half as large as the other test does.
    assert_plausible(stats.chi2(z.size), np.sum(z**2))


def assert_unrelated(columns):
    """No two columns, of mean 0 and variance 1, are correlated: not one pair, nor all a little."""
    rows, count = columns.shape
    products = columns.T.astype(np.float64) @ columns / np.sqrt(rows)
    z = products[np.triu_indices(count, 1)]
    assert_plausible(stats.norm, z, tests=z.size)
    assert_plausible(stats.chi2(z.size), np.sum(z**2))


@pytest.fixture(scope='session')
def statistics():
    """The checks above, by their names. (Tests cannot import each other's modules.)"""
    return types.SimpleNamespace(
        FALSE_ALARM=FALSE_ALARM,
        assert_plausible=assert_plausible,
        assert_normal=assert_normal,
        assert_unrelated=assert_unrelated,
    )
