"""Poisson sampling: inclusion, independence, and the same batch for any devices and hosts."""

import numpy as np
import pytest
from scipy import stats

from dpp_jax.privacy import poisson
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.training import devices, steps

KEY = 0x0123456789ABCDEF0123456789ABCDEF


def inclusions(sampler, batches):
    """(batches, size) bool: who is in which batch."""
    included = np.zeros((len(batches), sampler.size), bool)
    for row, batch in zip(included, batches):
        row[sampler.indices(batch)] = True
    return included


@pytest.mark.parametrize('q', [0.01, 1 / 15, 0.3, 0.8])
def test_every_example_is_included_with_probability_q_in_every_batch(q, statistics):
    size, batches = 2000, 6000
    included = inclusions(poisson.PoissonSampler(size=size, probability=q, key=KEY), range(batches))
    statistics.assert_plausible(stats.binom(included.size, q), included.sum())
    for axis in (0, 1):  # every example, and the size of every batch: neither too even nor too uneven
        counts, n = included.sum(axis), included.shape[axis]
        statistics.assert_plausible(stats.binom(n, q), counts, tests=counts.size)
        spread = np.sum((counts - n * q) ** 2) / (n * q * (1 - q))
        statistics.assert_plausible(stats.chi2(counts.size), spread)
    # The sizes' whole distribution, in ten bins that are alike.
    borders = stats.binom(size, q).ppf(np.arange(1, 10) / 10)
    expected = batches * np.diff([0, *stats.binom(size, q).cdf(borders), 1])
    found = np.bincount(np.searchsorted(borders, included.sum(1)), minlength=10)
    assert stats.chisquare(found, expected).pvalue > statistics.FALSE_ALARM


def test_inclusions_are_independent_between_examples_batches_and_keys(statistics):
    sampler = poisson.PoissonSampler(size=500, probability=0.5, key=KEY)
    statistics.assert_unrelated(2.0 * inclusions(sampler, range(5000)) - 1)  # examples
    keys = (KEY, KEY ^ 1, KEY ^ (1 << 64), KEY ^ (1 << 127))
    samplers = [poisson.PoissonSampler(size=20000, probability=0.5, key=key) for key in keys]
    batches = np.concatenate([inclusions(sampler, range(100)) for sampler in samplers])
    statistics.assert_unrelated(2.0 * batches.T - 1)


def test_no_batch_is_another_one_shifted(statistics):
    """As it would be if the streams of two batches or keys overlapped."""
    size = 20000
    samplers = [poisson.PoissonSampler(size=size, probability=0.5, key=key) for key in (KEY, KEY ^ 1)]
    rows = np.concatenate([2.0 * inclusions(sampler, range(6)) - 1 for sampler in samplers])
    spectra = np.fft.rfft(rows)
    for i in range(len(rows)):
        for j in range(i, len(rows)):
            z = np.fft.irfft(spectra[i] * spectra[j].conj(), size) / np.sqrt(size)
            statistics.assert_plausible(stats.norm, z[i == j :], tests=100 * size)


def visited(indices, microbatch, capacity, share=WHOLE):
    """The images that the step's microbatches meet on this process's devices, in any order."""
    numbers = share.own(np.arange(500))
    images = np.zeros((len(numbers), 4, 4, 1), np.uint8)
    batch = devices.deal_own(steps.make_batch(images, numbers, indices, capacity, share=share))
    rows = microbatch * steps.used_microbatches(share.largest(indices), microbatch)
    return batch['label'][:, :rows][batch['mask'][:, :rows]]


@pytest.mark.parametrize(
    ('number', 'microbatch', 'capacity'), [(1, 1, 8), (1, 64, 64), (2, 4, 16), (8, 3, 24), (8, 2, 160)]
)
def test_a_batch_is_the_same_for_any_devices_microbatch_and_padding(number, microbatch, capacity):
    """Nobody is left out or met twice, also if a batch is far larger than expected."""
    sampler = poisson.PoissonSampler(size=500, probability=0.25, key=KEY)
    with devices.limited_to(number):
        for indices in (*map(sampler.indices, range(20)), np.arange(500), np.arange(0)):
            met = visited(indices, microbatch, capacity)
            np.testing.assert_array_equal(np.sort(met), indices)


def test_images_of_all_pairs_are_together_as_often_as_two_coins_say(statistics):
    """Few of many, where they are sorted, and most of them, where those that stay away are drawn."""
    for size, q in ((150, 0.02), (40, 0.9)):
        included = inclusions(poisson.PoissonSampler(size=size, probability=q, key=KEY), range(20000))
        together = included.T.astype(np.float64) @ included
        pairs = together[np.triu_indices(size, 1)]
        statistics.assert_plausible(stats.binom(20000, q * q), pairs, tests=pairs.size)
        statistics.assert_unrelated((included - q) / np.sqrt(q * (1 - q)))


def test_processes_meet_parts_of_one_batch():
    """Two of four devices: together every image of the batch once, each about half."""
    sampler = poisson.PoissonSampler(size=500, probability=0.25, key=KEY)
    with devices.limited_to(4):
        for number in range(20):
            indices = sampler.indices(number)
            parts = [visited(indices, 4, 80, Share(index, 2)) for index in range(2)]
            np.testing.assert_array_equal(np.sort(np.concatenate(parts)), indices)
            assert min(map(len, parts)) > 0.3 * len(indices)
