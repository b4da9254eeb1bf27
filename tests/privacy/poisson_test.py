"""Poisson batches: a function of key and number, and rows of padding that hold nobody's data."""

import collections
import contextlib
import dataclasses
from fractions import Fraction
import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest
from scipy import stats

from dpp_jax.privacy import poisson

KEY = 0x0123456789ABCDEF0123456789ABCDEF


def test_a_batch_depends_on_its_number_and_the_key_alone():
    sampler = poisson.PoissonSampler(size=500, probability=0.2, key=KEY)
    later = sampler.indices(7)
    np.testing.assert_array_equal(
        poisson.PoissonSampler(size=500, probability=0.2, key=KEY).indices(7), later
    )
    assert not np.array_equal(later, sampler.indices(8))
    assert not np.array_equal(
        later, poisson.PoissonSampler(size=500, probability=0.2, key=KEY + 1).indices(7)
    )


def test_probability_one_takes_everybody():
    indices = poisson.PoissonSampler(size=50, probability=1.0, key=KEY).indices(3)
    np.testing.assert_array_equal(indices, np.arange(50))


def test_capacity_holds_all_batches_and_is_not_wasteful():
    sampler = poisson.PoissonSampler(size=60000, probability=1 / 15, key=KEY)
    capacity = sampler.capacity(64)
    assert capacity % 64 == 0
    assert max(len(sampler.indices(batch)) for batch in range(200)) < capacity < 1.25 * 4000
    assert poisson.PoissonSampler(size=100, probability=1.0, key=KEY).capacity(8) == 104


def test_padding_never_truncates():
    arrays = {'x': np.arange(40, dtype=np.int64) + 5}
    for n in (0, 1, 8, 9, 30):
        rows, mask = poisson.fetch(arrays, np.arange(n), 8)
        assert len(rows['x']) % 8 == 0 and len(rows['x']) >= 8
        np.testing.assert_array_equal(rows['x'][mask], np.arange(n) + 5)
        assert mask.sum() == n and mask.dtype == bool


PRIVATE = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 20), st.just(3), st.just(2)), elements=st.integers(1, 255)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(private=PRIVATE, capacity=st.integers(1, 30), data=st.data())
def test_a_row_of_padding_is_zero_and_holds_nobodys_data(private, capacity, data):
    """Every private value is at least 1: a row of zeros is nobody's. Members' rows are theirs, in order."""
    size = len(private)
    indices = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1)))), np.int64)
    arrays = {'image': private, 'label': np.arange(size, dtype=np.int32) + 1, 'weight': np.ones(size)}
    copies = {name: array.copy() for name, array in arrays.items()}
    rows, mask = poisson.fetch(arrays, indices, capacity)
    assert rows.keys() == arrays.keys()
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < len(indices))
    assert len(mask) % capacity == 0 and len(mask) - max(len(indices), 1) < capacity
    for name, array in arrays.items():
        assert rows[name].dtype == array.dtype and rows[name].shape == (len(mask), *array.shape[1:])
        np.testing.assert_array_equal(rows[name][mask], array[indices])
        assert not rows[name][~mask].any()
        # Rows are copies: what is done to a batch leaves the private images alone.
        rows[name][:] = 0
        np.testing.assert_array_equal(array, copies[name])


@pytest.mark.parametrize('probability', [0.01, 0.3, 1.0])
def test_where_the_number_of_examples_is_not_public_only_who_is_in_a_batch_depends_on_it(probability):
    samplers = [
        poisson.PoissonSampler(size=size, probability=probability, key=KEY, public_size=1000)
        for size in (1, 999, 1000, 1001, 5000)
    ]
    assert {sampler.expected_size for sampler in samplers} == {probability * 1000}
    assert len({sampler.capacity(8) for sampler in samplers}) == 1
    usual = poisson.PoissonSampler(size=1000, probability=probability, key=KEY)
    assert samplers[2].capacity(8) == usual.capacity(8)


class Words:
    """Random words that a test chooses."""

    def __init__(self, words):
        self.words = list(words)

    def random_raw(self, count):
        taken, self.words = self.words[:count], self.words[count:]
        if len(taken) < count:
            raise StopIteration
        return np.array(taken, np.uint64)


@pytest.mark.parametrize('size', [1, 2, 5, 17])
@pytest.mark.parametrize('q', [1e-300, 1e-9, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-53, 1.0])
def test_the_number_of_a_batch_is_binomial_to_128_bits(size, q):
    """Against exact fractions. q is the fraction that the float is, as the accountant takes it."""
    least, ends = poisson._table(size, q)
    exact = Fraction(q)
    distance = Fraction(0)
    for n in range(size + 1):
        weight = 0
        if 0 <= n - least < len(ends):
            weight = ends[n - least] - (ends[n - least - 1] if n > least else 0)
        pmf = math.comb(size, n) * exact**n * (1 - exact) ** (size - n)
        distance += abs(Fraction(weight, ends[-1]) - pmf)
    assert distance / 2 < Fraction(1, 2**128)


@pytest.mark.parametrize(('size', 'q'), [(60000, 1 / 15), (10**8, 4096 / 10**8)])
def test_a_large_table_is_binomial_and_what_it_leaves_out_is_nothing(size, q):
    least, ends = poisson._table(size, q)
    numbers = np.arange(least - 1, least + len(ends) + 1)
    found = np.float64(np.diff([0, 0, *ends, ends[-1]]) / ends[-1])  # whole numbers of 200 bits until here
    np.testing.assert_allclose(found, stats.binom(size, q).pmf(numbers), rtol=1e-6, atol=1e-50)
    assert found[1] > 0 and found[-2] > 0


def test_random_bits_meet_each_number_as_often_as_its_weight_says():
    size, q = 4, 0.3
    least, ends = poisson._table(size, q)
    assert (least, len(ends)) == (0, 5)

    def drawn(value):
        words = [value >> shift & 2**64 - 1 for shift in (192, 128, 64, 0)]
        return poisson._draw_count(Words(words), size, q)

    assert (drawn(0), drawn(2**256 - 1)) == (0, 4)
    for number, end in enumerate(ends[:-1]):  # the first value of 256 bits beyond the weights so far
        border = -(-(end << 256) // ends[-1])
        assert (drawn(border - 1), drawn(border)) == (number, number + 1)


@pytest.mark.parametrize('dense', [0, 32], ids=['sorted', 'table'])
@pytest.mark.parametrize(('size', 'count'), [(3, 1), (3, 2), (4, 2), (5, 1)])
def test_every_set_of_so_many_images_comes_from_as_many_streams(size, count, dense, monkeypatch):
    """Of all streams of five words; those that do not suffice for a set are left out."""
    monkeypatch.setattr(poisson, '_DENSE', dense)
    found = collections.Counter()
    for stream in itertools.product(range(size), repeat=5):
        with contextlib.suppress(StopIteration):
            found[tuple(poisson._draw_distinct(Words(stream), count, size).tolist())] += 1
    assert set(found) == set(itertools.combinations(range(size), count))
    assert len(set(found.values())) == 1


def test_words_that_would_favor_small_numbers_are_left_out():
    size = 2**62 + 2**61  # 2^64 has room for it twice, and for 2^62 more values
    last = 2 * size - 1
    words = [last + 1, 2**64 - 1, last, 5, 7]
    np.testing.assert_array_equal(poisson._draw_distinct(Words(words), 2, size), [5, size - 1])
    np.testing.assert_array_equal(poisson._draw_uniform(Words([2**64 - 1]), 1, 2**62), [2**62 - 1])


@pytest.mark.parametrize('q', [0.002, 0.05, 0.5, 0.98, 1.0])
def test_sorting_and_a_table_draw_the_same_batch(q, monkeypatch):
    sampler = poisson.PoissonSampler(size=3000, probability=q, key=KEY)
    drawn = []
    for dense in (0, 10**9):
        monkeypatch.setattr(poisson, '_DENSE', dense)
        drawn.append([sampler.indices(batch) for batch in range(5)])
    for one, other in zip(*drawn):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.int64 and (np.diff(one) > 0).all()


def test_drawing_takes_time_in_the_size_of_a_batch_whatever_there_is():
    """Of 2^62 images, of which no array of all of them could be made."""
    sampler = poisson.PoissonSampler(size=2**62, probability=2.0**-52, key=KEY)
    sizes = [len(sampler.indices(batch)) for batch in range(20)]
    assert np.abs(np.mean(sizes) - 1024) < 5 * 32 / np.sqrt(20)
    assert sampler.indices(0).max() > 2**61
    assert max(sizes) < sampler.capacity(8) < 1700


def test_extreme_probabilities_draw_nobody_and_everybody():
    for size in (1, 2, 1000):
        draw = lambda q, size=size: poisson.PoissonSampler(size=size, probability=q, key=KEY).indices(0)
        assert len(draw(5e-324)) == len(draw(1e-40)) == 0
        np.testing.assert_array_equal(draw(1.0), np.arange(size))
    one = poisson.PoissonSampler(size=1, probability=0.5, key=KEY)
    assert 60 < sum(len(one.indices(batch)) for batch in range(200)) < 140


@pytest.mark.parametrize(
    ('drawing', 'batch', 'expected'),
    [
        ('count', 7, [21, 37, 46, 61, 124, 126, 161, 197, 232, 259, 278, 359, 379, 383]),
        ('coins', 7, [154, 175, 187, 194, 213, 225, 228, 232, 245, 263, 295, 334]),
    ],
)
def test_batches_of_a_key_are_these_in_every_version_and_on_every_machine(drawing, batch, expected):
    """A run that goes on must draw what it drew. Never change these numbers: add a drawing."""
    sampler = poisson.PoissonSampler(size=400, probability=0.03, key=KEY, drawing=drawing)
    assert sampler.indices(batch).tolist() == expected


def test_runs_of_earlier_versions_toss_a_coin_for_every_image():
    sampler = poisson.PoissonSampler(size=300, probability=0.3, key=KEY, drawing=poisson.COINS)
    uniform = np.random.Generator(np.random.Philox(key=KEY, counter=[0, 0, 0, 4])).random(300)
    np.testing.assert_array_equal(sampler.indices(4), np.flatnonzero(uniform < 0.3))


GOOD = dict(size=5, probability=0.1, key=KEY)


@pytest.mark.parametrize(
    ('field', 'value', 'allowed'),
    [
        ('size', 0, 'a whole number, at least 1'),
        ('size', 2.5, 'a whole number, at least 1'),
        ('size', True, 'a whole number, at least 1'),
        ('public_size', 0, 'a whole number, at least 1'),
        ('public_size', 2.5, 'a whole number, at least 1'),
        ('probability', 0.0, r'in \(0, 1\]'),
        ('probability', 1.5, r'in \(0, 1\]'),
        ('probability', float('nan'), r'in \(0, 1\]'),
        ('probability', '0.5', r'in \(0, 1\]'),
        ('drawing', 'dice', "'coins' or 'count'"),
    ],
)
def test_settings_out_of_range_are_named(field, value, allowed):
    with pytest.raises(ValueError, match=f'^{field} is {value!r}; it must be {allowed}'):
        poisson.PoissonSampler(**{**GOOD, field: value})


@pytest.mark.parametrize('key', [-1, 2**128, 0.5, '9' * 30])
def test_a_bad_key_is_refused_and_not_printed(key):
    with pytest.raises(ValueError, match='^key must be a whole number of 128 bits$'):
        poisson.PoissonSampler(**{**GOOD, 'key': key})


def test_a_sampler_takes_names_only_hides_its_key_and_cannot_be_changed():
    with pytest.raises(TypeError):
        poisson.PoissonSampler(5, 0.1, KEY)
    sampler = poisson.PoissonSampler(**GOOD)
    assert str(KEY) not in repr(sampler) and 'key' not in repr(sampler)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.probability = 1.0
