"""What is written for the PyTorch implementation is the newest model, and nothing else is overwritten."""

import jax
import numpy as np
import pytest

from dpp_jax import pipeline
from dpp_jax.interop import pytorch
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir

torch = pytest.importorskip('torch')


@pytest.mark.parametrize('lost, training, steps', [((), 'finetune', 23), (('finetune',), 'pretrain', 8)])
def test_the_newest_model_is_exported_once(copied_run, tiny_model, capsys, lost, training, steps):
    config, workdir = copied_run
    for name in lost:
        workdir.model(name).rename(workdir.root / name)
    released = artefacts.weights(workdir, training, tiny_model.shapes())
    pipeline.run(config, workdir.root, 'export')
    path = workdir.release / 'model' / f'{training}.pth'
    assert f'{path} now has' in capsys.readouterr().out
    found = pytorch.read_checkpoint(path, tiny_model)
    assert found.pop('step') == steps
    assert found.pop('note').startswith('NOT PRIVATE')  # the run has a seed
    jax.tree.map(np.testing.assert_array_equal, found, released)
    saved = torch.load(path, weights_only=True)
    assert saved['note'].startswith('NOT PRIVATE')
    assert saved['ema']['decay'] == config[training].ema_decay
    assert path.stat().st_mtime == workdir.config.stat().st_mtime
    before = path.read_bytes()
    pipeline.run(config, workdir.root, 'export')  # the same bytes: nothing is in the way
    assert f'{path} has' in capsys.readouterr().out and path.read_bytes() == before


def test_another_file_is_not_overwritten(copied_run, tiny_model, tmp_path_factory):
    config, workdir = copied_run
    path = tmp_path_factory.mktemp('out') / 'ours.safetensors'
    path.write_bytes(b'mine')
    try:
        config.export.path = str(path)
        with pytest.raises(ValueError, match='ours.safetensors is there already, and is not this model'):
            pipeline.run(config, workdir.root, 'export')
        assert path.read_bytes() == b'mine'
        path.unlink()
        pipeline.run(config, workdir.root, 'export')
    finally:
        config.export.path = ''
    assert pytorch.read_checkpoint(path, tiny_model)['step'] == 23
    assert not list((workdir.release / 'model').glob('*.pth'))


def test_without_a_model_there_is_nothing_to_export(tiny_config, tmp_path):
    with pytest.raises(ValueError, match='--stage=export needs a model'):
        pipeline.run(tiny_config(), tmp_path, 'export')
    assert not WorkDir(tmp_path).config.exists()
