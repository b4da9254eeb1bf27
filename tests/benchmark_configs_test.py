"""The benchmark suite's configs hold its settings, and run through every stage on images of their shape."""

import importlib

import numpy as np
import pytest

from dpp_jax import build, pipeline, settings
from dpp_jax.run.folder import WorkDir

SHAPES = {  # name → side, classes, expected images of a query, private images
    'cifar10_32': (32, 10, 6_000, 50_000),
    'cifar100_32': (32, 100, 12_000, 50_000),
    'eurosat_32': (32, 10, 12_000, 21_600),
    'celeba_64': (64, 2, 12_000, 182_637),
}


def config_of(name, epsilon='10'):
    return importlib.import_module(f'dpp_jax.configs.{name}').get_config(epsilon)


@pytest.mark.parametrize('name', SHAPES)
def test_the_configs_are_allowed_and_hold_the_suite_s_settings(name):
    config, (side, classes, sample, images) = config_of(name), SHAPES[name]
    settings.check(config)
    assert build.query(config).dimensions == 3 * (side // 2) ** 2
    assert (config.data.classes, config.data.train_images) == (classes, images)
    assert config.query.sampling_probability * images == pytest.approx(sample)
    assert (config.finetune.clip_norm, config.finetune.batch_size) == (0.001, 4096)
    made = build.plan(config, build.model(config)).figures()
    assert made['epsilon_total'] <= 10 and made['epsilon_query'] < 5


def stand_in(folder, side, classes):
    """A few images in each of the classes, as npz."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 4 * classes), ('test', 2 * classes)):
        images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
        np.savez(folder / f'{split}.npz', images=images, labels=np.arange(count) % classes)
    return f'npz:{folder}', 4 * classes


# cifar10_32 has the shape of eurosat_32, and the sampler of cifar100_32.
@pytest.mark.parametrize('name', [name for name in SHAPES if name != 'cifar10_32'])
def test_a_stand_in_of_each_shape_runs_one_step_of_every_stage(name, quick_config, tmp_path):
    config, (side, classes, *_) = config_of(name, '1000'), SHAPES[name]
    source, images = stand_in(tmp_path, side, classes)
    config.seed = 1
    config.dp.delta = 1e-4
    config.data.update(source=source, train_images=images)
    config.query.queries = 1
    config.model.update(
        network=quick_config().model.network, width=4, blocks=1, multipliers=(1,), attention_resolutions=()
    )
    config.pretrain.update(epochs=1, batch_size=classes)
    if name != 'eurosat_32':  # once is enough of what takes long to compile
        config.pretrain.augmentation = 'none'
    config.finetune.update(batch_size=images, epochs=1, draws=1, microbatch=2)
    config.generate.update(images=2 * classes, batch_size=25)
    config.generate.sampler.steps = config.generate.classifier_sampler.steps = 1
    config.evaluate.update(
        classifiers=('logistic',), features='cnn', epochs=1, feature_epochs=1, batch_size=8, real_images=False
    )
    pipeline.run(config, tmp_path / 'run', 'all')
    workdir = WorkDir(tmp_path / 'run')
    made = np.load(workdir.synthetic / 'images.npz')
    assert made['images'].shape == (2 * classes, side, side, 3) and len(np.unique(made['labels'])) == classes
    assert workdir.report_text.exists()
