"""What stages leave for others: what is damaged or of other settings is never taken for what it should be."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpp_jax import files
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.training import checkpoint


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def settings(tiny_config):
    """A function from changes of the tiny config to its settings by their full names."""
    return lambda **changes: flatten(tiny_config(**changes).to_dict())


def without_the_end(content):
    return content[:-30]


def zeros_in_the_middle(content):
    """Blocks that never reached the disk: the end, with the table of the archive, is there."""
    half = len(content) // 2
    return content[:half] + bytes(64) + content[half + 64 :]


def all_zeros(content):
    return bytes(len(content))


def nothing(content):
    return b''


DAMAGES = [without_the_end, zeros_in_the_middle, all_zeros, nothing]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_set_of_images_is_not_done(settings, tmp_path, images, damage, capsys):
    synthetic = artefacts.SyntheticImages(WorkDir(tmp_path), settings())
    (path,) = synthetic.paths.values()
    assert not synthetic.is_complete
    files.write_npz(path, images=images, labels=np.arange(60) % 10)
    assert synthetic.is_complete
    assert capsys.readouterr().out == ''
    path.write_bytes(damage(path.read_bytes()))
    assert not synthetic.is_complete
    assert f'{path} is damaged' in capsys.readouterr().out


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_images_are_named_with_what_to_do(settings, tmp_path, images, damage):
    workdir = WorkDir(tmp_path)
    synthetic = artefacts.SyntheticImages(workdir, settings())
    (path,) = synthetic.paths.values()
    for each in (path, workdir.central_images):
        files.write_npz(each, images=images, labels=np.arange(60) % 10)
    np.testing.assert_array_equal(synthetic.load(path)['images'], images)
    np.testing.assert_array_equal(artefacts.central_images(workdir)['images'], images)
    for each in (path, workdir.central_images):
        each.write_bytes(damage(each.read_bytes()))
    with pytest.raises(ValueError, match='images.npz cannot be read .*Run --stage=generate'):
        synthetic.load(path)
    with pytest.raises(ValueError, match='central_images.npz cannot be read .*run --stage=central'):
        artefacts.central_images(workdir)


def test_every_file_that_is_asked_for_is_needed(settings, tmp_path, images):
    def complete(**changes):
        return artefacts.SyntheticImages(WorkDir(tmp_path), settings(**changes)).is_complete

    folder = WorkDir(tmp_path).synthetic
    files.write_npz(folder / 'images.npz', images=images)
    assert complete() and not complete(generate__separate_classifier_images=True)
    assert not complete(generate__png_tree=True)
    files.write_npz(folder / 'classifier_images.npz', images=images)
    (folder / 'png').mkdir()
    assert complete(generate__separate_classifier_images=True, generate__png_tree=True)


def test_classifiers_are_trained_on_their_own_images_where_there_are_any(settings, tmp_path):
    for separate, name in ((False, 'images.npz'), (True, 'classifier_images.npz')):
        changes = {'generate__separate_classifier_images': separate}
        synthetic = artefacts.SyntheticImages(WorkDir(tmp_path), settings(**changes))
        assert synthetic.for_classifiers.name == name


def test_images_that_were_only_begun_belong_to_their_settings(settings, tmp_path):
    """Otherwise their parts would be mixed with those of other settings."""
    workdir = WorkDir(tmp_path)
    artefacts.SyntheticImages(workdir, settings()).check()
    artefacts.SyntheticImages(workdir, settings()).record()
    artefacts.SyntheticImages(workdir, settings(generate__batch_size=3, finetune__epochs=2)).check()
    others = artefacts.SyntheticImages(workdir, settings(generate__sampler__steps=7))
    with pytest.raises(ValueError, match='belongs to other settings:\n  config.generate.sampler.steps'):
        others.check()


def test_scores_are_of_the_images_that_were_scored(settings, tmp_path, images):
    workdir = WorkDir(tmp_path)
    (path,) = artefacts.SyntheticImages(workdir, settings()).paths.values()
    files.write_npz(path, images=images)
    scores = artefacts.Evaluation(workdir, settings())
    scores.begin()
    scores.results.update(fid=1.5, accuracy={'logistic': 0.5})
    assert not scores.is_complete
    scores.save()
    found = artefacts.Evaluation(workdir, settings())
    assert found.results['fid'] == 1.5 and not found.is_complete
    fewer = dict(evaluate__classifiers=('logistic',), evaluate__metrics=())
    assert artefacts.Evaluation(workdir, settings(**fewer)).is_complete
    more = artefacts.Evaluation(workdir, settings(**fewer | {'evaluate__metrics': ('kid', 'memorization')}))
    assert more.missing_distances == ['kid', 'memorization'] and not more.is_complete
    more.results |= {'metrics_left_out': {'kid': 'why'}, 'memorization': {'p_value': 0.5}}
    assert more.is_complete
    assert artefacts.Evaluation(workdir, settings(evaluate__epochs=3)).results == {}
    files.write_npz(path, images=images ^ 1)
    assert artefacts.Evaluation(workdir, settings()).results == {}


@pytest.mark.parametrize('place', ['model/pretrain', 'model/finetune'])
@pytest.mark.parametrize(
    'tree',
    [{'weights': np.zeros(3)}, {'params': np.zeros(3)}, {'params': {'dense': {'kernel': np.zeros((2, 2))}}}],
    ids=['other names', 'no network', 'another network'],
)
def test_a_model_of_another_kind_is_named_before_anything_is_spent(tmp_path, tiny_model, place, tree):
    workdir, shapes = WorkDir(tmp_path), tiny_model.shapes()
    artefacts.check_models(workdir, shapes)
    checkpoint.save_model(workdir.release / place, tree)
    with pytest.raises(ValueError, match=f'the checkpoint .*{place} belongs to another network: '):
        artefacts.check_models(workdir, shapes)
    with pytest.raises(ValueError, match=f'the checkpoint .*{place} belongs to another network: '):
        artefacts.weights(workdir, place.removeprefix('model/'), shapes)


def test_a_damaged_model_of_another_kind_is_named(finished_run, tmp_path, tiny_model):
    """Of its shapes nothing, or only names, can be read; whoever needs the values says so."""
    _, reference, _ = finished_run
    workdir, shapes = WorkDir(tmp_path), tiny_model.shapes()
    with ocp.StandardCheckpointer() as checkpointer:
        other = {'weights': np.zeros(1000)}
        checkpointer.save(workdir.model('finetune').absolute(), other)
    for path in [path for path in workdir.model('finetune').rglob('*') if path.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    artefacts.check_models(workdir, shapes)
    with pytest.raises(ValueError, match='the checkpoint .*model/finetune cannot be read .*Restore it'):
        artefacts.weights(workdir, 'finetune', shapes)
    # A training in progress, in the place of a model.
    shutil.rmtree(workdir.model('finetune'))
    _, saved = checkpoint.latest_training(reference.checkpoints('finetune'))
    shutil.copytree(saved, workdir.model('finetune'))
    with pytest.raises(ValueError, match='the checkpoint .*model/finetune belongs to another network: '):
        artefacts.weights(workdir, 'finetune', shapes)


def test_a_model_that_is_not_there_is_named(tmp_path, tiny_model):
    with pytest.raises(FileNotFoundError, match='no model checkpoint in .*model/pretrain'):
        artefacts.weights(WorkDir(tmp_path), 'pretrain', tiny_model.shapes())
