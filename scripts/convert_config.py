"""Turn a YAML config of the PyTorch implementation, or of DPImageBench, into a config of this project.

    python -m scripts.convert_config configs/mnist_28/train_eps_1.0.yaml [pretrain.yaml] > my_mnist.py
    dpp-jax --config=my_mnist.py:1 --workdir=runs/mnist --stage=plan

Several files of one run (`pretrain` and `train`) are joined. What they say of this project's settings is
printed as a Python file. Keys without a counterpart are named in its comments with the reason; unknown keys
are named on the terminal, and the exit status is 1. Every key is in docs/from_pytorch.md.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import dataclasses
from pathlib import Path
import sys
from typing import Any

import yaml

from dpp_jax.configs import default

# How their names of sets begin → how such a set is read here, and N, as the paper and the benchmark count.
# Of other sets no N is known: the benchmark chose its own parts of them.
_SETS: dict[str, tuple[dict[str, Any], int | None]] = {
    'mnist': ({'data.source': 'tfds:mnist'}, 60_000),
    'fmnist': ({'data.source': 'tfds:fashion_mnist'}, 60_000),
    'cifar100': ({'data.source': 'tfds:cifar100'}, 50_000),
    'cifar10': ({'data.source': 'tfds:cifar10'}, 50_000),
    'celeba_male': (
        {'data.source': 'tfds:celeb_a', 'data.label_key': 'attributes/Male', 'data.fit': 'crop'},
        None,
    ),
    'celeba': ({'data.source': 'npz:data/celeba_32'}, 182_637),
    'camelyon': ({'data.source': 'npz:data/camelyon_32'}, 302_436),
    'eurosat': ({'data.source': 'tfds:eurosat', 'data.fit': 'crop'}, None),
}
_DENOISERS = {'edm': 'edm', 'v': 'v', 'vesde': 've', 'vpsde': 'vp'}
_SAMPLERS = {'ddim': 'ddim', 'edm': 'heun'}
# A key that has no counterpart → why.
_WITHOUT = {
    'setup': 'processes are found by --distributed; threads by JAX',
    'data.dataloader_params': 'images are in memory, or read when a batch needs them',
    'data.fid_stats': 'FID statistics are computed by --stage=evaluate, and kept in private/',
    'data.one_hot': 'labels are numbers',
    'data.dataset_params': 'labels are always used',
    'data.attr': 'the label is chosen by data.label_key',
    'data.specific_class': 'not offered',
    'data.img_num': 'not offered',
    'data.split': 'the private images are the split train',
    'data.test_path': 'a source has both splits',
    'data.aug.random': 'RandAugment is pretrain.augmentation',
    'model.network.label_dim': 'follows from data.classes',
    'model.network.num_in_channels': 'follows from data.channels',
    'model.network.num_out_channels': 'follows from data.channels',
    'model.network.image_size': 'follows from data.image_size',
    'model.ckpt': 'config.import.path, with config.import.kind, which says what it was trained on',
    'model.private_num_classes': 'follows from data.classes',
    'sampler': 'its samples are pictures during training',
    'train.seed': 'seeds make a run repeatable, and so not private',
    'train.log_freq': 'loop.log_every_steps changes no result',
    'train.gen': '--stage=generate',
    'train.nocond2cond': 'pre-training has labels',
    'train.partly_finetune': 'all weights are trained',
    'train.gen_batch_size': 'generate.batch_size is per device, and changes no result',
    'train.log_dir': '--workdir',
    'loss.min_sigma': 'not offered; 0 in all published configs',
    'loss.n_classes': 'follows from data.classes',
    'dp.alpha_num': 'not offered; 0 in all published configs',
    'dp.sdq': 'Poisson sampling, always',
    'dp.max_physical_batch_size': 'finetune.microbatch is chosen by the machine, and changes no result',
    'dp.n_splits': 'as dp.max_physical_batch_size',
    'n_splits': 'as dp.max_physical_batch_size',
    'gen.batch_size': 'as train.gen_batch_size',
    'gen.log_dir': '--workdir',
    'pretrain.log_dir': '--workdir',
    'eval.batch_size': 'changes no result',
    'eval.mode': "evaluate.selection; here 'synthetic' is the rule",
    'public_data': 'there are no public images',
    'model.public_num_classes': 'there are no public images',
    'optim.weight_decay': 'Adam without weight decay; 0 in all published configs',
    'sampler_fid.stochastic': 'follows from s_churn',
    **{f'train.{name}_{what}': 'pictures, checkpoints and FIDs during training are not settings here'
       for name in ('snapshot', 'save', 'fid') for what in ('freq', 'threshold')},
    'train.fid_samples': 'as train.fid_freq',
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What a config of theirs says.

    Attributes:
        settings: name here ('finetune.draws') → value.
        without: their key → why it has no counterpart.
        unknown: their keys that no published config has.
        differing: lines on values that are not offered here.
    """

    settings: dict[str, Any]
    without: dict[str, str]
    unknown: list[str]
    differing: list[str]


def convert(*configs: Mapping[str, Any], images: int | None = None) -> Converted:
    """Convert the configs of one run.

    Args:
        configs: nested, as YAML gives them: `train`, and `pretrain` if there is one, in any order.
        images: N, the number of private images, where the name of the set does not tell it.

    Raises:
        ValueError: a value is not of its kind.
    """
    found = Converted(settings={}, without={}, unknown=[], differing=[])
    for config in configs:
        entries = dict(_flat(_as_one_dialect(config)))
        for key, value in entries.items():
            _convert_one(found, key, _number(value))
    _read_query(found, images)
    return found


def _flat(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


def _number(value: Any) -> Any:
    """Return the number that a text is: YAML 1.1 reads 3e-4 as a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_one_dialect(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rename sections: DPImageBench's and those of a pre-training to those of a training.

    In the original, each file has one training, in sections of its own; a pre-training is told by its ε,
    'infinite'. The benchmark has both trainings in one file.
    """
    config = dict(config)
    if 'sensitive_data' in config:
        config['data'] = config.pop('sensitive_data')
        model = dict(config.get('model', {}))
        samplers = {name: model.pop(name) for name in list(model) if name.startswith('sampler')}
        train = dict(config.get('train', {}))
        for name in ('optim', 'loss', 'dp', 'n_splits'):
            if name in train:
                config[name] = train.pop(name)
        return {**config, 'model': model, 'train': train, **samplers}
    if str(config.get('dp', {}).get('epsilon')) == 'infinite':
        own = {name: config[name] for name in ('optim', 'loss') if name in config}
        pretrain = {**config.get('train', {}), **own}
        # Its set is that of the central images, and its samplers make pictures.
        others = config.keys() - own.keys() - {'train', 'dp', 'sampler', 'sampler_fid'}
        rest = {name: config[name] for name in others}
        data = {name: value for name, value in rest.get('data', {}).items() if name not in ('name', 'path')}
        return {**rest, 'data': data, 'pretrain': pretrain}
    return config


def _convert_one(found: Converted, key: str, value: Any) -> None:
    """Take one of their keys into `found`."""
    key = key.replace('optim.params.', 'optim.')
    in_training = key.removeprefix('pretrain.') if key.startswith('pretrain.') else None
    if key in _KEYS:
        _KEYS[key](found, value)
    elif name := _without(key) or (in_training and _without(_of_training(in_training))):
        found.without[name] = _WITHOUT[name]
    else:
        found.unknown.append(key)


def _of_training(key: str) -> str:
    """Name a key of the section `pretrain` as a training has it."""
    return key if key.startswith(('optim.', 'loss.')) else f'train.{key}'


def _without(key: str) -> str | None:
    """Return the name, its own or that of a section, under which a key is known to have no counterpart."""
    parts = key.split('.')
    names = ['.'.join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in _WITHOUT), None)


# ---- what a key does ----------------------------------------------------------------------------

_Action = Callable[[Converted, Any], None]


def _to(name: str, kind: Callable[[Any], Any] = lambda value: value) -> _Action:
    """Set a setting of this project to the value."""

    def act(found: Converted, value: Any) -> None:
        try:
            found.settings[name] = kind(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{name} would be {value!r}: {error}') from error

    return act


def _only(key: str, *allowed: Any) -> _Action:
    """Take a value that is the only one here; note others."""

    def act(found: Converted, value: Any) -> None:
        if value not in allowed:
            found.differing.append(f'{key} is {value!r}; here it is always {allowed[0]!r}')

    return act


def _named(name: str, known: Mapping[str, str]) -> _Action:
    """Translate a name."""

    def act(found: Converted, value: Any) -> None:
        if value not in known:
            raise ValueError(f'{name} would be {value!r}; it must be one of {", ".join(known)}')
        found.settings[name] = known[value]

    return act


def _set_of_images(found: Converted, value: Any) -> None:
    """Tell source and N by the name of a set."""
    if value is None:
        return
    known = next((known for name, known in _SETS.items() if str(value).startswith(name)), None)
    if known is None:
        found.differing.append(f'the set {value!r} is not known here: set data.source')
        return
    found.settings.update(known[0])
    found.settings['data.train_images'] = known[1]


def _history(found: Converted, value: Any) -> None:
    """Read the query from the accountant's history: [[σ, q, count]]."""
    if value is None:
        return
    try:
        ((sigma, q, count),) = value
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'dp.privacy_history is {value!r}; it must be [[σ, q, number of queries]]'
        ) from error
    found.settings.update(
        {
            'query.noise_multiplier': float(sigma),
            'query.sampling_probability': float(q),
            'query.queries': int(count),
        }
    )


def _central_batch(found: Converted, value: Any) -> None:
    found.settings['query.sampling_probability'] = ('of', int(value))  # until N is known


def _read_query(found: Converted, images: int | None) -> None:
    """Turn an expected number of sampled images into q."""
    q = found.settings.get('query.sampling_probability')
    total = images or found.settings.get('data.train_images')
    if images:
        found.settings['data.train_images'] = images
    if isinstance(q, tuple):
        if total is None:
            del found.settings['query.sampling_probability']
            found.differing.append(
                f'query.sampling_probability is {q[1]:,} / N, and no file tells N: give it by --images'
            )
        else:
            found.settings['query.sampling_probability'] = round(q[1] / total, 6)


def _training(section: str, theirs: str) -> dict[str, _Action]:
    """Return the keys of one training: ours is `section`, `theirs` begins their names."""
    loss, optim = (f'{theirs}.' if theirs == 'pretrain' else '' for _ in range(2))
    epochs = float if section == 'finetune' else int
    return {
        f'{theirs}.batch_size': _to(f'{section}.batch_size', int),
        f'{theirs}.n_epochs': _to(f'{section}.epochs', epochs),
        f'{loss}loss.n_noise_samples': _to(f'{section}.draws', int),
        f'{loss}loss.version': _only('loss.version', 'edm'),
        f'{loss}loss.p_mean': _only('loss.p_mean', -1.2),
        f'{loss}loss.p_std': _only('loss.p_std', 1.2),
        f'{optim}optim.lr': _to(f'{section}.learning_rate', float),
        f'{optim}optim.optimizer': _only('optim.optimizer', 'Adam'),
    }


def _sampler(theirs: str, ours: str) -> dict[str, _Action]:
    """Return the keys of one sampler."""
    return {
        f'{theirs}.type': _named(f'{ours}.name', _SAMPLERS),
        f'{theirs}.num_steps': _to(f'{ours}.steps', int),
        f'{theirs}.tmin': _to(f'{ours}.t_min', float),
        f'{theirs}.tmax': _to(f'{ours}.t_max', float),
        f'{theirs}.rho': _to(f'{ours}.rho', float),
        f'{theirs}.guid_scale': _to(f'{ours}.guidance', float),
        f'{theirs}.s_churn': _to(f'{ours}.s_churn', float),
        f'{theirs}.s_min': _to(f'{ours}.s_min', float),
        f'{theirs}.s_max': _to(f'{ours}.s_max', float),
        f'{theirs}.s_noise': _to(f'{ours}.s_noise', float),
        f'{theirs}.stochastic': _only(f'{theirs}.stochastic', False),
        f'{theirs}.labels': lambda found, value: None,  # as many as there are classes
        f'{theirs}.batch_size': lambda found, value: None,  # changes no result
    }


def _both_ema(found: Converted, value: Any) -> None:
    found.settings['pretrain.ema_decay'] = found.settings['finetune.ema_decay'] = float(value)


def _own_sampler(found: Converted, value: Any) -> None:
    found.settings['generate.classifier_sampler.name'] = _SAMPLERS[value]
    found.settings['generate.separate_classifier_images'] = True


_KEYS: dict[str, _Action] = {
    'data.name': _set_of_images,
    'data.path': lambda found, value: None,  # a folder of theirs
    'data.train_path': lambda found, value: None,
    'data.num_channels': _to('data.channels', int),
    'data.resolution': _to('data.image_size', int),
    'data.n_classes': _to('data.classes', int),
    'data.aug.magnitude': _to('pretrain.rand_augment.magnitude', int),
    'data.aug.num_ops': _to('pretrain.rand_augment.operations', int),
    'model.denoiser_name': _named('model.denoiser', _DENOISERS),
    'model.denoiser_network': _only('model.denoiser_network', 'song'),
    'model.ema_rate': _both_ema,
    'model.network.attn_resolutions': _to('model.attention_resolutions', tuple),
    'model.network.ch_mult': _to('model.multipliers', tuple),
    'model.network.num_res_blocks': _to('model.blocks', int),
    'model.network.nf': _to('model.width', int),
    **_training('finetune', 'train'),
    **_training('pretrain', 'pretrain'),
    **_sampler('sampler_fid', 'generate.sampler'),
    **_sampler('sampler_acc', 'generate.classifier_sampler'),
    'sampler_acc.type': _own_sampler,
    'train.final_fid_samples': _to('generate.images', int),
    'sampler_acc.sample_num': _to('generate.images', int),
    'gen.data_num': _to('generate.images', int),
    'pretrain.final_fid_samples': lambda found, value: None,
    # The benchmark's pre-training on central images has settings of its own, which rule.
    'pretrain.n_epochs_time': _to('pretrain.epochs', int),
    'pretrain.batch_size_time': _to('pretrain.batch_size', int),
    'pretrain.cond': _only('pretrain.cond', True),
    'pretrain.mode': _only('pretrain.mode', 'time'),
    'public_data.central.sigma': _to('query.noise_multiplier', float),
    'public_data.central.sample_num': _to('query.queries', int),
    'public_data.central.batch_size': _central_batch,
    'dp.epsilon': _to('dp.epsilon', float),
    'dp.delta': _to('dp.delta', float),
    'dp.max_grad_norm': _to('finetune.clip_norm', float),
    'dp.privacy_history': _history,
}


# ---- the file -----------------------------------------------------------------------------------


def python_file(converted: Converted, title: str) -> str:
    """Write the config as a Python file."""
    epsilon = converted.settings.get('dp.epsilon', 1.0)
    settings = {name: value for name, value in converted.settings.items() if value != _default(name)}
    settings.pop('dp.epsilon', None)
    lines = [
        f'"""{title}, converted from its YAML.',
        '',
        f'    dpp-jax --config=<this file>:{epsilon:g} --workdir=runs/mine --stage=plan',
        '',
        *([f'Not as there: {line}.' for line in converted.differing] + [''] if converted.differing else []),
        'Keys without a counterpart:',
        *(f'    {key}: {reason}' for key, reason in sorted(converted.without.items())),
        'Settings that are not here are those of configs/default.py.',
        '"""',
        '',
        'from dpp_jax.configs import default',
        '',
        '',
        f"def get_config(epsilon: str = '{epsilon:g}'):",
        '    config = default.get_config(epsilon)',
        f'    config.name = {title!r}',
        *(f'    config.{name} = {value!r}' for name, value in sorted(settings.items())),
        '    return config',
    ]
    return '\n'.join(lines) + '\n'


def _default(name: str) -> Any:
    """Return the value of a setting in configs/default.py."""
    value = default.get_config('0')
    for part in name.split('.'):
        value = value[part]
    return value


def main(arguments: list[str] | None = None) -> int:
    """Print the converted config; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('yaml', nargs='+', type=Path, help='one file, or those of both trainings')
    parser.add_argument('--images', type=int, help='N, where the name of the set does not tell it')
    options = parser.parse_args(arguments)
    try:
        read = [yaml.safe_load(path.read_text(encoding='utf-8')) for path in options.yaml]
        if not all(isinstance(config, dict) for config in read):
            raise ValueError('a file holds no sections')
        converted = convert(*read, images=options.images)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f'convert_config: {error}', file=sys.stderr)
        return 2
    print(python_file(converted, options.yaml[0].stem), end='')
    for line in converted.differing:
        print(f'convert_config: {line}', file=sys.stderr)
    if converted.unknown:
        print(f'convert_config: unknown keys: {", ".join(converted.unknown)}', file=sys.stderr)
    return 1 if converted.unknown else 0


if __name__ == '__main__':
    sys.exit(main())
