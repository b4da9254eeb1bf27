"""Scores come with what one must know to read them; what cannot be computed is left out, and said before."""

import json
import os
import re

import numpy as np
from PIL import Image
import pytest

from dpp_jax import pipeline
from dpp_jax.data.images import Images
from dpp_jax.data.stored import StoredImages
from dpp_jax.evaluation import inception_weights
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import report
from dpp_jax.stages.evaluate import common, distances


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
    quick_config, tmp_path, capsys, classes, test
):
    workdir, results, text = run(quick_config(), tmp_path, 60, test, classes)
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
    pipeline.run(config_of(workdir, quick_config, 60, classes, tmp_path), workdir.root, 'all')
    assert 'Everything is done' in capsys.readouterr().out


def config_of(workdir, quick_config, train, classes, root):
    """The config of `run` again."""
    config = quick_config()
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


def test_metrics_stand_beside_fid_with_their_spread_and_those_of_real_images(finished_run):
    config, workdir, _ = finished_run
    results = json.loads(workdir.evaluation.read_text())
    assert set(results['scores']) == {'kid', 'inception_score', 'precision', 'recall'}
    for name, score in results['scores'].items():
        assert score['images'] == 40 and score['spread'] >= 0
        assert (score['real'] < score['value']) == (name == 'kid')  # 40 images of a network hardly trained
    assert results['fid_spread'] > 0
    assert results['metrics_left_out'] == {
        'fid_of_class': 'no class has 100 synthetic and 100 private images'
    }
    found = results['memorization']
    assert (found['synthetic_images'], found['real_images'], found['private_images']) == (40, 360, 1437)
    assert 0 < found['p_value'] <= 1 and found['median_ratio'] > 0
    text = workdir.report_text.read_text()
    for word in ('KID', 'Inception score', 'precision', 'recall', 'nearest private image', '40 images; real'):
        assert word in text
    assert workdir.nearest.stat().st_mode & 0o777 == 0o600
    with Image.open(workdir.nearest) as picture:
        assert picture.size == (2 * 50 + 2, 10 * 50 + 2)  # ten pairs of magnified images


def test_features_of_private_images_are_computed_once(copied_run, monkeypatch):
    config, workdir = copied_run
    before = json.loads(workdir.evaluation.read_text())
    workdir.evaluation.unlink()
    monkeypatch.setattr(distances, '_blocks_of_share', lambda *_: pytest.fail('computed again'))
    pipeline.run(config, workdir.root, 'evaluate')
    again = json.loads(workdir.evaluation.read_text())
    assert again['fid'] == pytest.approx(before['fid']) and again['scores'] == before['scores']


def test_features_of_other_private_images_or_another_network_are_not_taken(copied_run):
    _, workdir = copied_run
    with np.load(workdir.private_features('cnn')) as file:
        digest = json.loads(str(file['key']))['network']
    told = {'kind': 'cnn', 'digest': digest}
    assert distances._cached(workdir, told).count == 1437
    assert distances._cached(workdir, told | {'digest': 'another'}) is None
    known = json.loads(workdir.fingerprints.read_text())
    known['train']['row_sum'] = '0' * 64
    workdir.fingerprints.write_text(json.dumps(known))
    assert distances._cached(workdir, told) is None


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'inception': '/none.pth'}, "config.evaluate.inception is '/none.pth', which is no file"),
        ({'inception': 'x', 'features': 'cnn'}, "it must be '', because evaluate.features is 'cnn'"),
        ({'features': 'clip'}, "config.evaluate.features is 'clip'; it must be 'auto' or"),
        ({'metrics': ('fad',)}, "config.evaluate.metrics is ('fad',); it must be a selection of 'kid'"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_spent(tiny_config, tmp_path, changes, message):
    config = tiny_config(evaluate__features='auto')
    config.evaluate.update(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.run(config, tmp_path / 'run', 'all')
    assert not (tmp_path / 'run' / 'release' / 'ledger.jsonl').exists()


def test_without_weights_the_settings_decide(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(inception_weights, 'URL', 'http://127.0.0.1:9/weights.pth')
    config = tiny_config(evaluate__features='auto')
    assert distances._inception(config) is None
    told = capsys.readouterr().out
    assert 'features of a small CNN: http://127.0.0.1:9' in told and told.count('\n') == 1
    config.evaluate.features = 'inception'
    assert 'will try to download the weights' in distances.check(config)[0]
    with pytest.raises(ValueError, match="config.evaluate.features is 'inception', but http://127.0.0.1:9"):
        distances._inception(config)


@pytest.mark.parametrize('least, warned', [(1999, True), (2000, False)])
def test_few_images_warn(least, warned):
    counts = {'private': 60_000, 'synthetic': least, 'test': 10_000}
    rows = report._score_rows({'fid': 1.0, 'fid_of_real_test_images': 1.0, 'fid_images': counts}, ())
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
