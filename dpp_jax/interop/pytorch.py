"""Checkpoints of the PyTorch implementation, in and out.

Its network keeps all parts in one list, `model.all_modules.N`, in the order in which they are used. One
walk over that list (`_modules`) says what each part is called here; both directions follow it.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from pathlib import Path
from typing import Any

from flax import traverse_util
import numpy as np

from dpp_jax.diffusion import unet
from dpp_jax.diffusion.model import Model

PyTree = Any
_PREFIX = 'model.all_modules.'


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One array: its name there, its path here, and how its axes are ordered."""

    name: str
    path: tuple[str, ...]
    layout: str  # 'same', 'dense' (out, in), 'conv' OIHW, 'conv1' OIHW with a 1x1 kernel

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        if self.layout == 'dense':
            return array.T
        if self.layout == 'conv':
            return array.transpose(2, 3, 1, 0)
        return array[:, :, 0, 0].T if self.layout == 'conv1' else array

    def to_pytorch(self, array: np.ndarray) -> np.ndarray:
        if self.layout == 'dense':
            return array.T
        if self.layout == 'conv':
            return array.transpose(3, 2, 0, 1)
        return array.T[:, :, None, None] if self.layout == 'conv1' else array

    def pytorch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the array's shape there, from its shape here."""
        return self.to_pytorch(np.broadcast_to(np.float32(0), shape)).shape


def params_from_pytorch(named: Mapping[str, np.ndarray], model: Model) -> PyTree:
    """Return the parameters of `model` from PyTorch's by their names.

    Args:
        named: name → array; names may have anything before 'model.all_modules.'. Other entries
            (buffers) are ignored.
        model: with a `diffusion.unet.UNet`.

    Returns:
        nested dicts of float32 arrays.

    Raises:
        ValueError: parameters are missing, have another shape, or do not exist in this network; or the
            network is no UNet.
    """
    arrays = {
        name[name.index(_PREFIX) :]: np.asarray(array) for name, array in named.items() if _PREFIX in name
    }
    table = list(_parameters(model))
    _refuse_differences(arrays, [parameter.name for parameter in table], model)
    shapes = traverse_util.flatten_dict(model.shapes())
    flat, misshaped = {}, []
    for parameter in table:
        array, wanted = arrays[parameter.name], parameter.pytorch_shape(shapes[parameter.path].shape)
        if array.shape == wanted:
            flat[parameter.path] = np.ascontiguousarray(parameter.to_flax(array), np.float32)
        else:
            misshaped.append(f'{parameter.name} has shape {array.shape}, not {wanted}')
    if misshaped:
        raise ValueError(
            f'the PyTorch parameters do not belong to {_text(model)}: {"; ".join(misshaped[:3])}'
        )
    return traverse_util.unflatten_dict(flat)


def params_to_pytorch(params: PyTree, model: Model) -> 'collections.OrderedDict[str, np.ndarray]':
    """Return name → array in PyTorch's parameter order: the inverse of `params_from_pytorch`.

    Raises:
        ValueError: parameters are missing, or do not exist in this network; or the network is no UNet.
    """
    flat = traverse_util.flatten_dict(params)
    table = list(_parameters(model))
    _refuse_differences(flat, [parameter.path for parameter in table], model)
    named = collections.OrderedDict()
    for parameter in table:
        array = parameter.to_pytorch(np.asarray(flat[parameter.path]))
        named[parameter.name] = np.ascontiguousarray(array)
    return named


def read_checkpoint(path: str | Path, model: Model) -> dict[str, Any]:
    """Return {'params', 'ema_params', 'step'} from a .pth file.

    Only tensors and plain containers are read: torch refuses a file that would run code.

    Raises:
        ImportError: torch is not installed.
        ValueError: the file lacks an entry; or as of `params_from_pytorch`.
    """
    torch = _torch()
    saved = torch.load(path, map_location='cpu', weights_only=True)
    for key in ('model', 'ema', 'step'):
        if key not in saved:
            raise ValueError(f'{path} has no entry {key!r}; it has {sorted(saved)}')
    named = {name: tensor.numpy() for name, tensor in saved['model'].items()}
    order = [parameter.name for parameter in _parameters(model)]
    averages = [tensor.numpy() for tensor in saved['ema']['shadow_params']]
    if len(averages) != len(order):
        raise ValueError(f'{path} has {len(averages)} averaged parameters; {_text(model)} has {len(order)}')
    return {
        'params': params_from_pytorch(named, model),
        'ema_params': params_from_pytorch(dict(zip(order, averages)), model),
        'step': int(saved['step']),
    }


def write_checkpoint(
    path: str | Path,
    *,
    params: PyTree,
    ema_params: PyTree,
    step: int,
    model: Model,
    ema_decay: float = 0.999,
    learning_rate: float = 3e-4,
) -> None:
    """Write a .pth file that the PyTorch implementation loads, with a fresh Adam.

    Args:
        path: of the file.
        params, ema_params: of `model`.
        step: how many updates they have had.
        model: with a `diffusion.unet.UNet`.
        ema_decay, learning_rate: for the PyTorch implementation to go on with.

    Raises:
        ImportError: torch is not installed.
        ValueError: as of `params_to_pytorch`.
    """
    torch = _torch()

    def tensors(tree):
        arrays = params_to_pytorch(tree, model)
        return {name: torch.tensor(array) for name, array in arrays.items()}

    weights = tensors(params)
    adam = torch.optim.Adam([t.clone().requires_grad_() for t in weights.values()], lr=learning_rate)
    torch.save(
        {
            'model': collections.OrderedDict((f'module.{name}', t) for name, t in weights.items()),
            'ema': {
                'decay': ema_decay,
                'num_updates': step,
                'shadow_params': list(tensors(ema_params).values()),
            },
            'optimizer': adam.state_dict(),
            'step': step,
        },
        path,
    )


def _modules(model: Model) -> Iterator[tuple[str, str]]:
    """Name here and kind of every entry of `all_modules`, in order."""
    net = model.network
    if not isinstance(net, unet.UNet):
        raise ValueError(f'the network is {type(net).__name__}; PyTorch checkpoints are of UNet alone')
    yield 'label_embedding', 'embedding'
    yield 'embed_0', 'dense'
    yield 'embed_1', 'dense'
    yield 'conv_in', 'conv'
    width, last = net.width, len(net.multipliers) - 1
    sizes = [model.image_shape[0] // 2**level for level in range(last + 1)]
    skips = [width]
    for level, multiplier in enumerate(net.multipliers):
        out = net.width * multiplier
        for i in range(net.blocks):
            yield f'down_{level}_block_{i}', 'block' if width == out else 'block+skip'
            width = out
            if sizes[level] in net.attention_resolutions:
                yield f'down_{level}_attention_{i}', 'attention'
            skips.append(width)
        if level < last:
            yield f'down_{level}_half', 'block+skip'
            skips.append(width)
    yield 'middle_block_0', 'block'
    yield 'middle_attention', 'attention'
    yield 'middle_block_1', 'block'
    for level in range(last, -1, -1):
        for i in range(net.blocks + 1):
            skips.pop()
            yield f'up_{level}_block_{i}', 'block+skip'  # its input is wider by the skip
        if sizes[level] in net.attention_resolutions:
            yield f'up_{level}_attention', 'attention'
        if level > 0:
            yield f'up_{level}_double', 'block+skip'
    yield 'norm_out', 'norm'
    yield 'conv_out', 'conv'


# Per kind: name there, path below the module here, layout.
_DENSE = (('weight', 'kernel', 'dense'), ('bias', 'bias', 'same'))
_CONV = (('weight', 'kernel', 'conv'), ('bias', 'bias', 'same'))
_CONV1 = (('weight', 'kernel', 'conv1'), ('bias', 'bias', 'same'))
_NORM = (('weight', 'scale', 'same'), ('bias', 'bias', 'same'))
_NIN = (('W', 'kernel', 'same'), ('b', 'bias', 'same'))
_BLOCK = (
    ('GroupNorm_0', 'norm_0', _NORM),
    ('Conv_0', 'conv_0', _CONV),
    ('Dense_0', 'embed', _DENSE),
    ('GroupNorm_1', 'norm_1', _NORM),
    ('Conv_1', 'conv_1', _CONV),
)
_PARTS = {
    'dense': (('', '', _DENSE),),
    'conv': (('', '', _CONV),),
    'norm': (('', '', _NORM),),
    'embedding': (('', '', (('weight', '', 'same'),)),),
    'block': _BLOCK,
    'block+skip': (*_BLOCK, ('Conv_2', 'skip', _CONV1)),
    'attention': (
        ('GroupNorm_0', 'norm', _NORM),
        ('NIN_0', 'query', _NIN),
        ('NIN_1', 'key', _NIN),
        ('NIN_2', 'value', _NIN),
        ('NIN_3', 'out', _NIN),
    ),
}


def _parameters(model: Model) -> Iterator[_Parameter]:
    """Every parameter, in PyTorch's order."""
    for number, (module, kind) in enumerate(_modules(model)):
        for there, here, leaves in _PARTS[kind]:
            for leaf_there, leaf_here, layout in leaves:
                name = '.'.join(filter(None, (f'{_PREFIX}{number}', there, leaf_there)))
                yield _Parameter(name, tuple(filter(None, (module, here, leaf_here))), layout)


def _refuse_differences(found: Iterable, expected: list, model: Model) -> None:
    """Raise an error that names parameters that are missing or that the network does not have."""
    join = lambda name: name if isinstance(name, str) else '/'.join(name)
    missing = [join(name) for name in expected if name not in found]
    unexpected = sorted(map(join, set(found) - set(expected)))
    if missing or unexpected:
        raise ValueError(
            f'the parameters do not belong to {_text(model)}: '
            f'missing {missing[:3] or "none"}, unexpected {unexpected[:3] or "none"}'
        )


def _text(model: Model) -> str:
    """Describe the network's settings in a line."""
    net, names = model.network, ('width', 'multipliers', 'blocks', 'attention_resolutions', 'classes')
    settings = ', '.join(f'{name} {getattr(net, name)}' for name in names)
    return f'this network ({settings}, images {model.image_shape})'


def _torch():
    """PyTorch, which only this module needs."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch checkpoints need torch, which is not installed: pip install 'dpp_jax[pytorch]'"
        ) from error
    return torch
