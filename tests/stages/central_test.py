"""The query: its deterministic chain bit for bit, its noise, and its sensitivity."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from dpp_jax.privacy import accounting
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.stages import central

# What the PyTorch code computes: full images, their halves with noise, and every step after it.
REFERENCE = Path(__file__).parents[1] / 'golden' / 'central_images.npz'
CLASSES = 3


@pytest.fixture(scope='module', params=['gray_28', 'rgb_32'])
def golden(request):
    with np.load(REFERENCE) as data:
        arrays = {k.split('/')[1]: data[k] for k in data if k.startswith(request.param)}
    post = arrays.pop('post_processed')
    arrays = {name: np.moveaxis(array, 1, -1) for name, array in arrays.items()}
    return {**arrays, 'post_processed': post if post.ndim == 4 else post[..., None]}


def test_chain_equals_the_pytorch_code_bit_for_bit(golden):
    size = golden['full'].shape[1:3]
    np.testing.assert_array_equal(central.nearest(golden['full'], 2), golden['nearest_half'])
    clipped = np.clip(golden['noisy_half'], 0, 1)
    np.testing.assert_array_equal(central.bilinear(clipped, size), golden['bilinear_up'])
    images = central.to_images(golden['noisy_half'], size, post_process=False)
    np.testing.assert_array_equal(images, golden['uint8'])
    images = central.to_images(golden['noisy_half'], size, post_process=True)
    np.testing.assert_array_equal(images, golden['post_processed'])


def mechanism(sensitivity, noise_multiplier=1.0):
    return GaussianMechanism('central_query', noise_multiplier, 0.5, sensitivity, 'test')


@functools.lru_cache
def query(kind, center=0.0, bins=4, noise=1e-9):
    """A jitted query on 4x5 images; with next to no noise by default. Class size 1: sums."""
    if kind == 'mean':
        function = functools.partial(central.mean_query, center=center, class_size=1.0)
    else:
        function = functools.partial(central.mode_query, bins=bins)
    bound = max(center, 1 - center) if kind == 'mean' else 1.0
    d = 4 * 5
    return jax.jit(functools.partial(function, mechanism=mechanism(d**0.5 * bound, noise), classes=CLASSES))


def sample(n, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 4, 5, 1)).astype(np.uint8)
    return images, rng.integers(0, CLASSES, n).astype(np.int32)


@pytest.mark.parametrize('center', [0.0, 0.5])
def test_mean_query_is_the_sum_per_class_without_padding(center):
    images, labels = sample(30)
    mask = np.arange(30) < 21
    result = query('mean', center)(images, labels, mask, jax.random.key(0))
    for label in range(CLASSES):
        rows = images[:21][labels[:21] == label] / 255.0 - center
        np.testing.assert_allclose(result[label], rows.sum(0) + center, atol=1e-4)


def test_mode_query_is_the_most_frequent_value():
    images, labels = sample(60)
    images[labels == 1] = 200  # bin 3 of 4
    result = query('mode')(images, labels, np.ones(60, bool), jax.random.key(0))
    np.testing.assert_array_equal(result[1], np.ones((4, 5, 1), np.float32))
    rows = images[labels == 0] // 64
    counts = np.stack([(rows == b).sum(0) for b in range(4)], -1)
    chosen = np.round(np.asarray(result[0]) * 3).astype(int)
    np.testing.assert_array_equal(np.take_along_axis(counts, chosen[..., None], -1)[..., 0], counts.max(-1))


def test_noisy_counts_give_the_means_of_unequal_classes():
    """A public class size would be wrong by as much as the classes differ."""
    images, labels = sample(60)
    labels = np.where(np.arange(60) < 50, 0, 1 + np.arange(60) % 2).astype(np.int32)
    run = functools.partial(
        central.mean_query,
        mechanism=mechanism(5.0, 1e-9),
        classes=CLASSES,
        center=0.3,
        class_size=20.0,
    )
    arguments = images, labels, np.ones(60, bool), jax.random.key(0)
    means = np.stack([images[labels == c].mean(0) / 255 for c in range(CLASSES)])
    np.testing.assert_allclose(run(*arguments, count_weight=1.5), means, atol=1e-5)
    assert np.abs(run(*arguments) - means).max() > 0.1


@pytest.mark.parametrize('clip_norm', [None, 0.35 * 20**0.5])
def test_a_large_class_is_summed_exactly_and_rounded_once(clip_norm):
    """In any order the same bits; so one image more changes the sum by no more than itself and a rounding."""
    n, center = 20_001, 0.3
    images = np.random.default_rng(0).integers(0, 256, (n, 4, 5, 1)).astype(np.uint8)
    images[0] = 255
    ask = jax.jit(
        functools.partial(
            central.mean_query,
            mechanism=mechanism(1.0, 1e-12),
            classes=1,
            center=center,
            class_size=1.0,
            clip_norm=clip_norm,
        )
    )

    def total(rows, size):
        mask = np.arange(n) < size
        return np.float64(ask(images[rows], np.zeros(n, np.int32), mask, jax.random.key(0)))

    everybody = total(np.arange(n), n)
    np.testing.assert_array_equal(total(np.random.default_rng(1).permutation(n), n), everybody)
    bound = 0.7 * 20**0.5 if clip_norm is None else clip_norm
    change = np.linalg.norm(everybody - total(np.r_[1:n, 0], n - 1))
    assert bound * (1 - 2e-3) < change < bound * (1 + n * 2**-23)


def test_clipping_scales_long_images_to_the_norm_and_leaves_short_ones():
    images, labels = sample(2)
    images[1] = 128
    labels[:] = 0, 1
    result = central.mean_query(
        images,
        labels,
        np.ones(2, bool),
        jax.random.key(0),
        mechanism=mechanism(1.0, 1e-9),
        classes=CLASSES,
        center=0.5,
        class_size=1.0,
        clip_norm=0.7,
    )
    result = np.asarray(result) - 0.5
    centred = images / 255.0 - 0.5
    assert np.linalg.norm(centred[0]) > 0.7 > np.linalg.norm(centred[1])
    expected = centred[0] * 0.7 / np.linalg.norm(centred[0])
    np.testing.assert_allclose(result[0], expected, atol=1e-4)
    np.testing.assert_allclose(result[1], centred[1], atol=1e-6)


@pytest.mark.parametrize('accountant', ['rdp', 'pld'])
def test_a_share_of_epsilon_decides_the_noise_of_the_query(tiny_config, accountant):
    config = tiny_config(query__epsilon_share=0.07, dp__accountant=accountant)
    event = accounting.subsampled_gaussian(
        central.noise_multiplier(config), config.query.sampling_probability, config.query.queries
    )
    spent = accounting.epsilon(event, config.dp.delta, accountant)
    assert 0.999 * 0.7 < spent <= 0.7


def test_a_share_that_no_noise_can_meet_is_named_with_the_least_that_can_be(tiny_config):
    config = tiny_config(query__epsilon_share=0.01, dp__epsilon=0.1, dp__delta=1e-5)
    with pytest.raises(ValueError) as refused:
        central.noise_multiplier(config)
    text = str(refused.value)
    assert 'config.query.epsilon_share is 0.01, which leaves the queries' in text
    assert '= 0.001;' in text  # share x budget
    config.query.epsilon_share = 1.001 * float(text.split('at least ')[-1].split(' ')[0])
    central.noise_multiplier(config)
