"""Poisson batches: a function of key and number, and rows of padding that hold nobody's data."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest

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
    for number in range(3):  # one example more changes nothing for the others
        less, more = samplers[1].indices(number), samplers[2].indices(number)
        np.testing.assert_array_equal(less, more[more < 999])


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
