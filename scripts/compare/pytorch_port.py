"""The method in PyTorch: network, denoisers, losses, samplers, Adam with averaged weights.

Written from `dpp_jax.diffusion` and the papers, module by module and under the same names, as one would write
it in PyTorch: NCHW arrays stored channels last, cuDNN's or oneDNN's convolutions. It shares no formula with
the package: what both compute is compared. DP-SGD is in `pytorch_private`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_SKIP_SCALE = 2**-0.5


class UNet(nn.Module):
    """F(x (n, C, H, W), c_noise (n,), label (n,)) → (n, C, H, W), as `dpp_jax.diffusion.unet.UNet`.

    With `is_bfloat16`, products and activations are bfloat16 (autocast); weights stay float32.
    """

    def __init__(
        self,
        image_channels,
        classes,
        width,
        multipliers,
        blocks,
        attention_resolutions,
        image_size,
        is_bfloat16=False,
    ):
        super().__init__()
        self.width, self.multipliers, self.blocks = width, multipliers, blocks
        self.is_bfloat16 = is_bfloat16
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
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            return self._output(x, c_noise, label).to(x.dtype)

    def _output(self, x, c_noise, label):
        half = self.width // 2
        # In float64: an angle is up to a thousand times a frequency, with all of its rounding.
        exponents = torch.arange(half, dtype=torch.float64, device=x.device) / (half - 1)
        angles = c_noise[:, None] * (10000**-exponents).to(x.dtype)
        embedding = torch.cat([angles.sin(), angles.cos()], 1)
        embedding = functional.pad(embedding, (0, self.width % 2)) + self.label_embedding(label)
        embedding = self.embed_1(functional.silu(self.embed_0(embedding)))
        h = self.conv_in(x)
        skips = [h]
        for level in range(len(self.multipliers)):
            for i in range(self.blocks):
                h = getattr(self, f'down_{level}_block_{i}')(h, embedding)
                h = self._attend(f'down_{level}_attention_{i}', h)
                skips.append(h)
            if level < len(self.multipliers) - 1:
                h = getattr(self, f'down_{level}_half')(h, embedding)
                skips.append(h)
        h = self.middle_block_0(h, embedding)
        h = self.middle_block_1(self.middle_attention(h), embedding)
        for level in reversed(range(len(self.multipliers))):
            for i in range(self.blocks + 1):
                h = getattr(self, f'up_{level}_block_{i}')(torch.cat([h, skips.pop()], 1), embedding)
            h = self._attend(f'up_{level}_attention', h)
            if level > 0:
                h = getattr(self, f'up_{level}_double')(h, embedding)
        return self.conv_out(functional.silu(self.norm_out(h)))

    def _attend(self, name, h):
        return getattr(self, name)(h) if hasattr(self, name) else h


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


def make_network(model, params: Mapping | None = None, *, channels_last: bool = True) -> UNet:
    """The twin of a `dpp_jax.diffusion.model.Model`'s network, with its parameters if there are any.

    Args:
        model: ours; a bfloat16 network gets a twin that computes in bfloat16, too.
        params: nested dicts of arrays, as Flax names them; None: PyTorch's own random numbers.
        channels_last: how images lie in memory.
    """
    ours = model.network
    twin = UNet(
        ours.image_channels, ours.classes, ours.width, ours.multipliers, ours.blocks,
        ours.attention_resolutions, model.image_shape[0], str(np.dtype(ours.dtype)) == 'bfloat16',
    )  # fmt: skip
    if params is not None:
        load(twin, params)
    return twin.to(memory_format=torch.channels_last) if channels_last else twin


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A column of table 1 of Karras et al. 2022 (EDM), elementwise on tensors.

    Attributes:
        skip, out, scale, noise: c_skip, c_out, c_in and c_noise of σ.
        weight: w(σ) of the squared error.
        sigma: σ from numbers `u` uniform in [0, 1): the quantile function of the noise levels in training.
    """

    skip: Callable
    out: Callable
    scale: Callable
    noise: Callable
    weight: Callable
    sigma: Callable


_DATA = 1 / math.sqrt(3)  # σ_data of values uniform in [-1, 1]
_BETA_MIN, _BETA_D = 0.1, 19.9


def _vp_sigma(t):
    return (_BETA_MIN * t + _BETA_D * t * t / 2).expm1().sqrt()


def _vp_time(s):
    return ((_BETA_MIN**2 + 2 * _BETA_D * (s * s).log1p()).sqrt() - _BETA_MIN) / _BETA_D


# Time of v, in [0, 1], at ln σ^-2 = 15; it is 1 minus that at -15.
_V_END = 2 / math.pi * math.atan(math.exp(-7.5))
KINDS = {
    'edm': Kind(
        skip=lambda s: _DATA**2 / (s * s + _DATA**2),
        out=lambda s: s * _DATA / (s * s + _DATA**2).sqrt(),
        scale=lambda s: (s * s + _DATA**2).rsqrt(),
        noise=lambda s: s.log() / 4,
        weight=lambda s: 1 / _DATA**2 + 1 / (s * s),
        sigma=lambda u: (1.2 * torch.special.ndtri(u) - 1.2).exp(),
    ),
    'vp': Kind(
        skip=torch.ones_like,
        out=lambda s: -s,
        scale=lambda s: (s * s + 1).rsqrt(),
        noise=lambda s: 999 * _vp_time(s),
        weight=lambda s: 1 / (s * s),
        sigma=lambda u: _vp_sigma(1e-5 + (1 - 1e-5) * u),
    ),
    've': Kind(
        skip=torch.ones_like,
        out=lambda s: s,
        scale=torch.ones_like,
        noise=lambda s: (s / 2).log(),
        weight=lambda s: 1 / (s * s),
        sigma=lambda u: 0.02 * 5000**u,
    ),
    'v': Kind(
        skip=lambda s: 1 / (s * s + 1),
        out=lambda s: s * (s * s + 1).rsqrt(),
        scale=lambda s: (s * s + 1).rsqrt(),
        noise=lambda s: 2 / math.pi * s.atan(),
        weight=lambda s: 1 + 1 / (s * s),
        sigma=lambda u: (math.pi / 2 * (_V_END + (1 - 2 * _V_END) * u)).tan(),
    ),
}


def denoiser(network: Callable, kind: str = 'edm') -> Callable:
    """D(x (n, C, H, W), sigma (n,), label (n,)) around the network F; `kind` is a name in `KINDS`."""
    of = KINDS[kind]

    def denoise(x, sigma, label):
        s = sigma[:, None, None, None]
        return of.skip(s) * x + of.out(s) * network(of.scale(s) * x, of.noise(sigma), label)

    return denoise


def losses(network: Callable, images, labels, sigma, noise, kind: str = 'edm'):
    """Weighted squared error of every noised image, (n,), as `dpp_jax.diffusion.loss.errors`.

    Args:
        network: F.
        images: (n, C, H, W) in [-1, 1].
        labels: (n,) int64.
        sigma: (n,).
        noise: like images, unit normal.
        kind: a name in `KINDS`.
    """
    denoised = denoiser(network, kind)(images + sigma[:, None, None, None] * noise, sigma, labels)
    return KINDS[kind].weight(sigma) * (denoised - images).square().mean((1, 2, 3))


def draw(images, labels, draws: int, label_dropout: float, no_class: int, kind: str = 'edm'):
    """Every image `draws` times, with noise levels, noise and label dropout: arguments of `losses`."""
    images = images.repeat_interleave(draws, 0).contiguous(memory_format=torch.channels_last)
    number, device = len(images), images.device
    # Of 2^53 equal steps, none of them 0: the normal quantile of 0 is not finite.
    uniform = (torch.rand(number, dtype=torch.float64, device=device) + 2**-54).clamp(max=1 - 2**-53)
    labels = labels.repeat_interleave(draws)
    dropped = torch.rand(number, device=device) < label_dropout
    sigma = KINDS[kind].sigma(uniform).float()
    return images, labels.masked_fill(dropped, no_class), sigma, torch.randn_like(images)


def plain_gradient(network: nn.Module, rows: tuple, rows_at_once: int, kind: str = 'edm'):
    """The gradient of the mean loss of all rows into .grad, some rows at a time; the mean loss."""
    network.zero_grad(set_to_none=True)
    total = 0.0
    for part in zip(*(array.split(rows_at_once) for array in rows)):
        loss = losses(network, *part, kind=kind).sum() / len(rows[0])
        loss.backward()
        total = total + loss.detach()
    return total


class Average:
    """Exponential moving average of parameters, with the warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.values = [parameter.detach().clone() for parameter in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in network.parameters()], weight)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        for parameter, value in zip(network.parameters(), self.values, strict=True):
            parameter.copy_(value)


def sigma_steps(steps: int, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Noise levels from t_max down to t_min (EDM, equation 5), float32 numbers."""
    last = max(steps - 1, 1)
    first, end = t_max ** (1 / rho), t_min ** (1 / rho)
    return [float(np.float32((first + i / last * (end - first)) ** rho)) for i in range(steps)]


def guided(denoise: Callable, guidance: float, no_class: int) -> Callable:
    """(1 + g) D(x; y) - g D(x; no class) (Ho & Salimans 2022)."""
    if guidance == 0:
        return denoise

    def of_both(x, sigma, label):
        twice = torch.cat([label, torch.full_like(label, no_class)])
        conditional, free = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), twice).chunk(2)
        return (1 + guidance) * conditional - guidance * free

    return of_both


def ddim(denoise: Callable, z, label, sigmas: list[float], **unused):
    """Images by Euler steps from unit normal `z`; the last one is the denoiser's output."""
    del unused
    x = sigmas[0] * z
    for now, after in zip(sigmas, [*sigmas[1:], 0.0]):
        clean = denoise(x, x.new_full((len(x),), now), label)
        x = x + (after - now) / now * (x - clean)
    return x


def heun(
    denoise: Callable,
    z,
    label,
    sigmas: list[float],
    *,
    noise: Callable | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
):
    """Images by EDM's algorithm 2; `noise` (step) → unit normal like z, where there is churn."""
    x = sigmas[0] * z
    for i, (now, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0])):
        gamma = min(s_churn / len(sigmas), 1.0) if s_min <= now <= s_max else 0.0
        hat = now * (1 + gamma)
        if gamma > 0:
            x = x + s_noise * math.sqrt(hat**2 - now**2) * noise(i)
        slope = (x - denoise(x, x.new_full((len(x),), hat), label)) / hat
        moved = x + (after - hat) * slope
        if after > 0:
            other = (moved - denoise(moved, x.new_full((len(x),), after), label)) / after
            moved = x + (after - hat) * (slope + other) / 2
        x = moved
    return x


SAMPLERS = {'ddim': ddim, 'heun': heun}


def to_pixels(images) -> np.ndarray:
    """(n, C, H, W) in about [-1, 1] → uint8 (n, H, W, C), rounded."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.moveaxis(pixels.cpu().numpy(), 1, -1)


def to_torch(images, device: str = 'cpu') -> torch.Tensor:
    """Images (..., H, W, C) as JAX has them → (..., C, H, W) float32."""
    return torch.tensor(np.moveaxis(np.asarray(images, np.float32), -1, -3)).to(device)
