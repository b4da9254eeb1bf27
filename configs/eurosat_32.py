"""EuroSAT (satellite images of ten kinds of land) at 32x32 with the settings of a benchmark suite.

    dpp-jax --config=eurosat_32:10 --workdir=runs/eurosat_32

Expects data/eurosat_32/train.npz (21,600 of the 27,000 images, averaged down from 64x64) and test.npz, each
with `images` (uint8 NHWC) and `labels` (0 to 9). The folder of the images will do as well:
`--config.data.source=folder:<path> --config.data.fit=crop --config.data.test_share=0.2`; say how many private
images `--stage=plan` finds by `--config.data.train_images`. Nothing is published with these settings.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import cifar10_32, default


@default.may_use_moments
def get_config(epsilon: str = '10') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'eurosat_32'
    config.data.update(source='npz:data/eurosat_32', train_images=21600, image_size=32, channels=3)
    config.query.update(noise_multiplier=5.0, sampling_probability=12000 / 21600, queries=1)
    cifar10_32.suite(config)
    config.pretrain.batch_size = 10
    config.generate.sampler = default.sampler(steps=250, s_churn=100.0, s_min=0.05)
    config.generate.separate_classifier_images = True
    config.generate.classifier_sampler = default.sampler(steps=250, s_churn=10.0, s_min=0.1)
    return config
