"""What was released is compared with its SHA-256 before anything uses it."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpp_jax import files, pipeline
from dpp_jax.run import artefacts
from dpp_jax.training import checkpoint

# What is used, by which stage, and what that stage makes.
USES = [
    ('central_images.npz', 'pretrain', 'model/pretrain'),
    ('model/pretrain', 'finetune', 'model/finetune'),
    ('model/finetune', 'generate', 'synthetic'),
]


def others(workdir, name, shapes):
    """Put other values in the place of what was released, in a file that is whole."""
    path = workdir.release / name
    if path.is_file():
        found = files.read_npz(path, '')
        files.write_npz(path, **found | {'images': found['images'] ^ 1})
    else:
        found = artefacts.weights(workdir, name.removeprefix('model/'), shapes)
        leaves, tree = jax.tree.flatten(found)
        leaves[-1] = np.nextafter(leaves[-1], np.float32(9))
        checkpoint.save_model(path, jax.tree.unflatten(tree, leaves))


def again(workdir, place):
    """Remove what a stage made, so that it has something to do."""
    path = workdir.release / place
    shutil.rmtree(path)


@pytest.mark.parametrize(
    'name, stage, makes, noted',
    [
        (*use, noted)
        for use in USES
        for noted in ('digests.json and keys.json', 'digests.json', 'keys.json')
        if (use[0], noted) != ('model/pretrain', 'keys.json')  # no mechanism made it: no keys tell of it
    ],
)
def test_other_values_than_were_released_are_refused_before_use(
    copied_run, tiny_model, name, stage, makes, noted
):
    config, workdir = copied_run
    others(workdir, name, tiny_model.shapes())
    if 'digests.json' not in noted:
        workdir.digests.unlink()
    if 'keys.json' not in noted:
        keys = json.loads(workdir.keys.read_text())
        if name != 'model/pretrain':
            del keys['central_query' if name.startswith('central') else 'dp_sgd']['released']
        workdir.keys.write_text(json.dumps(keys))
    again(workdir, makes)
    for command in (stage, 'all'):
        with pytest.raises(ValueError, match=f'{name} is not what this run released: .*Restore it'):
            pipeline.run(config, workdir.root, command)
    assert not (workdir.release / makes).exists()


def test_a_model_put_there_by_hand_is_refused_with_the_line_that_takes_it(copied_run, tiny_config, tmp_path):
    """Before the query is asked: what is it, and was it made from private images?"""
    _, finished = copied_run
    config, root = tiny_config(), tmp_path / 'new'
    shutil.copytree(finished.model('pretrain'), root / 'release' / 'model' / 'pretrain')
    with pytest.raises(ValueError, match='pretrain was not made by this run: .*add this line') as refused:
        pipeline.run(config, root, 'all')
    assert not (root / 'release' / 'central_images.npz').exists()
    line = str(refused.value).partition('that file: ')[2]
    (root / 'release' / 'digests.json').write_text('{' + line + '}')
    pipeline.run(config, root, 'central')
    pipeline.run(config, root, 'finetune')


def test_digests_in_release_are_those_of_what_was_released(finished_run, tiny_model):
    _, workdir, _ = finished_run
    noted = json.loads(workdir.digests.read_text())
    assert set(noted) - {'_note'} == {name for name, _, _ in USES}
    central = artefacts.central_images(workdir)
    assert noted['central_images.npz'] == files.digest(artefacts.central_arrays(central))
    for name in ('pretrain', 'finetune'):
        leaves = jax.tree.leaves(artefacts.weights(workdir, name, tiny_model.shapes()))
        assert noted[f'model/{name}'] == files.digest(leaves)


def test_what_a_version_before_released_is_taken_as_it_is_and_noted(copied_run, tiny_model):
    config, workdir = copied_run
    before = json.loads(workdir.digests.read_text())
    workdir.digests.unlink()
    again(workdir, 'synthetic')
    pipeline.run(config, workdir.root, 'generate')
    assert json.loads(workdir.digests.read_text()) == before
