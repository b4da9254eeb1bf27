"""Reading private images: the real sets, files made here, and everything that can be wrong."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
from pathlib import Path
import re
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_digits

from dpp_jax.data import resize, sources
from dpp_jax.data.preparation import Preparation
from dpp_jax.data.sources import folder, npz
from dpp_jax.data.stored import StoredImages
from dpp_jax.privacy import groups, poisson
from dpp_jax.privacy.shares import Share
from dpp_jax.training import steps

SHARED = Path(__file__).resolve().parents[3] / 'shared'
MNIST_IDX, MNIST_TFDS = SHARED / 'data' / 'mnist', SHARED / 'data' / 'tfds'
# Of the original training files: images of each class, and MD5 of the unpacked image file.
MNIST_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_MD5 = '6bbc9ace898e44ae57da46a324031adb'
needs_idx = pytest.mark.skipif(not MNIST_IDX.exists(), reason='no ../shared/data/mnist')
needs_tfds = pytest.mark.skipif(not MNIST_TFDS.exists(), reason='no ../shared/data/tfds')


def source_info(name, train_images, test_images, image_shape, classes):
    return sources.SourceInfo(
        name=name,
        train_images=train_images,
        test_images=test_images,
        image_shape=image_shape,
        classes=classes,
    )


def plain(info):
    """What a source says of its images' number, shape and classes."""
    return dataclasses.replace(info, class_names=(), class_counts=(), sides=None, groups=None, notes=())


def random_set(count, shape=(4, 6), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


def idx_bytes(array):
    header = [0x800 + array.ndim, *array.shape]
    return np.array(header, '>u4').tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_set(tmp_path):
    """A folder with the four files: train plain, test gzipped."""
    for split, stem, count in (('train', 'train', 7), ('test', 't10k', 4)):
        images, labels = random_set(count, seed=count)
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            path = tmp_path / f'{stem}-{kind}-ubyte'
            if split == 'train':
                path.write_bytes(idx_bytes(array))
            else:
                path.with_name(path.name + '.gz').write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path


@pytest.fixture
def npz_set(tmp_path):
    """A folder with train.npz (color) and test.npz."""
    for split, count in (('train', 7), ('test', 4)):
        images, labels = random_set(count, (4, 6, 3), seed=count)
        labels = labels.astype(np.int64)
        np.savez_compressed(tmp_path / f'{split}.npz', images=images, labels=labels)
    return tmp_path


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test = sources.load('digits', 'train'), sources.load('digits', 'test')
    again = sources.load('digits', 'train')
    np.testing.assert_array_equal(train.images, again.images)
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    shares = [np.bincount(part.labels) / len(part.labels) for part in (train, test)]
    np.testing.assert_allclose(*shares, atol=2e-3)
    # Together they are the whole set, every image once, with its label.
    digits = load_digits()
    whole = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert whole.min() == 0 and whole.max() == 255
    parts = [(p.images[..., 0], p.labels) for p in (train, test)]
    assert sorted_rows(*map(np.concatenate, zip(*parts))) == sorted_rows(whole, digits.target)


def sorted_rows(images, labels):
    return sorted(bytes([label]) + image.tobytes() for image, label in zip(images, labels))


def test_description_of_the_digits_is_what_is_loaded():
    info = sources.describe('digits')
    assert plain(info) == source_info('digits', 1437, 360, (8, 8, 1), 10)
    assert info.class_counts == tuple(np.bincount(sources.load('digits', 'train').labels))


def test_idx_files_plain_and_gzipped(idx_set):
    source = f'idx:{idx_set}'
    assert plain(sources.describe(source)) == source_info(source, 7, 4, (4, 6, 1), 3)
    for split, count in (('train', 7), ('test', 4)):
        images, labels = random_set(count, seed=count)
        loaded = sources.load(source, split)
        np.testing.assert_array_equal(loaded.images[..., 0], images)
        np.testing.assert_array_equal(loaded.labels, labels)
        assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int32


def test_description_of_idx_files_reads_no_pixel(idx_set):
    """The image files may end after their headers."""
    path = idx_set / 'train-images-idx3-ubyte'
    path.write_bytes(path.read_bytes()[:16])
    assert sources.describe(f'idx:{idx_set}').train_images == 7
    with pytest.raises(ValueError, match='train-images'):
        sources.load(f'idx:{idx_set}', 'train')


def test_description_of_npz_files_reads_no_pixel(npz_set):
    """What follows the header of the images may be damaged."""
    path = npz_set / 'train.npz'
    images, labels = random_set(7, (64, 64, 3))  # more than one block of the file
    for split in sources.SPLITS:
        np.savez(npz_set / f'{split}.npz', images=images, labels=labels)
    damaged(path, lambda content: content.replace(images.tobytes(), bytes(images.size)))
    assert sources.describe(f'npz:{npz_set}').train_images == 7
    with pytest.raises(ValueError, match='train.npz cannot be read'):
        sources.load(f'npz:{npz_set}', 'train')


def test_every_source_stands_under_the_kind_of_its_form():
    for kind, source in sources.SOURCES.items():
        assert source.form.partition(':')[0] == kind


@needs_idx
def test_mnist_is_mnist():
    source = f'idx:{MNIST_IDX}'
    assert plain(sources.describe(source)) == source_info(source, 60000, 10000, (28, 28, 1), 10)
    train, test = sources.load(source, 'train'), sources.load(source, 'test')
    assert hashlib.md5(idx_bytes(train.images[..., 0])).hexdigest() == MNIST_MD5
    assert np.bincount(train.labels).tolist() == MNIST_COUNTS
    assert train.labels[:3].tolist() == [5, 0, 4] and test.labels[:3].tolist() == [7, 2, 1]


@needs_idx
@needs_tfds
def test_mnist_of_tfds_is_the_same_images():
    """tensorflow-datasets stores them in another order."""
    source = 'tfds:mnist'
    info = sources.describe(source, data_dir=str(MNIST_TFDS))
    assert plain(info) == source_info(source, 60000, 10000, (28, 28, 1), 10)
    for split in sources.SPLITS:
        tfds = sources.load(source, split, data_dir=str(MNIST_TFDS))
        idx = sources.load(f'idx:{MNIST_IDX}', split)
        assert tfds.images.shape == idx.images.shape and tfds.labels.dtype == np.int32
        assert sorted_rows(tfds.images, tfds.labels) == sorted_rows(idx.images, idx.labels)


@needs_tfds
def test_reading_tfds_does_not_import_tensorflow():
    program = (
        'import sys\n'
        'from dpp_jax.data import sources\n'
        f"images = sources.load('tfds:mnist', 'test', data_dir={str(MNIST_TFDS)!r})\n"
        'print(len(images.images), "tensorflow" in sys.modules)\n'
    )
    root = Path(sources.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.split() == ['10000', 'False']


@pytest.fixture(scope='module')
def tiny_tfds():
    """A small set that tensorflow-datasets can prepare without a network; `fail` stops it."""
    import tensorflow_datasets as tfds

    class TinyForTest(tfds.core.GeneratorBasedBuilder):
        """Six images in two classes."""

        VERSION = tfds.core.Version('1.0.0')
        fail = False
        train_images = 4

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        'image': tfds.features.Image(shape=(4, 6, 3)),
                        'label': tfds.features.ClassLabel(num_classes=2),
                        'about': {'person': np.int64},
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            if self.fail:
                raise ConnectionError('no network')
            return {'train': self._generate_examples(self.train_images), 'test': self._generate_examples(2)}

        def _generate_examples(self, count):
            images, labels = random_set(count, (4, 6, 3), 2, seed=count)
            for i in range(count):
                yield i, {'image': images[i], 'label': int(labels[i]), 'about': {'person': i // 2}}

    return TinyForTest


def test_tfds_is_prepared_when_it_is_not_there(tiny_tfds, tmp_path, monkeypatch, capfd):
    where = {'data_dir': str(tmp_path)}
    with pytest.raises(FileNotFoundError, match='not prepared in .*download_and_prepare'):
        sources.describe('tfds:tiny_for_test', **where)
    monkeypatch.setattr(tiny_tfds, 'fail', True)
    with pytest.raises(FileNotFoundError, match='not be prepared.*no network.*Prepare it with'):
        sources.load('tfds:tiny_for_test', 'train', **where)
    monkeypatch.setattr(tiny_tfds, 'fail', False)
    loaded = sources.load('tfds:tiny_for_test', 'train', **where)
    assert 'tiny_for_test is not prepared' in capfd.readouterr().out
    assert sorted_rows(loaded.images, loaded.labels) == sorted_rows(*random_set(4, (4, 6, 3), 2, seed=4))
    assert loaded.groups is None
    grouped = sources.load('tfds:tiny_for_test', 'train', groups='about/person', **where)
    np.testing.assert_array_equal(grouped.images, loaded.images)
    # Whose an image is stands in its record: i and i + 1 for an even i.
    images, _ = random_set(4, (4, 6, 3), 2, seed=4)
    places = [next(i for i in range(4) if (images[i] == image).all()) for image in grouped.images]
    np.testing.assert_array_equal(grouped.groups, np.array(places) // 2)
    for name in ('person', 'about/x', 'image/x', 'about'):
        with pytest.raises(
            ValueError, match=f"data.groups is '{name}'; it must be a feature .*'about'|integers"
        ):
            sources.load('tfds:tiny_for_test', 'train', groups=name, **where)
    info = sources.describe('tfds:tiny_for_test', **where)
    assert plain(info) == source_info('tfds:tiny_for_test', 4, 2, (4, 6, 3), 2)
    # Prepared in another format, it cannot be read without TensorFlow.
    folder = tmp_path / 'tiny_for_test' / '1.0.0'
    for path in folder.glob('dataset_info.json'):
        content = json.loads(path.read_text()) | {'fileFormat': 'tfrecord'}
        for split in content['splits']:
            template = split['filepathTemplate']
            split['filepathTemplate'] = template.replace('array_record', 'tfrecord')
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='not in the array_record format'):
        sources.load('tfds:tiny_for_test', 'test', **where)


def test_features_of_a_tfds_set_are_checked_before_it_is_downloaded(tiny_tfds, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class UnlabeledForTest(tiny_tfds):
        """As celeb_a: no feature `label`."""

        def _info(self):
            features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(4, 6, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

    monkeypatch.setattr(UnlabeledForTest, 'download_and_prepare', no_array)
    for call in (sources.describe, sources.load, sources.shape):
        arguments = () if call is sources.describe else ('train',)
        with pytest.raises(
            ValueError, match=r"config.data.label_key is 'label'; .* has the features \['image'\]"
        ):
            call('tfds:unlabeled_for_test', *arguments, data_dir=str(tmp_path))


def test_without_a_network_one_short_try_is_made(tiny_tfds, tmp_path, monkeypatch):
    import requests

    tried = []

    def get(url, **settings):
        tried.append((url, settings['timeout']))
        raise requests.ConnectionError('no route to host')

    monkeypatch.setattr(requests, 'get', get)
    monkeypatch.setattr(tiny_tfds, 'url_infos', {'https://a.test/images.zip': None}, raising=False)
    monkeypatch.setattr(tiny_tfds, 'download_and_prepare', no_array)
    with pytest.raises(
        FileNotFoundError, match='https://a.test/images.zip cannot be reached.*Prepare it with'
    ):
        sources.load('tfds:tiny_for_test', 'train', data_dir=str(tmp_path))
    assert tried == [('https://a.test/images.zip', 5)]


def test_npz_files(npz_set):
    source = f'npz:{npz_set}'
    assert plain(sources.describe(source)) == source_info(source, 7, 4, (4, 6, 3), 3)
    images, labels = random_set(7, (4, 6, 3), seed=7)
    loaded = sources.load(source, 'train')
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.labels.dtype == np.int32


def test_npz_files_without_a_channel_axis(npz_set):
    images, labels = random_set(5)
    for split in sources.SPLITS:
        np.savez(npz_set / f'{split}.npz', images=images, labels=labels)
    assert sources.describe(f'npz:{npz_set}').image_shape == (4, 6, 1)
    assert sources.load(f'npz:{npz_set}', 'train').images.shape == (5, 4, 6, 1)


def test_average_down_is_the_rounded_mean_of_each_block(npz_set):
    whole = sources.load(f'npz:{npz_set}', 'train').images.astype(np.float64)
    half = sources.load(f'npz:{npz_set}', 'train', average_down=2).images
    assert half.shape == (7, 2, 3, 3) and half.dtype == np.uint8
    for row in range(2):
        for column in range(3):
            block = whole[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            mean = block.mean((1, 2))
            np.testing.assert_array_equal(half[:, row, column], np.floor(mean + 0.5))


@pytest.mark.parametrize('k', [0, -1, 3, 4])
def test_average_down_must_divide_the_image_size(npz_set, k):
    with pytest.raises(ValueError, match=f'average_down is {k}; .* divide the image size.* 4 x 6'):
        sources.load(f'npz:{npz_set}', 'train', average_down=k)


@pytest.mark.parametrize('name', ['digitz', 'digits:', 'digits:x', 'tfds', 'tfds:', 'idx', '', ':x'])
def test_unknown_sources_are_refused_with_the_allowed_forms(name):
    forms = (
        'digits, folder:<path>, zip:<path>, npz:<folder>, idx:<folder>, tfds:<name>[/<config>][:<version>], '
    )
    text = re.escape(f'must be one of: {forms}wilds-camelyon:<path>')
    for call in (lambda: sources.describe(name), lambda: sources.load(name, 'train')):
        with pytest.raises(ValueError, match=text) as error:
            call()
        assert repr(name) in str(error.value)


def test_unknown_tfds_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'tfds:no_such_set_of_images'.*knows no such set"):
        sources.load('tfds:no_such_set_of_images', 'train', data_dir=str(tmp_path))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'validation'; it must be one of train, test"):
        sources.load('digits', 'validation')


@pytest.mark.parametrize('kind', ['idx', 'npz'])
def test_missing_files_are_named(kind, tmp_path):
    for call in (sources.describe, lambda source: sources.load(source, 'train')):
        with pytest.raises(FileNotFoundError, match=f'{tmp_path}/nowhere/train'):
            call(f'{kind}:{tmp_path}/nowhere')


def damaged(path, change):
    """Writes a changed copy of a file's content in its place."""
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ('name', 'change', 'text'),
    [
        ('train-images-idx3-ubyte', lambda b: b[:-1], 'has 167 bytes .* must have 168'),
        ('train-images-idx3-ubyte', lambda b: b + b'x', 'has 169 or more bytes'),
        ('train-images-idx3-ubyte', lambda b: b'\0\0\x0d\x03' + b[4:], '00000d03 .* 00000803'),
        ('train-images-idx3-ubyte', lambda b: b[:10], 'has 10 of 16 bytes of header'),
        ('train-images-idx3-ubyte', lambda b: b'', 'begins with nothing'),
        ('train-labels-idx1-ubyte', lambda b: b[:-2], 'has 5 bytes .* must have 7'),
        ('train-labels-idx1-ubyte', lambda b: b'\0\0\x08\x03' + b[4:], '00000803 .* 00000801'),
        ('t10k-images-idx3-ubyte.gz', lambda b: b[:-20], 'cannot be read'),
        ('t10k-images-idx3-ubyte.gz', lambda b: b'not gzip', 'cannot be read'),
        ('t10k-labels-idx1-ubyte.gz', lambda b: gzip.compress(idx_bytes(np.zeros(3))), 'labels'),
    ],
)
def test_damaged_idx_files_are_refused(idx_set, name, change, text):
    damaged(idx_set / name, change)
    split = 'train' if name.startswith('train') else 'test'
    with pytest.raises(ValueError, match=text) as error:
        sources.load(f'idx:{idx_set}', split)
    assert str(idx_set) in str(error.value)


@pytest.mark.parametrize(
    'change', [lambda b: b[: len(b) // 2], lambda b: b'', lambda b: b'text', lambda b: b[:200]]
)
def test_damaged_npz_files_are_refused(npz_set, change):
    damaged(npz_set / 'train.npz', change)
    for call in (sources.describe, lambda source: sources.load(source, 'train')):
        with pytest.raises(ValueError, match='train.npz cannot be read'):
            call(f'npz:{npz_set}')


@pytest.mark.parametrize('names', [{'images'}, {'labels'}, {'x', 'y'}, {'train_images', 'labels'}, set()])
def test_npz_without_images_and_labels_is_refused_with_the_line_that_converts(npz_set, names):
    np.savez(npz_set / 'train.npz', **{name: random_set(3)[0] for name in names})
    for call in (sources.describe, lambda source: sources.load(source, 'train')):
        with pytest.raises(
            ValueError, match='it must have images and labels. To convert it: python -c'
        ) as no:
            call(f'npz:{npz_set}')
        assert all(name in str(no.value) for name in names)


@pytest.mark.parametrize('images, labels', [('{}_images', '{}_labels'), ('x_{}', 'y_{}')])
def test_archives_of_other_makers_are_read_as_they_are(tmp_path, images, labels):
    """One file with both splits, as MedMNIST and Keras have it, labels (N, 1); or cut into two files."""
    sets = {'train': random_set(7, (4, 6, 3)), 'test': random_set(4, (4, 6, 3), seed=1)}
    arrays = {
        split: {images.format(split): found[0], labels.format(split): found[1][:, None]}
        for split, found in sets.items()
    }
    np.savez(tmp_path / 'both.npz', **arrays['train'], **arrays['test'])
    for split in sources.SPLITS:
        np.savez(tmp_path / f'{split}.npz', **arrays[split])
    for source in (f'npz:{tmp_path}/both.npz', f'npz:{tmp_path}'):
        assert plain(sources.describe(source)) == source_info(source, 7, 4, (4, 6, 3), 3)
        for split, found in sets.items():
            loaded = sources.load(source, split)
            np.testing.assert_array_equal(loaded.images, found[0])
            np.testing.assert_array_equal(loaded.labels, found[1])


def header(shape, dtype='u1'):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': shape}
    )
    return file.getvalue()


def write_archive(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f'{name}.npy', content)


def no_array(*_, **__):
    raise AssertionError('an array is read')


@pytest.mark.parametrize('shape', [(10**12, 4, 6, 3), (8, 4, 6, 3), (6, 4, 6, 3), (0, 4, 6, 3)], ids=str)
@pytest.mark.parametrize('which', ['images', 'labels'])
def test_npz_headers_that_lie_are_refused_before_anything_is_read(npz_set, monkeypatch, which, shape):
    images, labels = random_set(7, (4, 6, 3))
    true = {'images': (7, 4, 6, 3), 'labels': (7,)}
    claimed = true | {which: shape[: len(true[which])]}
    write_archive(
        npz_set / 'train.npz',
        images=header(claimed['images']) + images.tobytes(),
        labels=header(claimed['labels']) + labels.tobytes(),
    )
    monkeypatch.setattr(folder, 'read_rows', no_array)
    for call in (sources.describe, lambda source: sources.shape(source, 'train')):
        with pytest.raises(ValueError, match=f'train.npz cannot be read: the header of {which} claims'):
            call(f'npz:{npz_set}')


def test_images_without_a_label_each_are_refused_before_anything_is_read(npz_set, monkeypatch):
    np.savez(npz_set / 'train.npz', images=random_set(7)[0], labels=random_set(6)[1])
    monkeypatch.setattr(folder, 'read_rows', no_array)
    with pytest.raises(ValueError, match=r'images of shape \(7, 4, 6\) and labels of shape \(6,\)'):
        sources.describe(f'npz:{npz_set}')


def test_a_small_archive_that_unpacks_to_gigabytes_is_refused_before_it_is_read(npz_set, monkeypatch):
    monkeypatch.setattr(npz, '_LARGE', 2**20)
    shape = (10**5, 4, 6, 3)
    write_archive(
        npz_set / 'test.npz',
        images=header(shape) + bytes(math.prod(shape)),
        labels=header((10**5,)) + bytes(10**5),
    )
    monkeypatch.setattr(folder, 'read_rows', no_array)
    for call in (sources.describe, lambda source: sources.shape(source, 'test')):
        with pytest.raises(ValueError, match='test.npz: images unpacks to 7,200,000 bytes from .*no images'):
            call(f'npz:{npz_set}')


@pytest.mark.parametrize('kind', ['idx', 'npz'])
def test_more_than_the_memory_is_refused_before_it_is_read(request, kind, monkeypatch):
    source = f'{kind}:{request.getfixturevalue(f"{kind}_set")}'
    monkeypatch.setattr(os, 'sysconf', lambda name: 10)  # pages of 10 bytes, 10 of them
    for call in (sources.describe, lambda source: sources.load(source, 'train')):
        with pytest.raises(ValueError, match='in its header; it must be less than .* memory of this machine'):
            call(source)


def test_a_gzipped_file_is_unpacked_no_further_than_its_header_says(idx_set):
    path = idx_set / 't10k-images-idx3-ubyte.gz'
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(10**7)))
    with pytest.raises(ValueError, match='has 97 or more bytes after its header; .* must have 96'):
        sources.load(f'idx:{idx_set}', 'test')


def test_train_and_test_of_different_sizes_are_refused(npz_set):
    images, labels = random_set(5, (8, 8, 3))
    np.savez(npz_set / 'test.npz', images=images, labels=labels)
    with pytest.raises(ValueError, match=r'\(7, 4, 6, 3\) in train and \(5, 8, 8, 3\) in test'):
        sources.describe(f'npz:{npz_set}')


@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_class_may_be_empty(npz_set, split):
    """Whether one is depends on single images: it must not decide whether anything is released."""
    source = f'npz:{npz_set}'
    assert sources.load(source, split, classes=4).labels.max() == 2


def test_labels_must_be_in_range_and_those_of_a_test_set_need_not_all_be_there(npz_set):
    source = f'npz:{npz_set}'
    assert sources.load(source, 'test', classes=3).labels.max() == 2
    images, labels = random_set(4, (4, 6, 3), classes=2)
    np.savez(npz_set / 'test.npz', images=images, labels=labels)
    assert sources.load(source, 'test').labels.max() == 1
    with pytest.raises(ValueError, match=r'\(train\): the labels go from 0 to 2'):
        sources.load(source, 'train', classes=2)


# ---- a share of the rows, and rows that stay in files --------------------------------------------

COUNT = 41  # rows of the sets below
KINDS = ('digits', 'idx', 'idx.gz', 'npz', 'npz reversed', 'tfds', 'tfds stored')


@pytest.fixture(scope='module')
def tfds_folder(tiny_tfds, tmp_path_factory):
    """Where 41 images are prepared; their set is tfds:more_for_test."""
    root = tmp_path_factory.mktemp('tfds')

    class MoreForTest(tiny_tfds):
        """The same, but more."""

        train_images = COUNT

    MoreForTest(data_dir=str(root)).download_and_prepare(file_format='array_record')
    return str(root)


@pytest.fixture
def make_set(tmp_path, tfds_folder):
    """A function: kind → arguments of `load`, of a set of 41 images in color (idx: gray)."""

    def make(kind):
        images, labels = random_set(COUNT, (4, 6, 3))
        if kind.startswith('tfds'):
            return {
                'source': 'tfds:more_for_test',
                'data_dir': tfds_folder,
                'in_memory': 'no' if 'stored' in kind else 'yes',
            }
        if kind.startswith('idx'):
            images = images[..., 0]
            for stem in ('train', 't10k'):
                for name, array in (('images-idx3', images), ('labels-idx1', labels)):
                    path, content = tmp_path / f'{stem}-{name}-ubyte', idx_bytes(array)
                    path.write_bytes(content)
                    if kind.endswith('gz'):
                        path.unlink()
                        path.with_name(path.name + '.gz').write_bytes(gzip.compress(content))
        if kind.startswith('npz'):
            images = np.asfortranarray(images) if 'reversed' in kind else images
            for split in sources.SPLITS:
                np.savez_compressed(
                    tmp_path / f'{split}.npz', images=images, labels=labels[:, None], person=PERSON
                )
        return {'source': kind if kind == 'digits' else f'{kind[:3]}:{tmp_path}'}

    return make


PERSON = np.random.default_rng(1).permutation(COUNT) // 3  # whose an image of the npz set is


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('block', [2**22, 100])
def test_shares_have_exactly_their_rows_and_are_together_the_whole(make_set, monkeypatch, kind, block):
    monkeypatch.setattr(folder, '_BLOCK', block)
    monkeypatch.setattr('dpp_jax.data.sources.tfds._BATCH', block)
    arguments = make_set(kind) | {'split': 'train', 'average_down': 2}
    whole = sources.load(**arguments | {'in_memory': 'yes'})
    assert whole.total == len(whole.images)
    seen = []
    for rows in [slice(p, None, 3) for p in range(3)] + [np.array([0, 7, 8, 40]), slice(5, 20, 4), None]:
        share = sources.load(**arguments, rows=rows)
        assert share.total == whole.total and len(share.images) == len(share.labels)
        np.testing.assert_array_equal(share.images[:], whole.images[slice(None) if rows is None else rows])
        np.testing.assert_array_equal(share.labels, whole.labels[share.kept.numbers()])
        seen.append(share)
    numbers = np.concatenate([share.kept.numbers() for share in seen[:3]])
    assert sorted(numbers) == list(range(whole.total))


@pytest.mark.parametrize('kind, name', [('npz', 'person'), ('tfds', 'about/person')])
def test_the_share_of_a_process_has_whole_groups(make_set, kind, name):
    arguments = make_set(kind) | {'split': 'train', 'groups': name}
    whole = sources.load(**arguments)
    shares = [sources.load(**arguments, rows=Share(p, 3).images) for p in range(3)]
    for share in shares:
        np.testing.assert_array_equal(share.groups, whole.groups)  # of all: they decide who is used
        np.testing.assert_array_equal(share.images, whole.images[share.kept.numbers()])
    own = [set(share.own_groups.tolist()) for share in shares]
    assert not (own[0] & own[1] or own[0] & own[2] or own[1] & own[2])
    assert set.union(*own) == set(whole.groups.tolist())
    assert sum(len(share.images) for share in shares) == COUNT
    # Process p keeps the units u with u % P == p, in the order of `choose`.
    members = groups.choose(whole.groups, 2, key=1)
    for p, share in enumerate(shares):
        used = members[p::3]
        assert (share.kept.places(used[used >= 0]) >= 0).all()


def test_a_share_may_be_empty_and_a_split_may_not(npz_set):
    source = f'npz:{npz_set}'
    empty = sources.load(source, 'train', rows=Share(8, 9).images)
    assert empty.images.shape == (0, 4, 6, 3) and empty.labels.shape == (0,) and empty.total == 7
    np.savez(npz_set / 'train.npz', images=np.zeros((0, 4, 6, 3), np.uint8), labels=np.zeros(0, int))
    with pytest.raises(ValueError, match='at least one image'):
        sources.load(source, 'train', rows=Share(0, 2).images, classes=3)


def test_a_set_need_not_fit_the_memory_if_a_share_does(npz_set, monkeypatch):
    source = f'npz:{npz_set}'  # 504 bytes of training images
    monkeypatch.setattr(os, 'sysconf', lambda name: 18)  # memory of 324 bytes
    for call in (sources.describe, lambda source: sources.load(source, 'train')):
        with pytest.raises(ValueError, match='memory of this machine'):
            call(source)
    assert sources.describe(source, processes=2).train_images == 7
    assert len(sources.load(source, 'train', rows=slice(1, None, 2)).images) == 3
    assert sources.shape(source, 'train', rows=Share(0, 2).images) == (7, 4, 6, 3)


@pytest.mark.parametrize('kind', ['npz', 'idx.gz', 'idx'])
def test_the_memory_that_reading_takes_falls_with_the_processes(tmp_path, kind):
    """The most that is in use at any time, of sets of 24 MiB: little more than the share."""
    count, size = 3 * 2**13, 32
    images = np.zeros((count, size, size), np.uint8)
    images[:, 0] = np.random.default_rng(0).integers(0, 256, (count, size))
    if kind == 'npz':
        np.savez_compressed(tmp_path / 'train.npz', images=images, labels=np.arange(count) % 10)
        np.savez(tmp_path / 'test.npz', images=images[:1], labels=[9])
    else:
        for name, array in (('images-idx3', images), ('labels-idx1', np.arange(count) % 10)):
            path, content = tmp_path / f'train-{name}-ubyte', idx_bytes(array)
            if kind.endswith('gz'):
                path.with_name(path.name + '.gz').write_bytes(gzip.compress(content, 1))
            else:
                path.write_bytes(content)
    peaks = []
    for processes in (1, 2, 4):
        tracemalloc.start()
        share = sources.load(
            f'{kind[:3]}:{tmp_path}', 'train', classes=10, rows=slice(processes - 1, None, processes)
        )
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
        assert share.images.nbytes == images.nbytes // processes
    for peak, mebibytes in zip(peaks, (24, 12, 6)):
        assert mebibytes < peak < mebibytes + 6, peaks


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux tells what a process took at most')
def test_a_fresh_process_grows_by_its_share(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2**16, 32, 32), np.uint8)  # 64 MiB
    np.savez(tmp_path / 'train.npz', images=images, labels=np.arange(len(images)) % 10)
    program = (
        'from dpp_jax.data import sources\n'
        'def most():\n'
        "    return open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]\n"
        'print(most())\n'
        'for rows in (slice(1, None, 4), None):\n'
        f"    kept = sources.load('npz:{tmp_path}', 'train', classes=10, rows=rows)\n"
        '    print(most())\n'
        '    del kept\n'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    before, share, whole = (int(kibibytes) / 1024 for kibibytes in done.stdout.split())
    assert share - before < 16 + 12 and 64 - 8 < whole - before < 64 + 24, (before, share, whole)


@pytest.fixture
def both(make_set):
    """A function: further arguments → the same tfds set in memory, and left in its files."""

    def load(**more):
        arguments = make_set('tfds') | {'split': 'train'} | more
        return [sources.load(**arguments | {'in_memory': where}) for where in ('yes', 'no')]

    return load


def test_batches_of_images_that_stay_in_files_are_those_of_images_in_memory(both):
    memory, stored = both(average_down=2, groups='about/person')
    assert isinstance(stored.images, StoredImages) and stored.images.shape == memory.images.shape
    members = groups.choose(memory.groups, 2, key=3)
    sampler = poisson.PoissonSampler(size=COUNT, probability=0.3, key=7)
    for number in range(5):
        indices = sampler.indices(number)
        pairs = [
            [steps.make_batch(found.images, found.labels, indices, 4) for found in (memory, stored)],
            [
                steps.make_batch(found.images, found.labels, indices[indices < len(members)], 4, members)
                for found in (memory, stored)
            ],
            [
                poisson.fetch({'images': resize.nearest(found.images, 2)}, indices, 64)[0]
                for found in (memory, stored)
            ],
        ]
        for one, other in pairs:
            assert one.keys() == other.keys()
            for name in one:
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name], other[name])


@needs_tfds
def test_rows_of_mnist_are_read_when_they_are_needed():
    where = {'source': 'tfds:mnist', 'split': 'test', 'data_dir': str(MNIST_TFDS)}
    memory, stored = sources.load(**where), sources.load(**where, in_memory='no', rows=slice(1, None, 2))
    np.testing.assert_array_equal(stored.labels, memory.labels[1::2])
    chosen = np.random.default_rng(0).integers(0, 5000, (40, 3))  # some of them twice
    np.testing.assert_array_equal(stored.images[chosen], memory.images[1::2][chosen])


def test_where_images_lie_is_decided_by_their_size(make_set, monkeypatch):
    arguments = make_set('tfds') | {'split': 'train', 'in_memory': 'auto'}
    assert isinstance(sources.load(**arguments).images, np.ndarray)
    monkeypatch.setattr(os, 'sysconf', lambda name: 50)  # memory of 2,500 bytes; the images take 2,952
    assert isinstance(sources.load(**arguments).images, StoredImages)
    assert isinstance(sources.load(**arguments, rows=slice(0, None, 3)).images, np.ndarray)
    # They are read before they are pooled.
    assert isinstance(sources.load(**arguments, average_down=2).images, StoredImages)


def test_a_source_that_cannot_be_read_row_by_row_says_so(npz_set):
    with pytest.raises(ValueError, match="in_memory is 'no'; .* must be 'auto' or 'yes'.*: tfds:<name>"):
        sources.load(f'npz:{npz_set}', 'train', in_memory='no')
    assert isinstance(sources.load(f'npz:{npz_set}', 'train', in_memory='auto').images, np.ndarray)
    with pytest.raises(ValueError, match="in_memory is 'maybe'; it must be one of auto, yes, no"):
        sources.load(f'npz:{npz_set}', 'train', in_memory='maybe')


def test_the_stamp_of_files_changes_with_them_and_with_what_decodes_them(both, tfds_folder, monkeypatch):
    memory, stored = both()
    assert memory.stamp is None and len(stored.stamp) == 64
    assert both()[1].stamp == stored.stamp
    (path,) = Path(tfds_folder).rglob('*-train.array_record*')
    time = path.stat().st_mtime
    os.utime(path, (time + 5, time + 5))
    later = both()[1].stamp
    assert later != stored.stamp
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: 'another')
    assert both()[1].stamp not in (later, stored.stamp)


# ---- other people's arrays and features ---------------------------------------------------------


def test_labels_may_be_one_hot(npz_set):
    images, labels = random_set(7, (4, 6, 3), seed=7)
    for dtype in (np.float32, np.int64, bool):
        np.savez(npz_set / 'train.npz', images=images, labels=np.eye(3)[labels].astype(dtype))
        assert sources.load(f'npz:{npz_set}', 'train').labels.tolist() == labels.tolist()
        assert sources.describe(f'npz:{npz_set}').class_counts == (3, 2, 2)
    np.savez(npz_set / 'train.npz', images=images, labels=np.ones((7, 3), int))
    with pytest.raises(ValueError, match='not one 1 in each row'):
        sources.describe(f'npz:{npz_set}')


@pytest.mark.parametrize('is_float', [True, False])
@pytest.mark.parametrize('is_transposed', [True, False])
@pytest.mark.parametrize('names', [('images', 'labels'), ('train_images', 'train_labels')])
def test_arrays_in_another_form_are_refused_with_the_line_that_converts(
    tmp_path, names, is_float, is_transposed
):
    images, labels = random_set(7, (4, 6, 3))
    changed = images.transpose(0, 3, 1, 2) if is_transposed else images
    changed = changed / 255 if is_float else changed
    np.savez(tmp_path / 'train.npz', **dict(zip(names, (changed, labels))))
    if not (is_float or is_transposed):
        assert sources.load(f'npz:{tmp_path}', 'train', classes=3).images.shape == images.shape
        return
    for call in (sources.shape, sources.load):
        with pytest.raises(ValueError, match='they must be .* To convert it') as refused:
            call(f'npz:{tmp_path}', 'train')
    line = re.search('python (-c ".*")', str(refused.value))[1]
    converted = tmp_path / 'converted'
    converted.mkdir()
    subprocess.run(f'{sys.executable} {line}', shell=True, check=True, cwd=converted)
    np.testing.assert_array_equal(sources.load(f'npz:{converted}', 'train', classes=3).images, images)


def test_a_validation_part_of_arrays_is_told(tmp_path):
    parts = {f'{part}_images': random_set(6)[0] for part in ('train', 'val', 'test')}
    parts |= {f'{part}_labels': random_set(6)[1][:, None] for part in ('train', 'val', 'test')}
    np.savez(tmp_path / 'x.npz', **parts)
    source = f'npz:{tmp_path}/x.npz'
    assert sources.describe(source).notes == ('val_images, val_labels (the validation part) are not used',)
    with pytest.raises(ValueError, match="config.data.validation is 'train'; it must be 'unused'"):
        sources.load(source, 'train', preparation=Preparation(validation='train'))


def test_arrays_are_made_to_fit(npz_set):
    wanted = Preparation(image_size=4, channels=1, fit='crop')
    found = sources.load(f'npz:{npz_set}', 'train', preparation=wanted)
    whole = random_set(7, (4, 6, 3), seed=7)[0]
    for image, original in zip(found.images, whole):
        expected = Image.fromarray(original[:, 1:5]).convert('L')
        np.testing.assert_array_equal(image[..., 0], expected)
    assert sources.shape(f'npz:{npz_set}', 'train', preparation=wanted) == (7, 4, 4, 1)
    assert sources.load(f'npz:{npz_set}', 'train', preparation=wanted, average_down=2).images.shape[1:] == (
        2,
        2,
        1,
    )


@pytest.fixture(scope='module')
def faces(tmp_path_factory):
    """Like celeb_a: attributes within a feature, images of any size, a validation part; and without parts."""
    import tensorflow_datasets as tfds

    class FacesForTest(tfds.core.GeneratorBasedBuilder):
        """Faces."""

        VERSION = tfds.core.Version('2.0.1')
        counts = {'train': 6, 'validation': 3, 'test': 2}

        def _info(self):
            features = {
                'photo': {'image': tfds.features.Image(shape=(None, None, 3))},
                'attributes': {'Male': np.bool_, 'Age': np.int64},
                'hair': tfds.features.ClassLabel(names=['fair', 'dark']),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split, count) for split, count in self.counts.items()}

        def _generate_examples(self, split, count):
            for i in range(count):
                image = random_set(1, (9 + i, 8, 3), seed=10 * len(split) + i)[0][0]
                about = {'Male': i % 2 == 0, 'Age': i}
                yield i, {'photo': {'image': image}, 'attributes': about, 'hair': i % 2}

    class AloneForTest(FacesForTest):
        """No parts."""

        counts = {'train': 20}

    where = str(tmp_path_factory.mktemp('tfds'))
    for builder in (FacesForTest, AloneForTest):
        builder(data_dir=where, file_format='array_record').download_and_prepare()
    return where


FACES = {
    'image_key': 'photo/image',
    'label_key': 'attributes/Male',
    'image_size': 8,
    'channels': 3,
    'fit': 'crop',
}


@pytest.mark.parametrize('version', ['', ':2.0.1'])
def test_features_of_tfds_are_named_by_their_keys(faces, version):
    where = {'data_dir': faces, 'preparation': Preparation(**FACES)}
    source = f'tfds:faces_for_test{version}'
    info = sources.describe(source, **where)
    assert (info.train_images, info.test_images, info.image_shape) == (6, 2, (None, None, 3))
    assert (info.classes, info.class_names, info.sides) == (2, ('False', 'True'), None)
    assert any("'validation' is not used" in note for note in info.notes)
    found = sources.load(source, 'train', **where)
    assert found.images.shape == (6, 8, 8, 3) and np.bincount(found.labels).tolist() == [3, 3]
    stored = sources.load(source, 'train', in_memory='no', **where)
    np.testing.assert_array_equal(stored.images[:], found.images)
    np.testing.assert_array_equal(stored.labels, found.labels)
    for key, classes, names in (('hair', 2, ('fair', 'dark')), ('', 1, ())):
        named = Preparation(**FACES | {'label_key': key})
        info = sources.describe(source, data_dir=faces, preparation=named)
        assert (info.classes, info.class_names) == (classes, names)
        assert sources.load(source, 'train', data_dir=faces, preparation=named).labels.max() == classes - 1
    for key, text in (
        ('attributes/Age', 'a feature with classes'),
        ('Male', "'attributes/Age', 'attributes/Male'"),
    ):
        with pytest.raises(ValueError, match=f"label_key is '{key}'.*{text}"):
            sources.describe(source, data_dir=faces, preparation=Preparation(**FACES | {'label_key': key}))


def test_a_validation_part_of_tfds_may_be_private(faces):
    wanted = Preparation(**FACES | {'validation': 'train'})
    source, where = 'tfds:faces_for_test', {'data_dir': faces, 'preparation': wanted}
    assert sources.describe(source, **where).train_images == 9
    found = sources.load(source, 'train', **where)
    assert len(found.images) == 9 and len({image.tobytes() for image in found.images}) == 9
    assert (
        len(sources.identity(source, 'train', **where)) == len(sources.identity(source, 'test', **where)) + 1
    )
    assert sources.load(source, 'train', in_memory='no', **where).stamp


def test_a_tfds_set_without_a_test_part_gets_one(faces):
    wanted = Preparation(**FACES | {'test_share': 0.25})
    source, where = 'tfds:alone_for_test', {'data_dir': faces, 'preparation': wanted}
    info = sources.describe(source, **where)
    assert (info.train_images, info.test_images) == (15, 5) and 'there is no split test' in info.notes[0]
    parts = [sources.load(source, split, **where).images for split in sources.SPLITS]
    assert len({image.tobytes() for part in parts for image in part}) == 20
    stored = sources.load(source, 'train', in_memory='no', rows=slice(1, None, 2), **where)
    np.testing.assert_array_equal(stored.images[:], parts[0][1::2])
    alone = Preparation(**FACES | {'is_listing_public': False})
    with pytest.raises(ValueError, match='has no split test. Its records have no names'):
        sources.describe(source, data_dir=faces, preparation=alone)
