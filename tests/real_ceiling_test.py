"""The script of ceilings runs from its command line to a table; its images can be told apart."""

from pathlib import Path
import subprocess
import sys

import numpy as np

from scripts import real_ceiling

ROOT = Path(__file__).resolve().parents[1]


def test_shapes_have_equal_classes_and_follow_from_the_seed():
    made = real_ceiling.shapes(300, seed=0)
    assert made.images.shape == (300, 28, 28, 1) and made.images.dtype == np.uint8
    assert np.bincount(made.labels).tolist() == [100, 100, 100]
    other = real_ceiling.shapes(300, seed=1)
    assert not np.array_equal(made.images, other.images)
    np.testing.assert_array_equal(made.images, real_ceiling.shapes(300, seed=0).images)


def test_a_short_table_is_printed():
    command = [sys.executable, '-m', 'scripts.real_ceiling', '--source=digits', '--classifiers=mlp']
    command += ['--train=400', '--test=100', '--epochs=8', '--learning_rate=0.003']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert '400 training and 100 test images of (8, 8, 1), 10 classes' in head
    kind, accuracy, *_ = row.split()
    assert kind == 'mlp' and float(accuracy) > 60
