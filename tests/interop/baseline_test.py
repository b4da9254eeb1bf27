"""The PyTorch twin that speed is compared with computes the same: network, gradient, clipped sum."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpp_jax import build
from dpp_jax.privacy import clipping
from scripts.benchmark import pytorch_baseline as baseline

DRAWS, EXAMPLES, CLIP_NORM = 2, 3, 0.7
GRID = clipping.Grid(clip_norm=CLIP_NORM, rows=EXAMPLES)


class Twins:
    """Our model and its twin with the same random weights, and the same noised images for both."""

    def __init__(self, model):
        self.model = model
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(
            # Not as initialized: the last convolution of every block would be almost zero.
            lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
            model.shapes(),
        )
        self.images = jnp.asarray(rng.uniform(-1, 1, (EXAMPLES,) + model.image_shape), jnp.float32)
        keys, labels = jax.random.split(jax.random.key(1), EXAMPLES), jnp.arange(EXAMPLES)
        self.drawn = jax.vmap(model.drawing(draws=DRAWS, label_dropout=0.5))(labels, keys)
        self.network = baseline.make_network(model)
        baseline.load(self.network, self.params)

    def loss(self, params, example):
        image, drawn = example
        return self.model.errors(params, image, drawn).mean()

    def rows(self):
        """The noised images as the twin takes them: (n, C, H, W) and so on."""
        labels, sigma, noise = (np.array(a).reshape((-1,) + a.shape[2:]) for a in self.drawn)
        images = np.repeat(np.array(self.images), DRAWS, axis=0)
        to_torch = lambda array: torch.tensor(np.moveaxis(array, -1, 1))
        return to_torch(images), torch.tensor(labels).long(), torch.tensor(sigma), to_torch(noise)

    def compare(self, theirs, ours, tolerance):
        """Every parameter's array, relative to the whole."""
        ours = dict(baseline.named(ours, self.network))
        assert theirs.keys() == ours.keys()
        scale = np.sqrt(sum(np.square(array).sum() for array in ours.values()))
        for name, array in ours.items():
            np.testing.assert_allclose(theirs[name], array, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.fixture(scope='module')
def twins(tiny_config):
    """With a second level: halving and doubling, and attention at the smaller size."""
    config = tiny_config(model__multipliers=(2, 2), model__attention_resolutions=(4,))
    return Twins(build.model(config))


def test_network_has_the_same_parameters_and_output(twins):
    ours = traverse_util.flatten_dict(twins.params)
    assert len(ours) == len(twins.network.state_dict())
    assert sum(p.numel() for p in twins.network.parameters()) == sum(a.size for a in ours.values())
    images, labels, sigma, _ = twins.rows()
    network = jax.jit(twins.model.network.apply)
    expected = network(
        {'params': twins.params}, jnp.moveaxis(images.numpy(), 1, -1), sigma.numpy(), labels.numpy()
    )
    with torch.no_grad():
        output = twins.network(images, sigma, labels)
    assert output.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(np.moveaxis(output.numpy(), 1, -1), expected, atol=2e-5)


def test_plain_gradient(twins):
    gradient = jax.jit(jax.grad(lambda p, e: jax.vmap(twins.loss, (None, 0))(p, e).mean()))
    expected = gradient(twins.params, (twins.images, twins.drawn))
    baseline.plain_gradient(twins.network, twins.rows(), rows_at_once=4)
    got = {name: p.grad.numpy() for name, p in twins.network.named_parameters()}
    twins.compare(got, expected, 1e-5)


def test_clipped_sum_of_opacus(twins):
    examples = (twins.images, twins.drawn)
    clipped = jax.jit(
        lambda params: clipping.clipped_gradient_sum(
            twins.loss, params, examples, jnp.ones(EXAMPLES, bool),
            grid=GRID, microbatch=1, microbatches=EXAMPLES,
        )
    )  # fmt: skip
    expected, sums = clipped(twins.params)
    assert sums['clipped'] > 0
    expected = jax.tree.map(GRID.decode, expected)
    step = baseline.PrivateStep(
        twins.network, clip_norm=CLIP_NORM, noise_multiplier=1.0, expected_batch_size=EXAMPLES,
        learning_rate=1e-3,
    )  # fmt: skip
    step.step(twins.rows(), DRAWS, images_at_once=2, finish=False)
    twins.compare(step.clipped_sum(), expected, 2e-5)  # ours clips to a norm smaller by 1e-5
    before = [p.detach().clone() for p in twins.network.parameters()]
    step.step(twins.rows(), DRAWS, images_at_once=2)
    assert all((a != b).any() for a, b in zip(before, twins.network.parameters()))
