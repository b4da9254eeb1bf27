"""MNIST 28x28 with the paper's settings.

    python -m dpp_jax.main --config=configs/mnist_28.py:1 --workdir=runs/mnist_28 --stage=all

Published with these settings (FID by Inception features / accuracy of the CNN): ε = 1: 13.7 / 95.6 %,
ε = 10: 3.4 / 98.1 %. `--config.data.source=idx:<folder>` reads the classic files instead.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import default


@default.may_use_moments
def get_config(epsilon: str = '1') -> ConfigDict:
    config = default.get_config(epsilon)
    small = default.is_small(config.dp.epsilon)
    config.generate.sampler = (
        default.sampler(s_churn=100.0, s_min=0.05)
        if small
        else default.sampler(s_churn=50.0, s_min=0.05, guidance=0.25)
    )
    config.generate.separate_classifier_images = True
    config.generate.classifier_sampler = default.sampler(s_churn=10.0, s_min=0.1 if small else 0.025)
    return config
