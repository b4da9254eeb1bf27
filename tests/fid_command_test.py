"""The command takes folders, archives and arrays, and says in a line what it cannot take."""

import io
import zipfile

import numpy as np
from PIL import Image
import pytest

from dpp_jax import fid_command


def png(image, mode=None):
    content = io.BytesIO()
    Image.fromarray(image, mode).save(content, 'PNG')
    return content.getvalue()


@pytest.fixture(name='sets')
def _sets(tmp_path):
    """Three images of different sizes, in each form."""
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 256, shape, np.uint8) for shape in ((4, 5, 3), (6, 3), (2, 2, 3))]
    folder = tmp_path / 'folder'
    (folder / 'b').mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
        for name, image in zip(('a.png', 'b/c.PNG', 'b/d.png'), found):
            (folder / name).write_bytes(png(image))
            archive.writestr(name, png(image))
        archive.writestr('__MACOSX/._a.png', b'no image')
    (folder / 'notes.txt').write_text('no image')
    return tmp_path, found


@pytest.mark.parametrize('name', ['folder', 'set.zip'])
def test_folders_and_archives_are_read_in_order(sets, name):
    root, expected = sets
    found = list(fid_command.read_images(root / name))
    assert [image.shape for image in found] == [(4, 5, 3), (6, 3, 1), (2, 2, 3)]
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one.squeeze(), other)


def told(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['dpp-jax-fid', *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        fid_command.entry_point()
    assert '\n' not in str(ended.value)
    return str(ended.value)


def test_mistakes_are_told_in_a_line(sets, monkeypatch):
    root, _ = sets
    (root / 'empty').mkdir()
    np.savez(root / 'float.npz', images=np.zeros((3, 4, 4, 1)))
    np.savez(root / 'other.npz', labels=np.zeros(3))
    (root / 'broken.npz').write_bytes(b'PK\3\4 and no more')
    good = root / 'folder'
    for name, message in (
        ('empty', 'has 0 image(s)'),
        ('none', 'is not there; it must be a folder'),
        ('folder/notes.txt', 'is no folder, .npz or .zip file'),
        ('float.npz', r'images of float64 and shape (3, 4, 4, 1); they must be uint8'),
        ('other.npz', 'has labels; it must have an array images'),
        ('broken.npz', 'broken.npz'),
    ):
        assert message in told(monkeypatch, good, root / name)
    monkeypatch.setenv('XDG_CACHE_HOME', str(root))
    assert 'no whole file of torch.save' in told(monkeypatch, good, good, f'--features={good / "notes.txt"}')


def test_damaged_images_are_named_and_deep_ones_are_read(sets):
    root, _ = sets
    path = root / 'folder' / 'b' / 'broken.png'
    path.write_bytes(png(np.zeros((9, 9), np.uint8))[:-30])
    with pytest.raises(ValueError, match='broken.png is cut off before the end'):
        list(fid_command.read_images(root / 'folder'))
    path.write_bytes(png(np.full((9, 9), 65535, np.uint16)))
    assert any((image == 255).all() for image in fid_command.read_images(root / 'folder'))
