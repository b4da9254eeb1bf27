"""The work directory: who may read it, and which settings and images it belongs to."""

import errno
import json
import os
import stat
import tempfile

import numpy as np
import pytest

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.run.folder import WorkDir, flatten


def record(root, config):
    """What a run does with a folder before it computes anything."""
    workdir = WorkDir(root)
    workdir.check(flatten(config.to_dict()))
    with workdir.opened():
        workdir.record(flatten(config.to_dict()))
    return workdir


def test_private_is_closed_to_others_and_says_what_it_is(tiny_config, tmp_path):
    workdir = record(tmp_path / 'run', tiny_config())
    assert stat.S_IMODE(os.stat(workdir.private).st_mode) == 0o700
    assert 'without a privacy guarantee' in (workdir.private / 'README.txt').read_text()
    assert 'privacy_statement.md' in workdir.card.read_text(encoding='utf-8')


def test_another_config_is_refused_with_the_differences(tiny_config, tmp_path):
    record(tmp_path, tiny_config())
    workdir = record(tmp_path, tiny_config())
    with pytest.raises(ValueError) as error:
        workdir.check(flatten(tiny_config(finetune__epochs=3, dp__epsilon=2.0).to_dict()))
    assert 'config.finetune.epochs: 1.0 there, 3.0 now' in str(error.value)
    assert 'config.dp.epsilon: 10.0 there, 2.0 now' in str(error.value)
    assert 'query' not in str(error.value)


def test_settings_that_change_no_result_or_only_what_follows_the_model_may_change(tiny_config, tmp_path):
    record(tmp_path, tiny_config())
    record(tmp_path, tiny_config(finetune__microbatch=2, loop__log_every_steps=7))
    record(tmp_path, tiny_config(finetune__devices_per_image=2))
    record(tmp_path, tiny_config(generate__sampler__steps=2, evaluate__epochs=3))


def test_private_belongs_to_its_settings_also_where_release_was_moved_away(tiny_config, tmp_path):
    workdir = record(tmp_path / 'run', tiny_config())
    workdir.release.rename(tmp_path / 'moved')
    workdir.check(flatten(tiny_config(generate__sampler__steps=2).to_dict()))
    with pytest.raises(ValueError, match='config.pretrain.enabled: True there, False now'):
        workdir.check(flatten(tiny_config(pretrain__enabled=False).to_dict()))
    record(tmp_path / 'run', tiny_config())


@pytest.mark.parametrize('name, stood_for', [('dp.relation', 'zero_out'), ('dp.already_spent', '')])
def test_a_folder_of_an_earlier_version_is_one_of_zero_out_with_nothing_before(
    tiny_config, tmp_path, name, stood_for
):
    workdir = record(tmp_path, tiny_config())
    recorded = json.loads(workdir.config.read_text())
    workdir.config.write_text(json.dumps({key: value for key, value in recorded.items() if key != name}))
    workdir.check({**recorded, name: stood_for})
    with pytest.raises(ValueError, match=f'config.{name}: {stood_for} there, other now'):
        workdir.check({**recorded, name: 'other'})


def test_a_setting_that_an_earlier_version_did_not_have_stands_for_what_it_did(tiny_config, tmp_path):
    workdir = record(tmp_path, tiny_config())
    recorded = json.loads(workdir.config.read_text())
    assert recorded['model.network'] == 'unet'
    workdir.config.write_text(json.dumps({**recorded, 'model.network': None}))
    with pytest.raises(ValueError, match='config.model.network: None there, unet now'):
        workdir.check(recorded)
    old = {name: value for name, value in recorded.items() if name != 'model.network'}
    workdir.config.write_text(json.dumps(old))
    workdir.check(recorded)
    with pytest.raises(ValueError, match='config.model.network: unet there, other now'):
        workdir.check({**recorded, 'model.network': 'other'})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('')
    with pytest.raises(PermissionError, match='--workdir=.*file/run cannot be written'):
        with WorkDir(blocked / 'run').opened():
            pass


def test_a_file_system_that_can_only_be_read_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
    with pytest.raises(PermissionError, match='cannot be written .*Read-only file system'):
        with WorkDir(tmp_path).opened():
            pass


def test_a_lock_that_cannot_be_taken_is_named(tmp_path):
    """As where it belongs to another user, or the file system has none."""
    (tmp_path / '.lock').mkdir()
    with pytest.raises(PermissionError, match=f'--workdir={tmp_path} cannot be written'):
        with WorkDir(tmp_path).opened():
            pass


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path):
    with WorkDir(tmp_path).opened():
        with pytest.raises(PermissionError, match='is in use by another process'):
            with WorkDir(tmp_path).opened():
                pass
    with WorkDir(tmp_path).opened():
        pass


def test_a_second_process_is_refused_in_a_store_too(store):
    with WorkDir(store).opened():
        with pytest.raises(
            PermissionError, match='--workdir=.* is in use by another process: process .* on '
        ):
            with WorkDir(store).opened():
                pass
    with WorkDir(store).opened():
        pass


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    workdir = WorkDir(tmp_path)
    with workdir.opened():
        (workdir.release / 'a').mkdir()
        kept = workdir.release / 'a' / 'file.npz'
        kept.write_bytes(b'whole')
        (workdir.release / 'a' / '.new_file.npz').write_bytes(b'ha')
        # What a kill leaves: nobody leaves the context.
        killed = files.whole_folder(workdir.release / 'png')
        killed.__enter__()
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
    with WorkDir(tmp_path).opened():
        pass
    assert all(path.exists() for path in theirs) and not ours.exists()


@pytest.mark.parametrize('damage', [lambda text: text[:-9], lambda text: '\0' * len(text), lambda text: '[]'])
@pytest.mark.parametrize('name', ['config.json', 'data.json'])
def test_a_damaged_record_is_named_with_what_to_do(tiny_config, tmp_path, name, damage):
    workdir = record(tmp_path, tiny_config())
    images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32)
    read = {
        'config.json': lambda: workdir.check(flatten(tiny_config().to_dict())),
        'data.json': lambda: workdir.check_fingerprint('train', Images(images=images, labels=labels)),
    }[name]
    read()
    (path,) = tmp_path.rglob(name)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f'{name} cannot be read .*Restore the file.*delete it'):
        read()


@pytest.mark.parametrize('change', ['pixel', 'label', 'order', 'fewer', 'shape'])
def test_other_images_are_refused(tmp_path, change):
    workdir = WorkDir(tmp_path)
    images = np.arange(6 * 4 * 2, dtype=np.uint8).reshape(6, 4, 2, 1)
    labels = np.arange(6) % 3
    with workdir.opened():
        workdir.check_fingerprint('train', Images(images=images, labels=labels))
        workdir.check_fingerprint('train', Images(images=images.copy(), labels=labels.copy()))
        workdir.check_fingerprint('test', Images(images=images[:2], labels=labels[:2]))
        others = {
            'pixel': (np.where(images == 7, 8, images).astype(np.uint8), labels),
            'label': (images, np.where(np.arange(6) == 2, 0, labels)),
            'order': (images[::-1], labels[::-1]),
            'fewer': (images[:5], labels[:5]),
            'shape': (images.reshape(6, 2, 4, 1), labels),
        }
        with pytest.raises(ValueError, match='other images .* was made with .6.: their fingerprint'):
            workdir.check_fingerprint('train', Images(images=others[change][0], labels=others[change][1]))
    assert stat.S_IMODE(os.stat(workdir.fingerprints).st_mode) == 0o600


def test_flatten_is_json(tiny_config):
    flat = flatten(tiny_config().to_dict())
    assert json.loads(json.dumps(flat)) == flat
    assert flat['model.multipliers'] == [1] and flat['generate.sampler.steps'] == 4
