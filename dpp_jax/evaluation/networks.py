"""Networks of the classifiers: images of any size → logits and hidden values."""

from collections.abc import Callable
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


def _initial(inputs: int, as_pytorch: bool) -> tuple[Callable, Callable]:
    """Return the initializers of kernel and bias of a layer whose values have so many inputs.

    PyTorch draws both evenly from ±1/sqrt(inputs): kernels √3 narrower than Flax's.
    """
    if not as_pytorch:
        return nn.initializers.lecun_normal(), nn.initializers.zeros_init()
    most = inputs**-0.5
    draw = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -most, most)
    return draw, draw


class Conv3x3(nn.Module):
    """3x3 convolution with bias: (N, H, W, C) → (N, H', W', channels).

    Nine shifted views and one matrix product ("im2col"): XLA:CPU runs `lax.conv` inside loops some 90 times
    slower. The convolution of `diffusion.winograd` always pads; most of these networks do not.

    Attributes:
        channels: of the result.
        same: pad with zeros, so that H and W stay; otherwise each loses 2.
        as_pytorch: whether random weights are those of PyTorch, see `_initial`.
    """

    channels: int
    same: bool
    as_pytorch: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.same:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width, inputs = x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
        shape = (3, 3, inputs, self.channels)
        kernel_init, bias_init = _initial(9 * inputs, self.as_pytorch)
        kernel = self.param('kernel', kernel_init, shape)
        bias = self.param('bias', bias_init, (self.channels,))
        views = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(views, axis=-1)
        return patches @ kernel.reshape(9 * inputs, self.channels) + bias


class Cnn(nn.Module):
    """The paper's CNN, for images of any size.

    conv 3x3 (32), max-pool 2x2, ReLU, dropout ½, conv 3x3 (64), max-pool 2x2, ReLU, dropout ½,
    conv 3x3 (128), ReLU, dense (`hidden`), ReLU, dense (`classes`); no padding.

    Images with a side below 18 would end with no pixel. For them, all three convolutions pad with zeros and
    keep the size, and images with a side below 2 are not pooled.

    Attributes:
        classes: number of logits.
        hidden: number of hidden values.
        as_pytorch: whether random weights are those of PyTorch, see `_initial`.
    """

    classes: int
    hidden: int = 128
    as_pytorch: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits, (N, classes), and the values before the last ReLU, (N, hidden).

        Args:
            images: float32 (N, H, W, C) in [-1, 1].
            train: whether to apply dropout, with the key `dropout`.
            mask: not used: no image has an effect on the results of others.
        """
        del mask
        side = min(images.shape[1:3])
        same = ((side - 2) // 2 - 2) // 2 - 2 < 1
        dropout = functools.partial(nn.Dropout, 0.5, deterministic=not train)
        convolution = functools.partial(Conv3x3, same=same, as_pytorch=self.as_pytorch)
        x = nn.relu(_max_pool(convolution(32, name='conv_1')(images)))
        x = dropout(name='dropout_1')(x)
        x = nn.relu(_max_pool(convolution(64, name='conv_2')(x)))
        x = dropout(name='dropout_2')(x)
        x = nn.relu(convolution(128, name='conv_3')(x))
        hidden = self._dense(self.hidden, 'dense_1', x.reshape(x.shape[0], -1))
        return self._dense(self.classes, 'dense_2', nn.relu(hidden)), hidden

    def _dense(self, features: int, name: str, x: jax.Array) -> jax.Array:
        kernel_init, bias_init = _initial(x.shape[-1], self.as_pytorch)
        return nn.Dense(features, name=name, kernel_init=kernel_init, bias_init=bias_init)(x)


class Mlp(nn.Module):
    """One hidden layer: dense (`hidden`), ReLU, dropout ½, dense (`classes`).

    Dropout as in the CNN: without it, the network soon learns a few thousand synthetic images by heart.

    Attributes:
        classes: number of logits.
        hidden: number of hidden values.
    """

    classes: int
    hidden: int = 256

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits and hidden values, as `Cnn` does."""
        del mask
        hidden = nn.Dense(self.hidden, name='dense_1')(images.reshape(images.shape[0], -1))
        x = nn.Dropout(0.5, deterministic=not train, name='dropout_1')(nn.relu(hidden))
        return nn.Dense(self.classes, name='dense_2')(x), hidden


def _max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pool with stride 2; drops an odd last row or column, and does nothing on a side below 2."""
    batch, height, width, channels = x.shape
    if min(height, width) < 2:
        return x
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    # A reshape and a maximum: on a CPU, their gradient is much faster than that of reduce_window.
    return x.reshape(batch, height, 2, width, 2, channels).max(axis=(2, 4))
