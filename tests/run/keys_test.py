"""The only door to the secret keys: they stay, they are not told, and no mechanism gets other ones."""

import json
import os
import stat

import jax
import numpy as np
import pytest

from dpp_jax.privacy import mechanism, poisson
from dpp_jax.privacy.ledger import Entry, Ledger
from dpp_jax.run.keys import Keys, is_seeded


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'keys.json'


@pytest.fixture
def ledger(tmp_path):
    """Names nothing yet."""
    return Ledger(tmp_path / 'ledger.jsonl')


def words(key):
    return tuple(np.ravel(jax.random.key_data(key)).tolist())


def entry(randomness, mechanism='dp_sgd', index=0):
    return Entry(mechanism, index, 1.0, 0.1, 1.0, randomness)


def test_keys_are_not_shown(path, ledger):
    keys, part = Keys(path, None).of_mechanism('dp_sgd', ledger), Keys(path, None).of_part('pretrain')
    sampler = poisson.PoissonSampler(size=5, probability=0.5, key=keys.sampling)
    shown = f'{keys} {keys.noise} {part} {sampler}'
    assert keys.noise.identifier in shown
    for secret in (keys.sampling, *words(keys.noise.keys), part.order, *words(part.random)):
        assert str(secret) not in shown


def test_a_plan_without_a_mechanism_whose_output_was_released_is_refused(path, ledger):
    keys = Keys(path, None)
    for name in ('central_query', 'dp_sgd'):
        keys.of_mechanism(name, ledger)
    keys.of_part('pretrain')
    keys.check_planned(['dp_sgd'])  # nothing was released yet
    keys.bind_release('central_query', [np.zeros(3)])
    keys.check_planned(['central_query', 'dp_sgd'])
    with pytest.raises(ValueError, match='keys of central_query, whose output was released') as refused:
        keys.check_planned(['dp_sgd'])
    assert '\n' not in str(refused.value)


def test_keys_stay_and_differ_between_parts_and_runs(path, tmp_path, ledger):
    one, two = Keys(path, None), Keys(tmp_path / 'other.json', None)
    keys = [
        one.of_mechanism('dp_sgd', ledger),
        one.of_mechanism('central_query', ledger),
        two.of_mechanism('dp_sgd', ledger),
    ]
    assert len({k.sampling for k in keys}) == 3
    assert len({k.noise.identifier for k in keys}) == 3
    assert len({words(k.noise.keys) for k in keys}) == 3
    parts = [one.of_part('pretrain'), one.of_part('init'), two.of_part('pretrain')]
    assert len({p.order for p in parts} | {k.sampling for k in keys}) == 6
    assert len({words(p.random) for p in parts} | {words(k.noise.keys) for k in keys}) == 6
    again = Keys(path, None).of_mechanism('dp_sgd', ledger)
    assert again.sampling == keys[0].sampling and again.noise.identifier == keys[0].noise.identifier
    assert words(again.noise.keys) == words(keys[0].noise.keys)
    assert words(Keys(path, None).of_part('pretrain').random) == words(parts[0].random)
    for each in keys:
        assert f'{each.sampling:x}' not in each.noise.identifier
        assert str(each.sampling) not in each.noise.identifier
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert 'without a privacy guarantee' in path.read_text()


def test_a_seed_makes_keys_repeatable_and_says_so(tmp_path, ledger):
    one, two, other = (
        Keys(tmp_path / name, seed).of_mechanism('dp_sgd', ledger)
        for name, seed in (('a', 7), ('b', 7), ('c', 8))
    )
    assert one.sampling == two.sampling != other.sampling
    assert words(one.noise.keys) == words(two.noise.keys) != words(other.noise.keys)
    assert 'not-private' in one.noise.identifier and is_seeded(one.noise.identifier)
    assert not is_seeded(Keys(tmp_path / 'd', None).of_mechanism('dp_sgd', ledger).noise.identifier)


def test_keys_that_were_made_otherwise_are_refused(path, ledger):
    Keys(path, 7).of_mechanism('dp_sgd', ledger)
    Keys(path, None).of_part('generate')
    text = 'config.seed is {}; .* holds keys of {}'
    for seed in (None, 8):
        with pytest.raises(ValueError, match=text.format(seed, 'dp_sgd')):
            Keys(path, seed).of_mechanism('dp_sgd', ledger)
    with pytest.raises(ValueError, match=text.format(7, 'generate')):
        Keys(path, 7).of_part('generate')


@pytest.mark.parametrize('file', ['lost', 'of another run', 'whole'])
def test_a_mechanism_gets_no_keys_but_those_that_the_ledger_names(path, ledger, tmp_path, file):
    """Other keys would spend its budget a second time, also where the file itself is in order."""
    keys = Keys(path, None)
    own = keys.of_mechanism('dp_sgd', ledger)
    ledger.append(entry(own.noise.identifier))
    assert keys.of_mechanism('dp_sgd', ledger).sampling == own.sampling
    if file == 'lost':
        path.unlink()
    elif file == 'of another run':
        other = tmp_path / 'other.json'
        Keys(other, None).of_mechanism('dp_sgd', ledger=Ledger(tmp_path / 'another.jsonl'))
        other.replace(path)
    else:  # and somebody ran with a copy of the folder, that had no keys
        ledger.append(entry('another', index=1))
    before = ledger.path.read_text()
    for _ in range(2):
        with pytest.raises(ValueError, match='has releases of dp_sgd with keys that .* second time'):
            keys.of_mechanism('dp_sgd', ledger)
    assert ledger.path.read_text() == before
    keys.of_mechanism('central_query', ledger)  # of which the ledger names nothing


def test_keys_that_no_release_was_made_with_are_given(path, ledger):
    """Drawn by a process that was killed before its first release, or while the ledger names another part."""
    first = Keys(path, None).of_mechanism('dp_sgd', ledger)
    ledger.append(entry('of the query', mechanism='central_query'))
    assert Keys(path, None).of_mechanism('dp_sgd', ledger).sampling == first.sampling


def test_what_was_released_with_a_key_is_not_replaced_by_anything_else(path, ledger):
    keys = Keys(path, None)
    arrays = [np.arange(3.0), np.zeros((2, 2), np.uint8)]
    for name in ('dp_sgd', 'central_query'):
        keys.of_mechanism(name, ledger)
    assert not keys.may_repeat('dp_sgd') and keys.may_repeat('pretrain')
    keys.bind_release('dp_sgd', arrays)
    keys.bind_release('dp_sgd', [array.copy() for array in arrays])
    assert keys.may_repeat('dp_sgd') and not keys.may_repeat('central_query')
    other = [np.nextafter(arrays[0], 9), arrays[1]]
    with pytest.raises(ValueError, match='the new output of dp_sgd differs .* It was not released'):
        keys.bind_release('dp_sgd', other)
    keys.bind_release('central_query', other)
    keys.of_part('generate')
    with pytest.raises(ValueError, match='the new output of central_query differs'):
        Keys(path, None).bind_release('central_query', arrays)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.parametrize('damage', [lambda text: text[:-9], lambda text: '\0' * len(text), lambda text: '[]'])
def test_a_damaged_file_is_named_with_what_to_do(path, ledger, damage):
    keys = Keys(path, None)
    ask = [
        lambda: keys.of_mechanism('dp_sgd', ledger),
        lambda: keys.of_part('pretrain'),
        lambda: keys.may_repeat('dp_sgd'),
        lambda: keys.bind_release('dp_sgd', []),
    ]
    for each in ask:
        each()
    whole = json.loads(path.read_text())
    assert set(whole) == {'_note', '_random_bits', 'dp_sgd', 'pretrain'}
    torn = damage(path.read_text())
    path.write_text(torn)
    for each in ask:
        with pytest.raises(ValueError, match='keys.json cannot be read .*Restore the file.*delete it'):
            each()
    assert path.read_text() == torn


@pytest.mark.parametrize('name', ['central_query', 'dp_sgd'])
def test_keys_of_a_mechanism_have_one_door(path, name):
    with pytest.raises(ValueError, match=f"name is '{name}'; keys of a mechanism"):
        Keys(path, None).of_part(name)
    assert not path.exists()


def test_a_mechanism_has_four_independent_noise_keys_and_another_part_one(path, ledger):
    """A search finds a key of 64 bits; four of them together have 256."""
    keys = Keys(path, None)
    noise = keys.of_mechanism('dp_sgd', ledger).noise.keys
    assert noise.shape == (4,) and len({words(key) for key in noise}) == 4
    assert keys.of_part('pretrain').random.shape == ()


def test_a_run_that_began_with_a_single_noise_key_goes_on_with_it(path, ledger):
    old = {'identifier': 'ab', 'sampling': 'f' * 32, 'noise': '00000001fffffffe'}
    path.write_text(json.dumps({'dp_sgd': old}))
    keys = Keys(path, None).of_mechanism('dp_sgd', ledger)
    assert keys.noise.keys.shape == () and words(keys.noise.keys) == (1, 0xFFFFFFFE)
    noise = np.asarray(mechanism.normal(keys.noise.keys, (5,)))
    expected = jax.random.normal(keys.noise.keys, (4, 5)).sum(0) / 2
    np.testing.assert_array_equal(noise, expected)


def test_keys_tell_how_batches_are_drawn_and_those_of_earlier_versions_go_on_as_they_did(path, ledger):
    """A step that is taken again must draw the same batch."""
    new = Keys(path, None).of_mechanism('dp_sgd', ledger)
    assert new.drawing == poisson.COUNT
    assert Keys(path, None).of_mechanism('dp_sgd', ledger).drawing == poisson.COUNT
    known = json.loads(path.read_text())
    known['dp_sgd']['sampling'] = known['dp_sgd']['sampling'].removeprefix('count:')
    assert len(known['dp_sgd']['sampling']) == 32  # as an earlier version wrote it, and no other can be read
    path.write_text(json.dumps(known))
    old = Keys(path, None).of_mechanism('dp_sgd', ledger)
    assert (old.sampling, old.drawing) == (new.sampling, poisson.COINS)
    known['dp_sgd']['sampling'] = 'dice:' + known['dp_sgd']['sampling']  # of a later version
    path.write_text(json.dumps(known))
    with pytest.raises(ValueError, match='field dp_sgd.sampling is "dice:.*Restore the file'):
        Keys(path, None).of_mechanism('dp_sgd', ledger)


@pytest.mark.parametrize(
    'flag, value, told',
    [
        ('jax_threefry_partitionable', False, 'JAX_THREEFRY_PARTITIONABLE is False; set JAX_.*=True'),
        ('jax_default_prng_impl', 'rbg', 'JAX_DEFAULT_PRNG_IMPL is rbg; set JAX_.*=threefry2x32'),
    ],
)  # fmt: skip
def test_keys_are_given_only_while_jax_makes_the_same_bits_of_them(path, ledger, flag, value, told):
    Keys(path, None).of_mechanism('dp_sgd', ledger)
    before, usual = path.read_bytes(), getattr(jax.config, flag)
    jax.config.update(flag, value)
    try:
        for ask in (
            lambda: Keys(path, None).of_mechanism('dp_sgd', ledger),
            lambda: Keys(path, 7).of_part('x'),
        ):
            with pytest.raises(ValueError, match=f'{told}.* second release'):
                ask()
    finally:
        jax.config.update(flag, usual)
    assert path.read_bytes() == before
    Keys(path, None).of_mechanism('dp_sgd', ledger)


def test_another_version_of_jax_may_make_other_bits(path, ledger):
    Keys(path, None).of_mechanism('dp_sgd', ledger)
    known = json.loads(path.read_text())
    known['_random_bits']['test_draw'] = 'of another version'
    path.write_text(json.dumps(known))
    with pytest.raises(ValueError, match='JAX .* makes other bits; use the version of this folder'):
        Keys(path, None).of_part('pretrain')


def test_keys_of_an_earlier_version_go_on_and_note_their_bits(path, ledger):
    own = Keys(path, None).of_mechanism('dp_sgd', ledger)
    known = json.loads(path.read_text())
    noted = known.pop('_random_bits')
    path.write_text(json.dumps(known))
    assert Keys(path, None).of_mechanism('dp_sgd', ledger).sampling == own.sampling
    assert json.loads(path.read_text())['_random_bits'] == noted
