"""The same network and training steps in PyTorch with Opacus, to compare speed and numbers with.

Written from `dpp_jax.diffusion`, module by module and under the same names, as one would write it in
PyTorch: NCHW arrays stored channels last, cuDNN's or oneDNN's convolutions, Opacus's hooks for
per-example gradients. Noise draws are rows of the batch whose gradients are averaged per example.
"""

from collections.abc import Callable, Mapping

import numpy as np
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.optimizers import DPOptimizer
import torch
from torch import nn
from torch.nn import functional

from dpp_jax.diffusion import denoiser

_SKIP_SCALE = 2**-0.5


class UNet(nn.Module):
    """F(x (n, C, H, W), c_noise (n,), label (n,)) → (n, C, H, W), as `dpp_jax.diffusion.unet.UNet`."""

    def __init__(
        self, image_channels, classes, width, multipliers, blocks, attention_resolutions, image_size
    ):
        super().__init__()
        self.width, self.multipliers, self.blocks = width, multipliers, blocks
        self.label_embedding = nn.Embedding(classes + 1, width)
        self.embed_0 = nn.Linear(width, 4 * width)
        self.embed_1 = nn.Linear(4 * width, 4 * width)
        self.conv_in = _conv3x3(image_channels, width)
        add = lambda name, module: self.add_module(name, module)
        block = lambda into, out, resample='': ResidualBlock(into, out, 4 * width, resample)
        channels, skips = width, [width]
        sizes = [image_size // 2**level for level in range(len(multipliers))]
        for level, multiplier in enumerate(multipliers):
            out = width * multiplier
            for i in range(blocks):
                add(f'down_{level}_block_{i}', block(channels, out))
                channels = out
                if sizes[level] in attention_resolutions:
                    add(f'down_{level}_attention_{i}', Attention(channels))
                skips.append(channels)
            if level < len(multipliers) - 1:
                add(f'down_{level}_half', block(channels, channels, 'down'))
                skips.append(channels)
        self.middle_block_0 = block(channels, channels)
        self.middle_attention = Attention(channels)
        self.middle_block_1 = block(channels, channels)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            out = width * multiplier
            for i in range(blocks + 1):
                add(f'up_{level}_block_{i}', block(channels + skips.pop(), out))
                channels = out
            if sizes[level] in attention_resolutions:
                add(f'up_{level}_attention', Attention(channels))
            if level > 0:
                add(f'up_{level}_double', block(channels, channels, 'up'))
        self.norm_out = _group_norm(channels)
        self.conv_out = _conv3x3(channels, image_channels)

    def forward(self, x, c_noise, label):
        half = self.width // 2
        frequencies = torch.exp(-np.log(10000) * torch.arange(half, device=x.device) / (half - 1))
        angles = c_noise[:, None] * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], 1) + self.label_embedding(label)
        embedding = self.embed_1(functional.silu(self.embed_0(embedding)))
        parts = dict(self.named_children())

        def attend(name, h):
            return parts[name](h) if name in parts else h

        h = self.conv_in(x)
        skips = [h]
        for level in range(len(self.multipliers)):
            for i in range(self.blocks):
                h = parts[f'down_{level}_block_{i}'](h, embedding)
                h = attend(f'down_{level}_attention_{i}', h)
                skips.append(h)
            if level < len(self.multipliers) - 1:
                h = parts[f'down_{level}_half'](h, embedding)
                skips.append(h)
        h = self.middle_block_0(h, embedding)
        h = self.middle_block_1(self.middle_attention(h), embedding)
        for level in reversed(range(len(self.multipliers))):
            for i in range(self.blocks + 1):
                h = parts[f'up_{level}_block_{i}'](torch.cat([h, skips.pop()], 1), embedding)
            h = attend(f'up_{level}_attention', h)
            if level > 0:
                h = parts[f'up_{level}_double'](h, embedding)
        return self.conv_out(functional.silu(self.norm_out(h)))


class ResidualBlock(nn.Module):
    """BigGAN's residual block; `resample` is '', 'down' or 'up'."""

    def __init__(self, channels, features, embedding, resample=''):
        super().__init__()
        self.resample = {
            '': nn.Identity(),
            'down': nn.AvgPool2d(2),
            'up': nn.Upsample(scale_factor=2, mode='nearest'),
        }[resample]
        self.norm_0 = _group_norm(channels)
        self.conv_0 = _conv3x3(channels, features)
        self.embed = nn.Linear(embedding, features)
        self.norm_1 = _group_norm(features)
        self.conv_1 = _conv3x3(features, features)
        changes = resample or channels != features
        self.skip = nn.Conv2d(channels, features, 1) if changes else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv_0(self.resample(functional.silu(self.norm_0(x))))
        h = h + self.embed(functional.silu(embedding))[:, :, None, None]
        h = self.conv_1(functional.silu(self.norm_1(h)))
        return (self.skip(self.resample(x)) + h) * _SKIP_SCALE


class Attention(nn.Module):
    """Self-attention over all pixels, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = _group_norm(channels)
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (n, pixels, C)
        h = functional.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return (x + self.out(h).transpose(1, 2).reshape(x.shape)) * _SKIP_SCALE


def _conv3x3(channels, features):
    return nn.Conv2d(channels, features, 3, padding=1)


def _group_norm(channels):
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def make_network(model) -> UNet:
    """The twin of a `dpp_jax.diffusion.model.Model`'s network, channels last."""
    ours = model.network
    twin = UNet(
        ours.image_channels, ours.classes, ours.width, ours.multipliers, ours.blocks,
        ours.attention_resolutions, model.image_shape[0],
    )  # fmt: skip
    return twin.to(memory_format=torch.channels_last)


def load(network: nn.Module, params: Mapping) -> None:
    """Our parameters (nested dicts of arrays, as Flax names them) into the twin."""
    network.load_state_dict({name: torch.tensor(array) for name, array in named(params, network)})


def named(tree: Mapping, network: nn.Module):
    """(the twin's name, array in its layout) for every leaf of a tree like our parameters."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    renamed = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}

    def walk(subtree, prefix):
        for key, value in subtree.items():
            if isinstance(value, Mapping):
                yield from walk(value, f'{prefix}{key}.')
                continue
            array = np.asarray(value)
            name = prefix + renamed[key] if key in renamed else f'{prefix}{key}.weight'
            if key == 'kernel':  # HWIO → OIHW, (in, out) → (out, in)
                array = np.moveaxis(array, (-1, -2), (0, 1))
            yield name, np.ascontiguousarray(array).reshape(shapes[name])

    return walk(tree, '')


def edm_losses(network: Callable, images, labels, sigma, noise):
    """Weighted squared error of every row, (n,); the EDM loss of `dpp_jax.diffusion.loss`.

    Args:
        network: F.
        images: (n, C, H, W) float32 in [-1, 1].
        labels: (n,) int64.
        sigma: (n,) float32.
        noise: like images, unit normal.
    """
    data = denoiser.SIGMA_DATA
    level = sigma[:, None, None, None]
    total = (level**2 + data**2).sqrt()
    noisy = images + level * noise
    output = network(noisy / total, sigma.log() / 4, labels)
    denoised = (data / total) ** 2 * noisy + level * data / total * output
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return weight * (denoised - images).square().mean((1, 2, 3))


def draw(images, labels, draws: int, label_dropout: float, no_class: int):
    """Every image `draws` times, with noise levels, noise and label dropout: arguments of `edm_losses`."""
    images = images.repeat_interleave(draws, 0).contiguous(memory_format=torch.channels_last)
    sigma = (denoiser.P_MEAN + denoiser.P_STD * torch.randn(len(images), device=images.device)).exp()
    labels = labels.repeat_interleave(draws)
    dropped = torch.rand(len(images), device=images.device) < label_dropout
    return images, labels.masked_fill(dropped, no_class), sigma, torch.randn_like(images)


def plain_gradient(network: nn.Module, rows: tuple, rows_at_once: int) -> None:
    """The gradient of the mean loss of all rows into .grad, some rows at a time."""
    network.zero_grad()
    for part in zip(*(array.split(rows_at_once) for array in rows)):
        (edm_losses(network, *part).sum() / len(rows[0])).backward()


@register_grad_sampler(nn.Conv2d)
def _conv_grad_sample(layer, activations, backprops):
    """Opacus's own, for arrays in the order that it takes for granted.

    Its `unfold2d` (1.6) reads channels-last activations through strides of contiguous ones: the
    gradients are wrong, and no error says so.
    """
    return compute_conv_grad_sample(layer, [activations[0].contiguous()], backprops)


class PrivateStep:
    """One DP-SGD step by Opacus: its per-example gradients, clipping, accumulation and noise."""

    def __init__(
        self, network: nn.Module, *, clip_norm, noise_multiplier, expected_batch_size, learning_rate
    ):
        self.network = GradSampleModule(network, loss_reduction='sum')
        self.optimizer = DPOptimizer(
            torch.optim.Adam(network.parameters(), lr=learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_batch_size,
        )

    def step(self, rows: tuple, draws: int, images_at_once: int, finish: bool = True) -> None:
        """Clip and add the gradients of all images, then noise and Adam.

        Args:
            rows: arguments of `edm_losses`; the draws of an image follow each other.
            draws: per image.
            images_at_once: whose gradients exist at once.
            finish: False to leave noise and Adam to a later call.
        """
        parts = list(zip(*(array.split(images_at_once * draws) for array in rows)))
        for number, part in enumerate(parts, start=1):
            (edm_losses(self.network, *part).sum() / draws).backward()
            for parameter in self.network.parameters():
                per_row = parameter.grad_sample
                parameter.grad_sample = per_row.reshape(-1, draws, *per_row.shape[1:]).sum(1)
            self.optimizer.signal_skip_step(do_skip=not finish or number < len(parts))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def clipped_sum(self) -> dict[str, np.ndarray]:
        """What steps without `finish` have added up, by the network's names."""
        parameters = self.network._module.named_parameters()
        return {name: parameter.summed_grad.numpy() for name, parameter in parameters}
