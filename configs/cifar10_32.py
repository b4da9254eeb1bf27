"""CIFAR-10 32x32 with the settings of a benchmark suite for this method.

    dpp-jax --config=cifar10_32:10 --workdir=runs/cifar10_32

Published there (accuracy / FID by Inception features): ε = 10: 43.3 % / 95.3. This repository has no results
of its own.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import default


@default.may_use_moments
def get_config(epsilon: str = '10') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'cifar10_32'
    config.data.update(source='tfds:cifar10', train_images=50000, image_size=32, channels=3)
    # 6,000 images are expected in each query.
    config.query.update(noise_multiplier=5.0, sampling_probability=6000 / 50000, queries=5)
    suite(config)
    config.generate.sampler = default.sampler('ddim', steps=250)
    return config


def suite(config: ConfigDict) -> None:
    """Set what the benchmark suite has for all of its sets of 32x32."""
    config.model.update(multipliers=(2, 4), attention_resolutions=(16,))
    config.pretrain.update(epochs=2000, batch_size=50)
    config.pretrain.rand_augment.magnitude = 9
    # So small that every gradient is clipped: with Adam, only its direction counts.
    config.finetune.update(batch_size=4096, epochs=150, clip_norm=0.001)
