"""The residual networks are those of the literature, and take images of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.evaluation import residual

NETWORKS = [residual.ResNet(10), residual.ResNeXt(10), residual.WideResNet(10)]


@pytest.mark.parametrize(
    'network, number', [*zip(NETWORKS, [11_173_962, 34_426_698, 8_949_210])], ids=['resnet', 'resnext', 'wrn']
)
def test_parameters_at_10_classes_in_color_are_as_many_as_in_the_literature(network, number):
    """11.17 M, 34.4 M (8x64d), 8.95 M: convolutions and the dense layer, scales and shifts."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == number


@pytest.mark.parametrize('network', NETWORKS, ids=['resnet', 'resnext', 'wrn'])
@pytest.mark.parametrize('shape', [(8, 8, 1), (28, 28, 1), (64, 64, 3), (9, 14, 3)])
def test_images_have_any_size_and_the_weights_do_not_depend_on_it(network, shape):
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))
    other = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, shape[2])))
    assert variables == other
    (logits, hidden), _ = jax.eval_shape(
        lambda v: network.apply(
            v, jnp.zeros((2, *shape)), True, jnp.ones(2), mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        ),
        variables,
    )  # fmt: skip
    assert logits.shape == (2, 10) and hidden.shape[0] == 2


@pytest.mark.parametrize('height, width', [(7, 8), (9, 14)])
@pytest.mark.parametrize(
    'size, stride, groups', [(3, 1, 1), (3, 2, 1), (3, 1, 4), (3, 2, 4), (1, 1, 1), (1, 2, 1)]
)
def test_a_convolution_and_its_gradients_are_those_of_the_library(height, width, size, stride, groups):
    layer = residual.Conv(24, size, stride, groups)
    x = np.random.default_rng(0).normal(size=(2, height, width, 16)).astype(np.float32)
    kernel = layer.init(jax.random.key(0), x)['params']['kernel']
    assert kernel.shape == (size, size, 16 // groups, 24)

    def library(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(size // 2, size // 2)] * 2, feature_group_count=groups,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )  # fmt: skip

    def ours(x, kernel):
        return layer.apply({'params': {'kernel': kernel}}, x)

    expected, pull_back = jax.vjp(library, x, kernel)
    found, our_pull_back = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    g = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    for a, b in zip(our_pull_back(g), pull_back(g)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_rows_under_the_mask_count_in_no_statistic_and_dropout_is_for_training_alone():
    network = residual.WideResNet(3, depth=10, factor=1)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), images)

    @jax.jit
    def train(images, mask, key):
        return network.apply(variables, images, True, mask, mutable=['batch_stats'], rngs={'dropout': key})

    mask, keys = jnp.array([1.0, 1, 1, 0]), jax.random.split(jax.random.key(1))
    (logits, _), statistics = train(images, mask, keys[0])
    (others, _), same = train(np.concatenate([images[:3], images[:1]]), mask, keys[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), statistics, same)
    np.testing.assert_allclose(logits[:3], others[:3], rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits, train(images, mask, keys[1])[0][0])
    tested = jax.jit(network.apply)(variables, images)[0]
    np.testing.assert_allclose(
        tested[:1], jax.jit(network.apply)(variables, images[:1])[0], rtol=1e-4, atol=1e-5
    )
