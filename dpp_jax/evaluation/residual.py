"""Residual networks for small images: ResNet-18, ResNeXt-29 and WRN-40-4, as usual for CIFAR.

All three begin with a 3x3 convolution of the whole image, halve the sides a few times, and end with the mean
over pixels and a dense layer. So they take gray or color images of any size; 8 to 64 pixels make sense.

Convolutions are those of `diffusion.winograd`: inside of a loop, as the trainer's, XLA:CPU is some 90 times
slower with its own. Other backends use their own.

Batch normalization keeps running statistics in the collection `batch_stats`, with the weight 0.1 for a new
batch, as PyTorch's layer. The trainer averages them as it averages the weights. Rows under the mask, which
pad a batch, count in no statistic.
"""

from collections.abc import Callable
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpp_jax.diffusion import winograd

_INITIAL = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')  # He et al. 2015, for ReLU


class Conv(nn.Module):
    """Convolution without bias: (N, H, W, C) → (N, H / stride, W / stride, channels), rounded up.

    Attributes:
        channels: of the result; a multiple of `groups`.
        size: 3 (with a border of one zero) or 1.
        stride: 1 or 2.
        groups: so many parts of the channels, each convolved for itself; a divisor of C.
    """

    channels: int
    size: int = 3
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[-1] // self.groups
        kernel = self.param('kernel', _INITIAL, (self.size, self.size, inputs, self.channels))
        if self.size == 1:
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        convolve = winograd.conv3x3 if self.stride == 1 else _halving
        if self.groups == 1:
            return convolve(x, kernel)
        x = x.reshape(*x.shape[:-1], self.groups, inputs)
        kernel = kernel.reshape(*kernel.shape[:-1], self.groups, -1)
        y = jax.vmap(convolve, in_axes=(-2, -2), out_axes=-2)(x, kernel)
        return y.reshape(*y.shape[:-2], self.channels)


def _halving(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve with stride 2 and a border of one zero, by one product: three layers of a network at most."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    last = [size - 2 for size in x.shape[1:3]]
    views = [x[:, i : last[0] + i : 2, j : last[1] + j : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(views, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _norm(train: bool, mask: jax.Array | None) -> Callable[..., jax.Array]:
    """Return x, name → x, normalized by the statistics of the batch, or by the running ones."""
    rows = None if mask is None else (mask > 0).reshape(-1, 1, 1, 1)

    def apply(x, name):
        layer = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
        return layer(x, mask=rows if train else None)

    return apply


def _head(x: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
    """Return logits and hidden values, the means over pixels."""
    hidden = x.mean(axis=(1, 2))
    return nn.Dense(classes, name='dense')(hidden), hidden


class ResNet(nn.Module):
    """ResNet with basic blocks (He et al. 2016, arXiv 1512.03385), in the form for small images.

    Attributes:
        classes: number of logits.
        blocks: per stage; (2, 2, 2, 2) is ResNet-18. Every stage but the first halves the sides.
        width: channels of the first stage; each further one has twice as many.
    """

    classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits, (N, classes), and the means over pixels of the last stage, (N, channels).

        Args:
            images: float32 (N, H, W, C) in [-1, 1].
            train: whether to normalize by the statistics of the batch, and to keep them.
            mask: (N,), 0 for rows that count in no statistic; None: all count.
        """
        norm = _norm(train, mask)
        x = nn.relu(norm(Conv(self.width, name='conv_0')(images), 'norm_0'))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = self._block(x, norm, self.width * 2**stage, stride, f'stage_{stage + 1}_{block + 1}')
        return _head(x, self.classes)

    def _block(self, x, norm, channels, stride, name):
        y = nn.relu(norm(Conv(channels, stride=stride, name=f'{name}_conv_1')(x), f'{name}_norm_1'))
        y = norm(Conv(channels, name=f'{name}_conv_2')(y), f'{name}_norm_2')
        if x.shape != y.shape:
            x = norm(Conv(channels, 1, stride, name=f'{name}_skip')(x), f'{name}_skip_norm')
        return nn.relu(x + y)


class ResNeXt(nn.Module):
    """ResNeXt (Xie et al. 2017, arXiv 1611.05431), in the form for small images.

    Attributes:
        classes: number of logits.
        blocks: per stage, of three; 3 is ResNeXt-29.
        groups: of the 3x3 convolutions ("cardinality").
        width: channels of a group in the first stage. 8 groups of 64 are the benchmark's.
    """

    classes: int
    blocks: int = 3
    groups: int = 8
    width: int = 64

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits and hidden values, as `ResNet` does."""
        norm = _norm(train, mask)
        x = nn.relu(norm(Conv(64, name='conv_0')(images), 'norm_0'))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = self._block(x, norm, 2**stage, stride, f'stage_{stage + 1}_{block + 1}')
        return _head(x, self.classes)

    def _block(self, x, norm, factor, stride, name):
        inner, outer = self.groups * self.width * factor, 256 * factor
        y = nn.relu(norm(Conv(inner, 1, name=f'{name}_conv_1')(x), f'{name}_norm_1'))
        y = Conv(inner, stride=stride, groups=self.groups, name=f'{name}_conv_2')(y)
        y = nn.relu(norm(y, f'{name}_norm_2'))
        y = norm(Conv(outer, 1, name=f'{name}_conv_3')(y), f'{name}_norm_3')
        if x.shape != y.shape:
            x = norm(Conv(outer, 1, stride, name=f'{name}_skip')(x), f'{name}_skip_norm')
        return nn.relu(x + y)


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146).

    Attributes:
        classes: number of logits.
        depth: 6 n + 4, with n blocks in each of three stages.
        factor: of the width; the stages have 16, 32 and 64 times as many channels.
        dropout: between the two convolutions of a block; 0.3 as the benchmark.
    """

    classes: int
    depth: int = 40
    factor: int = 4
    dropout: float = 0.3

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits and hidden values, as `ResNet` does; in training with the key `dropout`."""
        norm = _norm(train, mask)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        x = Conv(16, name='conv_0')(images)
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                channels, stride = 16 * 2**stage * self.factor, 2 if stage and not block else 1
                x = self._block(x, norm, dropout, channels, stride, f'stage_{stage + 1}_{block + 1}')
        return _head(nn.relu(norm(x, 'norm')), self.classes)

    def _block(self, x, norm, dropout, channels, stride, name):
        before = nn.relu(norm(x, f'{name}_norm_1'))
        y = Conv(channels, stride=stride, name=f'{name}_conv_1')(before)
        y = dropout(name=f'{name}_dropout')(nn.relu(norm(y, f'{name}_norm_2')))
        y = Conv(channels, name=f'{name}_conv_2')(y)
        if x.shape != y.shape:
            x = Conv(channels, 1, stride, name=f'{name}_skip')(before)
        return x + y
