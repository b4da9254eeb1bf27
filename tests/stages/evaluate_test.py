"""Scores come with what one must know to read them; what cannot be computed is left out, and said before."""

import json
import os

import numpy as np
import pytest

from dpp_jax import pipeline
from dpp_jax.data.images import Images
from dpp_jax.data.stored import StoredImages
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import report
from dpp_jax.stages.evaluate import common


def run(config, root, train, test, classes):
    """All stages on images of random bits, so many of them."""
    folder = root / 'data'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('test', test)):
        images = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
        np.savez(folder / f'{split}.npz', images=images, labels=np.arange(count) % classes)
    config.data.update(source=f'npz:{folder}', train_images=train, classes=classes)
    config.finetune.update(batch_size=20, epochs=1.0)
    config.evaluate.classifiers = ('logistic',)
    workdir = WorkDir(root / 'run')
    pipeline.run(config, workdir.root, 'all')
    return workdir, json.loads(workdir.evaluation.read_text()), workdir.report_text.read_text()


@pytest.mark.parametrize('classes, test', [(1, 20), (2, 1), (1, 1)])
def test_an_evaluation_that_lacks_classes_or_test_images_says_so_before_and_after(
    tiny_config, tmp_path, capsys, classes, test
):
    workdir, results, text = run(tiny_config(), tmp_path, 60, test, classes)
    told = capsys.readouterr().out
    before = told[: told.index('central: done')]
    reason = 'config.data.classes is 1' if classes == 1 else 'the test set has 1 image(s)'
    assert f'Evaluation will leave this out: {reason}' in before and reason in text
    assert ('logistic' in results['accuracy']) == (classes == 2)
    # Features without classes: FID is there, and says whose it is.
    assert results['fid'] > 0 and ('rotations' in results['fid_features']) == (classes == 1)
    assert ('fid_of_real_test_images' in results) == (test > 1)
    left_out = results['metrics_left_out']
    assert ('memorization' in left_out) == (test == 1) == ('memorization' not in results)
    assert ('inception_score' in left_out) == (classes == 1)
    pipeline.run(tiny_config_of(workdir, tiny_config, 60, classes, tmp_path), workdir.root, 'all')
    assert 'Everything is done' in capsys.readouterr().out


def tiny_config_of(workdir, tiny_config, train, classes, root):
    """The config of `run` again."""
    config = tiny_config()
    config.data.update(source=f'npz:{root / "data"}', train_images=train, classes=classes)
    config.finetune.update(batch_size=20, epochs=1.0)
    config.evaluate.classifiers = ('logistic',)
    return config


def test_scores_stand_beside_their_ceiling_and_fid_beside_its_numbers(finished_run):
    config, workdir, _ = finished_run
    results = json.loads(workdir.evaluation.read_text())
    real = results['accuracy_of_real_images']
    assert set(real) == set(results['accuracy']) == set(config.evaluate.classifiers)
    assert 0.9 < real['logistic'] <= 1 and real['logistic'] > results['accuracy']['logistic']
    assert results['fid_images'] == {'private': 1437, 'synthetic': 40, 'test': 360}
    text = workdir.report_text.read_text()
    assert f'(trained on the real images: {100 * real["logistic"]:.1f} %)' in text
    assert '(40 synthetic, 1,437 private images)' in text and '(360 test, 1,437 private images)' in text
    assert 'fewer than 2,000 (private, synthetic, test) make FID too large' in text
    assert workdir.ceiling.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('least, warned', [(1999, True), (2000, False)])
def test_few_images_warn(least, warned):
    counts = {'private': 60_000, 'synthetic': least, 'test': 10_000}
    rows = report._score_rows({'fid': 1.0, 'fid_of_real_test_images': 1.0, 'fid_images': counts})
    assert any('too large' in text for _, text in rows) == warned


def test_the_ceiling_is_computed_once_for_other_synthetic_images(copied_run):
    config, workdir = copied_run
    known = json.loads(workdir.ceiling.read_text())
    known['accuracy'] = {kind: 0.123 for kind in known['accuracy']}
    workdir.ceiling.write_text(json.dumps(known))
    workdir.evaluation.unlink()
    config = config.copy_and_resolve_references()
    config.evaluate.fid = False
    pipeline.run(config, workdir.root, 'evaluate')
    results = json.loads(workdir.evaluation.read_text())
    assert set(results['accuracy_of_real_images'].values()) == {0.123}


def test_without_the_ceiling_no_classifier_sees_private_images(copied_run):
    config, workdir = copied_run
    workdir.ceiling.unlink()
    workdir.evaluation.unlink()
    config = config.copy_and_resolve_references()
    config.evaluate.update(fid=False, real_images=False)
    pipeline.run(config, workdir.root, 'evaluate')
    assert not workdir.ceiling.exists()
    assert 'accuracy_of_real_images' not in json.loads(workdir.evaluation.read_text())


def test_images_that_stay_in_files_are_read_for_networks_that_learn_from_them_if_they_fit(monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    train = Images(images=StoredImages(lambda rows: array[rows], array.shape), labels=np.arange(6) % 2)
    read, reason = common.in_memory(lambda: train, train)
    assert isinstance(read.images, np.ndarray) and reason is None
    np.testing.assert_array_equal(read.images, array)
    monkeypatch.setattr(os, 'sysconf', lambda name: 13)  # memory of 169 bytes; the images take 96
    same, reason = common.in_memory(lambda: train, train)
    assert same is train and 'more than half of the memory of this machine' in reason

    def too_large():
        raise ValueError('train.npz claims an array of 3.0 GiB')

    assert common.in_memory(too_large, train) == (train, 'train.npz claims an array of 3.0 GiB')
