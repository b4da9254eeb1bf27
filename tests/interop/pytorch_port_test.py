"""The PyTorch port that we compare with: it agrees with the golden vectors, and its DP steps with each other.

That it agrees with the package is what `scripts/compare_pytorch.py` shows, and compare_test.py checks.
"""

import numpy as np
import pytest
import torch

from dpp_jax import build
from scripts.compare import pytorch_port as port
from scripts.compare import pytorch_private as private

# name of the file: image channels, classes, size, attention at
FILES = {'mnist_28_nf16': (1, 10, 28, 14), 'rgb_32_nf16': (3, 2, 32, 16)}
STEPS = 8


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Golden:
    """A reference file, and the port with its weights, which lie in the order of its own modules."""

    def __init__(self, name, path):
        channels, classes, size, attention = FILES[name]
        self.classes = classes
        with np.load(path) as file:
            self.arrays = dict(file)
        self.network = port.UNet(channels, classes, 16, (2, 2), 2, (attention,), size)
        self.network.load_state_dict(self.renamed('param/'))
        self.network.to(memory_format=torch.channels_last)

    def renamed(self, prefix):
        """Arrays that are named after parameters, by the port's names: both use modules in one order."""
        found = [array for name, array in self.arrays.items() if name.startswith(prefix)]
        state = self.network.state_dict()
        assert len(found) == len(state)
        tensors = {}
        for (name, value), array in zip(state.items(), found):
            # Attention's matrices are (in, out) there.
            array = array.T if 'attention' in name and array.ndim == 2 else array
            tensors[name] = torch.tensor(array).reshape(value.shape)
        return tensors

    def __getitem__(self, key):
        array = torch.tensor(self.arrays[key])
        return array.long() if array.dtype in (torch.int32, torch.int64) else array


@pytest.fixture(scope='module', params=FILES)
def golden(request, golden_file):
    return Golden(request.param, golden_file(f'{request.param}.npz'))


def check(name, got, expected, tolerance):
    error = float((got - expected).norm() / expected.norm())
    assert error < tolerance, f'{name}: relative error {error:.1e}'


@torch.no_grad()
def test_network_and_denoisers_equal_the_golden_vectors(golden):
    output = golden.network(golden['net_in_x'], golden['net_in_t'], golden['y'])
    check('net_out', output, golden['net_out'], 1e-5)
    for kind, name in (('edm', 'D_edm'), ('vp', 'D_vpsde'), ('ve', 'D_vesde'), ('v', 'D_v')):
        denoise = port.denoiser(golden.network, kind)
        check(name, denoise(golden['noisy'], golden['sigma'], golden['y']), golden[name], 1e-4)


@torch.no_grad()
def test_samplers_equal_the_golden_vectors(golden):
    denoise = port.denoiser(golden.network)
    guided = port.guided(denoise, 1.5, golden.classes)
    arguments = golden['z'], golden['y_sample'], port.sigma_steps(STEPS)
    # DDIM without guidance and Heun without churn are the same lines.
    drawn = iter(golden['edm_churn_8_noise'])
    churn = {'s_churn': 4.0, 's_min': 0.05, 's_max': 50.0, 'noise': lambda i: next(drawn)}
    for name, images in (
        ('ddim_8_cfg1.5', port.ddim(guided, *arguments)),
        ('edm_churn_8', port.heun(denoise, *arguments, **churn)),
    ):
        check(name, images, golden[name], 1e-3)


def test_norms_and_clipped_sum_equal_the_golden_vectors(golden):
    sigma = (-1.2 + 1.2 * golden['dp_log_sigma_normal']).exp()
    n, draws = sigma.shape
    rows = (
        golden['dp_x'].repeat_interleave(draws, 0),
        golden['dp_y'].repeat_interleave(draws),
        sigma.flatten(),
        golden['dp_noise'].flatten(0, 1),
    )
    step = private.Loop(
        golden.network, draws=draws, clip_norm=float(golden['dp_clip']), noise_multiplier=1.0,
        expected_batch_size=n, learning_rate=1e-3,
    )  # fmt: skip
    loss = step.step(rows, images_at_once=n, finish=False)
    check('dp_loss', loss, golden['dp_loss'].mean(), 1e-4)
    check('dp_norms', torch.cat(step.norms), golden['dp_norms'], 1e-4)
    stride = int(golden.arrays.get('clipped_sum_stride', 1))  # tests/golden keeps every 16th value
    if stride == 1:
        expected = golden.renamed('clipped_sum/')
        total = step.clipped_sum()
        names = list(total)
        flat = lambda arrays: torch.cat([torch.as_tensor(arrays[name]).flatten() for name in names])
        check('clipped_sum', flat(total), flat(expected), 1e-3)


DRAWS, IMAGES, CLIP_NORM = 2, 3, 0.3


@pytest.fixture(scope='module')
def model(tiny_config):
    """With a second level: halving and doubling, and attention at the smaller size."""
    return build.model(tiny_config(model__multipliers=(1, 2), model__attention_resolutions=(4,)))


@pytest.fixture(scope='module')
def rows(model):
    torch.manual_seed(0)
    images = torch.rand(IMAGES, 1, 8, 8) * 2 - 1
    return port.draw(images, torch.arange(IMAGES), DRAWS, label_dropout=0.5, no_class=model.classes)


def make_step(form, model, **settings):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.2, p.shape) for name, p in port.make_network(model).named_parameters()}
    network = port.make_network(model)
    network.load_state_dict({name: torch.tensor(array).float() for name, array in params.items()})
    settings = {'clip_norm': CLIP_NORM, 'noise_multiplier': 1.0} | settings
    return private.FORMS[form](
        network, draws=DRAWS, expected_batch_size=IMAGES, learning_rate=1e-3, **settings
    )  # fmt: skip


# The compiled ones take a minute to compile; `compare_pytorch.py` runs them.
EAGER = [name for name in private.FORMS if 'compiled' not in name]


@pytest.mark.parametrize('form', EAGER)
def test_every_form_has_the_clipped_sum_of_a_loop_in_float64(form, model, rows):
    exact = make_step('loop over images', model).network.double()
    total, norms = 0.0, []
    for example in zip(*(array.split(DRAWS) for array in rows)):
        example = [array.double() if array.is_floating_point() else array for array in example]
        exact.zero_grad()
        port.losses(exact, *example).mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in exact.parameters()])
        norms.append(float(gradient.norm()))
        total = total + min(1, CLIP_NORM / norms[-1]) * gradient
    assert min(norms) < CLIP_NORM < max(norms), norms
    step = make_step(form, model)
    step.step(rows, images_at_once=2, finish=False)
    found = torch.cat([torch.tensor(array).flatten() for array in step.clipped_sum().values()])
    check(form, found, total, 1e-5)


@pytest.mark.parametrize('form', EAGER)
def test_a_step_takes_the_noisy_mean(form, model, rows):
    """Adam's first update is learning rate times sign: of the noise alone where it is large."""
    step, seen = make_step(form, model, noise_multiplier=1e4), []
    before = [p.detach().clone() for p in step.network.parameters()]

    def look(*_):
        seen.append(torch.cat([p.grad.flatten() for p in step.network.parameters()]))

    step.adam.register_step_pre_hook(look)
    step.step(rows, images_at_once=2)
    (gradient,) = seen
    assert abs(float(gradient.std()) / (1e4 * CLIP_NORM / IMAGES) - 1) < 0.05
    moved = torch.cat([(old - new).detach().flatten() for old, new in zip(before, step.network.parameters())])
    torch.testing.assert_close(moved, 1e-3 * gradient.sign(), rtol=0, atol=1e-6)


def test_layers_keep_opacus_own_gradients_outside_of_these_forms():
    from opacus.grad_sample import GradSampleModule

    layer = torch.nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(4, 2, 5, 5)
    module = GradSampleModule(layer, loss_reduction='sum')
    module(x).square().sum().backward()
    for i in range(4):
        layer.zero_grad()
        module.disable_hooks()
        module(x[i : i + 1]).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, layer.weight.grad_sample[i])


def test_average_warms_up():
    network = torch.nn.Linear(1, 1)
    average = port.Average(network, decay=0.999)
    start = network.weight.detach().clone()
    with torch.no_grad():
        network.weight += 1
    average.update(network)
    torch.testing.assert_close(average.values[0], start + 1 - 2 / 11)
