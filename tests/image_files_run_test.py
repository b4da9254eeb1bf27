"""Runs on image files: what is kept of them, and what is said before."""

import json

import numpy as np
from PIL import Image
import pytest

from dpp_jax import build, pipeline
from dpp_jax.data import decode, sources
from dpp_jax.run.folder import WorkDir


@pytest.fixture
def scans(tmp_path_factory):
    """The digits as files of several formats and sizes, in folders of their classes."""
    root = tmp_path_factory.mktemp('scans')
    found = sources.load('digits', 'train')
    for i, (image, label) in enumerate(zip(found.images[:400], found.labels)):
        folder = root / f'digit_{label}'
        folder.mkdir(exist_ok=True)
        picture = Image.fromarray(image[..., 0]).resize((16 + i % 3, 16), Image.Resampling.NEAREST)
        picture.convert('RGB' if i % 5 == 0 else 'L').save(folder / f'{i}.{("png", "bmp", "tiff")[i % 3]}')
    return root


def config_of(tiny_config, scans, **changes):
    settings = {
        'data__source': f'folder:{scans}',
        'data__fit': 'crop',
        'data__train_images': 360,
        'dp__delta': 1e-3,
    }
    return tiny_config(**settings | changes)


def test_image_files_are_private_images(tiny_config, scans, tmp_path, monkeypatch, capsys):
    config = config_of(tiny_config, scans)
    config.data.train_images = sources.describe(config.data.source).train_images
    pipeline.run(config, tmp_path, 'plan')
    assert not (tmp_path / 'private').exists()
    pipeline.run(config, tmp_path, 'central')
    workdir = WorkDir(tmp_path)
    released = workdir.config.read_text()
    assert str(scans) not in released and json.loads(released)['data.fit'] == 'crop'
    # What was decoded is not decoded again.
    monkeypatch.setattr(decode, 'decode', None)
    found = build.images(config, 'train', cache=workdir.decoded)
    workdir.check_fingerprint('train', found)
    assert len(found.images) == config.data.train_images
    monkeypatch.undo()
    # A file that changes is noticed and named, and is another image than the one that the run began with.
    name = next(iter(json.loads((workdir.decoded / 'train.json').read_text())['files']))
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(scans / name)
    found = build.images(config, 'train', cache=workdir.decoded)
    assert f'changed since they were decoded: 1 changed ({name})' in capsys.readouterr().out
    with pytest.raises(ValueError, match='has other images'):
        workdir.check_fingerprint('train', found)


def test_everything_that_does_not_fit_is_told_at_once(tiny_config, scans):
    config = config_of(tiny_config, scans, data__fit='none', data__classes=3, data__train_images=7)
    info, problems = build.source_problems(config)
    assert info.classes == 10 and info.class_names[3] == 'digit_3'
    for text in ('data.train_images is 7', "data.fit is 'none'", 'data.classes is 3', 'data.image_size is 8'):
        assert any(text in problem for problem in problems), (text, problems)
    config = config_of(tiny_config, scans, data__image_size=None, data__channels=None)
    info = sources.describe(config.data.source, preparation=build.preparation(config))
    assert info.image_shape == (16, None, 3) or info.image_shape == (None, None, 3)


def test_problems_of_both_parts_are_told_at_once(tiny_config, tmp_path):
    labels = np.arange(40) % 10
    for split, shape in (('train', (40, 9, 9)), ('test', (40, 7, 7))):
        np.savez(tmp_path / f'{split}.npz', images=np.zeros(shape, np.uint8), labels=labels)
    config = tiny_config(data__source=f'npz:{tmp_path}', data__train_images=40)
    with pytest.raises(ValueError) as refused:
        build.check_headers(config, sources.SPLITS)
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 and 'private images' in lines[0] and 'test images' in lines[1]
