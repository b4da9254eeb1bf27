"""Neighboring private sets through the whole program: what is released differs by its noisy values alone."""

import copy
import json

import numpy as np
import pytest

from dpp_jax import pipeline
from dpp_jax.privacy import poisson
from dpp_jax.run import composition
from dpp_jax.run.folder import WorkDir

COUNT = 60
LEFT_OUT = 17  # number of the image by which two sets differ


def make_images():
    rng = np.random.default_rng(0)
    return {'images': rng.integers(0, 256, (COUNT, 8, 8, 1), np.uint8), 'labels': np.arange(COUNT) % 10}


def run(config, root, private, fid=False):
    """All stages on these private images."""
    folder = root.parent / f'data_{root.name}'
    folder.mkdir()
    np.savez(folder / 'train.npz', **private)
    np.savez(folder / 'test.npz', **make_images())
    link = root.parent / 'data'  # the same path in both configs
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    config.data.source = f'npz:{link}'
    config.data.train_images = COUNT
    config.finetune.update(batch_size=20, epochs=1.0)
    config.evaluate.update(classifiers=('logistic',), fid=fid)
    pipeline.run(config, root, 'all')
    return WorkDir(root)


def zero_out(monkeypatch):
    """Nobody samples the image: all that it contributes to is as if it were not there."""
    indices = poisson.PoissonSampler.indices

    def without(sampler, batch):
        found = indices(sampler, batch)
        return found[found != LEFT_OUT]

    monkeypatch.setattr(poisson.PoissonSampler, 'indices', without)
    return make_images()


def add_remove(monkeypatch):
    del monkeypatch
    return {name: np.delete(array, LEFT_OUT, axis=0) for name, array in make_images().items()}


def replace_one(monkeypatch):
    """Another image, of another class, in the place of one."""
    del monkeypatch
    private = make_images()
    private['images'][LEFT_OUT] = 255 - private['images'][LEFT_OUT]
    private['labels'][LEFT_OUT] = (private['labels'][LEFT_OUT] + 1) % 10
    return private


@pytest.mark.parametrize('neighbor', [zero_out, add_remove, replace_one], ids=lambda f: f.__name__)
def test_neighbors_release_the_same_files_and_differ_only_by_what_noise_went_into(
    quick_config, tmp_path, monkeypatch, neighbor, released
):
    relation = neighbor.__name__
    accountant = 'pld' if relation == 'replace_one' else 'rdp'

    def config():
        found = quick_config(dp__relation=relation, dp__accountant=accountant)
        found.moments.update(enabled=True, frequencies=4, noise_multiplier=20.0)
        found.frequency.update(enabled=True, features=16, noise_multiplier=20.0)
        found.pretrain.update(moments_steps=2, frequency_steps=2, generator_steps=5)
        return found

    one = run(config(), tmp_path / 'one', make_images())
    other = run(config(), tmp_path / 'other', neighbor(monkeypatch))
    found, without_noise = zip(*(released(workdir) for workdir in (one, other)))
    assert found[0].keys() == found[1].keys()
    assert {'config.json', 'plan.json', 'ledger.jsonl', 'privacy_statement.json'} <= set(without_noise[0])
    assert without_noise[0] == without_noise[1]
    assert {w.model(name).exists() for w in (one, other) for name in ('pretrain', 'finetune')} == {True}
    # The neighbors are different ones: the noisy values differ, because the noise here is the same.
    assert found[0]['central_images.npz'] != found[1]['central_images.npz']
    plan = json.loads(found[0]['plan.json'])
    assert (plan['relation'], plan['private_images']) == (relation, COUNT)
    assert relation in composition.text(str(one.root))


def test_another_number_of_images_is_refused_where_it_is_public(quick_config, tmp_path):
    for relation, accountant in (('zero_out', 'rdp'), ('replace_one', 'pld')):
        config = quick_config(dp__relation=relation, dp__accountant=accountant)
        with pytest.raises(ValueError, match='config.data.train_images is 60; it must be 59'):
            run(config, tmp_path / relation, add_remove(None))
        assert not WorkDir(tmp_path / relation).ledger.exists()


@pytest.mark.parametrize('left', [0, 1])
def test_whether_a_class_has_images_decides_neither_what_is_released_nor_whether(
    quick_config, tmp_path, left
):
    """Of class 3, one set has two images, with which FID can be computed, and its neighbor one; or one and 0.

    Removing the image stands for giving it to nobody: the number of images is another, and not public.
    """
    private = make_images()
    numbers = np.flatnonzero(private['labels'] == 3)

    def with_images_of_class_3(count):
        return {name: np.delete(array, numbers[count:], axis=0) for name, array in private.items()}

    config = quick_config(dp__relation='add_remove', evaluate__feature_epochs=1)
    runs = [
        run(config, tmp_path / str(count), with_images_of_class_3(count), fid=True)
        for count in (left, left + 1)
    ]
    names = [{p.relative_to(w.release) for p in w.release.rglob('*')} for w in runs]
    assert names[0] == names[1]
    for count, workdir in zip((left, left + 1), runs):
        results, text = json.loads(workdir.evaluation.read_text()), workdir.report_text.read_text()
        # Which features there can be, single images decide: it is told in private/ alone.
        assert ('rotations' in results['fid_features']) == (count < 2) == ('rotations' in text)
        assert 'logistic' in results['accuracy']


def test_release_moved_away_and_a_run_without_the_query_is_refused(copied_run):
    """It would spend a second time under a budget that knows nothing of the query."""
    config, workdir = copy.deepcopy(copied_run[0]), copied_run[1]  # the config is that of all tests
    workdir.release.rename(workdir.root / 'published')
    with config.unlocked():
        config.pretrain.enabled = False
    with pytest.raises(ValueError, match='config.pretrain.enabled: True there, False now'):
        pipeline.run(config, workdir.root, 'all')
    workdir.own_config.unlink()  # as in a folder of an earlier version
    with pytest.raises(ValueError, match='keys of central_query, whose output was released'):
        pipeline.run(config, workdir.root, 'all')
    assert not workdir.released_ledger.exists()
