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
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten
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
        ({'as_paper': True}, 'config.evaluate.epochs is 2; it must be 50, because evaluate.as_paper is True'),
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


def test_an_evaluation_as_in_the_paper_says_so_and_stands_apart_from_others(copied_run):
    config, workdir = copied_run
    before = json.loads(workdir.evaluation.read_text())
    assert before['protocol'] == 'as this program does by itself'
    config = config.copy_and_resolve_references()
    config.evaluate.update(fid=False, real_images=False, classifiers=('logistic', 'mlp', 'cnn'), seeds=2)
    config.evaluate.update(as_paper=True, features='auto', epochs=50, ema_decay=0.9999)
    pipeline.run(config, workdir.root, 'evaluate')
    results = json.loads(workdir.evaluation.read_text())
    assert results['protocol'] == 'as in the paper' and results['of']['settings']['evaluate.as_paper']
    assert results['selection'].startswith('nothing') and 'held_out_accuracy' not in results
    assert {kind: len(found) for kind, found in results['accuracy_of_seeds'].items()} == {
        'logistic': 1, 'mlp': 2, 'cnn': 2
    }  # fmt: skip
    assert results['selected']['cnn'] == ['epoch 50 of 50'] * 2
    assert results['accuracy_mean'] == pytest.approx(np.mean(list(results['accuracy'].values())))
    pipeline.run(config, workdir.root, 'report')
    text, page = workdir.report_text.read_text(), workdir.report_page.read_text()
    for word in ('as in the paper', 'mean of the three', f'{100 * results["accuracy_mean"]:.1f} %'):
        assert word in text and word in page
    # Without the setting, these scores are of another evaluation; with it, they are there.
    assert artefacts.Evaluation(workdir, flatten(config.to_dict())).is_complete
    config.evaluate.as_paper = False
    assert artefacts.Evaluation(workdir, flatten(config.to_dict())).results == {}


# ---- images from elsewhere ----------------------------------------------------------------------


def contents(folder):
    """All files of a folder, but those of images from elsewhere and what notes the progress."""
    paths = [path for path in folder.rglob('*') if path.is_file() and 'other_images' not in path.parts]
    return {path: path.read_bytes() for path in paths}


def test_images_of_a_file_are_scored_as_the_runs_own_and_change_nothing_of_it(copied_run, tmp_path_factory):
    """The run's own images, as DPImageBench has them: they get the scores that the run has."""
    config, workdir = copied_run
    data, path = np.load(workdir.synthetic / 'images.npz'), tmp_path_factory.mktemp('other') / 'gen.npz'
    pixels = np.moveaxis(data['images'], 3, 1).astype(np.float32) / 255
    np.savez(path, x=pixels, y=data['labels'].astype(np.int64))
    config = config.copy_and_resolve_references()
    config.evaluate.update(images=str(path), classifiers=('logistic',))
    own, before = json.loads(workdir.evaluation.read_text()), contents(workdir.root)
    pipeline.run(config, workdir.root, 'evaluate')
    after = contents(workdir.root)
    changed = {file.name for file in before if after[file] != before[file]}
    assert changed <= {'keys.json'} and after.keys() == before.keys()
    (folder,) = (workdir.private / 'other_images').iterdir()
    assert folder.name.startswith('gen_') and folder.stat().st_mode & 0o777 == 0o700
    results = json.loads((folder / 'evaluation.json').read_text())
    assert results['fid'] == pytest.approx(own['fid']) and results['scores']['kid'] == own['scores']['kid']
    assert results['memorization'] == own['memorization'] and (folder / 'nearest.png').exists()
    assert 0 < results['accuracy']['logistic'] <= 1
    for name in ('report.txt', 'report.html', 'report.json'):
        text = (folder / name).read_text()
        assert 'file from elsewhere' in text and 'claims no privacy' in text and 'ε' not in text
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    # Other images have a place of their own; the same ones are not scored again.
    np.savez(path, x=1 - pixels, y=data['labels'])
    config.evaluate.fid = False
    pipeline.run(config, workdir.root, 'evaluate')
    assert len(list((workdir.private / 'other_images').iterdir())) == 2
    assert json.loads((folder / 'evaluation.json').read_text()) == results


def test_images_of_a_file_are_scored_without_a_run(tiny_config, tmp_path, capsys, gate):
    rng, workdir = np.random.default_rng(0), WorkDir(tmp_path / 'new')
    np.savez(
        tmp_path / 'a b.npz', images=rng.integers(0, 256, (40, 8, 8, 1), np.uint8), labels=np.arange(40) % 10
    )
    changes = {'evaluate__images': str(tmp_path / 'a b.npz'), 'evaluate__fid': False}
    config = tiny_config(**changes, evaluate__real_images=False)
    config.evaluate.classifiers = ('logistic',)
    pipeline.run(config, workdir.root, 'evaluate')
    (folder,) = (workdir.private / 'other_images').iterdir()
    assert folder.name.startswith('a_b_')
    told = capsys.readouterr().out
    assert str(folder / 'report.html') in told and 'claims no privacy' in told and 'ε' not in told
    assert not contents(workdir.release) and not workdir.own_ledger.exists()
    # A run can begin here.
    config.evaluate.images = ''
    assert not any(gate(config, workdir).done.values())


@pytest.mark.parametrize('stage', ['all', 'plan', 'report', 'clean'])
def test_images_of_a_file_are_for_one_stage(tiny_config, tmp_path, stage):
    config = tiny_config(evaluate__images='gen.npz')
    with pytest.raises(ValueError, match="evaluate.images is 'gen.npz'; it must be '', because --stage is"):
        pipeline.run(config, tmp_path / 'run', stage)
    assert not (tmp_path / 'run').exists()


def test_nothing_is_spent_on_images_of_a_file_and_bad_ones_are_named_before_all_else(tiny_config, tmp_path):
    config = tiny_config(evaluate__images='none.npz')
    with pytest.raises(ValueError, match='config.evaluate.images: none.npz is no file'):
        pipeline.run(config, tmp_path / 'run', 'evaluate')
    config.evaluate.selection = 'private_noisy'
    with pytest.raises(ValueError, match='because evaluate.images names a file: ε would be spent'):
        pipeline.run(config, tmp_path / 'run', 'evaluate')
    assert not (tmp_path / 'run').exists()


def test_images_of_a_file_are_scored_beside_a_run_whose_selection_is_private(tiny_config, tmp_path):
    workdir = WorkDir(tmp_path)
    with workdir.opened():
        workdir.record(flatten(tiny_config(evaluate__selection='private_noisy').to_dict()))
    plain = flatten(tiny_config().to_dict())
    with pytest.raises(ValueError, match='config.evaluate.selection: private_noisy there, synthetic now'):
        workdir.check(plain)
    assert workdir.check(plain | {'evaluate.images': 'gen.npz'}) == []


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
