"""Images without labels are one class: they go through every stage, and no word speaks of what cannot be."""

import numpy as np
import pytest

from dpp_jax import pipeline
from dpp_jax.run.folder import WorkDir


@pytest.fixture(scope='module')
def run_of_one_class(quick_config, tmp_path_factory):
    root = tmp_path_factory.mktemp('one_class')
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        images = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
        np.savez(root / f'{split}.npz', images=images, labels=np.zeros(60, np.int64))
    config = quick_config(
        data__source=f'npz:{root}',
        data__train_images=60,
        data__classes=1,
        data__class_names=('images',),
        finetune__batch_size=20,
        generate__png_tree=True,
        generate__separate_classifier_images=True,
    )
    config.generate.classifier_sampler.update(steps=2, guidance=0.5)
    pipeline.run(config, root / 'run', 'all')
    return config, WorkDir(root / 'run')


def test_every_stage_of_one_class_completes(run_of_one_class):
    _, workdir = run_of_one_class
    made = np.load(workdir.synthetic / 'images.npz')
    assert made['images'].shape == (40, 8, 8, 1) and not made['labels'].any()
    assert np.load(workdir.central_images)['images'].shape[0] == 2
    assert workdir.report_text.exists()


def test_a_run_of_one_class_goes_on(run_of_one_class, capsys):
    config, workdir = run_of_one_class
    pipeline.run(config, workdir.root, 'all')
    assert 'Everything is done' in capsys.readouterr().out
    pipeline.run(config, workdir.root, 'plan')
    told = capsys.readouterr().out
    assert '1 class\n' in told and '1 classes' not in told


def test_what_needs_classes_is_said_to_be_left_out(run_of_one_class):
    text = run_of_one_class[1].report_text.read_text()
    assert 'config.data.classes is 1' in text
    assert 'accuracy of' not in text and ' % (trained on' not in text
