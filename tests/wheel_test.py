"""What is installed from a wheel samples from a released model, with nothing else at hand."""

import os
from pathlib import Path
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Never read: they may be large or change meanwhile.
_LEFT_OUT = shutil.ignore_patterns('.*', '__pycache__', 'build', 'dist', '*.egg-info', 'runs', 'tests')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The folder with what a wheel holds; it is built from a copy, since building writes beside setup.py."""
    folder = tmp_path_factory.mktemp('wheel')
    shutil.copytree(ROOT, folder / 'source', ignore=_LEFT_OUT)
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation',
         '--no-index', '--wheel-dir', folder, folder / 'source'],
        check=True,
    )  # fmt: skip
    (wheel,) = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / 'installed')
    return folder / 'installed'


def test_a_wheel_samples_from_a_release_in_an_empty_folder(finished_run, installed, tmp_path):
    config, workdir, _ = finished_run
    shutil.copytree(workdir.release, tmp_path / 'release')
    empty = tmp_path / 'empty'
    empty.mkdir()
    program = (
        'import sys, dpp_jax; model = dpp_jax.load(sys.argv[1]); images, labels = model.sample(5, seed=1); '
        'print(dpp_jax.__file__, images.shape, labels.tolist(), "".join(model.classes), '
        'model.privacy.delta, model, sep="\\n")'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, tmp_path / 'release'],
        env=os.environ | {'PYTHONPATH': str(installed)},
        cwd=empty,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, shape, labels, classes, delta, shown = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed)
    assert (shape, labels, classes) == ('(5, 8, 8, 1)', '[0, 1, 2, 3, 4]', '0123456789')
    assert float(delta) == config.dp.delta and '8x8x1, 10 classes' in shown
    assert not list(empty.iterdir())
