import contextlib
import errno
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpp_jax import files, lease
from dpp_jax.training import checkpoint
from dpp_jax.training import state as state_lib


def make_state(width=3):
    params = {'a': {'kernel': jnp.arange(2.0 * width).reshape(2, width)}, 'b': jnp.ones(())}
    return state_lib.create(params, optax.adam(1e-3))


def test_state_comes_back_as_it_was(tmp_path):
    state = jax.tree.map(np.asarray, make_state())
    store = checkpoint.TrainingStore(tmp_path)
    assert store.restore(state) is None
    store.save(0, state)
    store.close()
    again = checkpoint.TrainingStore(tmp_path).restore(jax.tree.map(np.zeros_like, state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_training_of_another_network_is_refused(tmp_path):
    store = checkpoint.TrainingStore(tmp_path)
    store.save(0, jax.tree.map(np.asarray, make_state()))
    store.close()
    with pytest.raises(ValueError, match=r'another network.*kernel is \(2, 3\) there and \(2, 4\)'):
        checkpoint.TrainingStore(tmp_path).restore(make_state(width=4))


def test_model_of_another_network_is_refused_and_a_missing_one_named(tmp_path):
    params = make_state().params.tree()
    checkpoint.save_model(tmp_path / 'model', params)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_model(tmp_path / 'model', params), params)
    with pytest.raises(ValueError, match='another network'):
        checkpoint.load_model(tmp_path / 'model', make_state(width=4).params.tree())
    with pytest.raises(ValueError, match='b is .* there and missing'):
        checkpoint.load_model(tmp_path / 'model', {'a': params['a']})
    with pytest.raises(FileNotFoundError, match='no model checkpoint'):
        checkpoint.load_model(tmp_path / 'nowhere', params)


def test_leaving_the_store_by_an_exception_and_ending_the_process_loses_nothing(tmp_path):
    """As after SIGTERM: the save is still under way when the program ends."""
    program = """
import sys
import numpy as np
from dpp_jax.training import checkpoint
with checkpoint.TrainingStore(sys.argv[1]) as store:
    store.save(5, {'w': np.arange(200000.0)})
    sys.exit(3)
"""
    result = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert result.returncode == 3 and 'Traceback' not in result.stderr, result.stderr
    with checkpoint.TrainingStore(tmp_path) as store:
        saved = store.restore({'w': np.zeros(200000)})
    np.testing.assert_array_equal(saved['w'], np.arange(200000.0))


def test_a_save_that_the_disk_refuses_leaves_the_older_checkpoint(tmp_path):
    """A limit on the size of files stands for a full disk; both fail in the same system call."""
    program = """
import resource, sys
import numpy as np
from dpp_jax.training import checkpoint
folder = sys.argv[1]
state = {'w': np.random.default_rng(0).normal(size=100000)}
with checkpoint.TrainingStore(folder) as store:
    store.save(1, state)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
try:
    with checkpoint.TrainingStore(folder) as store:
        store.save(2, {'w': state['w'] + 1})
    sys.exit('saved in spite of the limit')
except checkpoint.SaveFailed as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert checkpoint.latest_training(folder)[0] == 1
with checkpoint.TrainingStore(folder) as store:
    np.testing.assert_array_equal(store.restore({'w': np.zeros(100000)})['w'], state['w'])
    store.save(3, {'w': state['w'] + 2})
assert checkpoint.latest_training(folder)[0] == 3
"""
    result = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert result.returncode == 0, result.stderr
    assert 'could not be written' in result.stdout and 'are intact' in result.stdout


def test_shapes_of_a_training_are_checked_without_reading_it(tmp_path):
    with checkpoint.TrainingStore(tmp_path) as store:
        store.save(4, jax.tree.map(np.asarray, make_state()))
    step, folder = checkpoint.latest_training(tmp_path)
    assert step == 4
    checkpoint.check_params(folder, make_state().params)
    with pytest.raises(ValueError, match='another network'):
        checkpoint.check_params(folder, make_state(width=4).params.tree())


def damage(folder, how):
    """What a power failure may leave of the files of a checkpoint."""
    for path in Path(folder).rglob('*'):
        if path.is_file():
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if how == 'cut' else bytes(len(content)))


@pytest.mark.parametrize('how', ['cut', 'zeros'])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(tmp_path, how, caplog):
    state = jax.tree.map(np.asarray, make_state())
    with checkpoint.TrainingStore(tmp_path) as store:
        for step in (1, 2):
            store.save(step, state.replace(step=np.int32(step)))
    damage(tmp_path / '2', how)
    checkpoint.check_params(tmp_path / '2' / 'default', state.params)
    with checkpoint.TrainingStore(tmp_path) as store:
        assert store.restore(state).step == 1
        assert 'cannot be read' in caplog.text and (tmp_path / 'damaged_2').is_dir()
        store.save(2, state.replace(step=np.int32(2)))
    with checkpoint.TrainingStore(tmp_path) as store:
        assert store.restore(state).step == 2
    for step in (1, 2):
        damage(tmp_path / str(step), how)
    before = {path.name for path in tmp_path.iterdir()}
    with checkpoint.TrainingStore(tmp_path) as store, pytest.raises(ValueError, match='delete it'):
        store.restore(state)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_error_that_passes_takes_no_checkpoint_away(tmp_path, monkeypatch):
    state = jax.tree.map(np.asarray, make_state())
    with checkpoint.TrainingStore(tmp_path) as store:
        for step in (1, 2):
            store.save(step, state.replace(step=np.int32(step)))

    def fail(*_, **__):
        raise OSError(errno.EMFILE, 'Too many open files')

    with monkeypatch.context() as patch, checkpoint.TrainingStore(tmp_path) as store:
        patch.setattr(store._manager, 'restore', fail)
        with pytest.raises(ValueError, match='can be read: 2, 1 .*Too many open files.* try again'):
            store.restore(state)
    with checkpoint.TrainingStore(tmp_path) as store:
        assert store.restore(state).step == 2


def test_a_training_whose_checkpoints_were_all_put_aside_does_not_begin_again_without_a_word(tmp_path):
    (tmp_path / 'damaged_7').mkdir()
    with checkpoint.TrainingStore(tmp_path) as store:
        with pytest.raises(ValueError, match='can be read: damaged_7 .they were put aside before.*delete it'):
            store.restore(make_state())


@pytest.mark.parametrize('how', ['cut', 'zeros'])
def test_a_damaged_model_is_named(tmp_path, how):
    params = make_state().params.tree()
    checkpoint.save_model(tmp_path / 'model', params)
    damage(tmp_path / 'model', how)
    with pytest.raises(ValueError, match='model cannot be read .*move it away'):
        checkpoint.load_model(tmp_path / 'model', params)


def test_who_lost_the_lease_leaves_the_checkpoints_of_the_new_owner(store, monkeypatch):
    monkeypatch.setattr(lease, '_LOOK_AGAIN', 0.0)
    monkeypatch.setattr(lease, '_SETTLE', 0.0)
    folder, state = store / 'resume', {'w': np.arange(3.0)}
    with files.locked(store / '.lock'):
        with pytest.raises(lease.Lost, match='This process stops'):
            with checkpoint.TrainingStore(folder, keep=1) as training:
                training.save(1, state)
                assert training.latest_step() == 1
                (store / '.lock').unlink()
                training.save(2, state)
    assert files.names(folder) == ['1'] and files.is_whole(folder / '1')
    files.write_bytes(folder / '7' / 'a', b'')  # of the new owner, which the old one does not know
    with files.locked(store / '.lock'), contextlib.ExitStack() as stack:
        copy = checkpoint._Copy(folder, stack)
        shutil.rmtree(copy.local / '7')
        (store / '.lock').unlink()
        copy.begin(lambda: None)
        with pytest.raises(lease.Lost):
            copy.wait()
    assert files.names(folder) == ['1', '7']
