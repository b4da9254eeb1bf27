"""The mechanism: noise and ledger entry come together, from one key and one index."""

import dataclasses
import inspect

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.privacy import mechanism as mechanism_lib
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey

KEY = NoiseKey(identifier='key-1', keys=jax.random.split(jax.random.key(11), 4))
OTHER_KEY = NoiseKey(identifier='key-2', keys=jax.random.split(jax.random.key(12), 4))
INDICES = st.integers(0, 2**31 - 1)


def make_mechanism(**changes):
    settings = dict(name='test', noise_multiplier=3.0, sampling_probability=0.1, sensitivity=2.0)
    return GaussianMechanism(**{**settings, **changes})


def identity_sum(total):
    """A sum that is its own argument, with something aside."""
    return total, {'aside': jnp.sum(total['a'])}


def random_sum(draw_key, total):
    """A sum that draws random numbers of its own: what it drew stands aside."""
    drawn = jax.random.key_data(draw_key)
    return total, {'drawn': drawn}


def make_noisy(function=identity_sum, key=KEY, **options):
    return make_mechanism().noisy(
        function, key, then=lambda noisy, aside, *arguments: (noisy, aside, arguments), **options
    )


TOTAL = {'a': np.arange(12, dtype=np.float32).reshape(3, 4), 'b': np.float32(7)}
NOISY = {
    is_random: make_noisy(random_sum if is_random else identity_sum, is_random=is_random)
    for is_random in (False, True)
}
OTHER = make_noisy(key=OTHER_KEY)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def of_the_key(index, is_random):
    """The keys of noise and of the sum in release number `index`, as key data."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEY.keys, index)
    if not is_random:
        return keys, None
    split = jax.vmap(jax.random.split)(keys)
    return split[:, 0], split[0, 1]


@jax.jit
def expected_sum(total, key):
    """σ Δ = 6 times unit noise of this key, in the order of the leaves."""
    vector = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(total)])
    return vector + 6.0 * mechanism_lib.normal(key, vector.shape)


@pytest.mark.parametrize('is_random', [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(index=INDICES)
def test_release_number_n_has_entry_n_and_the_noise_of_key_and_n(is_random, index):
    (noisy, aside, arguments), entry = NOISY[is_random](index, TOTAL)
    noise_key, sum_key = of_the_key(index, is_random)
    # Another program may add the four draws in another order.
    np.testing.assert_allclose(flat(noisy), expected_sum(TOTAL, noise_key), rtol=1e-5, atol=1e-5)
    assert dataclasses.asdict(entry) == {
        'mechanism': 'test',
        'index': index,
        'noise_multiplier': 3.0,
        'sampling_probability': 0.1,
        'sensitivity': 2.0,
        'randomness': 'key-1',
        'unit': 'image',
        'declared': False,
    }
    # What stands aside, and the arguments, come through without noise.
    if is_random:
        np.testing.assert_array_equal(aside['drawn'], jax.random.key_data(sum_key))
    else:
        assert aside['aside'] == TOTAL['a'].sum()
    jax.tree.map(np.testing.assert_array_equal, arguments, (TOTAL,))


@pytest.mark.parametrize('is_random', [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(one=INDICES, other=INDICES)
def test_the_same_index_is_the_same_release_and_another_index_is_another(is_random, one, other):
    """Noise and entry cannot part: both are equal, or both differ."""
    noisy_sum = NOISY[is_random]
    (value, aside, _), entry = noisy_sum(one, TOTAL)
    (again, aside_again, _), entry_again = noisy_sum(one, TOTAL)
    jax.tree.map(np.testing.assert_array_equal, (value, aside), (again, aside_again))
    assert entry == entry_again
    (second, second_aside, _), second_entry = noisy_sum(other, TOTAL)
    assert (entry.key == second_entry.key) == (one == other)
    differs = flat(value) != flat(second)
    # Rounded to float32 beside the sum, one of the 13 values may come out equal by chance; not two.
    assert not differs.any() if one == other else differs.sum() >= 12
    if is_random:
        assert np.array_equal(aside['drawn'], second_aside['drawn']) == (one == other)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(index=INDICES)
def test_another_key_has_other_noise_and_another_name_in_the_entry(index):
    (value, *_), entry = NOISY[False](index, TOTAL)
    (second, *_), second_entry = OTHER(index, TOTAL)
    assert (flat(value) != flat(second)).sum() >= 12
    assert entry == dataclasses.replace(second_entry, randomness='key-1')
    assert second_entry.randomness == 'key-2'


def test_the_noise_of_a_sum_that_draws_is_none_that_the_sum_can_draw():
    """Its key is independent of the noise's, and of the noise of the same release without draws."""
    index = 5
    noise_key, sum_key = of_the_key(index, True)
    plain_key, _ = of_the_key(index, False)
    data = [jax.random.key_data(keys) for keys in (noise_key, sum_key, plain_key, KEY.keys)]
    words = np.concatenate([np.reshape(keys, (-1, 2)) for keys in data])
    assert len({word.tobytes() for word in words}) == 13


@pytest.mark.parametrize('index', [-1, 1.0, True, None])
def test_an_index_that_the_ledger_cannot_hold_draws_nothing(index):
    ran = []
    noisy_sum = make_noisy(compiled=lambda function: lambda *arguments: ran.append(arguments))
    with pytest.raises(ValueError, match=f'index is {index}; it must be'):
        noisy_sum(index, TOTAL)
    assert not ran


def test_the_only_ways_to_noise_bring_the_entry_along():
    """Besides its fields a mechanism has the entry and the noisy sum; a key shows its name alone."""
    fields = {field.name for field in dataclasses.fields(GaussianMechanism)}
    public = {name for name, _ in inspect.getmembers(make_mechanism()) if not name.startswith('_')}
    assert public - fields == {'entry', 'noisy'}
    assert 'key-1' in repr(KEY) and str(jax.random.key_data(KEY.keys)) not in repr(KEY)
    assert 'Array' not in repr(KEY)


def test_the_entry_says_what_the_noise_is():
    entry = make_mechanism().entry(4, 'r')
    assert (entry.mechanism, entry.index, entry.randomness) == ('test', 4, 'r')
    assert (entry.noise_multiplier, entry.sampling_probability, entry.sensitivity) == (3.0, 0.1, 2.0)


@pytest.mark.parametrize(
    ('field', 'value', 'allowed'),
    [
        ('name', '', 'a text, not empty'),
        ('name', 3, 'a text, not empty'),
        ('noise_multiplier', 0.0, 'finite and > 0'),
        ('noise_multiplier', -1.0, 'finite and > 0'),
        ('noise_multiplier', float('nan'), 'finite and > 0'),
        ('noise_multiplier', float('inf'), 'finite and > 0'),
        ('noise_multiplier', '3', 'a number'),
        ('noise_multiplier', True, 'a number'),
        ('sampling_probability', 0.0, r'in \(0, 1\]'),
        ('sampling_probability', 1.5, r'in \(0, 1\]'),
        ('sampling_probability', float('nan'), r'in \(0, 1\]'),
        ('sensitivity', 0.0, 'finite and > 0'),
        ('sensitivity', -1.0, 'finite and > 0'),
        ('sensitivity', float('nan'), 'finite and > 0'),
        ('sensitivity', float('inf'), 'finite and > 0'),
        ('sensitivity', None, 'a number'),
    ],
)
def test_a_mechanism_without_noise_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f'^{field} is {value!r}; it must be {allowed}'):
        make_mechanism(**{field: value})


@pytest.mark.parametrize('identifier', ['', None, 3])
def test_a_key_without_a_name_is_refused(identifier):
    with pytest.raises(ValueError, match=f'^identifier is {identifier!r}; it must be a text, not empty'):
        NoiseKey(identifier=identifier, keys=jax.random.split(jax.random.key(0), 4))


def test_mechanism_and_key_take_names_only_and_cannot_be_changed():
    with pytest.raises(TypeError):
        GaussianMechanism('test', 3.0, 0.1, 2.0)
    with pytest.raises(TypeError):
        NoiseKey('key-1', jax.random.key(0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_mechanism().noise_multiplier = 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        KEY.identifier = 'other'
    with pytest.raises(dataclasses.FrozenInstanceError):
        OTHER.noise_key = KEY


def test_noise_has_fine_values_in_its_tail():
    """One draw of JAX's has so few values far out that most of them come several times."""
    shape = (1 << 22,)
    for values, is_fine in (
        (mechanism_lib.normal(jax.random.key(0), shape), True),
        (jax.random.normal(jax.random.key(0), shape), False),
    ):
        tail = np.asarray(values)[np.abs(values) > 4]
        assert len(tail) > 150
        assert (len(np.unique(tail)) > 0.99 * len(tail)) == is_fine
    bits = jnp.finfo(jnp.float32)
    farthest = jax.scipy.special.erfinv(1 - bits.epsneg) * np.sqrt(2)  # of one draw
    assert mechanism_lib.NOISE_KEYS * farthest / np.sqrt(mechanism_lib.NOISE_KEYS) > 10
