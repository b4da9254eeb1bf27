import errno
import json
import os
import stat
import tempfile

import jax
import numpy as np
import pytest

from dpp_jax.privacy import poisson
from dpp_jax.run import folder as workdir_lib


def record(root, config):
    """What a run does with a folder before it computes anything."""
    workdir = workdir_lib.WorkDir(root)
    workdir.check(config)
    with workdir.opened():
        workdir.record(config)
    return workdir


def test_private_is_closed_to_others_and_says_what_it_is(tiny_config, tmp_path):
    workdir = record(tmp_path / 'run', tiny_config())
    workdir.keys('dp_sgd', None)
    assert stat.S_IMODE(os.stat(workdir.private).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(workdir.private / 'keys.json').st_mode) == 0o600
    assert 'WITHOUT a privacy guarantee' in (workdir.private / 'README.txt').read_text()


def test_another_config_is_refused_with_the_differences(tiny_config, tmp_path):
    record(tmp_path, tiny_config())
    workdir = record(tmp_path, tiny_config())
    with pytest.raises(ValueError) as error:
        workdir.check(tiny_config(finetune__epochs=3, dp__epsilon=2.0))
    assert 'config.finetune.epochs: 1.0 there, 3.0 now' in str(error.value)
    assert 'config.dp.epsilon: 10.0 there, 2.0 now' in str(error.value)
    assert 'query' not in str(error.value)


def test_settings_that_change_no_result_or_only_what_follows_the_model_may_change(tiny_config, tmp_path):
    record(tmp_path, tiny_config())
    record(tmp_path, tiny_config(finetune__microbatch=2, loop__log_every_steps=7))
    record(tmp_path, tiny_config(generate__sampler__steps=2, evaluate__epochs=3))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('')
    with pytest.raises(PermissionError, match='--workdir=.*file/run cannot be written'):
        with workdir_lib.WorkDir(blocked / 'run').opened():
            pass


def test_a_file_system_that_can_only_be_read_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
    with pytest.raises(PermissionError, match='cannot be written .*Read-only file system'):
        with workdir_lib.WorkDir(tmp_path).opened():
            pass


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path):
    with workdir_lib.WorkDir(tmp_path).opened():
        with pytest.raises(PermissionError, match='is in use by another process'):
            with workdir_lib.WorkDir(tmp_path).opened():
                pass
    with workdir_lib.WorkDir(tmp_path).opened():
        pass


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path)
    with workdir.opened():
        (workdir.release / 'a').mkdir()
        kept = workdir.release / 'a' / 'file.npz'
        kept.write_bytes(b'whole')
        (workdir.release / 'a' / '.new_file.npz').write_bytes(b'ha')
        workdir_lib.unfinished(workdir.release / 'png').mkdir()
    with workdir.opened():
        left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*')}
    assert left == {'.lock', 'release', 'private', 'release/a', 'release/a/file.npz'}


def test_nothing_is_removed_from_folders_that_are_not_of_the_run(tmp_path):
    theirs = [tmp_path / 'theirs' / '.new_file', tmp_path / '.new_folder' / 'file']
    for path in theirs:
        path.parent.mkdir()
        path.write_text('')
    ours = tmp_path / '.new_plan'  # as a plan's picture begins
    ours.write_text('')
    with workdir_lib.WorkDir(tmp_path).opened():
        pass
    assert all(path.exists() for path in theirs) and not ours.exists()


@pytest.mark.parametrize('damage', [lambda text: text[:-9], lambda text: '\0' * len(text), lambda text: '[]'])
@pytest.mark.parametrize('name', ['config.json', 'data.json', 'keys.json'])
def test_a_damaged_record_is_named_with_what_to_do(tiny_config, tmp_path, name, damage):
    workdir = record(tmp_path, tiny_config())
    images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2)
    read = {
        'config.json': lambda: workdir.check(tiny_config()),
        'data.json': lambda: workdir.check_fingerprint('train', images, labels),
        'keys.json': lambda: workdir.keys('dp_sgd', None),
    }[name]
    read()
    (path,) = tmp_path.rglob(name)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f'{name} cannot be read .*Restore it.*delete it'):
        read()


def test_keys_are_not_shown(tmp_path):
    keys = workdir_lib.WorkDir(tmp_path).keys('dp_sgd', None)
    words = np.asarray(jax.random.key_data(keys.noise))
    shown = f'{keys} {poisson.PoissonSampler(5, 0.5, keys.sampling)}'
    assert keys.identifier in shown and str(keys.sampling) not in shown
    assert not any(str(word) in shown for word in words)


def test_what_was_released_with_a_key_is_not_replaced_by_anything_else(tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path)
    arrays = [np.arange(3.0), np.zeros((2, 2), np.uint8)]
    for part in ('dp_sgd', 'central_query'):
        workdir.keys(part, None)
    assert not workdir.may_repeat('dp_sgd') and workdir.may_repeat('pretrain')
    workdir.bind_release('dp_sgd', arrays)
    workdir.bind_release('dp_sgd', [array.copy() for array in arrays])
    assert workdir.may_repeat('dp_sgd') and not workdir.may_repeat('central_query')
    other = [np.nextafter(arrays[0], 9), arrays[1]]
    with pytest.raises(ValueError, match='dp_sgd, made again, is not what was released'):
        workdir.bind_release('dp_sgd', other)
    workdir.bind_release('central_query', other)
    workdir.keys('generate', None)
    with pytest.raises(ValueError, match='is not what was released'):
        workdir.bind_release('central_query', arrays)


@pytest.mark.parametrize('change', ['pixel', 'label', 'order', 'fewer', 'shape'])
def test_other_images_are_refused(tmp_path, change):
    workdir = workdir_lib.WorkDir(tmp_path)
    images = np.arange(6 * 4 * 2, dtype=np.uint8).reshape(6, 4, 2, 1)
    labels = np.arange(6) % 3
    with workdir.opened():
        workdir.check_fingerprint('train', images, labels)
        workdir.check_fingerprint('train', images.copy(), labels.copy())
        workdir.check_fingerprint('test', images[:2], labels[:2])
        others = {
            'pixel': (np.where(images == 7, 8, images).astype(np.uint8), labels),
            'label': (images, np.where(np.arange(6) == 2, 0, labels)),
            'order': (images[::-1], labels[::-1]),
            'fewer': (images[:5], labels[:5]),
            'shape': (images.reshape(6, 2, 4, 1), labels),
        }
        with pytest.raises(ValueError, match='not those .6. with which .*fingerprint'):
            workdir.check_fingerprint('train', *others[change])
    assert stat.S_IMODE(os.stat(workdir.private / 'data.json').st_mode) == 0o600


def test_keys_stay_and_differ_between_parts_and_runs(tmp_path):
    one, two = workdir_lib.WorkDir(tmp_path / 'a'), workdir_lib.WorkDir(tmp_path / 'b')
    keys = [one.keys('dp_sgd', None), one.keys('central_query', None), two.keys('dp_sgd', None)]
    assert len({k.sampling for k in keys}) == 3
    assert len({k.identifier for k in keys}) == 3
    assert len({tuple(np.asarray(jax.random.key_data(k.noise))) for k in keys}) == 3
    again = workdir_lib.WorkDir(tmp_path / 'a').keys('dp_sgd', None)
    assert again.sampling == keys[0].sampling and again.identifier == keys[0].identifier
    assert not any(str(k.sampling) in k.identifier for k in keys)


def test_a_seed_makes_keys_repeatable_and_says_so(tmp_path):
    one = workdir_lib.WorkDir(tmp_path / 'a').keys('dp_sgd', 7)
    two = workdir_lib.WorkDir(tmp_path / 'b').keys('dp_sgd', 7)
    other = workdir_lib.WorkDir(tmp_path / 'c').keys('dp_sgd', 8)
    assert one.sampling == two.sampling != other.sampling
    assert 'not-private' in one.identifier


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / 'file.json'
    workdir_lib.write_json(path, {'old': 1})
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('disk')))
    with pytest.raises(OSError):
        workdir_lib.write_json(path, {'new': 2})
    assert json.loads(path.read_text()) == {'old': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['file.json']


def test_flatten_is_json(tiny_config):
    flat = workdir_lib.flatten(tiny_config())
    assert json.loads(json.dumps(flat)) == flat
    assert flat['model.multipliers'] == [1] and flat['generate.sampler.steps'] == 4


def test_npz_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / 'images.npz'
    workdir_lib.write_npz(path, images=np.arange(3))
    monkeypatch.setattr(os, 'fsync', lambda *_: (_ for _ in ()).throw(OSError('No space left')))
    with pytest.raises(OSError, match='No space left'):
        workdir_lib.write_npz(path, images=np.arange(4))
    with np.load(path) as data:
        np.testing.assert_array_equal(data['images'], np.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ['images.npz']


def test_keys_that_were_made_otherwise_are_refused(tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path)
    workdir.keys('dp_sgd', 7)
    workdir.keys('generate', None)
    for part, seed in (('dp_sgd', None), ('dp_sgd', 8), ('generate', 7)):
        with pytest.raises(ValueError, match=f'config.seed is {seed}; .* holds keys of {part}'):
            workdir.keys(part, seed)
