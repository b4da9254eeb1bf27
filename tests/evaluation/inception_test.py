"""Inception-v3 is numerically the network of the public FID; its file is read, converted once, and used."""

import json
import zlib

import jax
import numpy as np
import pytest
import torch

from dpp_jax import fid_command, files
from dpp_jax.data.images import Images
from dpp_jax.evaluation import fid, inception, inception_weights
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.keys import Keys
from dpp_jax.stages.evaluate import distances


def made_up(name, shape):
    """A parameter as tests/golden/README.md describes it."""
    r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith('running_var'):
        return np.exp(0.1 * r)
    if name.endswith('bn.weight'):
        return 1 + 0.1 * r
    if name.endswith(('bn.bias', 'running_mean')):
        return 0.1 * r
    return 0.01 * r if name == 'fc.bias' else r * np.float32(np.sqrt(2 / np.prod(shape[1:])))


@pytest.fixture(name='named', scope='module')
def _named(golden_file):
    shapes = json.loads(golden_file('inception_fid_parameters.json').read_text())
    return {name: made_up(name, shape) for name, shape in shapes.items()}


@pytest.fixture(name='file', scope='module')
def _file(named, tmp_path_factory):
    """A file as the public one, and a cache of its own; one image on a device at once."""
    folder = tmp_path_factory.mktemp('inception')
    tensors = {name: torch.tensor(array) for name, array in named.items()}
    tensors['Conv2d_1a_3x3.bn.num_batches_tracked'] = torch.tensor(0)
    torch.save(tensors, folder / 'weights.pth', _use_new_zipfile_serialization=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
        patch.setattr(inception, '_IMAGES_AT_ONCE', {'cpu': 1})
        yield folder / 'weights.pth'


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_features_and_logits_are_those_of_the_public_network(file, golden_file):
    network = inception_weights.load(str(file))
    assert 'NOT its public weights' in network.name
    with np.load(golden_file('inception_fid.npz')) as golden:
        rgb, gray = (golden[name].transpose(0, 2, 3, 1) for name in ('rgb_32', 'gray_28'))
        one_size = np.concatenate([inception.resized(images.astype(np.float32)) for images in (rgb, gray)])
        logits, features = network.outputs(one_size)
        assert relative(features[:3], golden['rgb_32_features']) < 1e-4
        assert relative(features[3:], golden['gray_28_features']) < 1e-4
        logits += network.params['fc']['bias']
        assert relative(logits[:3], golden['rgb_32_logits']) < 1e-4


def test_the_file_is_converted_once_and_the_command_compares_sets(file, tmp_path, monkeypatch, capsys):
    (cached,) = (file.parent / 'cache').rglob('*.npz')
    written = cached.stat().st_mtime_ns
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 7, 1), np.uint8)
    np.savez(tmp_path / 'a.npz', images=images)
    np.savez(tmp_path / 'b.npz', images=images // 4)
    arguments = ['dpp-jax-fid', str(tmp_path / 'a.npz'), str(tmp_path / 'b.npz'), f'--features={file}']
    monkeypatch.setattr('sys.argv', arguments)
    fid_command.entry_point()
    told = capsys.readouterr().out
    assert cached.stat().st_mtime_ns == written
    assert float(told.split()[1]) > 0 and '8 and 8' in told and 'KID' in told
    assert 'NOT its public weights' in told and 'fewer than 10,000' in told


def test_an_evaluation_takes_its_features_and_keeps_those_of_the_private_images(
    file, tiny_config, tmp_path, monkeypatch
):
    config = tiny_config(evaluate__features='inception', evaluate__inception=str(file), data__classes=2)
    workdir, settings = WorkDir(tmp_path), flatten(config.to_dict())
    rng = np.random.default_rng(0)
    images = {
        name: Images(images=rng.integers(0, 256, (number, 8, 8, 1), np.uint8), labels=np.arange(number) % 2)
        for name, number in (('private', 8), ('test', 8), ('synthetic', 8))
    }
    made = artefacts.SyntheticImages(workdir, settings)
    files.write_npz(
        made.paths['images'], images=images['synthetic'].images, labels=images['synthetic'].labels
    )
    workdir.check_fingerprint('train', images['private'])

    def evaluate():
        evaluation = artefacts.Evaluation(workdir, settings)
        evaluation.begin()
        distances.run(
            config,
            workdir,
            Keys(workdir.keys, 1),
            evaluation=evaluation,
            images=made,
            share=images['private'],
            private=lambda: pytest.fail('no network is trained'),
            test=lambda: images['test'],
        )
        return json.loads(workdir.evaluation.read_text())

    results = evaluate()
    network = inception_weights.load(str(file))
    direct = [fid.moments([network.features(images[name].images)]) for name in ('synthetic', 'private')]
    assert results['fid'] == pytest.approx(fid.frechet_distance(*direct[0], *direct[1]), rel=1e-4)
    assert results['fid_features'] == network.name
    assert set(results['scores']) == {'kid', 'precision', 'recall'}
    assert results['memorization']['private_images'] == 8
    # Again, of the same images: those of the private ones are not computed.
    monkeypatch.setattr(distances, '_blocks_of_share', lambda *_: pytest.fail('computed again'))
    workdir.evaluation.unlink()
    again = evaluate()
    assert again['fid'] == pytest.approx(results['fid']) and again['memorization'] == results['memorization']


def test_images_are_resized_as_pytorch_resizes_them():
    images = np.random.default_rng(0).uniform(0, 255, (2, 31, 310, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(images.transpose(0, 3, 1, 2)), (299, 299), mode='bilinear', align_corners=False
    )
    expected = expected.numpy().transpose(0, 2, 3, 1)
    for found in (inception.resized(images), inception.resized(jax.numpy.asarray(images))):
        np.testing.assert_allclose(found, expected, atol=2e-2)
    whole = np.zeros((1, 299, 299, 1), np.float32)
    assert inception.resized(whole) is whole


def test_parameters_of_another_network_are_refused(named):
    def refuses(changed, message):
        with pytest.raises(ValueError, match=message):
            inception.params_from_pytorch(changed)

    refuses({**named, 'layer1.weight': np.zeros(3)}, 'layer1.weight is not part of it')
    refuses({**named, 'fc.weight': np.zeros((1000, 2048))}, r'fc.kernel has shape \(2048, 1000\)')
    refuses({'fc.weight': named['fc.weight']}, 'is missing')
    with pytest.raises(ValueError, match='not the weights of Inception-v3'):
        inception.Inception.from_arrays({'images': np.zeros(3)})


def test_without_a_network_the_public_file_is_not_available(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(inception_weights, 'URL', 'http://127.0.0.1:9/weights.pth')
    assert inception_weights.is_missing() and not inception_weights.is_missing('x.pth')
    with pytest.raises(inception_weights.NotAvailable, match='127.0.0.1:9.* cannot be downloaded'):
        inception_weights.load()


def test_a_download_that_is_not_the_public_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'other.pth').write_bytes(b'something else')
    monkeypatch.setattr(inception_weights, 'URL', (tmp_path / 'other.pth').as_uri())
    with pytest.raises(inception_weights.NotAvailable, match='has the SHA-256 .*it must be 6726825d'):
        inception_weights.load()
    assert not (tmp_path / 'cache').exists()


def test_a_path_to_something_else_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='list.pth holds no parameters by name'):
        inception_weights.load(str(tmp_path / 'list.pth'))
    with pytest.raises(FileNotFoundError):
        inception_weights.load(str(tmp_path / 'none.pth'))
