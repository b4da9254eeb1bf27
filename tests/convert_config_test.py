"""Configs of the PyTorch implementation mean here what they mean there."""

import importlib

import pytest
import yaml

from dpp_jax import command_line, settings
from dpp_jax.configs import default
from dpp_jax.run.folder import flatten
from scripts import convert_config

# The published settings of MNIST at ε = 1, in the words of the PyTorch implementation.
TRAIN = """
setup: {runner: train_dpdm_base, n_gpus_per_node: 3, omp_n_threads: 64}
data: {path: data_dir, name: mnist_28, num_channels: 1, resolution: 28, n_classes: 10, one_hot: false}
model:
  ckpt: there.pth
  denoiser_name: edm
  denoiser_network: song
  ema_rate: .999
  network: {image_size: 28, attn_resolutions: [14], ch_mult: [2, 2]}
optim: {optimizer: Adam, params: {lr: 3e-4, weight_decay: 0.}}
sampler: {type: ddim, num_steps: 50}
sampler_fid: {type: edm, s_churn: 100, s_min: 0.05, num_steps: 1000, tmin: .002, tmax: 80.}
sampler_acc: {type: edm, s_churn: 10, s_min: 0.1, num_steps: 1000, labels: 10, sample_num: 60000}
train: {seed: 0, batch_size: 4096, n_epochs: 150, log_freq: 100, final_fid_samples: 60000}
loss: {version: edm, p_mean: -1.2, p_std: 1.2, n_noise_samples: 32, n_classes: 10}
dp: {sdq: true, privacy_history: [[5, 0.1, 5]], max_grad_norm: 1.0, delta: 1e-5, epsilon: 1., n_splits: 32}
"""
PRETRAIN = """
data: {name: pretrain_mean_mnist, num_channels: 1, resolution: 28, aug: {magnitude: 3, num_ops: 2}}
optim: {optimizer: Adam, params: {lr: 3e-4}}
sampler_fid: {type: ddim, num_steps: 50}
train: {batch_size: 64, n_epochs: 2000}
loss: {version: edm, n_noise_samples: 1}
dp: {epsilon: infinite}
"""
# And those of the benchmark, which has both trainings in one file.
BENCHMARK = """
setup: {method: dpsgd-diffusion}
public_data: {name: null, central: {batch_size: 6000, sigma: 5, sample_num: 5}}
sensitive_data: {name: cifar10, num_channels: 3, resolution: 32, n_classes: 10, train_path: here.zip}
model: {network: {ch_mult: [2, 4], attn_resolutions: [16]}, sampler_fid: {type: ddim, num_steps: 250}}
pretrain: {batch_size: 50, n_epochs: 2000, mode: time, loss: {n_noise_samples: 1}}
train: {batch_size: 4096, n_epochs: 150, loss: {n_noise_samples: 32}, dp: {max_grad_norm: 0.001, epsilon: 9}}
gen: {data_num: 60000}
"""


def read(*texts):
    return [yaml.safe_load(text) for text in texts]


@pytest.mark.parametrize('texts', [(TRAIN, PRETRAIN), (PRETRAIN, TRAIN)])
def test_the_published_settings_are_those_of_the_shipped_config(texts):
    converted = convert_config.convert(*read(*texts))
    assert not converted.unknown and not converted.differing
    there = flatten(default.get_config('1').to_dict()) | converted.settings
    here = flatten(importlib.import_module('dpp_jax.configs.mnist_28').get_config('1').to_dict())
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in there.items()} == here


def test_the_benchmarks_dialect_says_the_same_things():
    converted = convert_config.convert(*read(BENCHMARK))
    assert not converted.unknown and not converted.differing
    expected = {
        'query.noise_multiplier': 5.0, 'query.sampling_probability': 0.12, 'query.queries': 5,
        'pretrain.batch_size': 50, 'pretrain.epochs': 2000, 'pretrain.draws': 1,
        'finetune.batch_size': 4096, 'finetune.epochs': 150.0, 'finetune.draws': 32,
        'finetune.clip_norm': 0.001,
        'data.channels': 3, 'model.multipliers': (2, 4), 'generate.sampler.steps': 250, 'dp.epsilon': 9.0,
    }  # fmt: skip
    assert expected.items() <= converted.settings.items()


def test_unknown_keys_and_values_that_are_not_offered_are_named(tmp_path, capsys):
    path = tmp_path / 'theirs.yaml'
    path.write_text(TRAIN + 'surprise: {depth: 3}\n', encoding='utf-8')
    assert convert_config.main([str(path)]) == 1
    assert 'unknown keys: surprise.depth' in capsys.readouterr().err
    path.write_text(TRAIN.replace('p_mean: -1.2', 'p_mean: -2'), encoding='utf-8')
    assert convert_config.main([str(path)]) == 0
    told = capsys.readouterr()
    assert 'loss.p_mean is -2; here it is always -1.2' in told.err and 'loss.p_mean is -2' in told.out


@pytest.mark.parametrize(
    'text, reason',
    [
        (TRAIN.replace('denoiser_name: edm', 'denoiser_name: mine'), 'model.denoiser'),
        (TRAIN.replace('[[5, 0.1, 5]]', '[5]'), 'dp.privacy_history is [5]'),
        (TRAIN.replace('batch_size: 4096', 'batch_size: many'), 'finetune.batch_size'),
        ('just a text', 'no sections'),
        ('a: [', 'convert_config'),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(tmp_path, capsys, text, reason):
    path = tmp_path / 'theirs.yaml'
    path.write_text(text, encoding='utf-8')
    assert convert_config.main([str(path)]) == 2
    told = capsys.readouterr()
    assert reason in told.err and not told.out


def test_a_number_of_images_that_no_file_tells_is_asked_for():
    text = BENCHMARK.replace('name: cifar10', 'name: celeba_male_32')
    asked = convert_config.convert(*read(text))
    assert 'give it by --images' in asked.differing[0] and 'query.sampling_probability' not in asked.settings
    told = convert_config.convert(*read(text), images=162_770)
    assert told.settings['query.sampling_probability'] == pytest.approx(6000 / 162_770, abs=1e-6)
    assert told.settings['data.train_images'] == 162_770


def test_the_printed_file_is_a_config_that_the_program_takes(tmp_path, capsys):
    theirs = tmp_path / 'theirs.yaml'
    theirs.write_text(TRAIN, encoding='utf-8')
    assert convert_config.main([str(theirs)]) == 0
    ours = tmp_path / 'ours.py'
    ours.write_text(capsys.readouterr().out, encoding='utf-8')
    assert command_line.find_config(f'{ours}:1') == f'{ours}:1'
    spec = importlib.util.spec_from_file_location('ours', ours)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config('1')
    settings.check(config)
    assert config.generate.sampler.s_churn == 100.0 and config.data.source == 'tfds:mnist'
