"""The Inception-v3 network of the public FID (Heusel et al. 2017), in Flax.

It is the network of 2015 as the PyTorch port of the FID has it. It differs from the Inception-v3 of
torchvision (Szegedy et al. 2015): average pooling leaves the padding out, the last block pools with a
maximum, and there are 1008 logits. Batch norms are folded into the convolutions before them. Images are
resized as that port resizes them: bilinear, pixel centers at ½, no antialiasing.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.evaluation import trainer

FEATURES = 2048
LOGITS = 1008
SIDE = 299  # pixels
NAME = f'Inception-v3 ({FEATURES} features), the network of the public FID'

_EPSILON = 1e-3  # of the batch norms
# On one device at once: enough for an accelerator, and their activations take 2 GB.
_IMAGES_AT_ONCE = {'cpu': 8}
_IMAGES_AT_ONCE_ELSEWHERE = 64
_UNUSED = ('AuxLogits.', 'num_batches_tracked')  # in names of other files of the same network


class InceptionV3(nn.Module):
    """The network: images of any size → (logits, features)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return logits, (N, 1008), and features, (N, 2048).

        Args:
            images: float32 (N, H, W, C) in [-1, 1], C = 1 or 3.
        """
        x = resized(images)
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        x = _Conv(32, 3, stride=2, name='Conv2d_1a_3x3')(x)
        x = _Conv(32, 3, pad=False, name='Conv2d_2a_3x3')(x)
        x = _Conv(64, 3, name='Conv2d_2b_3x3')(x)
        x = _halved(x)
        x = _Conv(80, 1, name='Conv2d_3b_1x1')(x)
        x = _Conv(192, 3, pad=False, name='Conv2d_4a_3x3')(x)
        x = _halved(x)
        for letter, pooled in zip('bcd', (32, 64, 64)):
            x = _Mixed5(pooled, name=f'Mixed_5{letter}')(x)
        x = _Mixed6a(name='Mixed_6a')(x)
        for letter, width in zip('bcde', (128, 160, 160, 192)):
            x = _Mixed6(width, name=f'Mixed_6{letter}')(x)
        x = _Mixed7a(name='Mixed_7a')(x)
        x = _Mixed7(_mean_pool, name='Mixed_7b')(x)
        x = _Mixed7(_max_pool, name='Mixed_7c')(x)
        features = x.mean(axis=(1, 2))
        return nn.Dense(LOGITS, name='fc')(features), features


class _Conv(nn.Module):
    """Convolution with bias, and ReLU; a stride of 2 goes without padding."""

    channels: int
    size: int | tuple[int, int]
    stride: int = 1
    pad: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        padding = 'SAME' if self.pad and self.stride == 1 else 'VALID'
        return nn.relu(nn.Conv(self.channels, size, self.stride, padding, name='conv')(x))


class _Mixed5(nn.Module):
    """Blocks on 35x35 pixels."""

    pooled: int  # channels of the branch that pools

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _Conv(64, 1, name='branch1x1')(x)
        five = _Conv(48, 1, name='branch5x5_1')(x)
        five = _Conv(64, 5, name='branch5x5_2')(five)
        double = _Conv(64, 1, name='branch3x3dbl_1')(x)
        double = _Conv(96, 3, name='branch3x3dbl_2')(double)
        double = _Conv(96, 3, name='branch3x3dbl_3')(double)
        pool = _Conv(self.pooled, 1, name='branch_pool')(_mean_pool(x))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class _Mixed6a(nn.Module):
    """35x35 → 17x17 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _Conv(384, 3, stride=2, name='branch3x3')(x)
        double = _Conv(64, 1, name='branch3x3dbl_1')(x)
        double = _Conv(96, 3, name='branch3x3dbl_2')(double)
        double = _Conv(96, 3, stride=2, name='branch3x3dbl_3')(double)
        return jnp.concatenate([three, double, _halved(x)], axis=-1)


class _Mixed6(nn.Module):
    """Blocks on 17x17 pixels, with convolutions of 7 pixels in a row or a column."""

    width: int  # channels between them

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 7), (7, 1)
        one = _Conv(192, 1, name='branch1x1')(x)
        seven = _Conv(self.width, 1, name='branch7x7_1')(x)
        seven = _Conv(self.width, row, name='branch7x7_2')(seven)
        seven = _Conv(192, column, name='branch7x7_3')(seven)
        double = _Conv(self.width, 1, name='branch7x7dbl_1')(x)
        double = _Conv(self.width, column, name='branch7x7dbl_2')(double)
        double = _Conv(self.width, row, name='branch7x7dbl_3')(double)
        double = _Conv(self.width, column, name='branch7x7dbl_4')(double)
        double = _Conv(192, row, name='branch7x7dbl_5')(double)
        pool = _Conv(192, 1, name='branch_pool')(_mean_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class _Mixed7a(nn.Module):
    """17x17 → 8x8 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _Conv(192, 1, name='branch3x3_1')(x)
        three = _Conv(320, 3, stride=2, name='branch3x3_2')(three)
        seven = _Conv(192, 1, name='branch7x7x3_1')(x)
        seven = _Conv(192, (1, 7), name='branch7x7x3_2')(seven)
        seven = _Conv(192, (7, 1), name='branch7x7x3_3')(seven)
        seven = _Conv(192, 3, stride=2, name='branch7x7x3_4')(seven)
        return jnp.concatenate([three, seven, _halved(x)], axis=-1)


class _Mixed7(nn.Module):
    """Blocks on 8x8 pixels, whose branches part into a row and a column."""

    pool: Any  # of the last branch: one block takes means, the other one maxima

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 3), (3, 1)
        one = _Conv(320, 1, name='branch1x1')(x)
        three = _Conv(384, 1, name='branch3x3_1')(x)
        three = [
            _Conv(384, row, name='branch3x3_2a')(three),
            _Conv(384, column, name='branch3x3_2b')(three),
        ]
        double = _Conv(448, 1, name='branch3x3dbl_1')(x)
        double = _Conv(384, 3, name='branch3x3dbl_2')(double)
        double = [
            _Conv(384, row, name='branch3x3dbl_3a')(double),
            _Conv(384, column, name='branch3x3dbl_3b')(double),
        ]
        pool = _Conv(192, 1, name='branch_pool')(self.pool(x))
        return jnp.concatenate([one, *three, *double, pool], axis=-1)


def _mean_pool(x: jax.Array) -> jax.Array:
    """Mean of 3x3 pixels; at the border, of those that there are."""
    return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), 'SAME')


def _halved(x: jax.Array) -> jax.Array:
    """Maximum of 3x3 pixels, every second one."""
    return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


def resized(images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Return images, float32 (N, H, W, C), at 299x299 pixels: bilinear, centers at ½, no antialiasing.

    Between the centers of two pixels it goes straight; beyond the last one it stays. NumPy arrays stay
    NumPy arrays.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        if length == SIDE:
            continue
        place = np.clip((np.arange(SIDE) + 0.5) * length / SIDE - 0.5, 0, length - 1)
        left = np.floor(place).astype(int)
        right = np.minimum(left + 1, length - 1)
        weight = np.expand_dims((place - left).astype(np.float32), [a for a in range(4) if a != axis])
        take = jnp.take if isinstance(images, jax.Array) else np.take
        images = take(images, left, axis=axis) * (1 - weight) + take(images, right, axis=axis) * weight
    return images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """The network with its weights, as a feature network: see `features.FeatureNetwork`.

    Attributes:
        params: the weights, arrays by name, as of `params_from_pytorch`.
        name: what the features are, to be shown beside every FID.
    """

    params: dict[str, Any] = dataclasses.field(repr=False)
    name: str = NAME

    @property
    def images_at_once(self) -> int:
        """How many images go through the network together on a device."""
        return _IMAGES_AT_ONCE.get(jax.default_backend(), _IMAGES_AT_ONCE_ELSEWHERE)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return the features, see `outputs`."""
        return self.outputs(images)[1]

    def outputs(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits for the Inception score, float32 (N, 1008), and features, float32 (N, 2048).

        The logits go without their bias, as in the code of the first Inception score (Salimans et al. 2016).

        Args:
            images: uint8 (N, H, W, C), C = 1 or 3; or float32 in [0, 255], as `resized` returns them.
        """
        count = len(images)
        # Filled up to whole batches: the network takes long to compile, so there is one shape.
        missing = -count % (self.images_at_once * jax.local_device_count())
        filled = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        logits, features = trainer.apply(_network(), self.params, filled, self.images_at_once)
        return logits[:count] - self.params['fc']['bias'], features[:count]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for an npz file: the weights by name, and the name in `name`."""
        return {'name': np.array(self.name), **flax.traverse_util.flatten_dict(self.params, sep='/')}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> 'Inception':
        """Return the network that `to_arrays` gave these arrays.

        Raises:
            ValueError: the arrays are those of something else.
        """
        weights = {name: array for name, array in arrays.items() if name != 'name'}
        params = flax.traverse_util.unflatten_dict(weights, sep='/')
        found = jax.tree.map(np.shape, params)
        if 'name' not in arrays or found != jax.tree.map(lambda leaf: leaf.shape, _shapes()):
            raise ValueError('the arrays are not the weights of Inception-v3')
        return cls(params=params, name=str(arrays['name']))


@functools.cache
def _network() -> InceptionV3:
    return InceptionV3()


@functools.cache
def _shapes() -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images)['params']


def params_from_pytorch(named: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the network's parameters from those of the public PyTorch file, by their names there.

    A batch norm after a convolution becomes a factor of its kernel, and its bias.

    Args:
        named: name → array, as `Mixed_5b.branch1x1.conv.weight` (OIHW) and `….bn.running_var`.

    Returns:
        nested dicts of float32 arrays.

    Raises:
        ValueError: parameters are missing, have another shape, or do not exist in this network.
    """
    rest = {
        name: np.asarray(array, np.float64)
        for name, array in named.items()
        if not any(part in name for part in _UNUSED)
    }
    flat = {}
    try:
        for path, leaf in flax.traverse_util.flatten_dict(_shapes()).items():
            if path[-1] != 'kernel':
                continue
            if path[0] == 'fc':
                kernel, bias = rest.pop('fc.weight').T, rest.pop('fc.bias')
            else:
                kernel, bias = _folded(rest, '.'.join(path[:-2]))
            if kernel.shape != leaf.shape:
                raise ValueError(f'{".".join(path)} has shape {kernel.shape}; it must be {leaf.shape}')
            flat[path] = np.ascontiguousarray(kernel, np.float32)
            flat[(*path[:-1], 'bias')] = bias.astype(np.float32)
    except KeyError as error:
        raise ValueError(f'the parameters are not those of Inception-v3: {error} is missing') from error
    if rest:
        raise ValueError(
            f'the parameters are not those of Inception-v3: {", ".join(sorted(rest)[:3])} is not part of it'
        )
    return flax.traverse_util.unflatten_dict(flat)


def _folded(named: dict[str, np.ndarray], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Take a convolution and its batch norm out of `named`; return kernel (HWIO) and bias of both."""
    kernel = named.pop(f'{layer}.conv.weight').transpose(2, 3, 1, 0)
    scale = named.pop(f'{layer}.bn.weight') / np.sqrt(named.pop(f'{layer}.bn.running_var') + _EPSILON)
    bias = named.pop(f'{layer}.bn.bias') - named.pop(f'{layer}.bn.running_mean') * scale
    return kernel * scale, bias
