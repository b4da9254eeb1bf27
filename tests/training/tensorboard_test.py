"""Scalars are read back from event files, without TensorFlow."""

import math
import subprocess
import sys

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
