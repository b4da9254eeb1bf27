"""Scalars are read back from event files, without TensorFlow; TensorBoard shows them, and pictures."""

import contextlib
import io
import json
import math
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
from PIL import Image
import pytest

from dpp_jax.training import tensorboard


def test_scalars_are_read_back_and_a_step_taken_again_counts_once(tmp_path):
    for first, shift in ((0, 0.0), (4, 100.0)):
        with tensorboard.writer(tmp_path) as write:
            for step in range(first, first + 6):
                write(step, {'loss': step + shift, 'norm': math.nan})
    found = tensorboard.scalars(tmp_path)
    steps, losses = found['loss']
    assert steps == list(range(10))
    # Of two files of the same second, any may count as the later one.
    assert losses[:4] == [0, 1, 2, 3] and losses[6:] == [106, 107, 108, 109]
    assert all(map(math.isnan, found['norm'][1]))


def test_a_torn_file_is_read_as_far_as_it_is_whole(tmp_path):
    with tensorboard.writer(tmp_path) as write:
        for step in range(5):
            write(step, {'loss': step})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert tensorboard.scalars(tmp_path)['loss'] == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert tensorboard.scalars(tmp_path / 'nowhere') == {}
    program = (
        'import sys; from pathlib import Path; from dpp_jax.training import tensorboard; '
        f'print(len(tensorboard.scalars(Path({str(tmp_path)!r}))), "tensorflow" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['1', 'False']


@pytest.fixture(scope='module')
def served(finished_run):
    """A function from a path to what TensorBoard answers; it runs on the metrics of the finished run."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    metrics = finished_run[1].metrics('finetune').parent
    program = shutil.which('tensorboard', path=Path(sys.executable).parent)
    process = subprocess.Popen(
        [program, '--logdir', metrics, '--host', '127.0.0.1', '--port', str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def get(path):
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/{path}', timeout=30) as answer:
            return answer.read()

    try:
        _wait_until_all_is_read(process, get)
        yield get
    finally:
        process.terminate()
        process.wait()


def _wait_until_all_is_read(process, get):
    """It answers before it has read all files."""
    for _ in range(300):
        if process.poll() is not None:
            raise AssertionError(process.stderr.read())
        with contextlib.suppress(OSError):
            if len(json.loads(get('data/plugin/images/tags')).get('finetune', ())) == 3:
                return
        time.sleep(0.2)
    raise AssertionError('TensorBoard shows no images of the run')


def test_tensorboard_shows_curves_and_pictures_of_a_run(finished_run, served):
    config, workdir, _ = finished_run
    scalars = json.loads(served('data/plugin/scalars/tags'))
    assert scalars.keys() >= {'pretrain', 'finetune'} and 'loss' in scalars['pretrain']
    pictures = json.loads(served('data/plugin/images/tags'))
    assert set(pictures['central']) == {'central images'}
    assert set(pictures['finetune']) == {
        'synthetic images', 'synthetic classifier images', 'over finetuning',
    }  # fmt: skip
    found = json.loads(served('data/plugin/images/images?run=finetune&tag=over+finetuning&sample=0'))
    with np.load(workdir.over_finetuning) as arrays:
        assert [image['step'] for image in found] == arrays['steps'].tolist()
    (shown,) = json.loads(served('data/plugin/images/images?run=central&tag=central+images&sample=0'))
    content = served(f'data/plugin/images/individualImage?{shown["query"]}')
    with (
        Image.open(io.BytesIO(content)) as picture,
        Image.open(workdir.central_images.with_suffix('.png')) as released,
    ):
        np.testing.assert_array_equal(picture.convert('L'), released.convert('L'))
