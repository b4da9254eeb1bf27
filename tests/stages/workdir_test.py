import json
import os
import stat

import jax
import numpy as np
import pytest

from dpp_jax.stages import workdir as workdir_lib


def test_private_is_closed_to_others_and_says_what_it_is(tiny_config, tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path / 'run')
    workdir.open(tiny_config())
    workdir.keys('dp_sgd', None)
    assert stat.S_IMODE(os.stat(workdir.private).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(workdir.private / 'keys.json').st_mode) == 0o600
    assert 'WITHOUT a privacy guarantee' in (workdir.private / 'README.txt').read_text()


def test_another_config_is_refused_with_the_differences(tiny_config, tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path)
    workdir.open(tiny_config())
    workdir.open(tiny_config())
    with pytest.raises(ValueError) as error:
        workdir.open(tiny_config(finetune__epochs=3, dp__epsilon=2.0))
    assert 'config.finetune.epochs: 1.0 there, 3.0 now' in str(error.value)
    assert 'config.dp.epsilon: 10.0 there, 2.0 now' in str(error.value)
    assert 'query' not in str(error.value)


def test_settings_that_change_no_result_may_change(tiny_config, tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path)
    workdir.open(tiny_config())
    workdir.open(tiny_config(finetune__microbatch=2, loop__log_every_steps=7))


def test_a_folder_that_cannot_be_written_is_named(tiny_config, tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('')
    with pytest.raises(PermissionError, match='--workdir=.*file/run cannot be written'):
        workdir_lib.WorkDir(blocked / 'run').open(tiny_config())


def test_keys_stay_and_differ_between_parts_and_runs(tmp_path):
    one, two = workdir_lib.WorkDir(tmp_path / 'a'), workdir_lib.WorkDir(tmp_path / 'b')
    keys = [
        one.keys('dp_sgd', None), one.keys('central_query', None), two.keys('dp_sgd', None)
    ]
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
    assert flat['model.multipliers'] == [2, 2] and flat['generate.sampler.steps'] == 4
