"""Fashion-MNIST 28x28 with the paper's settings.

    python -m dpp_jax.main --config=configs/fmnist_28.py:1 --workdir=runs/fmnist_28 --stage=all

Published with these settings (FID by Inception features / accuracy of the CNN): ε = 1: 31.4 / 81.7 %,
ε = 10: 13.2 / 87.3 %.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import default


@default.may_use_moments
def get_config(epsilon: str = '1') -> ConfigDict:
    config = default.get_config(epsilon)
    small = default.is_small(config.dp.epsilon)
    config.name = 'fmnist_28'
    config.data.source = 'tfds:fashion_mnist'
    config.generate.sampler = (
        default.sampler(s_churn=50.0, s_min=0.025, guidance=1.0)
        if small
        else default.sampler(s_churn=25.0, s_min=0.2, guidance=0.25)
    )
    config.generate.separate_classifier_images = True
    config.generate.classifier_sampler = default.sampler(s_churn=10.0, s_min=0.025 if small else 0.1)
    return config
