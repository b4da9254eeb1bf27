"""How far a run is: told by its folder, while another process works there and afterwards."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

import filelock
import pytest

from dpp_jax import pipeline, status
from dpp_jax.run.folder import WorkDir
from dpp_jax.training import progress


def files_of(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob('*')}


def test_a_finished_run_is_done_and_nothing_is_written(finished_run):
    config, workdir, _ = finished_run
    before = files_of(workdir.root)
    found = status.read(workdir.root)
    assert {said['state'] for said in found['stages'].values()} == {'done'} and found['next'] is None
    assert found['running'] is False and found['now'] is None
    assert (
        found['epsilon_spent'] == pytest.approx(found['epsilon_planned'])
        and found['delta'] == config.dp.delta
    )
    assert all(made == of for made, of in found['releases'].values())
    assert 'everything is done' in status.text(found) and 'no process is at work' in status.text(found)
    assert json.loads(status.as_json(found)) == found
    assert files_of(workdir.root) == before


def test_a_run_in_progress_tells_what_it_has_spent_and_where_it_is(tiny_config, tmp_path):
    config = tiny_config()
    for stage in ('central', 'pretrain'):
        pipeline.run(config, tmp_path, stage)
    workdir = WorkDir(tmp_path)
    found = status.read(tmp_path)
    assert found['next'] == 'finetune' and found['stages']['pretrain']['state'] == 'done'
    assert found['stages']['finetune'] == {'state': 'to do', 'step': 0, 'of': 23}
    assert 0 < found['epsilon_spent'] < found['epsilon_planned'] <= found['epsilon_budget']
    assert found['releases'] == {'central_query': [2, 2], 'dp_sgd': [0, 23], 'selection': [0, 0]}
    note = {
        'name': 'finetune',
        'done': 3,
        'total': 23,
        'unit': 'step',
        'seconds_left': 90.0,
        'time': time.time(),
    }
    workdir.progress.write_text(json.dumps(note), encoding='utf-8')
    with filelock.FileLock(tmp_path / '.lock'):
        found = status.read(tmp_path)
        assert found['running'] is True
        assert 'finetune: 3 of 23 steps, about 1.5 minutes left' in status.text(found)
        assert 'a process is at work' in status.text(found)
    assert status.read(tmp_path)['running'] is False
    workdir.progress.write_text(json.dumps(note | {'time': time.time() - 3600}), encoding='utf-8')
    assert status.read(tmp_path)['now'] is None  # of a process that was killed


def test_release_alone_tells_its_state(finished_run, tmp_path):
    _, workdir, _ = finished_run
    shutil.copytree(workdir.release, tmp_path / 'release')
    found = status.read(tmp_path)
    assert found['stages']['finetune']['state'] == 'done' and found['epsilon_spent'] > 0


def test_another_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='it must be the folder of a run'):
        status.read(tmp_path)


def test_the_command_needs_no_config_and_is_soon_done(finished_run):
    _, workdir, _ = finished_run
    command = [sys.executable, '-m', 'dpp_jax.main', f'--workdir={workdir.root}', '--stage=status', '--json']
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ, check=True
    )
    assert json.loads(done.stdout)['next'] is None


def test_a_run_notes_its_progress_while_it_runs(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, '_NOTE_SECONDS', 0.0)
    seen, original = [], progress.Bar._take_note

    def look(bar):
        original(bar)
        seen.append(status.read(tmp_path)['now'])

    monkeypatch.setattr(progress.Bar, '_take_note', look)
    pipeline.run(tiny_config(), tmp_path, 'central')
    assert [now['name'] for now in seen] == ['central', 'central']
    assert not WorkDir(tmp_path).progress.exists()
