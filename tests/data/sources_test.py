"""Reading private images: the real sets, files made here, and everything that can be wrong."""

import gzip
import hashlib
import io
import json
import math
import os
from pathlib import Path
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dpp_jax.data import sources
from dpp_jax.data.sources import folder, npz

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
    assert info == source_info('digits', 1437, 360, (8, 8, 1), 10)


def test_idx_files_plain_and_gzipped(idx_set):
    source = f'idx:{idx_set}'
    assert sources.describe(source) == source_info(source, 7, 4, (4, 6, 1), 3)
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
    assert sources.describe(source) == source_info(source, 60000, 10000, (28, 28, 1), 10)
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
    assert info == source_info(source, 60000, 10000, (28, 28, 1), 10)
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
            return {'train': self._generate_examples(4), 'test': self._generate_examples(2)}

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
    assert info == source_info('tfds:tiny_for_test', 4, 2, (4, 6, 3), 2)
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
            ValueError, match=r"has the features \['image'\]; it must have the features 'image'"
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
    assert sources.describe(source) == source_info(source, 7, 4, (4, 6, 3), 3)
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
    text = 'must be one of: digits, tfds:<name>, idx:<folder>, npz:<folder>'
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
        assert sources.describe(source) == source_info(source, 7, 4, (4, 6, 3), 3)
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
