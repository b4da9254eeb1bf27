"""Parts that an interrupted run left; labels; images of class moments; forms of images, each read back."""

import html
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from dpp_jax import build, files, pipeline, settings
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import generate
from dpp_jax.stages import plan as plan_stage
from dpp_jax.stages.generate import exports, moments, sampling
from dpp_jax.training.state import FlatParams


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)


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
def test_parts_are_read_until_the_first_that_is_damaged(tmp_path, images, damage):
    for first in (0, 20, 40):
        files.write_npz(tmp_path / f'{first:010d}.npz', images=images[first : first + 20])
    np.testing.assert_array_equal(np.concatenate(sampling._read_parts(tmp_path)), images)
    path = tmp_path / f'{20:010d}.npz'
    path.write_bytes(damage(path.read_bytes()))
    (part,) = sampling._read_parts(tmp_path)
    np.testing.assert_array_equal(part, images[:20])


def test_parts_are_read_until_the_first_that_is_missing(tmp_path, images):
    for first in (0, 40):
        files.write_npz(tmp_path / f'{first:010d}.npz', images=images[first : first + 20])
    assert sum(map(len, sampling._read_parts(tmp_path))) == 20
    assert sampling._read_parts(tmp_path / 'nowhere') == []


@pytest.mark.parametrize('shares', [[1, 1, 1], [5, 1, 1], [0.9, 0.05, 0.05], [1000, 1, 0], [3, 2]])
def test_every_beginning_has_classes_near_their_shares_and_the_whole_two_of_each(shares):
    total = 300
    adjusted = sampling.with_two_of_each(np.array(shares, float), total)
    labels = sampling.labels_by_share(total, adjusted)
    assert labels.dtype == np.int32 and len(labels) == total
    counts = np.cumsum(labels[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, total + 1)[:, None] * adjusted
    assert np.abs(counts - wanted).max() <= 1 + len(shares) / 4
    assert counts[-1].min() >= 2
    exact = np.array(shares) / sum(shares)
    if (exact * total >= 2).all():
        np.testing.assert_allclose(adjusted, exact)
    longer = sampling.labels_by_share(2 * total, adjusted)
    np.testing.assert_array_equal(longer[:total], labels)


def test_equal_shares_are_the_classes_in_turn_and_the_least_number_of_images_is_two_of_each():
    for classes, total in ((10, 40), (3, 7), (7, 14)):
        adjusted = sampling.with_two_of_each(np.ones(classes), total)
        labels = sampling.labels_by_share(total, adjusted)
        np.testing.assert_array_equal(labels, sampling.image_labels(np.arange(total), classes))
        np.testing.assert_array_equal(sampling.image_numbers(labels, classes), np.arange(total))
        adjusted = sampling.with_two_of_each(np.arange(classes) ** 3 + 0.1, 2 * classes)
        labels = sampling.labels_by_share(2 * classes, adjusted)
        assert np.bincount(labels, minlength=classes).tolist() == [2] * classes


def test_an_image_keeps_its_number_whatever_there_is_of_other_classes():
    few, many = np.array([0, 1, 0, 2]), np.array([2, 2, 0, 1, 1, 0, 2])
    for label in range(3):
        numbers = [sampling.image_numbers(labels, 3)[labels == label] for labels in (few, many)]
        shortest = min(map(len, numbers))
        np.testing.assert_array_equal(numbers[0][:shortest], numbers[1][:shortest])
    numbers = sampling.image_numbers(many, 3)
    assert len(set(numbers)) == len(many)
    np.testing.assert_array_equal(sampling.image_labels(numbers, 3), many)


NAMES = ('T-shirt/top', 'a:b', 'a?b', 'A_B', 'con', ' .', 'sehr schön', 'x' * 200, '../..', 'NUL.txt')


def test_folders_of_classes_have_names_that_any_file_system_takes(tmp_path):
    found = exports.folder_names(NAMES)
    assert len({name.casefold() for name in found}) == len(NAMES)
    for name in found:
        assert not set(name) & set('/\\:*?"<>|') and name == name.strip(' .') and 0 < len(name) < 100
        assert name.partition('.')[0].casefold() not in exports._RESERVED
        (tmp_path / name).mkdir()
    assert found[6] == 'sehr schön'
    numbers = exports.folder_names([str(label) for label in range(12)])
    assert numbers == sorted(numbers) and numbers[:2] == ['00', '01']


@pytest.fixture
def labeled():
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (35, 6, 6, 3), np.uint8), rng.integers(0, 3, 35).astype(np.int32)


CLASSES = ('cat', 'dog / wolf', 'Ähre')


def test_the_tree_of_png_files_holds_every_image_below_its_class(tmp_path, labeled):
    """As torchvision's ImageFolder reads it: classes are folders, sorted by their names."""
    images, labels = labeled
    exports.write_png_tree(tmp_path / 'png', images, labels, CLASSES)
    folders = sorted(path.name for path in (tmp_path / 'png').iterdir())
    assert folders == ['cat', 'dog _ wolf', 'Ähre']
    seen = set()
    for label, name in enumerate(exports.folder_names(CLASSES)):
        for path in (tmp_path / 'png' / name).iterdir():
            number = int(path.stem)
            seen.add(number)
            with Image.open(path) as found:
                np.testing.assert_array_equal(np.asarray(found), images[number])
            assert labels[number] == label
    assert seen == set(range(35))


@pytest.mark.parametrize('channels', [1, 3])
def test_tensorflow_datasets_reads_its_folder_without_tensorflow(tmp_path, labeled, channels, monkeypatch):
    images, labels = labeled
    images = images[..., :channels]
    monkeypatch.setattr(exports, '_SHARD_BYTES', 12 * images[0].nbytes)  # several files
    folder = tmp_path / 'tfds'
    with files.noted(tmp_path, 'for this test'):
        exports.write_tfds(folder, images, labels, CLASSES, name='8 Bit-Set', description='What it is.')
    assert len(list(folder.glob('*.array_record*'))) == 3
    program = (
        'import sys, numpy as np, tensorflow_datasets as tfds\n'
        f'builder = tfds.builder_from_directory({str(folder)!r})\n'
        "rows = builder.as_data_source(split='train')\n"
        f'np.savez({str(tmp_path / "read.npz")!r}, images=np.stack([row["image"] for row in rows]),\n'
        '         labels=[row["label"] for row in rows], names=builder.info.features["label"].names,\n'
        '         about=builder.info.description, tensorflow="tensorflow" in sys.modules)\n'
    )
    subprocess.run([sys.executable, '-c', program], check=True, capture_output=True)
    found = np.load(tmp_path / 'read.npz')
    np.testing.assert_array_equal(found['images'], images)
    np.testing.assert_array_equal(found['labels'], labels)
    assert tuple(found['names']) == CLASSES and not found['tensorflow']
    assert 'NOT PRIVATE: for this test' in str(found['about']) and 'What it is.' in str(found['about'])


@pytest.mark.parametrize('channels', [1, 3])
def test_dpimagebench_reads_the_same_pixels_and_labels(tmp_path, labeled, channels):
    """Its evaluation cuts off fractions for FID; each of the 256 values must survive that."""
    images, labels = labeled
    images = images[..., :channels].copy()
    images.flat[:256] = np.arange(256)
    exports.write_dpimagebench(tmp_path / 'bench', images, labels)
    found = np.load(tmp_path / 'bench' / 'gen' / 'gen.npz')
    x, y = found['x'], found['y']
    assert x.dtype == np.float32 and x.shape == (35, channels, 6, 6) and 0 <= x.min() and x.max() <= 1
    for read in ((x * 255).astype(np.uint8), np.rint(x * 255)):
        np.testing.assert_array_equal(np.moveaxis(read, 1, 3), images)
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y, labels)


def test_a_run_writes_other_forms_of_its_images_when_they_are_asked_for(copied_run):
    config, workdir = copied_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.generate, 'dpimagebench', True)
        pipeline.run(config, workdir.root, 'generate')
    data = files.read_npz(workdir.synthetic / 'images.npz', '')
    found = files.read_npz(workdir.synthetic / 'dpimagebench' / 'gen' / 'gen.npz', '')
    np.testing.assert_array_equal(np.rint(np.moveaxis(found['x'], 1, 3) * 255), data['images'])
    np.testing.assert_array_equal(found['y'], data['labels'])
    for page in (workdir.card, workdir.release_page):
        assert 'release/synthetic/dpimagebench/gen/gen.npz' in page.read_text()


def test_a_run_leaves_class_names_in_its_files(finished_run):
    config, workdir, _ = finished_run
    data = files.read_npz(workdir.synthetic / 'images.npz', '')
    assert data['class_names'].tolist() == [str(label) for label in range(10)]
    assert data['labels'].tolist() == [*range(10)] * 4
    assert sorted(path.name for path in (workdir.synthetic / 'png').iterdir()) == sorted(map(str, range(10)))


def test_numbers_per_class_follow_the_noisy_counts_that_the_query_released(tiny_config, tmp_path):
    config = tiny_config(query__class_counts='noisy', generate__class_counts='query', generate__images=200)
    config.query.noise_multiplier = 6.0
    pipeline.run(config, tmp_path, 'central')
    workdir = WorkDir(tmp_path)
    counts = artefacts.central_images(workdir)['counts']
    assert counts.shape == (2, 10) and counts.dtype == np.float32
    labels = generate.default_labels(config, workdir, 200)
    shares = np.maximum(counts.sum(axis=0), 0) / np.maximum(counts.sum(axis=0), 0).sum()
    found = np.bincount(labels, minlength=10)
    assert np.abs(found - np.maximum(200 * shares, 2)).max() < 4 and found.std() > 1
    # Somebody who has release/ alone finds the same; without counts there is a line.
    central = artefacts.central_images(workdir)
    workdir.digests.unlink()
    workdir.keys.unlink()
    files.write_npz(workdir.central_images, images=central['images'], labels=central['labels'])
    with pytest.raises(ValueError, match="class_counts is 'query', but .* holds no counts"):
        generate.default_labels(config, workdir, 200)


def test_shares_as_set_are_those_of_the_images(tiny_config, tmp_path):
    config = tiny_config(generate__class_counts='shares', generate__images=100)
    config.generate.class_shares = (1,) * 9 + (11,)
    found = np.bincount(generate.default_labels(config, WorkDir(tmp_path), 100))
    assert found.tolist() == [5] * 9 + [55]


@pytest.mark.parametrize(
    'changes, text',
    [
        (
            {'generate__class_counts': 'query'},
            "class_counts is 'query'; it must be 'balanced' or 'shares': no",
        ),
        ({'generate__class_counts': 'shares'}, r'class_shares is \(\); it must be 10 numbers'),
        ({'generate__class_shares': (1,) * 10}, r"must be \(\), because generate.class_counts is 'balanced'"),
        ({'generate__class_shares': (0,) * 10}, 'must be finite numbers > 0'),
        ({'finetune__snapshots': 30}, r'snapshots is 30; it must be a whole number in \[0, 20\]'),
    ],
)
def test_settings_of_classes_that_cannot_be_are_named(tiny_config, changes, text):
    with pytest.raises(ValueError, match=text):
        settings.check(tiny_config(**changes))


def test_snapshots_are_shown_change_no_weight_and_are_deleted(copied_run, tiny_model):
    """The run kept two on its way. Its training is done again with three: the same weights, at more steps."""
    config, workdir = copied_run
    found = files.read_npz(workdir.over_finetuning, '')
    assert found['steps'].tolist() == [0, 7, 23] and found['images'].shape == (3, 20, 8, 8, 1)
    assert found['labels'].tolist() == [label for label in range(10) for _ in range(2)]
    assert len({images.tobytes() for images in found['images']}) == 3
    assert not workdir.snapshots.exists()

    before = artefacts.weights(workdir, 'finetune', tiny_model.shapes())
    shutil.rmtree(workdir.model('finetune'))
    shutil.rmtree(workdir.checkpoints('finetune'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.finetune, 'snapshots', 3)
        pipeline.run(config, workdir.root, 'finetune')
    after = artefacts.weights(workdir, 'finetune', tiny_model.shapes())
    jax.tree.map(np.testing.assert_array_equal, before, after)
    kept = artefacts.snapshots(workdir)
    assert sorted(kept) == [0, 2, 7]
    start = artefacts.weights(workdir, 'pretrain', tiny_model.shapes())['params']
    np.testing.assert_array_equal(files.read_npz(kept[0], '')['vector'], FlatParams.of(start).vector)

    for path in (workdir.over_finetuning, workdir.release_page):
        path.unlink()
    content = kept[7].read_bytes()
    kept[7].write_bytes(content[:-40])
    with pytest.raises(ValueError, match='0000000007.npz cannot be read .*Delete .*snapshots'):
        pipeline.run(config, workdir.root, 'generate')
    kept[7].write_bytes(content)
    pipeline.run(config, workdir.root, 'generate')
    more = files.read_npz(workdir.over_finetuning, '')
    assert more['steps'].tolist() == [0, 2, 7, 23]
    np.testing.assert_array_equal(more['images'][[0, 2, 3]], found['images'])
    assert not workdir.snapshots.exists()


@pytest.mark.parametrize('share', [0.0, 0.01, 0.1, 0.25, 0.29, 0.5, 0.9, 0.999])
@pytest.mark.parametrize('shares', [[1, 1, 1], [50, 10, 1], [1]])
def test_every_class_has_the_share_of_moments_images_from_its_beginning_on(share, shares):
    labels = sampling.labels_by_share(301, sampling.with_two_of_each(np.array(shares, float), 301))
    chosen = moments.places(labels, len(shares), share)
    assert chosen.shape == (301,) and chosen.dtype == bool
    for label in range(len(shares)):
        of_class = chosen[labels == label]
        images = np.arange(1, len(of_class) + 1)
        wanted = np.minimum(np.floor(images * share + 0.5), images - 1)  # one of the model is always there
        np.testing.assert_array_equal(np.cumsum(of_class), wanted)


def test_a_moments_image_keeps_its_pixels_whatever_else_is_drawn(tiny_config):
    config = tiny_config(moments__enabled=True, moments__frequencies=10)
    rng = np.random.default_rng(0)
    means, factors = rng.random((3, 10)), 0.1 * rng.standard_normal((3, 10, 10))
    answer = ClassMoments(np.float32(means), np.float32(factors), np.float32(0.01))
    draw = lambda *batch: answer.draw(build.frequencies(config), *batch)

    def filled(labels, key=7):
        chosen = moments.places(labels, 3, 0.75)
        images = np.full(((~chosen).sum(), 8, 8, 1), 99, np.uint8)
        found = moments.fill(images, chosen, labels, draw, key)
        assert (found[~chosen] == 99).all()
        return [found[chosen & (labels == label)] for label in range(3)]

    many, few, one = filled(np.arange(600) % 3), filled(np.arange(90) % 3), filled(np.full(100, 2))
    assert len({image.tobytes() for images in many for image in images}) == 450
    for label in range(3):
        np.testing.assert_array_equal(many[label][: len(few[label])], few[label])
    np.testing.assert_array_equal(many[2][: len(one[2])], one[2])
    assert (filled(np.arange(90) % 3, key=8)[0] != few[0]).any()


@pytest.fixture(scope='module')
def trained(quick_config, tmp_path_factory):
    """Config and folder of a run with class moments, of which no training draws; fine-tuned."""
    config = quick_config(moments__enabled=True, moments__frequencies=10, moments__clip_norm=1.0)
    config.moments.noise_multiplier = 2.0
    root = tmp_path_factory.mktemp('trained')
    for stage in ('central', 'pretrain', 'finetune'):
        pipeline.run(config, root, stage)
    return config, root


@pytest.fixture
def generated(trained, tmp_path):
    """A function: name, settings of generation → config, and the work directory after it."""
    config, root = trained

    def generate(name, **changes):
        shutil.copytree(root, tmp_path / name)
        changed = config.copy_and_resolve_references()
        changed.generate.update(changes)
        pipeline.run(changed, tmp_path / name, 'generate')
        return changed, WorkDir(tmp_path / name)

    return generate


def arrays_of(workdir, name='images'):
    return files.read_npz(workdir.synthetic / f'{name}.npz', '')


def test_a_share_of_the_images_comes_from_the_class_moments_and_the_others_are_what_they_were(generated):
    plain, of_moments = generated('plain')[1], generated('moments', moments_share=0.25)[1]
    before, found = arrays_of(plain), arrays_of(of_moments)
    assert 'source' not in before and 'generate/moments' not in plain.keys.read_text()
    source = found['source']
    assert source.dtype == np.uint8 and source.sum() == 10
    assert np.bincount(found['labels'][source == 1]).tolist() == [1] * 10
    np.testing.assert_array_equal(found['labels'], before['labels'])
    model = source == 0
    # But for rounding: other images are sampled with them.
    assert np.abs(found['images'][model].astype(int) - before['images'][model]).max() <= 1
    pixels = np.abs(found['images'][~model].astype(int) - before['images'][~model])
    assert pixels.max(axis=(1, 2, 3)).min() > 1

    for page in (of_moments.card, of_moments.release_page):
        text = page.read_text(encoding='utf-8')
        assert '25 % of the images of each class' in text and "data['source']" in html.unescape(text)
    assert '10 of all are drawn from the class moments' in of_moments.release_page.read_text(encoding='utf-8')
    assert '30 drawn from a diffusion model and 10 from class' in of_moments.card.read_text(encoding='utf-8')
    for page in (plain.card, plain.release_page):
        assert 'of the images of each class' not in page.read_text(encoding='utf-8')


def test_neither_a_restart_nor_the_batch_size_changes_moments_images(generated, monkeypatch):
    """The run ends between sampling and drawing, and goes on with other batches."""
    config, whole = generated('whole', moments_share=0.5, separate_classifier_images=True)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ClassMoments, 'draw', stop)
        generated('stopped', moments_share=0.5, separate_classifier_images=True, batch_size=1)
    stopped = WorkDir(whole.root.parent / 'stopped')
    assert len(files.names(stopped.synthetic / '.parts_images')) == 3  # of 20 images on 8 devices
    assert not (stopped.synthetic / 'images.npz').exists()
    pipeline.run(config, stopped.root, 'generate')
    sets = [arrays_of(whole, name) for name in ('images', 'classifier_images')]
    for name, expected in zip(('images', 'classifier_images'), sets):
        found = arrays_of(stopped, name)
        drawn = expected['source'] == 1
        assert drawn.sum() == 20
        np.testing.assert_array_equal(found['source'], expected['source'])
        np.testing.assert_array_equal(found['images'][drawn], expected['images'][drawn])
        assert np.abs(found['images'].astype(int) - expected['images']).max() <= 1
    drawn = sets[0]['source'] == 1
    assert (sets[0]['images'][drawn] != sets[1]['images'][drawn]).any(axis=(1, 2, 3)).all()


def test_another_share_never_replaces_images_and_damaged_moments_are_refused(generated):
    config, workdir = generated('run', moments_share=0.25)
    config.generate.moments_share = 0.5
    with pytest.raises(ValueError, match=r'(?s)belongs to other settings:.*config.generate.moments_share'):
        pipeline.run(config, workdir.root, 'generate')
    shutil.rmtree(workdir.synthetic)
    answer = dict(np.load(workdir.moments))
    np.savez(workdir.moments, **answer | {'means': 2 * answer['means']})
    with pytest.raises(ValueError, match='moments.npz is not what this run released'):
        pipeline.run(config, workdir.root, 'generate')
    assert not workdir.synthetic.exists()


def test_images_of_an_earlier_version_have_no_share(generated):
    config, workdir = generated('run')
    recorded = files.read_json(workdir.synthetic / 'settings.json', '')
    del recorded['generate.moments_share']
    files.write_json(workdir.synthetic / 'settings.json', recorded)
    before = (workdir.synthetic / 'images.npz').read_bytes()
    pipeline.run(config, workdir.root, 'generate')
    assert (workdir.synthetic / 'images.npz').read_bytes() == before


def test_the_plan_tells_the_share_and_moments_are_then_used(quick_config, quick_model):
    config = quick_config(moments__enabled=True, moments__frequencies=4, moments__noise_multiplier=0.5)
    told = lambda: (
        plan_stage.text(config, build.plan(config, quick_model)),
        plan_stage.warnings_of(config, build.plan(config, quick_model)),
    )
    text, warnings = told()
    assert 'in place of' not in text and any('moments_steps is 0' in warning for warning in warnings)
    config.generate.moments_share = 0.3
    text, warnings = told()
    assert 'in place of 30 %, images drawn from the class moments' in text
    assert not any('moments' in warning for warning in warnings)
