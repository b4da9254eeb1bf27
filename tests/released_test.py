"""What a finished run leaves: what may be made again from it, and what must not be lost or told."""

import copy
import json
import shutil
import textwrap

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpp_jax import files, pipeline
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts, folder
from dpp_jax.run.folder import flatten
from dpp_jax.run.keys import Keys
from dpp_jax.stages import central


def cut(path):
    """What a power failure may leave of a file, or of all files of a folder."""
    found = [path] if path.is_file() else [each for each in path.rglob('*') if each.is_file()]
    assert found
    for each in found:
        each.write_bytes(each.read_bytes()[: each.stat().st_size // 2])


def weights(workdir, model):
    return jax.tree.leaves(artefacts.weights(workdir, 'finetune', model.shapes()))


def synthetic_of(config, workdir):
    return artefacts.SyntheticImages(workdir, flatten(config.to_dict()))


def images_in(folder):
    return files.read_npz(folder / 'images.npz', '')['images']


def test_a_lost_model_is_made_again_as_the_same_bits(copied_run, tiny_model, gate):
    """From the last checkpoint; where that is torn, no later start may take it for a beginning."""
    config, workdir = copied_run
    released = weights(workdir, tiny_model)
    resume = workdir.checkpoints('finetune')
    shutil.copytree(resume, workdir.root / 'whole')
    shutil.rmtree(workdir.model('finetune'))
    (last,) = [path for path in resume.iterdir() if path.name.isdigit()]
    cut(last)
    for _ in range(2):
        with pytest.raises(ValueError, match=f'no checkpoint in .* can be read: {last.name} '):
            pipeline.run(config, workdir.root, 'finetune')
    shutil.rmtree(resume)
    # It may be trained again: what it must be is known.
    assert not gate(config, workdir).done['finetune']
    (workdir.root / 'whole').rename(resume)
    pipeline.run(config, workdir.root, 'finetune')
    jax.tree.map(np.testing.assert_array_equal, weights(workdir, tiny_model), released)


def as_the_version_before_wrote_it(workdir):
    """The files of a run whose form changed since."""
    settings = json.loads(workdir.config.read_text())
    for name, value in folder._NEW_SETTINGS.items():
        if settings[name] == value:
            del settings[name]
    files.write_json(workdir.config, settings)
    plan = json.loads(workdir.plan.read_text())
    files.write_json(workdir.plan, {**plan, 'memory_bytes_per_device': 123_456_789})
    workdir.own_ledger.unlink()


def test_a_run_of_the_version_before_is_done(copied_run, gate, capsys):
    config, workdir = copied_run
    as_the_version_before_wrote_it(workdir)
    before = {path: path.read_bytes() for path in workdir.root.rglob('*') if path.is_file()}
    assert all(gate(config, workdir).done.values())
    pipeline.run(config, workdir.root, 'all')
    assert f'Everything is done in {workdir.root}: {", ".join(pipeline.STAGES)}.' in capsys.readouterr().out
    after = {path: path.read_bytes() for path in workdir.root.rglob('*') if path.is_file()}
    assert after.keys() - before.keys() <= {workdir.root / '.lock'}
    assert {path: after[path] for path in before} == before
    with pytest.raises(ValueError, match='config.model.width: 8 there, 16 now'):  # its settings still bind it
        pipeline.run(with_settings(config, model__width=16), workdir.root, 'all')


def test_what_a_run_of_the_version_before_lost_is_made_again_as_the_same_bytes(copied_run, tiny_model):
    config, workdir = copied_run
    as_the_version_before_wrote_it(workdir)
    released = weights(workdir, tiny_model)
    lost = [workdir.central_images, *synthetic_of(config, workdir).paths.values(), workdir.evaluation]
    kept = [workdir.config, workdir.plan, workdir.ledger, workdir.keys]
    before = {path: path.read_bytes() for path in lost + kept}
    for path in lost:
        path.unlink()
    shutil.rmtree(workdir.model('finetune'))
    pipeline.run(config, workdir.root, 'all')
    assert {path: path.read_bytes() for path in lost + kept} == before
    jax.tree.map(np.testing.assert_array_equal, weights(workdir, tiny_model), released)


def change_keys(workdir, change):
    keys = json.loads(workdir.keys.read_text())
    change(keys)
    workdir.keys.write_text(json.dumps(keys))


def test_another_model_under_the_same_noise_is_not_released(copied_run):
    config, workdir = copied_run
    shutil.rmtree(workdir.model('finetune'))
    change_keys(workdir, lambda keys: keys['dp_sgd'].update(released='of another device'))
    with pytest.raises(ValueError, match='the new output of dp_sgd differs .* It was not released'):
        pipeline.run(config, workdir.root, 'finetune')
    assert not workdir.model('finetune').exists()


@pytest.mark.parametrize(
    'stage, mechanism, place',
    [('central', 'central_query', 'central_images.npz'), ('finetune', 'dp_sgd', 'model/finetune')],
)
def test_a_release_of_which_nothing_is_known_is_not_made_again(copied_run, stage, mechanism, place):
    """The statement says that it was made, and the keys do not say what it was."""
    config, workdir = copied_run
    path = workdir.release / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    change_keys(workdir, lambda keys: keys[mechanism].pop('released'))
    for command in ('plan', stage, 'all'):
        with pytest.raises(
            ValueError, match=f'the output of --stage={stage} is missing in .* counts it as released'
        ):
            pipeline.run(config, workdir.root, command)
    assert not path.exists()


def test_other_central_images_under_the_same_noise_are_not_released(copied_run, monkeypatch):
    config, workdir = copied_run
    path = workdir.central_images
    released = artefacts.central_images(workdir)['images']
    path.unlink()
    picture = path.with_suffix('.png')
    picture.unlink()
    monkeypatch.setattr(central, 'to_images', lambda *_, **__: released ^ 1)
    with pytest.raises(ValueError, match='the new output of central_query differs .* It was not released'):
        pipeline.run(config, workdir.root, 'central')
    assert not path.exists() and not picture.exists()


def test_no_central_image_appears_before_the_file_that_counts(copied_run, monkeypatch):
    config, workdir = copied_run
    workdir.central_images.unlink()
    workdir.central_images.with_suffix('.png').unlink()

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, 'write_npz', die)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, workdir.root, 'central')
    assert not list(workdir.release.glob('central_images*'))


def test_clean_deletes_private_and_leaves_a_run_that_can_be_sampled(copied_run, capsys):
    config, workdir = copied_run
    before = {p.name for p in workdir.release.iterdir()}
    pipeline.run(config, workdir.root, 'clean')
    assert not workdir.private.exists()
    assert 'move' in capsys.readouterr().out
    statement = json.loads(workdir.statement.read_text())
    assert [row['count'] for row in statement['mechanisms']] == [config.query.queries, 23]
    assert {p.name for p in workdir.release.iterdir()} == before
    old = images_in(workdir.synthetic)
    workdir.synthetic.rename(workdir.release / 'first')
    more = with_settings(config, generate__images=80)
    pipeline.run(more, workdir.root, 'generate')
    new = images_in(workdir.synthetic)
    assert new.shape == (80, 8, 8, 1) and new.std() > 1
    assert '80 synthetic images' in workdir.card.read_text(encoding='utf-8')
    assert '80 synthetic images' in workdir.release_page.read_text(encoding='utf-8')
    np.testing.assert_array_equal(images_in(workdir.release / 'first'), old)


def test_clean_is_refused_while_private_is_needed(tiny_config, tmp_path):
    pipeline.run(tiny_config(), tmp_path, 'central')
    with pytest.raises(ValueError, match='Finish with --stage=finetune first'):
        pipeline.run(tiny_config(), tmp_path, 'clean')
    assert (tmp_path / 'private' / 'keys.json').exists()


def test_clean_keeps_private_where_the_model_cannot_be_read(copied_run):
    config, workdir = copied_run
    cut(workdir.model('finetune'))
    before = {path for path in workdir.private.rglob('*')}
    with pytest.raises(ValueError, match='deleted nothing.*model/finetune cannot be read'):
        pipeline.run(config, workdir.root, 'clean')
    assert {path for path in workdir.private.rglob('*')} == before


def with_settings(config, **changes):
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return changed


def test_images_by_other_settings_never_take_the_place_of_those_there(copied_run):
    config, workdir = copied_run
    old, other = images_in(workdir.synthetic), with_settings(config, generate__images=80)
    for stage in ('plan', 'generate', 'evaluate', 'report', 'all'):
        with pytest.raises(ValueError) as refused:
            pipeline.run(other, workdir.root, stage)
        assert 'config.generate.images: 40 there, 80 now' in str(refused.value)
        assert f'move {workdir.synthetic} away' in str(refused.value)
    np.testing.assert_array_equal(images_in(workdir.synthetic), old)
    pipeline.run(with_settings(config, generate__batch_size=7), workdir.root, 'generate')


def test_scores_and_report_are_of_the_images_that_are_there(copied_run, gate):
    config, workdir = copied_run
    more = with_settings(config, generate__images=80, generate__png_tree=False)
    workdir.synthetic.rename(workdir.release / 'first')
    others = synthetic_of(more, workdir)
    others.record()
    for path in others.paths.values():
        files.write_npz(path, images=np.zeros((80, 8, 8, 1), np.uint8), labels=np.arange(80) % 10)
    done = gate(more, workdir).done
    assert not done['evaluate'] and not done['report']
    pipeline.run(more, workdir.root, 'report')
    text = workdir.report_text.read_text()
    assert '80 synthetic images' in text and 'FID' not in text and 'accuracy' not in text
    assert gate(more, workdir).done['report']
    workdir.synthetic.rename(workdir.release / 'second')
    (workdir.release / 'first').rename(workdir.synthetic)
    done = gate(config, workdir).done
    assert done['evaluate'] and not done['report']


def test_scores_by_other_settings_do_not_count(finished_run, gate):
    config, workdir, _ = finished_run
    assert gate(config, workdir).done['evaluate']
    assert not gate(with_settings(config, evaluate__epochs=3), workdir).done['evaluate']
    assert gate(with_settings(config, evaluate__classifiers=('mlp',)), workdir).done['evaluate']


@pytest.mark.parametrize(
    'name, stage, advice',
    [
        ('release/config.json', 'plan', 'written again'),
        ('release/synthetic/settings.json', 'plan', 'move .*synthetic away'),
        ('release/code.json', 'generate', 'delete it'),
        ('private/keys.json', 'generate', 'Restore the file.*draws images with new keys'),
        ('private/evaluation.json', 'plan', 'Delete the file and run --stage=evaluate'),
        ('private/report.json', 'plan', 'Delete the file and run --stage=report'),
        ('release/privacy_statement.json', 'finetune', 'delete it.*again from ledger'),
        ('release/central_images.npz', 'pretrain', 'move it away and run --stage=central: it makes the same'),
    ],
)
def test_a_torn_file_is_named_with_what_to_do(copied_run, name, stage, advice):
    config, workdir = copied_run
    again = {'generate': 'synthetic', 'pretrain': 'model/pretrain', 'finetune': 'model/finetune'}
    if stage in again:  # so that there is something to do
        shutil.rmtree(workdir.release / again[stage])
    cut(workdir.root / name)
    with pytest.raises(ValueError, match=f'{name} cannot be read .*{advice}'):
        pipeline.run(config, workdir.root, stage)


def forms(number, size):
    """How `number` of `size` bytes may stand in a text or in a file."""
    big, little = number.to_bytes(size, 'big'), number.to_bytes(size, 'little')
    text = f'{number:0{2 * size}x}'
    words = np.frombuffer(big, '>u4').astype('<u4').tobytes()  # as JAX keeps a key
    return [text.encode(), text.upper().encode(), str(number).encode(), big, little, words]


def contents(folder):
    """Every file of `folder`, and what is packed in it."""
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        yield path, path.read_bytes()
        if path.suffix == '.npz':
            yield from ((path, array.tobytes()) for array in files.read_npz(path, '').values())
    for path in (folder / 'model').iterdir():
        with ocp.StandardCheckpointer() as checkpointer:
            leaves = jax.tree.leaves(checkpointer.restore(path.absolute()))
        yield from ((path, np.asarray(leaf).tobytes()) for leaf in leaves)


def leaks(workdir, told):
    """Where the secrets of keys.json are seen."""
    keys = json.loads(workdir.keys.read_text())
    secrets = [
        (f'{part}/{kind}', form)
        for part in keys.keys() - {'_note', '_random_bits'}
        for kind, digits in (('sampling', 32), ('noise', 16))  # of each JAX key
        for each in textwrap.wrap(keys[part][kind].rpartition(':')[2], digits)
        for form in forms(int(each, 16), digits // 2)
    ]
    assert len(secrets) > 50
    seen = [*contents(workdir.release), ('output', told.encode())]
    return {(str(where), name) for where, data in seen for name, form in secrets if form in data}


def test_no_key_is_told_or_released(finished_run):
    _, workdir, told = finished_run
    assert 'finetune: done' in told
    assert leaks(workdir, told) == set()


def test_a_key_that_is_told_or_released_is_seen(copied_run):
    """Otherwise the test above could not fail."""
    _, workdir = copied_run
    keys = Keys(workdir.keys, 1).of_mechanism('dp_sgd', Ledger(workdir.ledger))
    np.savez_compressed(workdir.release / 'a.npz', key=jax.random.key_data(keys.noise.keys[2]))
    (workdir.release / 'b.txt').write_text(f'the key is {keys.sampling}')
    found = leaks(workdir, f'{keys.sampling:x}')
    assert found == {
        (str(workdir.release / 'a.npz'), 'dp_sgd/noise'),
        (str(workdir.release / 'b.txt'), 'dp_sgd/sampling'),
        ('output', 'dp_sgd/sampling'),
    }
