"""NCSN++ (Song et al. 2021, arXiv 2011.13456), class-conditional, as the PyTorch implementation has it.

BigGAN residual blocks, average-pool down and nearest up, no FIR filters, positional embedding of the
noise level, skip connections divided by √2. All parameters are float32; `dtype` is that of activations.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.diffusion import winograd

_SKIP_SCALE = np.float32(2**-0.5)


def ddpm_init(scale: float = 1.0):
    """Return a uniform initializer, scaled by the mean of fan-in and fan-out; 1e-10 replaces a scale of 0."""
    return nn.initializers.variance_scaling(max(scale, 1e-10), 'fan_avg', 'uniform')


class UNet(nn.Module):
    """The network F(x, c_noise, label).

    Attributes:
        image_channels: C of the images.
        classes: number of classes; label `classes` stands for "no class".
        width: channels of the first level before its multiplier.
        multipliers: channels per level, in units of `width`; each further level halves the image.
        blocks: residual blocks per level.
        attention_resolutions: sizes in the network at which blocks are followed by attention.
        dtype: of activations and matrix products.
        patch: p: blocks of p x p pixels are one pixel of C p² channels in the network, a p²-th of the work.
    """

    image_channels: int
    classes: int
    width: int = 32
    multipliers: tuple[int, ...] = (2, 2)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (14,)
    dtype: Any = jnp.float32
    patch: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, label: jax.Array) -> jax.Array:
        """Return the network's output.

        Args:
            x: (n, H, W, C) float32, scaled noisy images.
            c_noise: (n,) float32, the noise level as the denoiser encodes it.
            label: (n,) int32 in [0, classes].

        Returns:
            (n, H, W, C) float32.

        Raises:
            ValueError: images of this size cannot be halved, or never have an attention size.
        """
        self._check(x.shape)
        x = _to_patches(x, self.patch)
        embedding = self._embed(c_noise, label)
        channels = [self.width * m for m in self.multipliers]
        last = len(channels) - 1

        h = Conv3x3(self.width, dtype=self.dtype, name='conv_in')(x.astype(self.dtype))
        skips = [h]
        for level, features in enumerate(channels):
            for i in range(self.blocks):
                h = self._block(features, f'down_{level}_block_{i}')(h, embedding)
                if h.shape[1] in self.attention_resolutions:
                    h = Attention(dtype=self.dtype, name=f'down_{level}_attention_{i}')(h)
                skips.append(h)
            if level < last:
                h = self._block(features, f'down_{level}_half', 'down')(h, embedding)
                skips.append(h)

        h = self._block(channels[-1], 'middle_block_0')(h, embedding)
        h = Attention(dtype=self.dtype, name='middle_attention')(h)
        h = self._block(channels[-1], 'middle_block_1')(h, embedding)

        for level, features in reversed(list(enumerate(channels))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._block(features, f'up_{level}_block_{i}')(h, embedding)
            if h.shape[1] in self.attention_resolutions:
                h = Attention(dtype=self.dtype, name=f'up_{level}_attention')(h)
            if level > 0:
                h = self._block(features, f'up_{level}_double', 'up')(h, embedding)
        assert not skips

        h = nn.silu(GroupNorm(dtype=self.dtype, name='norm_out')(h))
        out = self.image_channels * self.patch**2
        h = Conv3x3(out, 0.0, dtype=self.dtype, name='conv_out')(h)
        return _from_patches(_wide(h), self.patch)

    def _block(self, features: int, name: str, resample: str = ''):
        """Return a residual block of this network."""
        return ResidualBlock(features, resample, dtype=self.dtype, name=name)

    def _embed(self, c_noise: jax.Array, label: jax.Array) -> jax.Array:
        """Return noise level and class in one vector: (n,), (n,) → (n, 4 width)."""
        table = self.param('label_embedding', nn.initializers.normal(1.0), (self.classes + 1, self.width))
        # A product, since the gradient of a look-up adds in no fixed order on a GPU. Vectors are few and
        # small, and everything that is made of them stays in full precision.
        rows = jax.nn.one_hot(label, self.classes + 1, dtype=table.dtype)
        rows = jnp.matmul(rows, table, precision=jax.lax.Precision.HIGHEST)
        h = positional_embedding(c_noise, self.width) + rows
        h = Dense(4 * self.width, dtype=h.dtype, name='embed_0')(h)
        return Dense(4 * self.width, dtype=h.dtype, name='embed_1')(nn.silu(h))

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raise an error for sizes that the network cannot take."""
        halvings = len(self.multipliers) - 1
        height, width = shape[1:3]
        step = self.patch * 2**halvings
        if height % step or width % step:
            raise ValueError(
                f'image size is {height}x{width}; with multipliers {self.multipliers} and patch {self.patch} '
                f'it must be divisible by {step}'
            )
        sizes = [height // self.patch // 2**level for level in range(halvings + 1)]
        if not set(self.attention_resolutions) <= set(sizes):
            raise ValueError(
                f'attention_resolutions is {self.attention_resolutions}; it must be a selection of '
                f'{sizes}, the sizes in the network'
            )


def _to_patches(x: jax.Array, patch: int) -> jax.Array:
    """Make one pixel of each block of patch x patch pixels: (n, H, W, C) → (n, H/p, W/p, p p C)."""
    if patch == 1:
        return x
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height // patch, patch, width // patch, patch, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // patch, width // patch, -1)


def _from_patches(x: jax.Array, patch: int) -> jax.Array:
    """Undo `_to_patches`."""
    if patch == 1:
        return x
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height, width, patch, patch, channels // patch**2)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, height * patch, width * patch, -1)


class ResidualBlock(nn.Module):
    """BigGAN's residual block; `resample` is '', 'down' (average of 2x2) or 'up' (repeat)."""

    features: int
    resample: str = ''
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """Return (n, H', W', features) from (n, H, W, C) and (n, E) float32."""
        h = nn.silu(GroupNorm(dtype=self.dtype, name='norm_0')(x))
        h, skip = _resample(h, self.resample), _resample(x, self.resample)
        h = Conv3x3(self.features, dtype=self.dtype, name='conv_0')(h)
        shift = Dense(self.features, dtype=embedding.dtype, name='embed')(nn.silu(embedding))
        h = _add(h, shift[:, None, None])
        h = nn.silu(GroupNorm(dtype=self.dtype, name='norm_1')(h))
        h = Conv3x3(self.features, 0.0, dtype=self.dtype, name='conv_1')(h)
        if self.resample or x.shape[-1] != self.features:
            skip = Dense(self.features, dtype=self.dtype, name='skip')(skip)
        return ((skip + h) * _SKIP_SCALE).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention over all pixels, one head."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the same shape: (n, H, W, C)."""
        n, height, width, channels = x.shape
        h = GroupNorm(dtype=self.dtype, name='norm')(x).reshape(n, height * width, channels)
        query, key, value = (
            Dense(channels, 0.1, dtype=self.dtype, name=name)(h) for name in ('query', 'key', 'value')
        )
        scores = jnp.einsum('nqc,nkc->nqk', query, key, preferred_element_type=_wide_dtype(h))
        weights = jax.nn.softmax(scores * channels**-0.5).astype(self.dtype)
        h = jnp.einsum('nqk,nkc->nqc', weights, value)
        h = Dense(channels, 0.0, dtype=self.dtype, name='out')(h).reshape(x.shape)
        return ((x + h) * _SKIP_SCALE).astype(self.dtype)


class Conv3x3(nn.Module):
    """3x3 convolution with bias, see `winograd`."""

    features: int
    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param('kernel', ddpm_init(self.scale), shape)
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        return _add(winograd.conv3x3(x, kernel), bias)


class Dense(nn.Module):
    """Matrix product on the last axis, with bias; on images a 1x1 convolution."""

    features: int
    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', ddpm_init(self.scale), (x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        return _add(x @ kernel.astype(self.dtype), bias)


class GroupNorm(nn.Module):
    """Group norm of min(C / 4, 32) groups of channels, eps 1e-6, statistics in float32.

    Not `nn.GroupNorm`: the gradient of the whole network takes a quarter more time with it on a CPU.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the same shape: (n, H, W, C)."""
        n, channels = x.shape[0], x.shape[-1]
        groups = min(channels // 4, 32)
        if not groups or channels % groups:
            raise ValueError(
                f'a group norm over {channels} channels cannot have {groups} equal groups; '
                'a width divisible by 4 (by 32 above 128 channels) always fits'
            )
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', nn.initializers.zeros, (channels,))

        def per_group(values):  # (n, C) → means of groups, spread over the channels again
            means = values.reshape(n, groups, -1).mean(-1, keepdims=True)
            return jnp.broadcast_to(means, (n, groups, channels // groups)).reshape(n, channels)

        wide = _wide(x)
        mean = per_group(wide.mean((1, 2)))
        centered = wide - mean[:, None, None]
        variance = per_group(jnp.square(centered).mean((1, 2)))
        factor = scale * jax.lax.rsqrt(variance + 1e-6)
        return (centered * factor[:, None, None] + bias).astype(self.dtype)


def positional_embedding(values: jax.Array, features: int) -> jax.Array:
    """Return sines, then cosines, of frequencies from 1 down to 1e-4 (DDPM): (n,) → (n, features)."""
    half = features // 2
    frequencies = np.exp(-np.log(10000) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = values[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, features % 2)))


def _add(x: jax.Array, few: jax.Array) -> jax.Array:
    """Return x + few, of x's dtype. The gradient of `few` is a sum over all pixels: never in bfloat16."""
    return (_wide(x) + few).astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_wide_dtype(x))


def _wide_dtype(x: jax.Array):
    """Return float32, or float64 where a reference is computed in it."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _resample(x: jax.Array, how: str) -> jax.Array:
    """Halve by the mean of 2x2 pixels, or double by repeating them."""
    n, height, width, channels = x.shape
    if how == 'down':
        return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    if how == 'up':
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, channels))
        return x.reshape(n, 2 * height, 2 * width, channels)
    return x
