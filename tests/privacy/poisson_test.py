import numpy as np
import pytest

from dpp_jax.privacy import poisson

KEY = 0x0123456789ABCDEF0123456789ABCDEF


def test_a_batch_depends_on_its_number_and_the_key_alone():
    sampler = poisson.PoissonSampler(size=500, probability=0.2, key=KEY)
    later = sampler.indices(7)
    np.testing.assert_array_equal(poisson.PoissonSampler(size=500, probability=0.2, key=KEY).indices(7), later)
    assert not np.array_equal(later, sampler.indices(8))
    assert not np.array_equal(later, poisson.PoissonSampler(size=500, probability=0.2, key=KEY + 1).indices(7))


def test_probability_one_takes_everybody():
    indices = poisson.PoissonSampler(size=50, probability=1.0, key=KEY).indices(3)
    np.testing.assert_array_equal(indices, np.arange(50))


def test_capacity_holds_all_batches_and_is_not_wasteful():
    sampler = poisson.PoissonSampler(size=60000, probability=1 / 15, key=KEY)
    capacity = sampler.capacity(64)
    assert capacity % 64 == 0
    assert max(len(sampler.indices(batch)) for batch in range(200)) < capacity < 1.2 * 4000
    assert poisson.PoissonSampler(size=100, probability=1.0, key=KEY).capacity(8) == 104


def test_padding_never_truncates():
    for n in (0, 1, 8, 9, 30):
        padded, mask = poisson.pad(np.arange(n) + 5, 8)
        assert len(padded) % 8 == 0 and len(padded) >= 8
        np.testing.assert_array_equal(padded[mask], np.arange(n) + 5)
        assert mask.sum() == n


@pytest.mark.parametrize(
    'arguments, text',
    [((0, 0.1, KEY), 'size is 0'), ((5, 0.0, KEY), 'probability is 0.0'), ((5, 1.5, KEY), 'is 1.5')],
)
def test_settings_out_of_range_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        poisson.PoissonSampler(*arguments)
