"""Files are there whole or not at all, and one process alone works in a folder."""

import json
import os
from pathlib import Path
import re
import signal
import stat
import subprocess
import sys

import filelock
import numpy as np
import pytest

from dpp_jax import files

ROOT = Path(__file__).resolve().parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse(message):
    """A function that fails as the system does."""

    def fail(*_):
        raise message if isinstance(message, Exception) else OSError(message)

    return fail


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / 'file.json'
    files.write_json(path, {'old': 1})
    monkeypatch.setattr(os, 'replace', refuse('disk'))
    with pytest.raises(OSError):
        files.write_json(path, {'new': 2})
    assert json.loads(path.read_text()) == {'old': 1}
    assert names(tmp_path) == ['file.json']


def test_npz_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / 'images.npz'
    files.write_npz(path, images=np.arange(3))
    monkeypatch.setattr(os, 'fsync', refuse('No space left'))
    with pytest.raises(OSError, match='No space left'):
        files.write_npz(path, images=np.arange(4))
    np.testing.assert_array_equal(files.read_npz(path, '')['images'], np.arange(3))
    assert names(tmp_path) == ['images.npz']


def test_the_same_arrays_make_the_same_file(tmp_path):
    """A release that is made again is compared by its bytes."""
    for name in ('one.npz', 'two.npz'):
        files.write_npz(tmp_path / name, images=np.arange(100), labels=np.zeros(3))
    assert (tmp_path / 'one.npz').read_bytes() == (tmp_path / 'two.npz').read_bytes()


def test_a_file_is_open_to_those_that_the_caller_says(tmp_path):
    files.write_json(tmp_path / 'secret', {}, mode=0o600)
    files.write_json(tmp_path / 'public', {})
    assert [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ('secret', 'public')] == [0o600, 0o644]


@pytest.mark.parametrize('chmod', [lambda *_: None, 'refused'], ids=['ignored', 'refused'])
def test_where_a_mount_takes_no_mode_the_user_hears_it(tmp_path, monkeypatch, chmod):
    private = tmp_path / 'private'
    assert files.make_folder(private, mode=0o700)
    assert files.store_advice(tmp_path / 'release', private, is_closed=True) == []
    private.chmod(0o777)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'chmod', refuse(PermissionError('chmod')) if chmod == 'refused' else chmod)
        assert files.make_folder(private)
        is_closed = files.make_folder(private, mode=0o700)
    assert not is_closed
    (told,) = files.store_advice(tmp_path / 'release', private, is_closed)
    assert 'private cannot be closed to others from here' in told and 'no access for others' in told


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path):
    path = tmp_path / 'png'
    path.mkdir()
    (path / 'old').touch()
    with pytest.raises(KeyboardInterrupt):
        with files.whole_folder(path) as unfinished:
            (unfinished / 'half').touch()
            raise KeyboardInterrupt
    assert names(path) == ['old']
    with files.whole_folder(path) as unfinished:
        (unfinished / 'new').touch()
        assert names(path) == ['old']
    assert names(path) == ['new'] and names(tmp_path) == ['png']


@pytest.mark.parametrize(
    'damage',
    [b'', b'{"a": 1', bytes(9), b'[]', b'{"a": "\xff"}'],
    ids=['empty', 'cut', 'zeros', 'list', 'bytes'],
)
def test_damaged_json_is_named_with_what_to_do(tmp_path, damage):
    path = tmp_path / 'file.json'
    files.write_json(path, {'a': 'ε'})
    assert files.read_json(path, '') == {'a': 'ε'}
    path.write_bytes(damage)
    with pytest.raises(ValueError, match='file.json cannot be read .*Do this.'):
        files.read_json(path, 'Do this.')


@pytest.mark.parametrize(
    'damage',
    [
        lambda content: b'',
        lambda content: content[:-30],
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: content[:100] + bytes(64) + content[164:],
    ],
    ids=['empty', 'without the end', 'half', 'zeros', 'zeros inside'],
)
def test_a_damaged_npz_is_named_with_what_to_do(tmp_path, damage):
    path = tmp_path / 'file.npz'
    with pytest.raises(FileNotFoundError):
        files.read_npz(path, '')
    images = np.random.default_rng(0).integers(0, 256, 1000)
    files.write_npz(path, images=images)
    np.testing.assert_array_equal(files.read_npz(path, '')['images'], images)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match='file.npz cannot be read .*Do this.'):
        files.read_npz(path, 'Do this.')


def test_a_digest_tells_types_shapes_order_and_every_bit():
    array = np.arange(6.0)
    others = [
        [array.astype(np.float32)],
        [array.reshape(2, 3)],
        [array[::-1]],
        [np.nextafter(array, 9)],
        [array[:3], array[3:]],
    ]
    assert files.digest([array]) == files.digest([array.copy()])
    assert len({files.digest(arrays) for arrays in [[array], *others]}) == 6


def test_an_entry_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'file'
    files.create(path)
    files.append(path, b'one\n', 0)
    with pytest.raises(OSError, match='has 4 bytes; this process knows 3: another process changed it'):
        files.append(path, b'two\n', 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', refuse('No space left'))
        with pytest.raises(OSError, match='No space left'):
            files.append(path, b'two\n', 4)
    assert path.read_bytes() == b'one\n'
    files.append(path, b'two\n', 4)
    files.truncate(path, 5)
    assert path.read_bytes() == b'one\nt'


HOLD = """
import sys, time
from dpp_jax import files
with files.locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_free_when_that_is_killed(tmp_path):
    path = tmp_path / '.lock'
    with files.locked(path):
        with pytest.raises(filelock.Timeout):
            with files.locked(path):
                pass
    command = [sys.executable, '-c', HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(filelock.Timeout):
            with files.locked(path):
                pass
        process.send_signal(signal.SIGKILL)
    with files.locked(path):
        pass


COPY = """
import sys, time
from dpp_jax import files
with files.local_folder() as folder:
    (folder / 'private').touch()
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_local_copy_of_a_killed_process_is_deleted_and_that_of_a_living_one_is_not():
    command = [sys.executable, '-c', COPY]
    found, processes = [], []
    for _ in range(2):
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        found.append(Path(processes[-1].stdout.readline().strip()))
    killed, living = processes
    killed.kill()
    killed.wait()
    assert all((folder / 'private').exists() for folder in found)
    assert stat.S_IMODE(found[0].parent.stat().st_mode) == 0o700
    files._remove_local_folders_of_killed.cache_clear()
    with files.local_folder() as own:
        assert own.exists() and not found[0].parent.exists() and (found[1] / 'private').exists()
    assert not own.parent.exists()
    for process in processes:
        process.kill()
        process.communicate()
    files._remove_local_folders_of_killed.cache_clear()
    with files.local_folder():
        assert not found[1].parent.exists()


FORM = {
    'name': str,
    'sizes': [int],
    'rows?': [{'epsilon': float, 'is_good': bool}],
    'key': re.compile('[0-9a-f]{4}'),
    '*': {'sha256': str},
}
GOOD = {
    'name': 'ε',
    'sizes': [1, 2],
    'rows': [{'epsilon': 1, 'is_good': True, 'more': 1}],
    'key': '01ab',
    '_note': 3,
    'other': {'sha256': 'a'},
}


def test_json_of_its_form_is_read_and_a_field_may_be_missing_where_the_form_says_so():
    assert files.fault(GOOD, FORM) is None
    assert files.fault({name: value for name, value in GOOD.items() if name != 'rows'}, FORM) is None


@pytest.mark.parametrize(
    'change, text',
    [
        ({'name': None}, 'field name is null; it must be a text'),
        ({'sizes': 3}, 'field sizes is 3; it must be a list'),
        ({'sizes': [1, True]}, r'field sizes\[1\] is true; it must be a whole number'),
        ({'sizes': [1.5]}, r'field sizes\[0\] is 1.5; it must be a whole number'),
        ({'rows': [{'epsilon': float('nan'), 'is_good': True}]}, r'field rows\[0\].epsilon is NaN; .*finite'),
        (
            {'rows': [{'epsilon': 'abc', 'is_good': True}]},
            r'field rows\[0\].epsilon is "abc"; .* a finite number',
        ),
        ({'rows': [{'epsilon': 1}]}, r'field rows\[0\] has no is_good'),
        ({'rows': [[]]}, r'field rows\[0\] is \[\]; it must be an object'),
        ({'key': '01AB'}, r'field key is "01AB"; it must be a text like \[0-9a-f\]\{4\}'),
        ({'other': 1}, 'field other is 1; it must be an object'),
    ],
    ids=repr,
)
def test_a_field_of_another_kind_is_named_with_what_is_expected(tmp_path, change, text):
    path = tmp_path / 'file.json'
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=rf'file.json cannot be read \({text}.*\). Do this.') as refused:
        files.read_json(path, 'Do this.', FORM)
    assert '\n' not in str(refused.value)


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / 'file.json'
    path.write_text('{"sizes": []}')
    with pytest.raises(ValueError, match='it has no field name'):
        files.read_json(path, '', FORM)
    path.write_text('[' * 100_000)
    with pytest.raises(ValueError, match='file.json cannot be read'):
        files.read_json(path, '', FORM)
