"""A private/ that lies elsewhere: no command begins with new keys by mistake."""

import json
import stat

import pytest

from dpp_jax import files
from dpp_jax.run.folder import WorkDir


def begin(root, private=None):
    """What a run leaves when it has made its keys."""
    workdir = WorkDir(root, private=private)
    workdir.check_private()
    with workdir.opened():
        files.write_json(workdir.keys, {}, mode=0o600)
        files.write_bytes(workdir.own_ledger, b'')
    return workdir


def refuse(root, private, text):
    """Both doors refuse: that of `plan`, and that of every command that writes. Nothing is written."""
    before = {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    workdir = WorkDir(root, private=private)
    for door in (workdir.check_private, lambda: workdir.opened().__enter__()):
        with pytest.raises(ValueError, match=text):
            door()
    assert not (root / 'private' / 'keys.json').exists() or root / 'private' / 'keys.json' in before
    assert {path: path.read_bytes() for path in root.rglob('*') if path.is_file()} == before


def test_it_is_closed_to_others_and_the_work_directory_has_none(tmp_path):
    workdir = begin(tmp_path / 'run', tmp_path / 'disk' / 'private')
    assert stat.S_IMODE(workdir.private.stat().st_mode) == 0o700
    assert not (tmp_path / 'run' / 'private').exists()
    assert workdir.ledger == tmp_path / 'disk' / 'private' / 'ledger.jsonl'
    begin(tmp_path / 'run', tmp_path / 'disk' / 'private')
    begin(tmp_path / 'run', f'{tmp_path}/run/../disk/private')
    assert 'disk' not in ''.join(path.read_text() for path in workdir.release.rglob('*') if path.is_file())


def test_a_command_without_the_flag_is_refused_with_what_to_add(tmp_path):
    begin(tmp_path / 'run', tmp_path / 'there')
    refuse(tmp_path / 'run', None, rf'--private is missing: .* Add --private={tmp_path}/there\. ')
    refuse(tmp_path / 'run', tmp_path / 'run' / 'private', '--private is missing')


def test_another_folder_is_refused_and_one_that_was_moved_is_not(tmp_path):
    begin(tmp_path / 'run', tmp_path / 'there')
    refuse(tmp_path / 'run', tmp_path / 'new', rf'is not that of .* last at {tmp_path}/there. Give its path')
    begin(tmp_path / 'other', tmp_path / 'of_other')
    refuse(tmp_path / 'run', tmp_path / 'of_other', 'is not that of')
    (tmp_path / 'there').rename(tmp_path / 'moved')
    refuse(tmp_path / 'run', tmp_path / 'there', 'is not that of')
    begin(tmp_path / 'run', tmp_path / 'moved')
    refuse(tmp_path / 'run', None, f'Add --private={tmp_path}/moved')


def test_a_run_that_began_inside_stays_there(tmp_path):
    begin(tmp_path / 'run')
    refuse(tmp_path / 'run', tmp_path / 'there', 'this run began with .*run/private. Leave --private out')
    begin(tmp_path / 'run')


def test_the_keys_of_one_run_serve_no_other(tmp_path):
    begin(tmp_path / 'run', tmp_path / 'there')
    refuse_new = tmp_path / 'new'
    refuse_new.mkdir()
    refuse(refuse_new, tmp_path / 'there', 'which belongs to another run: its keys may serve one run only')
    begin(tmp_path / 'inside')
    refuse(refuse_new, tmp_path / 'inside' / 'private', 'which belongs to another run')


def test_a_folder_with_anything_in_it_is_refused_and_untouched(tmp_path):
    """It would be closed to others, and a cleaning would delete it whole."""
    home = tmp_path / 'home'
    (home / 'documents').mkdir(parents=True)
    home.chmod(0o755)
    (tmp_path / 'run').mkdir()
    refuse(tmp_path / 'run', home, f'--private is {home}, which holds documents. Name an empty folder')
    assert stat.S_IMODE(home.stat().st_mode) == 0o755 and list((tmp_path / 'run').iterdir()) == []
    (home / 'documents').rmdir()
    begin(tmp_path / 'run', home)
    (home / 'more').touch()  # once it is that of the run, anything may be there
    begin(tmp_path / 'run', home)


def test_a_prefix_of_a_store_with_anything_below_it_is_refused(store, tmp_path):
    files.write_bytes(store / 'theirs' / 'photos' / 'a', b'')
    (tmp_path / 'run').mkdir()
    refuse(tmp_path / 'run', store / 'theirs', 'which holds photos. Name an empty folder')


def test_two_work_directories_never_share_one(tmp_path, monkeypatch):
    """Also if one was killed when private/ knew it and it did not know private/."""
    write = files.write_json

    def kill(path, *arguments, **named):
        if path.name == 'private.json':
            raise KeyboardInterrupt
        write(path, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, 'write_json', kill)
        begin(tmp_path / 'killed', tmp_path / 'there')
    first = json.loads((tmp_path / 'there' / 'run.json').read_text())['run']
    begin(tmp_path / 'run', tmp_path / 'there')
    assert json.loads((tmp_path / 'run' / 'private.json').read_text())['run'] != first
    refuse(tmp_path / 'killed', tmp_path / 'there', 'belongs to another run')
    begin(tmp_path / 'run', tmp_path / 'there')


@pytest.mark.parametrize('private', ['run', 'run/release', 'run/release/private', 'run/other', '.'])
def test_it_must_lie_outside_of_what_is_published(tmp_path, private):
    (tmp_path / 'run').mkdir()
    refuse(tmp_path / 'run', tmp_path / private, 'it must lie outside of --workdir=')


@pytest.mark.parametrize('kill_at', [1, 2])
def test_a_kill_before_both_know_each_other_loses_nothing(tmp_path, monkeypatch, kill_at):
    written = []

    def kill(path, *arguments, **named):
        written.append(path)
        if len(written) == kill_at:
            raise KeyboardInterrupt
        write(path, *arguments, **named)

    write = files.write_json
    monkeypatch.setattr(files, 'write_json', kill)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / 'run', tmp_path / 'there')
    monkeypatch.setattr(files, 'write_json', write)
    assert not (tmp_path / 'there' / 'keys.json').exists()
    begin(tmp_path / 'run', tmp_path / 'there')
    refuse(tmp_path / 'run', None, '--private is missing')


def test_what_is_read_of_a_run_is_read_from_there_or_refused(tmp_path):
    """Its published ledger may lack what it spent last: a sum from it would be too small."""
    workdir = begin(tmp_path / 'run', tmp_path / 'there')
    files.write_bytes(workdir.released_ledger, b'')
    assert WorkDir.to_read(tmp_path / 'run').ledger == workdir.own_ledger
    (tmp_path / 'there').rename(tmp_path / 'away')
    with pytest.raises(
        FileNotFoundError, match='there, which is not there, or of another run. Its ledger may'
    ):
        WorkDir.to_read(tmp_path / 'run')


def test_after_a_cleaning_it_is_forgotten(tmp_path):
    workdir = begin(tmp_path / 'run', tmp_path / 'there')
    workdir.delete_private()
    assert not (tmp_path / 'there').exists()
    begin(tmp_path / 'run')


def test_where_a_store_cannot_be_closed_the_user_hears_what_to_set_until_there_are_keys(store, capsys):
    with WorkDir(store).opened():
        pass
    told = capsys.readouterr().out
    assert 'cannot be closed to others from here (mode 0700)' in told and 'Publish a copy' in told
    is_gs = str(store).startswith('gs://')
    assert ('gs://bucket --uniform-bucket-level-access --public-access-prevention' in told) == is_gs
    begin(store)
    capsys.readouterr()
    begin(store)
    assert capsys.readouterr().out == ''


def test_a_store_and_a_disk_know_each_other(store, tmp_path, capsys):
    workdir = begin(store, tmp_path / 'disk')
    assert 'cannot be closed' not in capsys.readouterr().out
    assert json.loads((store / 'private.json').read_bytes())['path'] == str(tmp_path / 'disk')
    with pytest.raises(ValueError, match=f'Add --private={tmp_path}/disk'):
        WorkDir(store).check_private()
    assert not files.names(store / 'private') and stat.S_IMODE(workdir.keys.stat().st_mode) == 0o600
