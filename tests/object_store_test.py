"""In an object store, too, files and folders are there whole or not at all."""

import numpy as np
import pytest

from dpp_jax import files, lease, object_store


def local_folder(path, **contents):
    """A folder of this machine with these files."""
    path.mkdir()
    for name, content in contents.items():
        inner = path / name.replace('__', '/')
        inner.parent.mkdir(exist_ok=True)
        inner.write_bytes(content)
    return path


def test_a_scheme_decides_and_an_unknown_one_is_named(monkeypatch, tmp_path):
    assert files.is_in_store(files.path('gs://bucket/run/')) and not files.is_in_store(tmp_path)
    assert str(files.path('gs://bucket/run/') / 'release') == 'gs://bucket/run/release'
    with pytest.raises(ValueError, match='ftp://a/b; .* begin with one of gs://, s3://, az://'):
        files.path('ftp://a/b')
    monkeypatch.setenv(object_store.MOUNTED, f'/nowhere:{tmp_path}')
    assert files.is_in_store(tmp_path / 'run') and not files.is_in_store(tmp_path.parent)


def test_what_is_written_is_read(store):
    assert not (store / 'a.json').exists() and files.names(store) == []
    files.write_json(store / 'a.json', {'ε': 1}, mode=0o600)
    files.write_npz(store / 'folder' / 'b.npz', images=np.arange(5))
    assert files.read_json(store / 'a.json', '') == {'ε': 1}
    np.testing.assert_array_equal(files.read_npz(store / 'folder' / 'b.npz', '')['images'], np.arange(5))
    assert files.names(store) == ['a.json', 'folder']
    with pytest.raises(FileNotFoundError):
        files.read_npz(store / 'c.npz', '')


def test_a_failed_write_leaves_the_old_object(store):
    path = store / 'file'
    files.write_bytes(path, b'old')
    with pytest.raises(KeyboardInterrupt):
        with files.whole_file(path) as file:
            file.write(b'ne')
            raise KeyboardInterrupt
    assert path.read_bytes() == b'old' and files.names(store) == ['file']


def test_a_folder_is_whole_or_not_there(store, monkeypatch, tmp_path):
    """Also after a kill between any two objects, and where an older folder was in its place."""
    source = local_folder(tmp_path / 'source', a=b'1', deep__b=b'2', c=b'3')
    path = store / 'model'
    write = object_store.write
    for old in (False, True):
        for fails_at in range(1, 6):
            if old:
                files.put_folder(local_folder(tmp_path / f'old{fails_at}', old=b'0', a=b'0'), path)
            written = []

            def fail(where, data, written=written, fails_at=fails_at):
                written.append(where)
                if len(written) >= fails_at:
                    raise KeyboardInterrupt
                write(where, data)

            monkeypatch.setattr(object_store, 'write', fail)
            monkeypatch.setattr(object_store, '_AT_ONCE', 1)
            try:
                files.put_folder(source, path)
            except KeyboardInterrupt:
                assert files.is_whole(path) == (old and fails_at == 1)  # nothing was touched then
                assert ('model' in files.names(store)) == files.is_whole(path)
            else:
                assert fails_at == 5 and files.is_whole(path)
            monkeypatch.setattr(object_store, 'write', write)
            files.remove_unfinished(store, [store])
            if files.is_whole(path):
                files.remove_folder(path)
            assert not path.exists() and files.names(store) == []
    files.put_folder(source, path)
    with files.local_copy(path) as local:
        assert sorted(
            inner.relative_to(local).as_posix() for inner in local.rglob('*') if inner.is_file()
        ) == [
            'a',
            'c',
            'deep/b',
        ]
        assert (local / 'deep' / 'b').read_bytes() == b'2'


def test_a_folder_that_is_half_deleted_is_not_whole(store, monkeypatch, tmp_path):
    path = store / 'resume' / '5'
    files.put_folder(local_folder(tmp_path / 'source', a=b'1', b=b'2'), path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(object_store, 'delete', lambda folder: (folder / 'a').unlink() or 1 / 0)
        files.remove_folder(path)
    assert path.exists() and not files.is_whole(path)


def test_a_copy_of_a_folder_by_other_tools_is_whole(store):
    """As of a run that began on a disk: no object says that it is complete."""
    files.write_bytes(store / 'model' / 'finetune' / 'a', b'1')
    assert files.is_whole(store / 'model' / 'finetune')


def test_a_folder_moves_between_a_disk_and_a_store(store, tmp_path):
    source = local_folder(tmp_path / 'source', a=b'1')
    files.move_folder(source, store / 'there')
    assert not source.exists() and (store / 'there' / 'a').read_bytes() == b'1'
    files.move_folder(store / 'there', store / 'aside' / 'there')
    assert not (store / 'there').exists()
    with files.local_folder() as target:
        files.move_folder(store / 'aside' / 'there', target / 'back')
        assert (target / 'back' / 'a').read_bytes() == b'1'
    assert files.names(store / 'aside') == []


def test_files_of_a_folder_carry_the_note_of_its_place(store):
    with files.noted(store, 'a reason'):
        with files.whole_folder(store / 'notes') as unfinished:
            files.write_text(unfinished / 'a.txt', 'text')
    assert (store / 'notes' / 'a.txt').read_bytes() == b'NOT PRIVATE: a reason\n\ntext'


def test_a_log_is_written_whole_and_knows_what_another_process_did(store):
    path = store / 'private' / 'log'
    log = files.Log(path)
    log.append(b'one\n')
    log.append(b'two\n')
    assert path.read_bytes() == b'one\ntwo\n' and log.size == 8
    again = files.Log(path)
    assert again.content == b'one\ntwo\n'
    again.truncate(5)
    assert path.read_bytes() == b'one\nt'
    with pytest.raises(OSError, match='has 5 bytes; this process knows 8: another process changed it'):
        log.append(b'three\n')
    again.append(b'x\n')
    assert path.read_bytes() == b'one\ntx\n'


@pytest.mark.parametrize('is_there_too', [True, False])
def test_a_log_stops_when_the_lease_was_lost_wherever_it_lies(store, tmp_path, monkeypatch, is_there_too):
    """As a ledger in a private/ on a disk, of a run whose work directory is in a store."""
    monkeypatch.setattr(lease, '_LOOK_AGAIN', 0.0)
    path = store / 'log' if is_there_too else tmp_path / 'disk' / 'log'
    with files.locked(store / '.lock'):
        log = files.Log(path)
        log.append(b'one\n')
        (store / '.lock').unlink()
        with pytest.raises(lease.Lost):
            log.append(b'two\n')
        assert path.read_bytes() == b'one\n'


WRITES = {
    'file': lambda where, source: files.write_bytes(where / 'file', b'new'),
    'whole_folder': lambda where, source: files.put_folder(source, where / 'folder'),
    'move_there': lambda where, source: files.move_folder(source, where / 'folder'),
    'move_away': lambda where, source: files.move_folder(where / 'folder', where / 'aside'),
    'remove': lambda where, source: files.remove_folder(where / 'folder'),
    'delete': lambda where, source: files.delete_private(where / 'folder'),
}


@pytest.mark.parametrize('is_there_too', [True, False])
@pytest.mark.parametrize('work', WRITES.values(), ids=WRITES)
def test_who_lost_the_lease_writes_and_removes_nothing(store, tmp_path, monkeypatch, work, is_there_too):
    monkeypatch.setattr(lease, '_LOOK_AGAIN', 0.0)
    where = store if is_there_too else tmp_path / 'disk'
    files.write_bytes(where / 'file', b'old')
    files.write_bytes(where / 'folder' / 'a', b'old')
    source = local_folder(tmp_path / 'source', a=b'new')
    with files.locked(store / '.lock'):
        (store / '.lock').unlink()
        with pytest.raises(lease.Lost):
            work(where, source)
    assert files.names(where) == ['file', 'folder'] and files.is_whole(where / 'folder')
    assert (where / 'file').read_bytes() == (where / 'folder' / 'a').read_bytes() == b'old'
    assert (source / 'a').read_bytes() == b'new'


def test_a_folder_that_was_filled_while_the_lease_was_lost_takes_no_place(store, monkeypatch):
    monkeypatch.setattr(lease, '_LOOK_AGAIN', 0.0)
    files.write_bytes(store / 'folder' / 'a', b'old')
    with files.locked(store / '.lock'), pytest.raises(lease.Lost):
        with files.whole_folder(store / 'folder') as unfinished:
            (unfinished / 'a').write_bytes(b'new')
            (store / '.lock').unlink()
    assert (store / 'folder' / 'a').read_bytes() == b'old' and files.is_whole(store / 'folder')


def test_a_log_that_a_late_write_put_back_is_written_again_by_who_holds_the_lease(store):
    path = store / 'log'
    with files.locked(store / '.lock'):
        log = files.Log(path)
        for line in (b'one\n', b'two\n'):
            log.append(line)
        object_store.write(path, b'one\n')
        log.append(b'three\n')
        assert path.read_bytes() == b'one\ntwo\nthree\n' and log.size == 14
        for other in (b'ONE\n', b'one\ntwo\nthree\nmore'):  # what this process never wrote
            object_store.write(path, other)
            with pytest.raises(OSError, match='another process changed it'):
                log.append(b'four\n')
            assert path.read_bytes() == other
        object_store.write(path, b'one\n')
        (store / '.lock').unlink()  # just now: a look of five seconds ago is not enough
        with pytest.raises(OSError, match='another process changed it'):
            log.append(b'four\n')
    assert path.read_bytes() == b'one\n'


def test_files_follow_from_a_folder_of_this_machine(store):
    with files.following(store / 'metrics', 0.0) as (local, follow):
        (local / 'events').write_bytes(b'1')
        follow(lambda: (local / 'events').write_bytes(b'12'))
        assert (store / 'metrics' / 'events').read_bytes() == b'12'
        (local / 'events').write_bytes(b'123')
    assert (store / 'metrics' / 'events').read_bytes() == b'123'


def test_a_store_that_does_not_answer_is_named(bucket, monkeypatch):
    monkeypatch.setattr(bucket.Bucket, 'exists', lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match='--workdir=gs://bucket/run cannot be reached .ZeroDivisionError: '):
        object_store.check(files.path('gs://bucket/run'), '--workdir')
