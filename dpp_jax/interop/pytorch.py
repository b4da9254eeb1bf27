"""Checkpoints of the PyTorch implementation, in and out.

Its network keeps all parts in one list, `model.all_modules.N`, in the order in which they are used. One
walk over that list (`_modules`) says what each part is called here; both directions follow it.
"""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

PyTree = Any
_PREFIX = 'model.all_modules.'


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What decides the order and names of the parameters, see `diffusion.unet.UNet`."""

    image_size: int
    multipliers: tuple[int, ...] = (2, 2)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (14,)
    width: int = 32


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


def params_from_pytorch(named: Mapping[str, np.ndarray], architecture: Architecture) -> PyTree:
    """Parameters of `diffusion.unet.UNet` from PyTorch's by their names.

    Args:
        named: name → array; names may have anything before 'model.all_modules.'. Other entries
            (buffers) are ignored.
        architecture: of the network.

    Returns:
        nested dicts of float32 arrays.

    Raises:
        ValueError: a parameter is missing, or one is there that this network does not have.
    """
    arrays = {
        name[name.index(_PREFIX) :]: np.asarray(array)
        for name, array in named.items()
        if _PREFIX in name
    }
    table = list(_parameters(architecture))
    expected = [parameter.name for parameter in table]
    missing = [name for name in expected if name not in arrays]
    unexpected = sorted(set(arrays) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f'the PyTorch parameters do not belong to {architecture}: '
            f'missing {missing[:3] or "none"}, unexpected {unexpected[:3] or "none"}'
        )
    params: dict = {}
    for parameter in table:
        *folders, leaf = parameter.path
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        array = arrays[parameter.name]
        wanted = {'conv': 4, 'conv1': 4, 'dense': 2}.get(parameter.layout, array.ndim)
        if array.ndim != wanted:
            raise ValueError(f'{parameter.name} has shape {array.shape}; it must have {wanted} axes')
        node[leaf] = np.ascontiguousarray(parameter.to_flax(array), np.float32)
    return params


def params_to_pytorch(
    params: PyTree, architecture: Architecture
) -> 'collections.OrderedDict[str, np.ndarray]':
    """The inverse of `params_from_pytorch`: name → array, in PyTorch's parameter order."""
    named = collections.OrderedDict()
    for parameter in _parameters(architecture):
        node = params
        for part in parameter.path:
            if part not in node:
                raise ValueError(f'params have no {"/".join(parameter.path)}; {architecture} needs it')
            node = node[part]
        named[parameter.name] = np.ascontiguousarray(parameter.to_pytorch(np.asarray(node)))
    return named


def read_checkpoint(path: str | Path, architecture: Architecture) -> dict[str, Any]:
    """A .pth file → {'params', 'ema_params', 'step'}.

    Only tensors and plain containers are read: a file that would run code is refused by torch.
    """
    torch = _torch()
    saved = torch.load(path, map_location='cpu', weights_only=True)
    for key in ('model', 'ema', 'step'):
        if key not in saved:
            raise ValueError(f'{path} has no entry {key!r}; it has {sorted(saved)}')
    model = {name: tensor.numpy() for name, tensor in saved['model'].items()}
    order = [parameter.name for parameter in _parameters(architecture)]
    averages = [tensor.numpy() for tensor in saved['ema']['shadow_params']]
    if len(averages) != len(order):
        raise ValueError(
            f'{path} has {len(averages)} averaged parameters; {architecture} has {len(order)}'
        )
    return {
        'params': params_from_pytorch(model, architecture),
        'ema_params': params_from_pytorch(dict(zip(order, averages)), architecture),
        'step': int(saved['step']),
    }


def write_checkpoint(
    path: str | Path,
    *,
    params: PyTree,
    ema_params: PyTree,
    step: int,
    architecture: Architecture,
    ema_decay: float = 0.999,
    learning_rate: float = 3e-4,
) -> None:
    """A .pth file that the PyTorch implementation loads, with a fresh Adam."""
    torch = _torch()

    def tensors(tree):
        arrays = params_to_pytorch(tree, architecture)
        return {name: torch.tensor(array) for name, array in arrays.items()}

    model = tensors(params)
    adam = torch.optim.Adam([t.clone().requires_grad_() for t in model.values()], lr=learning_rate)
    torch.save(
        {
            'model': collections.OrderedDict((f'module.{name}', t) for name, t in model.items()),
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


def _modules(a: Architecture) -> Iterator[tuple[str, str]]:
    """Name here and kind of every entry of `all_modules`, in order."""
    yield 'label_embedding', 'embedding'
    yield 'embed_0', 'dense'
    yield 'embed_1', 'dense'
    yield 'conv_in', 'conv'
    width, last = a.width, len(a.multipliers) - 1
    sizes = [a.image_size // 2**level for level in range(last + 1)]
    skips = [width]
    for level, multiplier in enumerate(a.multipliers):
        out = a.width * multiplier
        for i in range(a.blocks):
            yield f'down_{level}_block_{i}', 'block' if width == out else 'block+skip'
            width = out
            if sizes[level] in a.attention_resolutions:
                yield f'down_{level}_attention_{i}', 'attention'
            skips.append(width)
        if level < last:
            yield f'down_{level}_half', 'block+skip'
            skips.append(width)
    yield 'middle_block_0', 'block'
    yield 'middle_attention', 'attention'
    yield 'middle_block_1', 'block'
    for level in range(last, -1, -1):
        for i in range(a.blocks + 1):
            skips.pop()
            yield f'up_{level}_block_{i}', 'block+skip'  # its input is wider by the skip
        if sizes[level] in a.attention_resolutions:
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


def _parameters(architecture: Architecture) -> Iterator[_Parameter]:
    """Every parameter, in PyTorch's order."""
    for number, (module, kind) in enumerate(_modules(architecture)):
        for there, here, leaves in _PARTS[kind]:
            for leaf_there, leaf_here, layout in leaves:
                name = '.'.join(filter(None, (f'{_PREFIX}{number}', there, leaf_there)))
                yield _Parameter(name, tuple(filter(None, (module, here, leaf_here))), layout)


def _torch():
    """PyTorch, which only this module needs."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch checkpoints need torch, which is not installed: pip install 'dpp_jax[pytorch]'"
        ) from error
    return torch
