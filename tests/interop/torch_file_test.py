"""Files of torch.save are read without PyTorch, in both formats; what is no tensor is refused by name."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch

from dpp_jax.interop import torch_file


@pytest.fixture(name='save', params=['zip', 'legacy'])
def _save(request, tmp_path):
    def save(value):
        torch.save(value, tmp_path / 'x.pth', _use_new_zipfile_serialization=request.param == 'zip')
        return tmp_path / 'x.pth'

    return save


def test_all_kinds_of_tensors_come_back(save):
    base = torch.arange(24.0).reshape(2, 3, 4)
    kinds = ('float64', 'float16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool')
    value = collections.OrderedDict(
        whole=base,
        view=base[1, :, 1:],  # of the same storage, with an offset
        turned=base.permute(2, 0, 1),
        scalar=torch.tensor(7),
        empty=torch.zeros(0, 5),
        parameter=torch.nn.Parameter(torch.ones(3)),
        nested={'list': [torch.zeros(2), 3, 'text', None], 'pair': (1.5, True)},
        **{kind: torch.tensor([0, 1, 5]).to(getattr(torch, kind)) for kind in kinds},
    )
    found = torch_file.read(save(value))
    assert isinstance(found, collections.OrderedDict) and list(found) == list(value)
    for name in ('whole', 'view', 'turned', 'scalar', 'empty', 'parameter', *kinds):
        expected = value[name].detach().numpy()
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)
    assert found['nested']['list'][1:] == [3, 'text', None] and found['nested']['pair'] == (1.5, True)


def test_the_state_of_a_network_is_read(save):
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    found = torch_file.read(save(state))
    assert found.keys() == state.keys()
    np.testing.assert_array_equal(found['0.weight'], state['0.weight'].numpy())


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


@pytest.mark.parametrize(
    'value, name',
    [
        (Evil(), 'posix.mkdir'),
        (torch.nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'),
        ({1, 2}, '__builtin__.set'),
    ],
    ids=['code', 'module', 'set'],
)
def test_anything_else_is_refused_by_name(save, value, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save({'weights': torch.zeros(3), 'x': value})
    with pytest.raises(ValueError, match=f'x.pth is not read: it holds {name}; it may hold tensors'):
        torch_file.read(path)
    assert not (tmp_path / 'evil').exists()


def test_cut_files_are_refused(save):
    path = save({'weights': torch.arange(1000.0)})
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='x.pth is no whole file of torch.save'):
            torch_file.read(path)
    path.write_bytes(pickle.dumps({'weights': 1}))
    with pytest.raises(ValueError, match='no whole file'):
        torch_file.read(path)


@pytest.mark.parametrize(
    'size, stride, offset',
    [((9,), (1,), 0), ((2, 4), (4, 1), 1), ((1000,), (0,), 0), ((2,), (-1,), 5)],
)
def test_a_tensor_stays_within_its_storage(size, stride, offset):
    with pytest.raises(ValueError, match='reaches beyond its storage'):
        torch_file._tensor(np.zeros(8), offset, size, stride)
