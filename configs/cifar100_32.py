"""CIFAR-100 32x32 with the settings of a benchmark suite for this method.

    dpp-jax --config=cifar100_32:10 --workdir=runs/cifar100_32

500 images per class are few: `--stage=plan` tells how noisy their central images are. Nothing is published
with these settings.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import cifar10_32, default


@default.may_use_moments
def get_config(epsilon: str = '10') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'cifar100_32'
    config.data.update(source='tfds:cifar100', train_images=50000, image_size=32, channels=3, classes=100)
    config.query.update(noise_multiplier=5.0, sampling_probability=12000 / 50000, queries=1)
    cifar10_32.suite(config)
    config.generate.sampler = default.sampler('ddim', steps=250)
    return config
