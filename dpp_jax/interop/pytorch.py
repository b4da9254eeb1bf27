"""Checkpoints of the PyTorch implementation, in and out; as .pth files, or as .safetensors.

Its network keeps all parts in one list, `model.all_modules.N`, in the order in which they are used. One
walk over that list (`_modules`) says what each part is called here; both directions follow it.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from pathlib import Path
import pickle
from typing import Any

from flax import traverse_util
import numpy as np

from dpp_jax.diffusion import unet
from dpp_jax.diffusion.model import Model

PyTree = Any
_PREFIX = 'model.all_modules.'
SUFFIXES = ('.pth', '.safetensors')  # of files that are written
_AVERAGE = 'ema.'  # before the names of averaged weights, where weights come by name alone
_WRAPPER = 'module.'  # before all names of a network that was trained on several devices


class RunsCode(ValueError):
    """A file would run code when it is read; whoever knows who made it may `trust` it."""


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
        named: name → array, with or without 'module.' before a name.
        model: with a `diffusion.unet.UNet`.

    Returns:
        nested dicts of float32 arrays.

    Raises:
        ValueError: parameters are missing, have another shape, do not exist in this network or are there
            twice; or the network is no UNet.
    """
    arrays = {name.removeprefix(_WRAPPER): np.asarray(array) for name, array in named.items()}
    twice = sorted(name for name in arrays if name in named and f'{_WRAPPER}{name}' in named)
    if twice:
        raise ValueError(f'the PyTorch parameter {twice[0]} is there twice, with and without {_WRAPPER!r}')
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


def read_checkpoint(path: str | Path, model: Model, *, trust: bool = False) -> dict[str, Any]:
    """Return {'params', 'ema_params', 'step', 'note'} from a file of weights.

    Args:
        path: a .safetensors file as `write_checkpoint` makes it; or a file of torch.save: a checkpoint with
            the entries `model`, `ema` and `step`, or the weights alone by their names, with or without
            'module.'. The average of weights that come alone is taken to be these, if no names begin with
            'ema.'; their step is 0. The note is that of `write_checkpoint`; None if there is none.
        model: whose weights they are.
        trust: also read a file that holds more than tensors and plain containers. Such a file runs code when
            it is read: whoever made it decides what that does.

    Raises:
        ImportError: torch, or safetensors, is not installed.
        OSError: there is no such file.
        ValueError: it is another kind of file, holds more than tensors, lacks an entry, or has weights of
            another network, see `params_from_pytorch`.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        weights, averages, step, note = _read_safetensors(path)
    else:
        weights, averages, step, note = _read_pth(path, trust)
    order = [parameter.name for parameter in _parameters(model)]
    if averages is not None and not isinstance(averages, Mapping):
        if len(averages) != len(order):
            raise ValueError(
                f'{path} has {len(averages)} averaged parameters; {_text(model)} has {len(order)}'
            )
        averages = dict(zip(order, averages))
    try:
        params = params_from_pytorch(weights, model)
        average = params if averages is None else params_from_pytorch(averages, model)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return {'params': params, 'ema_params': average, 'step': step, 'note': note}


_Arrays = Mapping[str, np.ndarray]


def _read_pth(path: Path, trust: bool) -> tuple[_Arrays, list[np.ndarray] | _Arrays | None, int, str | None]:
    """Return weights, averages (in the order of parameters, or by name) or None, step, and note or None."""
    torch = _torch()
    try:
        saved = torch.load(path, map_location='cpu', weights_only=not trust)
    except pickle.UnpicklingError as error:
        if not trust and 'GLOBAL' in str(error):
            raise RunsCode(
                f'{path} holds more than tensors and plain containers, and would run code when it is read. '
                'If you know who made it, trust it'
            ) from error
        raise ValueError(_other_file(path, error)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(_other_file(path, error)) from error
    if not isinstance(saved, Mapping):
        raise ValueError(
            f'{path} holds a {type(saved).__name__}; it must hold a checkpoint, or weights by name'
        )
    if 'model' not in saved and any(_PREFIX in str(name) for name in saved):
        return *_split(_numpy(saved, path)), 0, None
    missing = [key for key in ('model', 'ema', 'step') if key not in saved]
    if missing:
        raise ValueError(f'{path} has no entry {missing[0]!r}; it has {sorted(map(str, saved))[:10]}')
    weights, ema, step = (saved[key] for key in ('model', 'ema', 'step'))
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path}: 'model' is a {type(weights).__name__}; it must hold weights by name")
    if not isinstance(ema, Mapping) or not isinstance(ema.get('shadow_params'), list | tuple):
        raise ValueError(f"{path}: 'ema' has no list 'shadow_params' of averaged weights")
    if not hasattr(step, '__index__'):
        raise ValueError(f"{path}: 'step' is {step!r}; it must be a whole number")
    averages = _numpy({f'shadow_params[{n}]': each for n, each in enumerate(ema['shadow_params'])}, path)
    note = saved.get('note')
    return _numpy(weights, path), list(averages.values()), int(step), note if isinstance(note, str) else None


def _numpy(tensors: Mapping[str, Any], path: Path) -> _Arrays:
    """Return tensors by name as arrays; entries that are none are refused by name."""
    others = [str(name) for name, tensor in tensors.items() if not hasattr(tensor, 'detach')]
    if others:
        raise ValueError(f'{path}: {others[0]} is no tensor')
    return {str(name): tensor.detach().float().numpy() for name, tensor in tensors.items()}


def _split(arrays: _Arrays) -> tuple[_Arrays, _Arrays | None]:
    """Return weights, and averages by the same names, or None."""
    averages = {name: array for name, array in arrays.items() if name.startswith(_AVERAGE)}
    weights = {name: array for name, array in arrays.items() if name not in averages}
    return weights, {name.removeprefix(_AVERAGE): array for name, array in averages.items()} or None


def _other_file(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f'{path} is no file of torch.save, or is damaged ({reason}); .pth and .safetensors are read'


def _read_safetensors(path: Path) -> tuple[_Arrays, _Arrays | None, int, str | None]:
    """Return weights, averages by name or None, step, and note or None."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            metadata = file.metadata() or {}
            step = int(metadata.get('step', 0))
            arrays = {name: np.float32(file.get_tensor(name)) for name in file.keys()}
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f'{path} is no file of safetensors, or is damaged ({error})') from error
    return *_split(arrays), step, metadata.get('note')


def write_checkpoint(
    path: str | Path,
    *,
    params: PyTree,
    ema_params: PyTree,
    step: int,
    model: Model,
    ema_decay: float = 0.999,
    learning_rate: float = 3e-4,
    note: str | None = None,
) -> None:
    """Write a .pth file that the PyTorch implementation loads, with a fresh Adam; or a .safetensors file.

    Args:
        path: of the file; its suffix, .pth or .safetensors, decides. The latter has the weights by their
            PyTorch names, and their averages by the same names after 'ema.'.
        params, ema_params: of `model`.
        step: how many updates they have had.
        model: with a `diffusion.unet.UNet`.
        ema_decay, learning_rate: for the PyTorch implementation to go on with.
        note: that the file carries: an entry `note`, which the PyTorch implementation passes over.

    Raises:
        ImportError: torch, or safetensors, is not installed.
        ValueError: another suffix; or as of `params_to_pytorch`.
    """
    path = Path(path)
    weights, averages = (params_to_pytorch(tree, model) for tree in (params, ema_params))
    if path.suffix == '.safetensors':
        named = weights | {f'{_AVERAGE}{name}': array for name, array in averages.items()}
        metadata = {'format': 'pt', 'step': str(step)} | ({'note': note} if note else {})
        _safetensors().numpy.save_file(named, path, metadata=metadata)
    elif path.suffix == '.pth':
        saved = _for_pytorch(weights, averages, step=step, ema_decay=ema_decay, learning_rate=learning_rate)
        _torch().save(saved | ({'note': note} if note else {}), path)
    else:
        raise ValueError(f'the checkpoint to write is {path}; its suffix must be {" or ".join(SUFFIXES)}')


def _for_pytorch(
    weights: _Arrays, averages: _Arrays, *, step: int, ema_decay: float, learning_rate: float
) -> dict[str, Any]:
    """Return what the PyTorch implementation saves."""
    torch = _torch()
    tensors = {name: torch.tensor(array) for name, array in weights.items()}
    adam = torch.optim.Adam([t.clone().requires_grad_() for t in tensors.values()], lr=learning_rate)
    return {
        'model': collections.OrderedDict((f'{_WRAPPER}{name}', t) for name, t in tensors.items()),
        'ema': {
            'decay': ema_decay,
            'num_updates': step,
            'shadow_params': [torch.tensor(array) for array in averages.values()],
        },
        'optimizer': adam.state_dict(),
        'step': step,
    }


def _modules(model: Model) -> Iterator[tuple[str, str]]:
    """Name here and kind of every entry of `all_modules`, in order."""
    net = model.network
    if not isinstance(net, unet.UNet):
        raise ValueError(f'the network is {type(net).__name__}; PyTorch checkpoints are of UNet alone')
    if net.patch != 1:
        raise ValueError(f'model.patch is {net.patch}; PyTorch checkpoints are of networks without patches')
    if model.directions is not None:
        raise ValueError("model.around is 'moments'; denoisers of PyTorch checkpoints are around nothing")
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
    """Return PyTorch, which only this module needs."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch checkpoints need torch, which is not installed: pip install 'dpp_jax[pytorch]'"
        ) from error
    return torch


def _safetensors():
    """Return safetensors, which only this module needs."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            ".safetensors files need safetensors, which is not installed: pip install 'dpp_jax[pytorch]'"
        ) from error
    return safetensors
