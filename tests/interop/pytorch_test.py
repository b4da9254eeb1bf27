"""Agreement with the PyTorch implementation, array by array, with its weights mapped to ours.

Run with -s to see the errors. Tests skip where their file of reference values is not at hand
(tests/golden/README.md).
"""

import argparse
import dataclasses
import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.diffusion import denoiser, sampler, unet
from dpp_jax.diffusion.model import Model
from dpp_jax.interop import pytorch
from dpp_jax.privacy import clipping

# name of the file: image channels, classes, size, attention at
FILES = {'mnist_28_nf16': (1, 10, 28, 14), 'rgb_32_nf16': (3, 2, 32, 16)}

# Each program runs only a few times: compiling it well would take longer than all its runs.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make_model(size, channels, classes, multipliers, blocks, attention_resolutions, width):
    """A model with such a network."""
    network = unet.UNet(channels, classes, width, multipliers, blocks, attention_resolutions)
    kind = denoiser.make_kind('edm')
    return Model(network=network, image_shape=(size, size, channels), classes=classes, kind=kind)


@dataclasses.dataclass
class Golden:
    """A reference file in our layout, and our model with its weights."""

    data: dict
    model: Model
    params: dict

    def apply(self, x, c_noise, label):
        return self.model.network.apply({'params': self.params}, x, c_noise, label)

    @functools.cached_property
    def forward(self):
        """`apply`, compiled as in production."""
        return jax.jit(self.apply)

    def __getitem__(self, key):
        """Images as NHWC, the rest as it is."""
        array = self.data[key]
        return np.moveaxis(array, -3, -1) if array.ndim >= 4 else array


def make_golden(name, path):
    channels, classes, size, attention = FILES[name]
    model = make_model(size, channels, classes, (2, 2), 2, (attention,), width=16)
    with np.load(path) as file:
        data = {key: file[key] for key in file}
    named = {key.removeprefix('param/'): array for key, array in data.items() if key.startswith('param/')}
    return Golden(data, model, pytorch.params_from_pytorch(named, model))


@pytest.fixture(scope='module', params=FILES)
def golden(request, golden_file):
    return make_golden(request.param, golden_file(f'{request.param}.npz'))


def check(name, got, expected, tolerance):
    error = np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)
    print(f'{name}: relative error {error:.1e}')
    assert error < tolerance


def test_network(golden):
    output = golden.forward(golden['net_in_x'], golden['net_in_t'], golden['y'])
    check('net_out', output, golden['net_out'], 1e-4)


@pytest.mark.parametrize('kind, name', [('edm', 'D_edm'), ('vp', 'D_vpsde'), ('ve', 'D_vesde'), ('v', 'D_v')])
def test_denoisers(golden, kind, name):
    denoise = denoiser.make_kind(kind).denoiser(golden.forward)
    check(name, denoise(golden['noisy'], golden['sigma'], golden['y']), golden[name], 1e-4)


SIGMAS = sampler.sigma_steps(8)


def test_ddim(golden):
    denoise = golden.model.denoiser(golden.params)
    for name, guidance in (('ddim_8', 0.0), ('ddim_8_cfg1.5', 1.5)):
        guided = sampler.guided(denoise, guidance, golden.model.classes)
        images = quick_jit(lambda z, y: sampler.ddim(guided, z, y, sigmas=SIGMAS))(
            golden['z'], golden['y_sample']
        )
        check(name, images, golden[name], 1e-3)


def test_heun(golden):
    denoise = golden.model.denoiser(golden.params)
    # The reference drew noise only in the steps with churn: σ in [0.05, 50].
    drawn = jnp.asarray(golden['edm_churn_8_noise'])
    row = jnp.asarray(np.cumsum((SIGMAS >= 0.05) & (SIGMAS <= 50)) - 1)

    @quick_jit
    def sample(z, y, s_min):
        churn = sampler.Churn(s_churn=4.0, s_min=s_min, s_max=50.0)
        return sampler.heun(denoise, z, y, sigmas=SIGMAS, noise=lambda i: drawn[row[i]], churn=churn)

    # One program for both: nothing churns above s_max. That this is s_churn = 0 is sampler_test's.
    for name, s_min in (('edm_churn_8', 0.05), ('edm_heun_8', 51.0)):
        check(name, sample(golden['z'], golden['y_sample'], s_min), golden[name], 1e-3)


def test_dp_gradient(golden):
    """Losses, norms, and the sum of clipped per-example gradients of the privacy code."""
    model = golden.model

    def example_loss(params, example):
        sigma = jnp.exp(denoiser.P_MEAN + denoiser.P_STD * example['normal'])
        labels = jnp.broadcast_to(example['label'], sigma.shape)
        return model.errors(params, example['image'], (labels, sigma, example['noise'])).mean()

    examples = {
        'image': golden['dp_x'],
        'label': golden['dp_y'].astype(np.int32),
        'normal': golden['dp_log_sigma_normal'],
        'noise': golden['dp_noise'],
    }

    @quick_jit
    def everything(params):
        losses, gradients = jax.vmap(jax.value_and_grad(example_loss), (None, 0))(params, examples)
        clip_norm = float(golden['dp_clip'])
        grid = clipping.Grid(clip_norm=clip_norm, rows=5)
        units, norms = clipping.clipped_sum(gradients, jnp.ones(5, bool), grid)
        return losses, norms, jax.tree.map(grid.decode, units)

    losses, norms, total = everything(golden.params)
    check('dp_loss', losses, golden['dp_loss'], 1e-4)
    check('dp_norms', norms, golden['dp_norms'], 1e-3)
    ours = pytorch.params_to_pytorch(total, model)
    names = [key for key in golden.data if key.startswith('clipped_sum/')]
    assert len(names) == len(ours)
    expected = np.concatenate([golden.data[name].ravel() for name in names])
    stride = golden.data.get('clipped_sum_stride', 1)  # the file of tests/golden keeps every 16th value
    got = np.concatenate([ours[name[name.index('model.') :]].ravel()[::stride] for name in names])
    check('clipped_sum', got, expected, 1e-3)
    # The color file's gradients are all shorter than its clip norm; of the others some are longer.
    assert np.any(norms > golden['dp_clip']) == (model.classes == 10)


def test_names_and_order_are_those_of_the_file(golden):
    names = [key.removeprefix('param/') for key in golden.data if key.startswith('param/')]
    back = pytorch.params_to_pytorch(golden.params, golden.model)
    assert list(back) == names
    for name in names:
        np.testing.assert_array_equal(back[name], golden.data[f'param/{name}'])


@pytest.fixture(scope='module')
def checkpoint(golden_file):
    """The .pth file of the PyTorch code, read; with its network."""
    pytest.importorskip('torch')
    path = golden_file('mnist_28_nf16.pth')
    golden = make_golden('mnist_28_nf16', golden_file('mnist_28_nf16.npz'))
    return golden, pytorch.read_checkpoint(path, golden.model)


def test_checkpoint_of_the_pytorch_code(checkpoint, golden_file):
    golden, saved = checkpoint
    with np.load(golden_file('mnist_28_nf16_pth_outputs.npz')) as file:
        outputs = {key: file[key] for key in file}
    noisy = np.moveaxis(outputs['noisy'], 1, -1)

    @quick_jit
    def denoised(params):
        return golden.model.denoiser(params)(noisy, outputs['sigma'], outputs['y'])

    for params, name in (('params', 'out_model'), ('ema_params', 'out_ema')):
        check(name, denoised(saved[params]), np.moveaxis(outputs[name], 1, -1), 1e-4)
    assert saved['step'] == 3


def test_checkpoint_written_back_is_the_one_that_was_read(checkpoint, golden_file, tmp_path):
    torch = pytest.importorskip('torch')
    golden, saved = checkpoint
    read, path = golden_file('mnist_28_nf16.pth'), tmp_path / 'again.pth'
    pytorch.write_checkpoint(path, **saved, model=golden.model)
    original, again = (torch.load(p, weights_only=True) for p in (read, path))
    assert set(again) == set(original) and again['step'] == original['step']
    assert list(again['model']) == list(original['model'])
    for name, tensor in original['model'].items():
        assert torch.equal(again['model'][name], tensor)
    assert {k: v for k, v in again['ema'].items() if k != 'shadow_params'} == {
        k: v for k, v in original['ema'].items() if k != 'shadow_params'
    }
    pairs = zip(again['ema']['shadow_params'], original['ema']['shadow_params'], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again['optimizer']['param_groups'] == original['optimizer']['param_groups']


# From here on: networks made here, so that the tests run everywhere.
MODELS = {
    'three levels, color': make_model(8, 3, 4, (1, 2, 2), 1, (4,), width=8),
    'attention at both levels': make_model(8, 1, 4, (2, 1), 2, (8, 4), width=8),
    'one level without attention': make_model(8, 1, 4, (1,), 1, (), width=8),
}
MODEL = MODELS['three levels, color']


def fresh(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), model.shapes())


@pytest.mark.parametrize('name', MODELS)
def test_mapping_covers_every_parameter_of_any_unet_and_back(name):
    model = MODELS[name]
    params = fresh(model)
    back = pytorch.params_from_pytorch(pytorch.params_to_pytorch(params, model), model)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_written_checkpoint_reads_back_equal(tmp_path):
    torch = pytest.importorskip('torch')
    params, average = fresh(MODEL), fresh(MODEL, seed=1)
    path = tmp_path / 'model.pth'
    pytorch.write_checkpoint(path, params=params, ema_params=average, step=7, model=MODEL)
    saved = pytorch.read_checkpoint(path, MODEL)
    jax.tree.map(np.testing.assert_array_equal, saved['params'], params)
    jax.tree.map(np.testing.assert_array_equal, saved['ema_params'], average)
    assert saved['step'] == 7
    raw = torch.load(path, weights_only=True)
    assert all(name.startswith('module.model.all_modules.') for name in raw['model'])
    assert set(raw['ema']) == {'decay', 'num_updates', 'shadow_params'}
    assert len(raw['optimizer']['param_groups'][0]['params']) == len(raw['model'])


def test_safetensors_read_back_equal(tmp_path):
    params, average = fresh(MODEL), fresh(MODEL, seed=1)
    path = tmp_path / 'model.safetensors'
    pytorch.write_checkpoint(path, params=params, ema_params=average, step=7, model=MODEL)
    saved = pytorch.read_checkpoint(path, MODEL)
    jax.tree.map(np.testing.assert_array_equal, saved['params'], params)
    jax.tree.map(np.testing.assert_array_equal, saved['ema_params'], average)
    assert saved['step'] == 7


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_weights_alone_are_their_own_average(tmp_path, prefix):
    torch = pytest.importorskip('torch')
    params, path = fresh(MODEL), tmp_path / 'weights.pth'
    named = pytorch.params_to_pytorch(params, MODEL)
    torch.save({prefix + name: torch.tensor(array) for name, array in named.items()}, path)
    saved = pytorch.read_checkpoint(path, MODEL)
    jax.tree.map(np.testing.assert_array_equal, saved['params'], params)
    jax.tree.map(np.testing.assert_array_equal, saved['ema_params'], params)
    # Averages beside them are taken for what they are.
    average = fresh(MODEL, seed=1)
    averages = {f'ema.{n}': array for n, array in pytorch.params_to_pytorch(average, MODEL).items()}
    torch.save({name: torch.tensor(array) for name, array in (named | averages).items()}, path)
    saved = pytorch.read_checkpoint(path, MODEL)
    jax.tree.map(np.testing.assert_array_equal, saved['params'], params)
    jax.tree.map(np.testing.assert_array_equal, saved['ema_params'], average)


def test_a_file_that_would_run_code_is_read_only_on_trust(tmp_path):
    torch = pytest.importorskip('torch')
    params, path = fresh(MODEL), tmp_path / 'model.pth'
    named = {n: torch.tensor(a) for n, a in pytorch.params_to_pytorch(params, MODEL).items()}
    ema = {'shadow_params': list(named.values())}
    torch.save({'model': named, 'ema': ema, 'step': 1, 'more': argparse.Namespace(a=1)}, path)
    with pytest.raises(ValueError, match='would run code when it is read'):
        pytorch.read_checkpoint(path, MODEL)
    saved = pytorch.read_checkpoint(path, MODEL, trust=True)
    jax.tree.map(np.testing.assert_array_equal, saved['params'], params)


@pytest.mark.parametrize('name', ['model.pth', 'model.safetensors'])
@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04 cut off'])
def test_other_files_are_refused_by_name(tmp_path, name, content):
    pytest.importorskip('torch')
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'{name} is no file of'):
        pytorch.read_checkpoint(path, MODEL)


def test_a_checkpoint_without_an_entry_or_of_another_kind_is_refused(tmp_path):
    torch = pytest.importorskip('torch')
    path = tmp_path / 'model.pth'
    for content, reason in (
        ({'model': {}, 'step': 1}, "no entry 'ema'"),
        ([torch.zeros(2)], 'holds a list'),
        ({'model.all_modules.0.weight': 'text'}, 'is no tensor'),
        ({'model': [], 'ema': {}, 'step': 1}, "'model' is a list; it must hold weights by name"),
        ({'model': {}, 'ema': {}, 'step': 1}, "'ema' has no list 'shadow_params'"),
        ({'model': {}, 'ema': {'shadow_params': [1]}, 'step': 1}, r'shadow_params\[0\] is no tensor'),
        (
            {'model': {}, 'ema': {'shadow_params': []}, 'step': None},
            "'step' is None; it must be a whole number",
        ),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=reason):
            pytorch.read_checkpoint(path, MODEL)
    with pytest.raises(ValueError, match='its suffix must be .pth or .safetensors'):
        pytorch.write_checkpoint(
            tmp_path / 'model.bin', params=fresh(MODEL), ema_params=fresh(MODEL), step=1, model=MODEL
        )


def test_parameters_of_another_network_are_refused():
    params = fresh(MODEL)
    named = pytorch.params_to_pytorch(params, MODEL)
    with pytest.raises(ValueError, match='missing .*unexpected none'):
        pytorch.params_from_pytorch(dict(list(named.items())[:-1]), MODEL)
    with pytest.raises(ValueError, match='missing none, unexpected'):
        pytorch.params_from_pytorch({**named, 'model.all_modules.99.bias': np.ones(2)}, MODEL)
    wider = dataclasses.replace(MODEL, network=MODEL.network.clone(width=16))
    with pytest.raises(ValueError, match=r'all_modules.0.weight has shape \(5, 8\), not \(5, 16\)'):
        pytorch.params_from_pytorch(named, wider)
    with pytest.raises(ValueError, match=r"missing none, unexpected \['extra/kernel'\]"):
        pytorch.params_to_pytorch({**params, 'extra': {'kernel': np.ones(2)}}, MODEL)
    with pytest.raises(ValueError, match=r"missing \['conv_in/kernel', 'conv_in/bias'\]"):
        rest = {name: part for name, part in params.items() if name != 'conv_in'}
        pytorch.params_to_pytorch(rest, MODEL)


def test_other_networks_than_the_unet_are_refused():
    other = dataclasses.replace(MODEL, network=nn.Dense(3))
    with pytest.raises(ValueError, match='the network is Dense; PyTorch checkpoints are of UNet alone'):
        pytorch.params_to_pytorch({}, other)


def test_names_may_have_the_prefix_of_a_network_on_several_devices():
    params = fresh(MODEL)
    named = pytorch.params_to_pytorch(params, MODEL)
    read = pytorch.params_from_pytorch({f'module.{name}': array for name, array in named.items()}, MODEL)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    first = next(iter(named))
    for more in ('extra.weight', f'other.{first}', f'ema.{first}', f'module.module.{first}'):
        shown = more.removeprefix('module.')
        with pytest.raises(ValueError, match=rf"missing none, unexpected \['{shown}'\]"):
            pytorch.params_from_pytorch({**named, more: np.zeros_like(named[first])}, MODEL)
    with pytest.raises(ValueError, match=f"{first} is there twice, with and without 'module.'"):
        pytorch.params_from_pytorch({**named, f'module.{first}': named[first]}, MODEL)


def test_without_torch_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ImportError, match=r'pip install .dpp_jax\[pytorch\]'):
        pytorch.read_checkpoint(tmp_path / 'model.pth', MODEL)
