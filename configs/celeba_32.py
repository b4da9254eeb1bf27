"""CelebA 32x32, male / female, with the paper's settings.

    python -m dpp_jax.main --config=configs/celeba_32.py:1 --workdir=runs/celeba_32 --stage=all

Expects data/celeba_32/train.npz (train and validation images of CelebA, 182,637, cropped and resized
to 32x32) and test.npz, each with `images` (uint8 NHWC) and `labels` (0 or 1).
Published with these settings (FID by Inception features / accuracy of the CNN): ε = 1: 60.2 / 82.3 %,
ε = 10: 24.8 / 94.2 %.

The unit of privacy is one image. A person with k images has k ε and a larger δ; most people in CelebA have
about 20. For all images of a person as the unit, name the identities in data.groups (docs/privacy.md).
"""

from ml_collections import ConfigDict

from dpp_jax.configs import default


@default.may_use_moments
def get_config(epsilon: str = '1') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'celeba_32'
    config.data.update(source='npz:data/celeba_32', train_images=182637, image_size=32, channels=3, classes=2)
    config.dp.delta = 1e-6
    config.query.update(noise_multiplier=10.0, sampling_probability=0.0657, queries=250, bins=16)
    config.model.attention_resolutions = (16,)
    config.pretrain.epochs = 300
    config.pretrain.rand_augment.magnitude = 9
    config.finetune.batch_size = 2048
    config.generate.sampler = default.sampler(s_churn=50.0, s_min=0.005)
    config.generate.separate_classifier_images = True
    config.generate.classifier_sampler = default.sampler('ddim')
    return config
