"""The stage: its deterministic chain, and that it asks what the plan accounts for."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.data.images import Images
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages import central
from dpp_jax.training import devices

# What the PyTorch code computes: full images, their halves with noise, and every step after it.
REFERENCE = Path(__file__).parents[1] / 'golden' / 'central_images.npz'


@pytest.fixture(scope='module', params=['gray_28', 'rgb_32'])
def golden(request):
    with np.load(REFERENCE) as data:
        arrays = {k.split('/')[1]: data[k] for k in data if k.startswith(request.param)}
    post = arrays.pop('post_processed')
    arrays = {name: np.moveaxis(array, 1, -1) for name, array in arrays.items()}
    return {**arrays, 'post_processed': post if post.ndim == 4 else post[..., None]}


def test_chain_is_within_one_gray_level_of_the_pytorch_code(golden):
    """Its resizing is (tests/data/resize_test.py); every step after it is the same bit for bit."""
    size = golden['full'].shape[1:3]
    images = central.to_images(golden['noisy_half'], size, post_process=False)
    assert images.dtype == np.uint8
    difference = np.abs(images.astype(int) - golden['uint8'])
    assert difference.max() <= 1 and np.mean(difference == 0) >= 0.999
    filtered = np.stack([central.filter_image(image) for image in golden['uint8']])
    np.testing.assert_array_equal(filtered, golden['post_processed'])
    expected = np.stack([central.filter_image(image) for image in images])
    np.testing.assert_array_equal(central.to_images(golden['noisy_half'], size, post_process=True), expected)


def test_every_query_gets_the_plans_mechanism_and_the_samplers_batch(
    tiny_config, tiny_model, tmp_path, monkeypatch
):
    config = tiny_config(query__queries=3, query__sampling_probability=0.3, query__downsample=2)
    config.seed = None
    workdir, query = WorkDir(tmp_path), build.query(config)
    releases = build.plan(config, tiny_model, noise={DP_SGD: 5.0}).budget.of(CENTRAL_QUERY)
    rng = np.random.default_rng(0)
    count = config.data.train_images
    private = Images(
        images=rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8),
        labels=rng.integers(0, 10, count).astype(np.int32),
    )
    ledger, keys = Ledger(workdir.ledger), Keys(workdir.keys, config.seed)
    seen, asked, noisy = [], [], GaussianMechanism.noisy

    def watched(mechanism, sum_function, noise_key, *, then, compiled):
        asked.append((mechanism, noise_key))

        def and_seen(release):
            program = compiled(release)

            def run(batch, mask, key, index):
                flat = {name: devices.collect(rows) for name, rows in batch.items()}
                seen.append((flat, devices.collect(mask), key, int(index), len(ledger.entries)))
                return program(batch, mask, key, index)

            return run

        return noisy(mechanism, sum_function, noise_key, then=then, compiled=and_seen)

    monkeypatch.setattr(GaussianMechanism, 'noisy', watched)
    recorded_before_release = []

    def before_release():
        assert not list(workdir.release.glob('central_images*'))
        recorded_before_release.append(ledger.count(CENTRAL_QUERY))

    central.run(
        config,
        workdir,
        keys,
        ledger,
        private,
        before_release,
        query=query,
        releases=releases,
        unit=build.unit(config),
    )

    own_keys = keys.of_mechanism(CENTRAL_QUERY, ledger)
    ((mechanism, noise_key),) = asked
    assert mechanism == releases.mechanism and mechanism.sensitivity == query.sensitivity
    assert noise_key.identifier == own_keys.noise.identifier
    sampler = poisson.PoissonSampler(size=count, probability=0.3, key=own_keys.sampling)
    assert len(seen) == 3
    for number, (batch, mask, key, index, recorded) in enumerate(seen):
        drawn = sampler.indices(number)
        assert mask.sum() == len(drawn)
        np.testing.assert_array_equal(batch['images'][mask], private.images[drawn, ::2, ::2])
        np.testing.assert_array_equal(batch['labels'][mask], private.labels[drawn])
        assert not batch['images'][~mask].any() and not batch['labels'][~mask].any()
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(own_keys.noise.keys))
        # The query before is in the ledger when the next one is asked.
        assert index == recorded == number
    assert ledger.entries == [mechanism.entry(number, own_keys.noise.identifier) for number in range(3)]
    assert recorded_before_release == [3]
    with np.load(workdir.central_images) as data:
        assert data['images'].shape == (30, 8, 8, 1)
        np.testing.assert_array_equal(data['labels'], np.tile(np.arange(10), 3))
