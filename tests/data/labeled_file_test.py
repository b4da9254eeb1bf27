"""Files of labeled images from elsewhere: both layouts, and what is wrong with others, all at once."""

import re

import numpy as np
import pytest

from dpp_jax.data import labeled_file

SHAPE = (4, 5, 3)  # height, width, channels
PIXELS = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
LABELS = np.arange(12) % 3
X = np.moveaxis(PIXELS, 3, 1)
FLOATS = X.astype(np.float32) / 255


def read(path, *, least=2, **arrays):
    if arrays:
        np.savez(path, **arrays)
    return labeled_file.read(path, image_shape=SHAPE, classes=3, least=least)


def problems(path, **arrays):
    with pytest.raises(ValueError) as found:
        read(path, **arrays)
    return str(found.value).splitlines()


@pytest.mark.parametrize(
    'arrays',
    [
        {'x': X, 'y': LABELS},
        {'x': FLOATS, 'y': LABELS.astype(np.uint8)},
        {'x': FLOATS.astype(np.float64), 'y': LABELS, '_note': np.array('NOT PRIVATE')},
        {'x': np.asfortranarray(FLOATS), 'y': LABELS},
        {'images': PIXELS, 'labels': LABELS, 'class_names': np.array(['a', 'b', 'c'])},
        {'images': np.moveaxis(FLOATS, 1, 3), 'labels': LABELS},
    ],
    ids=['bytes', 'floats', 'doubles', 'reversed', 'ours', 'ours in floats'],
)
def test_pixels_and_labels_are_those_of_the_file(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(labeled_file, '_AT_ONCE', 5)
    found = read(tmp_path / 'gen.npz', **arrays)
    assert found.images.dtype == np.uint8 and found.labels.dtype == np.int32
    np.testing.assert_array_equal(found.images, PIXELS)
    np.testing.assert_array_equal(found.labels, LABELS)


def changed(array, place, value):
    array = array.copy()
    array.flat[place] = value
    return array


@pytest.mark.parametrize(
    'arrays, message',
    [
        ({'x': FLOATS}, 'has the arrays x; it must have x and y, or images and labels'),
        ({'y': LABELS}, 'has the arrays y; it must have'),
        ({'samples': FLOATS}, 'has the arrays samples; it must have'),
        ({'x': PIXELS, 'y': LABELS}, 'x has the shape (12, 4, 5, 3); it must be (N, 3, 4, 5)'),
        ({'images': X, 'labels': LABELS}, 'images has the shape (12, 3, 4, 5); it must be (N, 4, 5, 3)'),
        ({'x': FLOATS[:, :1], 'y': LABELS}, 'x has the shape (12, 1, 4, 5); it must be (N, 3, 4, 5)'),
        ({'x': FLOATS[:1], 'y': LABELS[:1]}, 'x has the shape (1, 3, 4, 5); it must be (N, 3, 4, 5) with at'),
        ({'x': X.astype(np.int32), 'y': LABELS}, 'x is int32; it must be uint8, or floating-point numbers'),
        ({'x': X.astype(object), 'y': LABELS}, 'x holds Python objects'),
        ({'x': 2 * FLOATS - 1, 'y': LABELS}, 'x has values from -1 to 1; they must lie in [0, 1]'),
        ({'x': 255 * FLOATS, 'y': LABELS}, 'x has values from 0 to 255; they must lie in [0, 1]'),
        ({'x': changed(FLOATS, 700, np.nan), 'y': LABELS}, 'x has NaN or infinite values, 1 of them'),
        ({'x': changed(FLOATS, 700, -np.inf), 'y': LABELS}, 'x has NaN or infinite values, 1 of them'),
        ({'x': FLOATS, 'y': LABELS + 1}, 'y: the labels go from 1 to 3; they must lie in 0..2'),
        ({'x': FLOATS, 'y': LABELS * 1.0}, 'y: the labels are float64 of shape (12,); they must be integers'),
        ({'x': FLOATS, 'y': LABELS[:7]}, 'y: the labels are int64 of shape (7,); they must be integers'),
        ({'x': FLOATS, 'y': np.eye(3, dtype=int)[LABELS]}, 'y: the labels are int64 of shape (12, 3)'),
        ({'x': FLOATS, 'y': np.minimum(LABELS, 1)}, 'there are too few images: 2 (0). Classifiers need 2'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_is_wrong_is_named(tmp_path, arrays, message):
    line, *_ = problems(tmp_path / 'gen.npz', **arrays)
    assert message in line and str(tmp_path / 'gen.npz') in line


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    x = changed(changed(FLOATS[..., :4], 5, np.nan), 9, 7.0)
    found = problems(tmp_path / 'gen.npz', x=x, labels=LABELS, y=LABELS - 1)
    wanted = [
        'the shape (12, 3, 4, 4)',
        'NaN or infinite values, 1 of them',
        'from 0 to 7',
        'the labels go from -1 to 1',
    ]
    assert len(found) == 4 and all(text in line for text, line in zip(wanted, found))


def test_a_file_that_is_not_there_or_damaged_is_named(tmp_path):
    path = tmp_path / 'gen.npz'
    with pytest.raises(FileNotFoundError, match='gen.npz is no file'):
        read(path)
    path.write_bytes(b'no archive')
    assert 'cannot be read' in problems(path)[0]
    np.savez_compressed(path, x=FLOATS, y=LABELS)
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes(100) + content[600:])
    assert re.search('gen.npz cannot be read', problems(path)[0])


def test_without_classifiers_no_class_is_needed(tmp_path):
    found = read(tmp_path / 'gen.npz', x=FLOATS, y=np.zeros(12, int), least=0)
    assert not found.labels.any()
