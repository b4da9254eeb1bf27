"""CelebA 64x64, male / female, with the settings of a benchmark suite for this method.

    dpp-jax --config=celeba_64:10 --workdir=runs/celeba_64

Expects data/celeba_64/train.npz (train and validation images of CelebA, 182,637, cropped and resized to
64x64) and test.npz, each with `images` (uint8 NHWC) and `labels` (0 or 1). Nothing is published with these
settings. With tensorflow-datasets: `--config.data.source=tfds:celeb_a --config.data.label_key=attributes/Male
--config.data.validation=train --config.data.fit=crop`. As in celeba_32, the unit of privacy is one image.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import cifar10_32, default


@default.may_use_moments
def get_config(epsilon: str = '10') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'celeba_64'
    config.data.update(source='npz:data/celeba_64', train_images=182637, image_size=64, channels=3, classes=2)
    config.dp.delta = 1e-6
    config.query.update(noise_multiplier=10.0, sampling_probability=12000 / 182637, queries=250)
    cifar10_32.suite(config)
    config.model.update(multipliers=(1, 2, 4), attention_resolutions=(32, 16))
    config.pretrain.epochs = 1000
    config.finetune.update(epochs=50, draws=4)
    config.generate.sampler = default.sampler('ddim', steps=250)
    return config
