"""What files tell beside their content: not when or where they were made, and whether the run is private."""

import json
import os
from pathlib import Path
import re
import shutil
import time
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
import pytest

from dpp_jax import files, pipeline
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts, folder, statement_text
from dpp_jax.run.folder import WorkDir

_MONTH = 31 * 86_400.0
_PER_SECOND = (1, 10**3, 10**6, 10**9)
_DATE = re.compile(rb'20\d\d-\d\d-\d\d')


def state_of(root):
    """Path → size and time of everything in a folder."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in (root, *root.rglob('*'))}


def tells_time(data, now):
    """Where bytes hold a time near now: a date, or a count of seconds, ms, µs or ns since 1970."""
    found = _DATE.findall(data)
    for number in re.findall(rb'(?<![\d.])\d{10,19}(?!\d)', data):
        found += [number for unit in _PER_SECOND if abs(int(number) / unit - now) < _MONTH]
    return found


def tells_path(data, paths):
    return [path for path in paths if str(path).encode() in data]


def told(release, now, paths):
    """File → times and paths that it tells."""
    found = {}
    for path in (path for path in release.rglob('*') if path.is_file()):
        data = path.read_bytes()
        found[path] = tells_time(data, now) + tells_path(data, paths)
        if path.suffix == '.npz':
            with zipfile.ZipFile(path) as archive:
                found[path] += [i.date_time for i in archive.infolist() if i.date_time[0] != 1980]
    return {str(path.relative_to(release)): what for path, what in found.items() if what}


def test_nothing_in_release_tells_a_time_or_a_path(finished_run):
    _, workdir, _ = finished_run
    places = [workdir.root, Path.home(), Path.cwd(), Path(__file__).parents[1], '/tmp/']
    assert told(workdir.release, time.time(), [place for place in places if str(place) != '/']) == {}
    # Not among them: the other format of orbax, which packs times.
    names = {path.name for path in (workdir.release / 'model').rglob('*') if path.is_file()}
    assert {name for name in names if not re.fullmatch(r'[\d.]+', name)} == {
        '.zarray', '_METADATA', '_CHECKPOINT_METADATA',
    }  # fmt: skip


@pytest.mark.parametrize(
    'content',
    [str(time.time_ns()), str(int(time.time())), '2026-11-26T10:00', '/home/me/run'],
    ids=['nanoseconds', 'seconds', 'date', 'path'],  # the same in every process
)
def test_what_tells_a_time_or_a_path_is_seen(tmp_path, content):
    """Otherwise the test above could not fail."""
    (tmp_path / 'a').write_text(f'x = {content}')
    (tmp_path / 'b').write_text('epsilon = 1.23456789012345678, steps = 1000000000000')
    assert set(told(tmp_path, time.time(), ['/home/me'])) == {'a'}


def test_every_file_in_release_has_the_time_of_the_config(copied_run):
    config, workdir = copied_run
    for path in (workdir.release, *workdir.release.rglob('*')):
        os.utime(path, (1e9, 1e9))
    os.utime(workdir.config, (1.1e9, 1.1e9))
    shutil.rmtree(workdir.model('finetune'))
    shutil.rmtree(workdir.synthetic)
    pipeline.run(config, workdir.root, 'all')
    assert {p.stat().st_mtime for p in (workdir.release, *workdir.release.rglob('*'))} == {1.1e9}
    assert workdir.keys.stat().st_mtime != 1.1e9


def test_nothing_in_release_changes_while_private_images_are_trained_on(copied_run, monkeypatch):
    config, workdir = copied_run
    shutil.rmtree(workdir.model('finetune'))
    shutil.rmtree(workdir.checkpoints('finetune'))
    lines = workdir.own_ledger.read_text().splitlines(True)
    for path in (workdir.own_ledger, workdir.released_ledger):
        path.write_text(''.join(lines[: config.query.queries]))
    workdir.statement.unlink()
    seen, append = [], Ledger.append

    def watched(ledger, entry):
        seen.append(state_of(workdir.release))
        return append(ledger, entry)

    monkeypatch.setattr(Ledger, 'append', watched)
    config.loop.checkpoint_every_seconds = 0.0
    try:
        pipeline.run(config, workdir.root, 'finetune')
    finally:
        config.loop.checkpoint_every_seconds = 1000.0
    assert len(seen) == len(lines) - config.query.queries and all(state == seen[0] for state in seen)
    assert workdir.released_ledger.read_text() == workdir.own_ledger.read_text() == ''.join(lines)


def test_plain_orbax_reads_a_released_model(finished_run, tiny_model):
    _, workdir, _ = finished_run
    ours = artefacts.weights(workdir, 'finetune', tiny_model.shapes())
    path = workdir.model('finetune').absolute()
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with checkpointer:
            theirs = checkpointer.restore(path)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(theirs), jax.tree.leaves(ours))


def test_a_run_of_the_version_before_goes_on_with_its_ledger(copied_run):
    """It grew in release/; what it names is neither lost nor named twice."""
    config, workdir = copied_run
    shutil.rmtree(workdir.model('finetune'))
    before = workdir.released_ledger.read_text()
    workdir.own_ledger.unlink()
    pipeline.run(config, workdir.root, 'finetune')
    assert workdir.own_ledger.read_text() == workdir.released_ledger.read_text() == before


def test_a_lost_published_ledger_is_published_again(copied_run):
    config, workdir = copied_run
    before = workdir.released_ledger.read_text()
    workdir.released_ledger.unlink()
    pipeline.run(config, workdir.root, 'all')
    assert workdir.released_ledger.read_text() == before


def test_after_clean_the_published_ledger_is_read(copied_run, gate):
    config, workdir = copied_run
    entries = gate(config, workdir).ledger.entries
    pipeline.run(config, workdir.root, 'clean')
    assert gate(config, workdir).ledger.entries == entries and len(entries) > 20


@pytest.mark.parametrize(
    'name, value, told',
    [
        ('data.source', 'npz:/home/me/faces', 'npz:<path>'),
        ('data.source', 'idx:faces', 'idx:<path>'),
        ('data.source', 'tfds:mnist', 'tfds:mnist'),
        ('data.source', 'digits', 'digits'),
        ('data.dir', '/home/me', '<path>'),
        ('data.dir', '', ''),
        ('dp.already_spent', '/home/me/a,/home/me/b', '<path>'),
    ],
)
def test_a_path_in_the_settings_binds_the_folder_and_is_not_told(tiny_config, tmp_path, name, value, told):
    workdir = WorkDir(tmp_path)
    settings = folder.flatten(tiny_config().to_dict()) | {name: value}
    with workdir.opened():
        workdir.record(settings)
    assert files.read_json(workdir.config, '')[name] == told
    workdir.check(settings)
    with pytest.raises(ValueError, match=f'config.{name}: .* there, npz:/other now'):
        workdir.check(settings | {name: 'npz:/other'})
    workdir.own_config.unlink()  # as after --stage=clean
    workdir.check(settings)


def says_not_private(path):
    """Whether a file says so, through its own reader; of a model or a training its folder does."""
    for parent in path.parents:
        metadata = parent / '_CHECKPOINT_METADATA'
        if metadata.exists():
            return 'NOT PRIVATE' in str(json.loads(metadata.read_text())['custom_metadata'])
    if path.suffix == '.png':
        with Image.open(path) as picture:
            return 'NOT PRIVATE' in picture.info.get('Comment', '')
    if path.suffix == '.npz':
        with np.load(path) as arrays:
            return 'NOT PRIVATE' in str(arrays.get('_note', ''))
    if path.suffix == '.json':
        return 'NOT PRIVATE' in json.loads(path.read_text()).get('_note', '')
    return re.search(b'not.private', path.read_bytes(), re.IGNORECASE) is not None


def silent(workdir):
    """Files of a run that do not say that it is not private."""
    found = [path for path in workdir.root.rglob('*') if path.is_file() and path.name != '.lock']
    return {path for path in found if not says_not_private(path)}, set(found)


def test_every_file_of_a_seeded_run_says_that_it_is_not_private(finished_run, tmp_path, capsys):
    config, workdir, told = finished_run
    some, found = silent(workdir)
    assert some == set()
    assert {p.suffix for p in found} > {'.json', '.jsonl', '.npz', '.png', '.txt', '.md', '.html'}
    assert told.startswith('NOT PRIVATE: the keys of this run come from config.seed = 1;')
    for stage in ('plan', 'report', 'generate'):
        pipeline.run(config, workdir.root, stage)
        assert capsys.readouterr().out.startswith('NOT PRIVATE')
    pipeline.run(config, tmp_path, 'plan')
    assert silent(WorkDir(tmp_path)) == (set(), {tmp_path / 'plan.png'})


def test_no_file_of_a_private_run_says_that_it_is_not(quick_config, tmp_path, capsys):
    config = quick_config(evaluate__fid=False, generate__png_tree=True)
    config.seed = None
    pipeline.run(config, tmp_path, 'all')
    some, found = silent(WorkDir(tmp_path))
    assert some == found and len(found) > 40
    told = capsys.readouterr()
    assert 'not private' not in (told.out + told.err).lower()


def test_notes_are_not_part_of_what_is_read(tmp_path):
    arrays, value = {'images': np.arange(3)}, {'a': 1, '_note': 'Do not publish.'}
    with files.noted(tmp_path, 'for tests'):
        files.write_npz(tmp_path / 'a.npz', **arrays)
        files.write_json(tmp_path / 'a.json', value)
        files.write_json(tmp_path / 'b.json', {'a': 1})
    files.write_json(tmp_path / 'c.json', value)
    assert files.read_npz(tmp_path / 'a.npz', '').keys() == arrays.keys()
    assert files.read_json(tmp_path / 'a.json', '') == files.read_json(tmp_path / 'c.json', '') == value
    assert files.read_json(tmp_path / 'b.json', '') == {'a': 1}
    assert json.loads((tmp_path / 'a.json').read_text())['_note'] == 'NOT PRIVATE: for tests\nDo not publish.'


def test_settings_that_were_scored_are_counted(copied_run, capsys):
    """Choosing among them by scores is a use of private images that no ledger sees."""
    config, workdir = copied_run

    def scored():
        return len(json.loads(workdir.scored.read_text())['subjects'])

    assert scored() == 1
    workdir.evaluation.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.evaluate, 'fid', False)
        pipeline.run(config, workdir.root, 'evaluate')
        assert scored() == 1
        patch.setitem(config.evaluate, 'epochs', 3)
        pipeline.run(config, workdir.root, 'all')
    assert scored() == 2
    told = capsys.readouterr().out
    assert 'in this folder so far: 1. Not covered' in told and 'in this folder so far: 2. Not covered' in told
    assert '2 (a choice by scores is not covered)' in workdir.report_text.read_text()
    assert statement_text.CHOICE in workdir.statement_text.read_text()
