"""Groups as the unit of privacy, through the whole program: neighbors, surplus images, what is said."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from dpp_jax import build, pipeline
from dpp_jax.data.images import Images
from dpp_jax.privacy import groups
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import artefacts, composition, statement
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys

COUNT, GROUPS, MOST = 60, 20, 2
LEFT_OUT = 7  # number of the group by which two sets differ


def make_images():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 8, 8, 1), np.uint8)
    # Numbers of people are not 0, 1, 2 ..., and their images lie anywhere in the set.
    person = rng.permutation(np.repeat(1000 * np.arange(GROUPS) + 3, COUNT // GROUPS))
    return {'images': images, 'labels': np.arange(COUNT) % 10, 'person': person}


def make_config(make_quick_config, folder, private, **changes):
    """A config whose unit is a group, on these images; the same path in every config of `folder`."""
    own, link = folder / f'data_{len(list(folder.glob("data_*")))}', folder / 'data'
    own.mkdir()
    np.savez(own / 'train.npz', **private)
    np.savez(own / 'test.npz', **make_images())
    link.unlink(missing_ok=True)
    link.symlink_to(own)
    config = make_quick_config(
        data__source=f'npz:{link}', data__groups='person', data__train_images=COUNT, dp__unit='group'
    )
    config.data.train_groups, config.dp.images_per_group = GROUPS, MOST
    config.dp.relation = 'add_remove'
    config.finetune.update(batch_size=20, epochs=1.0)
    config.evaluate.update(classifiers=('logistic',), fid=False)
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return config


@pytest.fixture
def grouped(quick_config, tmp_path):
    """A function (private images, settings) → config whose unit is a group, on these images."""
    return functools.partial(make_config, quick_config, tmp_path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('groups')


@pytest.fixture(scope='module')
def one(quick_config, folder):
    """A whole run."""
    return run(make_config(quick_config, folder, make_images()), folder / 'one')


def run(config, root):
    pipeline.run(config, root, 'all')
    return WorkDir(root)


def of_group(private):
    return np.flatnonzero(private['person'] == 1000 * LEFT_OUT + 3)


def without_a_group():
    private = make_images()
    return {name: np.delete(array, of_group(private), axis=0) for name, array in private.items()}


def with_another_group():
    """Somebody else in the place of somebody, with other images, of other classes, and fewer of them."""
    private = make_images()
    own = of_group(private)
    private['images'][own] = 255 - private['images'][own]
    private['labels'][own] = (private['labels'][own] + 1) % 10
    private['person'][own] = 5
    return {name: np.delete(array, own[1:], axis=0) for name, array in private.items()}


@pytest.mark.parametrize('neighbor', [without_a_group, with_another_group], ids=lambda f: f.__name__)
def test_neighbors_by_a_group_release_the_same_files_and_differ_only_by_what_noise_went_into(
    one, quick_config, folder, neighbor, released
):
    other = run(make_config(quick_config, folder, neighbor()), folder / neighbor.__name__)
    (files, without_noise), (other_files, other_without_noise) = released(one), released(other)
    assert files.keys() == other_files.keys()
    assert without_noise == other_without_noise
    assert files['central_images.npz'] != other_files['central_images.npz']


def test_a_run_says_everywhere_that_its_unit_is_a_group(one):
    plan = json.loads(one.plan.read_text(encoding='utf-8'))
    assert (plan['unit'], plan['private_groups'], plan['images_per_group']) == ('group', GROUPS, MOST)
    lines = [json.loads(line) for line in one.ledger.read_text(encoding='utf-8').splitlines()]
    assert {line['unit'] for line in lines} == {'group'}
    text = one.statement_text.read_text(encoding='utf-8')
    assert 'Unit of privacy: one group' in text and 'exactly one group more' in text
    assert 'Unit of privacy: one group' in one.report_page.read_text(encoding='utf-8')


def test_surplus_images_of_a_group_change_no_bit_of_what_is_released(one, quick_config, folder, released):
    private = make_images()
    config = make_config(quick_config, folder, private)
    kept = Keys(one.keys, config.seed).members(private['person'], MOST)
    surplus = np.setdiff1d(np.arange(COUNT), kept)
    assert len(surplus) == COUNT - GROUPS * MOST
    private['images'][surplus] = 255 - private['images'][surplus]
    private['labels'][surplus] = 9 - private['labels'][surplus]
    other = run(make_config(quick_config, folder, private), folder / 'surplus')
    assert released(one) == released(other)
    shapes = build.model(config).shapes()
    for training in ('pretrain', 'finetune'):
        np.testing.assert_equal(*[artefacts.weights(w, training, shapes)['params'] for w in (one, other)])


def test_epsilons_of_different_units_are_not_added_up(one, grouped, tmp_path):
    other = WorkDir(tmp_path / 'of_images')
    mechanism = GaussianMechanism(
        name='dp_sgd', noise_multiplier=1.0, sampling_probability=1.0, sensitivity=1.0
    )
    Ledger(other.ledger).append(mechanism.entry(0, 'other keys'))
    other.plan.write_bytes(one.plan.read_bytes())
    with pytest.raises(ValueError, match='runs with different units of privacy .group and image.'):
        composition.text(f'{one.root},{other.root}')
    config = grouped(make_images(), dp__already_spent=str(other.ledger))
    with pytest.raises(ValueError, match='already_spent .* whose unit of privacy is image; it must be group'):
        build.plan(config, build.model(config))


@pytest.mark.parametrize('relation', ['zero_out', 'replace_one'])
def test_the_number_of_groups_is_that_of_the_set_where_it_is_public(grouped, relation):
    """That of the images is not asked for: one group decides it."""
    config = grouped(with_another_group(), dp__relation=relation)
    assert len(build.images(config, 'train').images) == COUNT - 2
    config = grouped(without_a_group(), dp__relation=relation)
    with pytest.raises(
        ValueError, match='config.data.train_groups is 20; it must be 19, the number of groups'
    ):
        build.images(config, 'train')


def test_other_groups_are_other_private_images(tmp_path):
    workdir, made = WorkDir(tmp_path), make_images()
    private = Images(images=made['images'], labels=made['labels'], groups=made['person'])
    workdir.check_fingerprint('train', private)
    workdir.check_fingerprint('train', private)
    with pytest.raises(ValueError, match='has other images'):
        workdir.check_fingerprint('train', dataclasses.replace(private, groups=np.roll(private.groups, 1)))


@pytest.mark.parametrize(
    ('person', 'text'),
    [
        (np.zeros(COUNT), 'the groups are float64 of shape .60,.; they must be integers of shape .60,.'),
        (np.zeros(3, int), 'the groups are int64 of shape .3,.; they must be integers of shape .60,.'),
        (None, "config.data.groups is 'person'; it must be an array of integers in .*train.npz"),
    ],
    ids=['float', 'short', 'missing'],
)
def test_groups_that_cannot_be_read_are_refused(grouped, tmp_path, person, text):
    private = {name: array for name, array in make_images().items() if name != 'person'}
    config = grouped(private | ({} if person is None else {'person': person}))
    with pytest.raises(ValueError, match=text):
        build.images(config, 'train')


def test_the_plan_says_who_is_protected(grouped):
    plan = build.plan(grouped(make_images()), build.model(grouped(make_images())))
    assert plan.unit == groups.Unit(images=COUNT, groups=GROUPS, images_per_group=MOST)
    assert plan.expected_batch_size == pytest.approx(20)  # images, of 40 that count
    made = statement.make(plan.budget.releases, is_private=True, delta=1e-4, accountant='rdp', budget=10.0)
    assert made['unit'] == 'group' and 'the number of groups is public' in made['neighboring_relation']
    assert any('images in several groups' in line for line in made['not_covered'])
    assert any('the number of groups' in line for line in made['assumptions'])
