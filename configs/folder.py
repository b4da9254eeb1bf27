"""Your own images: name them and ε, and everything else follows from them.

    dpp-jax --config=folder:8 --config.data.source=folder:/data/scans --workdir=runs/scans --stage=plan
    dpp-jax --config=folder:8 --config.data.source=folder:/data/scans --workdir=runs/scans

Settings that are unset here get their values when a run begins, from the headers of the images and from each
other: `dpp_jax/derive.py` has a rule for each. `--stage=plan` prints every value with its reason. Set any of
them yourself: `--config.finetune.epochs=10`. Any kind of source will do: folder:, zip:, npz:, idx:, tfds:.

What the rules read from the private images (how many there are, their size, the names of the classes) is
public by declaration: the privacy statement says so. To keep it secret, set it yourself.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dpp_jax.configs import default

# Whole numbers, fractions, texts and so on that a rule decides.
_DERIVED = {
    'dp.delta': float,
    'data.train_images': int,
    'data.image_size': int,
    'data.channels': int,
    'data.classes': int,
    'data.class_names': tuple,
    'data.average_down': int,
    'query.kind': str,
    'query.noise_multiplier': float,
    'query.sampling_probability': float,
    'query.queries': int,
    'query.downsample': int,
    'query.pixel_center': float,
    'query.class_counts': str,
    'query.post_process': bool,
    'model.width': int,
    'model.multipliers': tuple,
    'model.blocks': int,
    'model.attention_resolutions': tuple,
    'pretrain.batch_size': int,
    'pretrain.epochs': int,
    'pretrain.draws': int,
    'pretrain.learning_rate': float,
    'pretrain.ema_decay': float,
    'pretrain.augmentation': str,
    'pretrain.rand_augment.magnitude': int,
    'pretrain.affine.shift': float,
    'finetune.batch_size': int,
    'finetune.epochs': float,
    'finetune.draws': int,
    'finetune.learning_rate': float,
    'finetune.ema_decay': float,
    'generate.images': int,
    'generate.sampler.steps': int,
    'evaluate.epochs': int,
    'evaluate.ema_decay': float,
}


def get_config(epsilon: str = '8') -> ConfigDict:
    config = default.get_config(epsilon)
    config.name = 'folder'
    config.data.source = placeholder(str)
    config.data.fit = 'crop'
    for name, kind in _DERIVED.items():
        *sections, last = name.split('.')
        section = config
        for part in sections:
            section = section[part]
        section[last] = placeholder(kind)
    return config
