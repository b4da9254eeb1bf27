"""Camelyon17 (WILDS) tissue patches 32x32, tumor or not, with the paper's settings.

    python -m dpp_jax.main --config=configs/camelyon_32.py:1 --workdir=runs/camelyon_32 --stage=all

Expects data/camelyon_32/train.npz (302,436 images) and test.npz, each with `images` (uint8 NHWC) and
`labels` (0 or 1). Published with these settings (FID by Inception features / accuracy of the CNN):
ε = 1: 52.8 / 77.3 %, ε = 10: 27.8 / 82.9 %.

The unit of privacy is one image, a patch. A patient has thousands, and ε for each of them. For all used
patches of a patient as the unit, name the patients in data.groups (docs/privacy.md).
"""

from ml_collections import ConfigDict

from dpp_jax.configs import default


@default.may_use_moments
def get_config(epsilon: str = '1') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'camelyon_32'
    config.data.update(
        source='npz:data/camelyon_32', train_images=302436, image_size=32, channels=3, classes=2
    )
    config.dp.delta = 1e-6
    config.query.update(noise_multiplier=10.0, sampling_probability=0.04, queries=250, bins=16)
    config.model.update(multipliers=(1, 2, 2), attention_resolutions=(16,))
    config.pretrain.epochs = 300
    config.pretrain.rand_augment.magnitude = 9
    config.finetune.update(batch_size=2048, epochs=20)
    config.generate.sampler = (
        default.sampler('ddim', steps=50)
        if default.is_small(config.dp.epsilon)
        else default.sampler(s_churn=50.0, s_min=0.005)
    )
    config.generate.separate_classifier_images = True
    config.generate.classifier_sampler = default.sampler('ddim', steps=50)
    config.evaluate.learning_rate = 1e-4
    return config
