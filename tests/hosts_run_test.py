"""A run in several real processes, over loopback, is the run of one process; scripts/shapes.py tries more."""

import importlib.util
import json
import os
from pathlib import Path
import re
import signal
import threading

import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.configs import digits_8
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def launch():
    spec = importlib.util.spec_from_file_location('launch_local', ROOT / 'scripts' / 'launch_local.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Together:
    """The program in some processes; what each says, line by line. Each works in a folder of its own."""

    def __init__(self, launch, config, root, processes, devices, stage='all'):
        usual = flatten(digits_8.get_config('10').to_dict())
        settings = {name: value for name, value in flatten(config.to_dict()).items() if value != usual[name]}
        arguments = ['--config=digits_8:10', '--workdir=run', f'--hosts={processes}', f'--stage={stage}']
        arguments += [
            f'--config.{name}={tuple(value) if isinstance(value, list) else value}'
            for name, value in settings.items()
        ]
        # Only process 0 has the folder of the run: the others begin elsewhere.
        self.folders = [root] + [root / f'elsewhere_{number}' for number in range(1, processes)]
        for folder in self.folders[1:]:
            folder.mkdir(exist_ok=True)
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        self.all = launch.start(arguments, processes, devices, folders=self.folders, env=environment)
        self.said = ['' for _ in self.all]
        self._readers = [
            threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(processes)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number):
        for line in self.all[number].stdout:
            self.said[number] += line.decode(errors='replace')

    def wait(self, seconds=280):
        try:
            statuses = [process.wait(timeout=seconds) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        for reader in self._readers:
            reader.join()
        return statuses


def released_arrays(config, workdir, model):
    weights = artefacts.weights(workdir, 'finetune', model.shapes())
    flat = lambda tree, name='': (
        [pair for key, inner in sorted(tree.items()) for pair in flat(inner, f'{name}/{key}')]
        if isinstance(tree, dict)
        else [(name, np.asarray(tree))]
    )
    return dict(flat(weights))


def check_same(config, workdir, reference, model, has_images=True):
    """Central images bit for bit, the same ledger, weights up to rounding, and a whole set of images."""
    for name in ('images', 'labels'):
        with np.load(workdir.central_images) as ours, np.load(reference.central_images) as theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert workdir.released_ledger.read_bytes() == reference.released_ledger.read_bytes()
    assert workdir.plan.read_bytes() == reference.plan.read_bytes()
    theirs = released_arrays(config, reference, model)
    for name, ours in released_arrays(config, workdir, model).items():
        np.testing.assert_allclose(ours, theirs[name], atol=1e-5, err_msg=name)
    for name in ('images.npz', 'classifier_images.npz') if has_images else ():
        with np.load(workdir.synthetic / name) as ours, np.load(reference.synthetic / name) as theirs:
            np.testing.assert_array_equal(ours['labels'], theirs['labels'])
            assert np.abs(ours['images'].astype(int) - theirs['images']).max() <= 1


def test_two_processes_of_four_devices_make_what_one_makes(launch, finished_run, tiny_model, tmp_path):
    config, reference, _ = finished_run
    run = Together(launch, config, tmp_path, 2, 4)
    assert run.wait() == [0, 0], run.said[0] + run.said[1]
    workdir = WorkDir(tmp_path / 'run')
    check_same(config, workdir, reference, tiny_model)
    scores, known = (json.loads(where.evaluation.read_text()) for where in (workdir, reference))
    assert scores['fid'] == pytest.approx(known['fid'], rel=0.05)
    assert scores['fid_images'] == known['fid_images']
    # One writer, and one who speaks.
    assert not list(run.folders[1].iterdir())
    # Gloo's threads write into each other's lines.
    lines = [line for line in run.said[1].splitlines() if line and 'peer ranks' not in line]
    assert len(lines) == 1 and lines[0].startswith('process 1 of 2, 4 of 8 devices'), run.said[1]
    assert 'process 0 of 2, 4 of 8 devices' in run.said[0] and 'finetune: done in' in run.said[0]


def test_a_run_of_two_processes_is_stopped_and_goes_on_in_one(launch, finished_run, tiny_model, tmp_path):
    """SIGTERM to process 0 in the middle of fine-tuning: all stop after the same step."""
    config, reference, _ = finished_run
    run = Together(launch, config, tmp_path, 2, 1)
    ledger = WorkDir(tmp_path / 'run').own_ledger
    while run.all[0].poll() is None and not (ledger.exists() and 'dp_sgd' in ledger.read_text()):
        run._readers[0].join(0.02)
    run.all[0].send_signal(signal.SIGTERM)  # it decides; tests/training/hosts_test.py asks the other one
    assert run.wait() == [0] * 2, '\n'.join(run.said)
    assert re.search(r'finetune stopped after step \d+; its state is saved', run.said[0]), run.said[0]
    alone = Together(launch, config, tmp_path, 1, 1, 'finetune')
    assert alone.wait() == [0], alone.said[0]
    assert 'runs           finetune' in alone.said[0]
    check_same(config, WorkDir(tmp_path / 'run'), reference, tiny_model, has_images=False)


def test_a_command_on_one_host_of_several_fails_at_once(launch, tmp_path):
    arguments = ['--config=digits_8:10', '--workdir=run', '--hosts=4']
    (alone,) = launch.start(arguments, 1, 1, folders=[tmp_path], env={**os.environ, 'PYTHONPATH': str(ROOT)})
    said = alone.communicate(timeout=120)[0].decode()
    assert alone.returncode == 1 and '--hosts is 4, but this run has 1 process' in said


def test_a_run_around_class_moments_is_the_same_in_two_processes(launch, tiny_config, tmp_path):
    config = tiny_config(
        moments__enabled=True,
        moments__frequencies=10,
        moments__clip_norm=1.0,
        moments__noise_multiplier=1.0,
        model__around='moments',
        pretrain__epochs=0,
        pretrain__moments_steps=4,
        generate__moments_share=0.25,
    )
    found = []
    for processes, devices in ((2, 1), (1, 2)):
        root = tmp_path / str(processes)
        root.mkdir()
        run = Together(launch, config, root, processes, devices, stage='all')
        assert run.wait() == [0] * processes, ''.join(run.said)
        found.append(WorkDir(root / 'run'))
    check_same(config, *found, build.model(config), has_images=False)
    assert found[0].moments.read_bytes() == found[1].moments.read_bytes()
    images = [np.load(workdir.synthetic / 'images.npz') for workdir in found]
    assert (images[0]['source'] == images[1]['source']).all() and images[0]['source'].mean() == 0.25
    assert np.abs(images[0]['images'].astype(int) - images[1]['images']).max() <= 1
