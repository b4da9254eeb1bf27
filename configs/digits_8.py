"""scikit-learn's handwritten digits, 8x8: the whole pipeline in minutes on two cores.

    bash scripts/demo.sh

At ε = 10, δ = 1e-4, with seeds 0, 1 and 2 (tuned on seed 0 alone). Accuracy on the 360 real test images:
CNN 93.6, 93.3, 93.9 %; MLP 91.9, 91.9, 91.4 %; logistic regression 91.1, 91.9, 90.8 %. FID with features of a
small CNN: 5.8, 6.2, 6.6. Two cores take six to seven minutes with the installation, and less than four when
the compiled programs are kept.
"""

from ml_collections import ConfigDict

from dpp_jax.configs import default


def get_config(epsilon: str = '10') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'digits_8'
    config.dp.delta = 1e-4
    config.data.update(source='digits', train_images=1437, image_size=8)
    # A tenth of 1,437 images drowns in the noise: ask all of them, less often.
    config.query.update(
        noise_multiplier=4.0,
        sampling_probability=1.0,
        queries=2,
        downsample=1,
        # Error of the central images (mean squared, x 1000): 34.4 in the paper's form, 9.6 with pixels
        # centered at 0.5, 6.0 with these (scripts/query_error.py). Center and norm are public choices, made
        # on a public set.
        pixel_center=0.3,
        clip_norm=0.35 * 8,  # 0.35 sqrt(d)
        post_process=False,
    )
    config.model.update(width=16, blocks=1, attention_resolutions=(4,))
    # Color operations destroy images of 8x8 pixels; small movements do not.
    config.pretrain.update(epochs=600, batch_size=64, draws=4, learning_rate=2e-3, ema_decay=0.995)
    config.pretrain.augmentation = 'affine'
    config.finetune.update(
        batch_size=256,
        epochs=20,
        draws=4,
        learning_rate=2e-3,
        ema_decay=0.995,
    )
    config.generate.images = 5000
    config.generate.sampler = default.sampler(steps=18)
    config.evaluate.update(features='cnn', epochs=30, ema_decay=0.99)
    config.loop.checkpoint_every_seconds = 20.0
    return config
