"""The networks of the classifiers have the paper's layers, and take images of any size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.evaluation import networks


def shapes(network, shape):
    """Parameters of a network for images of that shape, without their values."""
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))['params']


def test_cnn_at_28_has_as_many_parameters_as_the_papers():
    convolutions = (9 * 1 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    dense = (3 * 3 * 128 + 1) * 128 + (128 + 1) * 10
    leaves = jax.tree.leaves(shapes(networks.Cnn(10), (28, 28, 1)))
    assert sum(leaf.size for leaf in leaves) == convolutions + dense == 241_546


class PlainCnn(nn.Module):
    """The paper's CNN as one would write it with the library's layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (3, 3), padding='VALID', name='conv_1')(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.Conv(64, (3, 3), padding='VALID', name='conv_2')(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(nn.Conv(128, (3, 3), padding='VALID', name='conv_3')(x))
        x = nn.relu(nn.Dense(128, name='dense_1')(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name='dense_2')(x)


def test_cnn_computes_what_library_layers_compute():
    images = np.random.default_rng(0).uniform(-1, 1, (3, 28, 28, 1)).astype(np.float32)
    params = jax.jit(networks.Cnn(10).init)(jax.random.key(0), images)
    logits, hidden = jax.jit(networks.Cnn(10).apply)(params, images)
    np.testing.assert_allclose(logits, jax.jit(PlainCnn().apply)(params, images), rtol=1e-4, atol=1e-5)
    assert hidden.min() < 0  # the values before the ReLU


@pytest.mark.parametrize(
    ('shape', 'last_pixels'),
    [
        ((28, 28, 1), 9), ((32, 32, 3), 16), ((18, 18, 1), 1), ((18, 28, 1), 3),  # no padding
        ((17, 17, 1), 16), ((14, 14, 1), 9), ((8, 8, 1), 4), ((28, 8, 3), 14),  # padding
        ((3, 3, 1), 1), ((1, 1, 1), 1), ((1, 6, 1), 6),  # pools left out
    ],
)  # fmt: skip
def test_cnn_takes_any_size(shape, last_pixels):
    network = networks.Cnn(5)
    params = shapes(network, shape)
    assert params['dense_1']['kernel'].shape == (last_pixels * 128, 128)
    images = jnp.zeros((2, *shape))
    logits, hidden = jax.eval_shape(lambda p: network.apply({'params': p}, images), params)
    assert logits.shape == (2, 5) and hidden.shape == (2, 128)


def test_the_papers_cnn_begins_as_pytorch_begins():
    """Kernels and biases are even in ±1/sqrt(inputs), as torch.nn's; ours have no bias and are √3 wider."""
    torch = pytest.importorskip('torch')
    images = jnp.zeros((1, 28, 28, 1))
    theirs, ours = (
        jax.jit(networks.Cnn(10, as_pytorch=as_pytorch).init)(jax.random.key(0), images)['params']
        for as_pytorch in (True, False)
    )
    inputs = {'conv_1': 9, 'conv_2': 9 * 32, 'conv_3': 9 * 64, 'dense_1': 1152, 'dense_2': 128}
    assert set(theirs) == set(inputs)
    torch_layers = {'conv_2': torch.nn.Conv2d(32, 64, 3), 'dense_1': torch.nn.Linear(1152, 128)}
    for name, number in inputs.items():
        for values in theirs[name].values():
            assert 0.8 < np.abs(values).max() * number**0.5 <= 1
        spread = float(np.std(theirs[name]['kernel']))
        assert float(np.std(ours[name]['kernel'])) == pytest.approx(3**0.5 * spread, rel=0.15)
        assert not ours[name]['bias'].any()
        if name in torch_layers:
            layer = torch_layers[name]
            assert spread == pytest.approx(layer.weight.std().item(), rel=0.03)
            assert float(np.std(theirs[name]['bias'])) == pytest.approx(layer.bias.std().item(), rel=0.4)


@pytest.mark.parametrize('network', [networks.Cnn(5), networks.Mlp(5)])
def test_dropout_is_for_training_alone(network):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    params = network.init(jax.random.key(0), images)

    def logits(seed, train):
        return network.apply(params, images, train, rngs={'dropout': jax.random.key(seed)})[0]

    assert not np.array_equal(logits(0, True), logits(1, True))
    np.testing.assert_array_equal(logits(0, False), logits(1, False))
