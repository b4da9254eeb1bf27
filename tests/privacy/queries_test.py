"""Queries: what they add up, that one image changes it by the sensitivity at most, and what they refuse.

The tests of sensitivity know no query by name: one that is added to `QUERIES` is tested with all its
settings.
"""

import dataclasses
import functools
import itertools
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest

from dpp_jax.privacy import groups, poisson
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.privacy.queries import (
    CENTRAL_KINDS,
    QUERIES,
    FrequencyQuery,
    MeanQuery,
    ModeQuery,
    MomentsQuery,
    Query,
    Spread,
    frequency,
    make_query,
    moments,
)
from dpp_jax.privacy.shares import Share
from dpp_jax.training import devices

CLASSES, SHAPE = 3, (4, 5, 1)
DIMENSIONS = 20
SIZES = {'classes': CLASSES, 'dimensions': DIMENSIONS}
OTHER_FIELDS = (*SIZES, 'images_per_group')
ROWS = 6  # of a padded sample
# Numbers around which a setting may do something else; those that a query refuses are left out.
POOL = (None, False, True, 0, 1, 2, 3, 16, 64, 0.1, 0.3, 0.5, 0.7, 2.5, 4.2, 30.0)
# Instead of them, where a number only scales: a program of its own takes longer than others.
FEW = {
    ('MomentsQuery', 'clip_norm'): (0.1, 2.5, 30.0),
    ('FrequencyQuery', 'features'): (2, 64),
    ('FrequencyQuery', 'bandwidth'): (2.5,),
}


# --- Sensitivity, of every query


def values_of(query, name):
    """Return what the setting may be: its default, of POOL, and of the names in the query's own refusal."""
    fields = {field.name: field for field in dataclasses.fields(query)}
    default, found = fields[name].default, []
    candidates = [] if default is dataclasses.MISSING else [default]
    try:
        query(**SIZES, **{name: 'no such name'})
    except ValueError as error:
        candidates += re.findall(r"'(\w+)'", str(error).partition('must be')[2])
    for value in (*candidates, *FEW.get((query.__name__, name), POOL)):
        try:
            query(**SIZES, **{name: value})
        except ValueError:
            continue
        # True is no other 1 to Python.
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in found):
            found.append(value)
    return found


@functools.cache
def all_settings(kind):
    """Return every combination of the values of a query's own settings."""
    query = QUERIES[kind]
    names = [field.name for field in dataclasses.fields(query) if field.name not in OTHER_FIELDS]
    return [dict(zip(names, values)) for values in itertools.product(*(values_of(query, n) for n in names))]


EVERY_SETTING = [
    pytest.param(kind, own, id='-'.join([kind, *(f'{name}={value}' for name, value in own.items())]))
    for kind in QUERIES
    for own in all_settings(kind)
]


def flat(tree):
    """Return all sums as one vector in float64."""
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def with_one_more(images, labels, mask, place):
    """Return the sample with its last row, which is padding, moved to `place` and counted."""
    order = np.insert(np.arange(ROWS - 1), place, ROWS - 1)
    return images[order], labels[order], np.insert(mask[:-1], place, True)


image_bytes = hnp.arrays(np.uint8, (ROWS, *SHAPE), elements=st.integers(0, 255))
extremes = hnp.arrays(np.uint8, (ROWS, *SHAPE), elements=st.sampled_from([0, 255]))


@pytest.mark.parametrize(('kind', 'own'), EVERY_SETTING)
def test_one_image_changes_all_sums_together_by_the_sensitivity_at_most(kind, own):
    """Of random and of extreme images, with any labels, beside any others and any padding."""
    query = QUERIES[kind](**SIZES, **own)
    bound, sums = query.sensitivity, jax.jit(query.sums)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(
        images=image_bytes | extremes,
        labels=hnp.arrays(np.int32, ROWS, elements=st.integers(0, CLASSES - 1)),
        count=st.integers(0, ROWS - 1),
        place=st.integers(0, ROWS - 1),
    )
    def check(images, labels, count, place):
        less = images, labels, np.arange(ROWS) < count
        more = with_one_more(*less, min(place, count))
        assert np.linalg.norm(flat(sums(*more)) - flat(sums(*less))) <= bound

    check()


@pytest.mark.parametrize(('kind', 'own'), EVERY_SETTING)
def test_an_image_more_than_the_public_number_changes_the_sums_by_the_sensitivity_at_most(kind, own):
    """The batch's arrays grow, where their number is not public; unit and bound must not."""
    query = QUERIES[kind](**SIZES, **own)
    images, labels = np.full((4 * ROWS, *SHAPE), 255, np.uint8), np.zeros(4 * ROWS, np.int32)

    program = jax.jit(query.sums, static_argnums=3)

    def sums(count, size):
        return flat(program(images[:size], labels[:size], np.arange(size) < count, ROWS))

    changes = [
        np.linalg.norm(sums(count + 1, grown) - sums(count, size))
        for size, count, grown in (
            (ROWS, ROWS, 2 * ROWS),
            (2 * ROWS, 2 * ROWS - 1, 2 * ROWS),
            (3 * ROWS, 3 * ROWS, 4 * ROWS),
        )
    ]
    assert max(changes) <= query.sensitivity


def candidates():
    """Return images of which one must be the longest contribution: all grays, corners of the cube, random."""
    rng = np.random.default_rng(7)
    grays = np.broadcast_to(np.arange(256).reshape(-1, 1, 1, 1), (256, *SHAPE))
    corners = 255 * rng.integers(0, 2, (200, *SHAPE))
    anything = rng.integers(0, 256, (200, *SHAPE))
    return np.concatenate([grays, corners, anything]).astype(np.uint8)


@pytest.mark.parametrize(('kind', 'own'), EVERY_SETTING)
def test_one_image_attains_the_sensitivity_within_a_hundredth(kind, own):
    """More noise than one image can ask for would be noise for nothing."""
    query = QUERIES[kind](**SIZES, **own)
    images, mask = candidates()[:, None], np.ones(1, bool)
    contributions = jax.vmap(lambda image: query.sums(image, np.zeros(1, np.int32), mask))(images)
    squares = [
        np.square(np.float64(leaf)).reshape(len(images), -1) for leaf in jax.tree.leaves(contributions)
    ]
    longest = np.sqrt(np.concatenate(squares, axis=1).sum(axis=1)).max()
    assert 0.99 * query.sensitivity <= longest <= query.sensitivity


@pytest.mark.parametrize('kind', QUERIES)
def test_a_query_has_settings_that_are_tried(kind):
    """The search of the tests above finds the defaults, names, and numbers on both sides of a bound."""
    assert len(all_settings(kind)) >= 1
    assert issubclass(QUERIES[kind], Query)
    if kind == 'mean':
        for name, some in {
            'class_counts': ['public', 'noisy'],
            'clip_norm': [None, 0.1, 2.5, 30.0],
            'pixel_center': [0.0, 0.3, 0.5],
        }.items():
            assert set(some) <= {own[name] for own in all_settings(kind)}
    if kind == 'mode':
        assert {2, 3, 16, 64} <= {own['bins'] for own in all_settings(kind)}


@pytest.mark.parametrize('kind', QUERIES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    images=image_bytes,
    other=image_bytes,
    count=st.integers(0, ROWS),
    label=st.integers(0, CLASSES - 1),
    choice=st.integers(0, 10**6),
)
def test_what_padding_holds_changes_no_bit(kind, images, other, count, label, choice):
    own = all_settings(kind)[choice % len(all_settings(kind))]
    query = QUERIES[kind](**SIZES, **own)
    mask = np.arange(ROWS) < count
    labels = np.arange(ROWS, dtype=np.int32) % CLASSES
    padded = np.where(mask[:, None, None, None], images, other), np.where(mask, labels, label)
    np.testing.assert_array_equal(flat(query.sums(*padded, mask)), flat(query.sums(images, labels, mask)))
    if count == 0:
        assert not flat(query.sums(*padded, mask)).any()


@pytest.mark.parametrize('kind', QUERIES)
def test_sums_and_estimate_have_one_row_for_each_class(kind):
    """And central images the shape of images, also of an empty sample."""
    query = make_query(kind, **SIZES, settings={})
    images, labels = np.zeros((ROWS, *SHAPE), np.uint8), np.zeros(ROWS, np.int32)
    total = query.sums(images, labels, np.zeros(ROWS, bool))
    for leaf in jax.tree.leaves(total):
        assert leaf.dtype == np.float32 and leaf.shape[0] == CLASSES
    estimate = query.estimate(total, 2.0)
    for leaf in jax.tree.leaves(estimate):
        assert leaf.dtype == np.float32 and leaf.shape[0] == CLASSES
    if kind in CENTRAL_KINDS:
        assert estimate.shape == (CLASSES, *SHAPE)


# --- With a mechanism


def make_mechanism(query, noise_multiplier=1e-9, **changes):
    fields = dict(
        name='query',
        noise_multiplier=noise_multiplier,
        sampling_probability=0.5,
        sensitivity=query.sensitivity,
    )
    return GaussianMechanism(**(fields | changes))


def ask(query, images, labels, mask, expected_size=float(CLASSES)):
    """Return central images, with next to no noise. Expected size CLASSES: a class's size is 1."""
    noise_key = NoiseKey(identifier='test', keys=jax.random.split(jax.random.key(0), 4))
    noisy = query.noisy(make_mechanism(query), noise_key, expected_size, len(images))
    return np.asarray(noisy(0, {'images': images, 'labels': labels}, mask)[0])


@pytest.mark.parametrize('kind', QUERIES)
def test_the_noisy_query_is_the_estimate_of_sums_with_noise_and_has_its_entry(kind):
    query = make_query(kind, **SIZES, settings={})
    images, labels = random_images(ROWS)
    mask = np.arange(ROWS) < 4
    mechanism = make_mechanism(query, noise_multiplier=0.5)
    noise_key = NoiseKey(identifier='k', keys=jax.random.split(jax.random.key(1), 4))
    result, entry = query.noisy(mechanism, noise_key, 6.0, ROWS)(
        2, {'images': images, 'labels': labels}, mask
    )
    plain = mechanism.noisy(
        lambda total: (total, None), noise_key, then=lambda noisy, *_: query.estimate(noisy, 6.0)
    )
    expected, expected_entry = plain(2, query.sums(images, labels, mask))
    np.testing.assert_allclose(flat(result), flat(expected), rtol=1e-5, atol=1e-5)
    assert entry == expected_entry == mechanism.entry(2, 'k')
    assert entry.sensitivity == query.sensitivity


@pytest.mark.parametrize('kind', QUERIES)
def test_a_mechanism_with_too_little_noise_for_the_query_is_refused(kind):
    query = make_query(kind, **SIZES, settings={})
    noise_key = NoiseKey(identifier='test', keys=jax.random.split(jax.random.key(0), 4))
    short = 0.999 * query.sensitivity
    with pytest.raises(ValueError, match=f'^sensitivity is {short!r}; it must be at least '):
        query.noisy(make_mechanism(query, sensitivity=short), noise_key, 1.0, ROWS)


# --- What the mean and the mode are


def random_images(n, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *SHAPE)).astype(np.uint8)
    return images, rng.integers(0, CLASSES, n).astype(np.int32)


@pytest.mark.parametrize('center', [0.0, 0.5])
def test_mean_query_is_the_sum_per_class_without_padding(center):
    images, labels = random_images(30)
    mask = np.arange(30) < 21
    result = ask(MeanQuery(**SIZES, pixel_center=center), images, labels, mask)
    for label in range(CLASSES):
        rows = images[:21][labels[:21] == label] / 255.0 - center
        np.testing.assert_allclose(result[label], rows.sum(0) + center, atol=1e-4)


def test_mode_query_is_the_most_frequent_value():
    images, labels = random_images(60)
    images[labels == 1] = 200  # bin 3 of 4
    result = ask(ModeQuery(**SIZES, bins=4), images, labels, np.ones(60, bool))
    np.testing.assert_array_equal(result[1], np.ones(SHAPE, np.float32))
    rows = images[labels == 0] // 64
    counts = np.stack([(rows == b).sum(0) for b in range(4)], -1)
    chosen = np.round(result[0] * 3).astype(int)
    np.testing.assert_array_equal(np.take_along_axis(counts, chosen[..., None], -1)[..., 0], counts.max(-1))


def test_noisy_counts_give_the_means_of_unequal_classes():
    """A public class size would be wrong by as much as the classes differ."""
    images, labels = random_images(60)
    labels = np.where(np.arange(60) < 50, 0, 1 + np.arange(60) % 2).astype(np.int32)
    means = np.stack([images[labels == c].mean(0) / 255 for c in range(CLASSES)])
    found = {
        counts: ask(
            MeanQuery(**SIZES, pixel_center=0.3, class_counts=counts), images, labels, np.ones(60, bool), 60.0
        )
        for counts in ('noisy', 'public')
    }
    np.testing.assert_allclose(found['noisy'], means, atol=1e-5)
    assert np.abs(found['public'] - means).max() > 0.1


@pytest.mark.parametrize('clip_norm', [None, 0.35 * 20**0.5])
def test_a_large_class_is_summed_exactly_and_rounded_once(clip_norm):
    """In any order the same bits; one image more changes the sum by its bound at most, rounding included."""
    n, center = 20_001, 0.3
    images = np.random.default_rng(0).integers(0, 256, (n, *SHAPE)).astype(np.uint8)
    images[0] = 255
    query = MeanQuery(classes=1, dimensions=DIMENSIONS, pixel_center=center, clip_norm=clip_norm)
    sums = jax.jit(query.sums)

    def total(rows, size):
        return np.float64(sums(images[rows], np.zeros(n, np.int32), np.arange(n) < size))

    everybody = total(np.arange(n), n)
    np.testing.assert_array_equal(total(np.random.default_rng(1).permutation(n), n), everybody)
    bound = 0.7 * 20**0.5 if clip_norm is None else clip_norm
    change = np.linalg.norm(everybody - total(np.r_[1:n, 0], n - 1))
    assert bound * (1 - 2e-3 - n * 2**-23) < change <= bound


def test_clipping_scales_long_images_to_the_norm_and_leaves_short_ones():
    images, labels = random_images(2)
    images[1] = 128
    labels[:] = 0, 1
    query = MeanQuery(**SIZES, pixel_center=0.5, clip_norm=0.7)
    result = ask(query, images, labels, np.ones(2, bool)) - 0.5
    centered = images / 255.0 - 0.5
    assert np.linalg.norm(centered[0]) > 0.7 > np.linalg.norm(centered[1])
    expected = centered[0] * 0.7 / np.linalg.norm(centered[0])
    np.testing.assert_allclose(result[0], expected, atol=1e-4)
    np.testing.assert_allclose(result[1], centered[1], atol=1e-6)


# --- What moments are


def make_moments(classes=CLASSES, dimensions=12, **settings):
    """A query and vectors, of which none is clipped unless `settings` say so."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((90, dimensions)).astype(np.float32)
    labels = np.where(np.arange(90) < 50, 0, 1 + np.arange(90) % 2).astype(np.int32)
    query = MomentsQuery(classes=classes, dimensions=dimensions, **{'clip_norm': 10.0} | settings)
    return query, vectors, labels


@pytest.mark.parametrize('counts', ['public', 'noisy'])
def test_moments_are_mean_and_second_moment_around_the_center(counts):
    center = np.random.default_rng(6).standard_normal((CLASSES, 12)).astype(np.float32)
    query, vectors, labels = make_moments(center=center, class_counts=counts)
    mask = np.arange(90) < 80
    means, seconds = query.estimate(query.sums(vectors, labels, mask), 80.0)
    for label in range(CLASSES):
        own = (vectors - center[label])[mask & (labels == label)]
        size = len(own) if counts == 'noisy' else 80 / CLASSES
        np.testing.assert_allclose(means[label], own.sum(0) / size, atol=1e-3)
        np.testing.assert_allclose(seconds[label], own.T @ own / size, atol=2e-3)


@pytest.mark.parametrize('counts', ['public', 'noisy'])
def test_no_vector_adds_more_than_the_sensitivity_wherever_it_lies_around_the_center(counts):
    """Short ones, and those that are clipped: √(f |u|² + (1 - f) |u|⁴) with the count beside it."""
    center = np.random.default_rng(6).standard_normal((CLASSES, 12)).astype(np.float32)
    query, vectors, _ = make_moments(center=center, class_counts=counts, clip_norm=3.0)
    lengths = np.linspace(0, 6, 20)
    added = []
    for length, vector in zip(lengths, vectors):
        own = center[1] + length * vector / np.linalg.norm(vector)
        added.append(np.linalg.norm(flat(query.sums(own[None], np.ones(1, np.int32), np.ones(1, bool)))))
    u, count = np.minimum(lengths / 3.0, 1), 0.2 if counts == 'noisy' else 0.0
    expected = np.sqrt((0.2 * u**2 + 0.8 * u**4 + count**2) / (1 + count**2))
    np.testing.assert_allclose(added, expected, atol=1e-4)
    assert max(added) <= query.sensitivity


def test_noise_of_moments_is_symmetric_isotropic_and_as_large_as_the_query_says():
    query, vectors, labels = make_moments(classes=40)
    key = NoiseKey(identifier='k', keys=jax.random.split(jax.random.key(1), 4))
    ask = query.noisy(make_mechanism(query, noise_multiplier=3.0), key, 90.0, 90)
    means, seconds = ask(0, {'images': vectors, 'labels': labels}, np.zeros(90, bool))[0]
    seconds = np.asarray(seconds)
    np.testing.assert_array_equal(seconds, np.swapaxes(seconds, 1, 2))
    of_mean, off_diagonal = query.noise(3.0, 90 / 40)
    assert np.std(means) == pytest.approx(of_mean, rel=0.1)
    assert np.std(seconds[:, *np.triu_indices(12, 1)]) == pytest.approx(off_diagonal, rel=0.05)
    assert np.std(seconds[:, np.arange(12), np.arange(12)]) == pytest.approx(2**0.5 * off_diagonal, rel=0.1)


@pytest.mark.parametrize('counts', ['public', 'noisy'])
def test_frequencies_are_mean_features_whose_products_are_a_gaussian_kernel(counts):
    query = FrequencyQuery(**SIZES, features=20_000, bandwidth=0.5, class_counts=counts)
    images, labels = random_images(60)
    pixels = images.reshape(60, -1).astype(np.float32) / 255
    features = np.asarray(query.embed(pixels))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    distances = np.linalg.norm(pixels[:, None] - pixels, axis=2)
    width = 0.5 * DIMENSIONS**0.5
    np.testing.assert_allclose(features @ features.T, np.exp(-(distances**2) / 2 / width**2), atol=0.04)
    mask = np.arange(60) < 50
    found = np.asarray(query.estimate(query.sums(images, labels, mask), 50.0))
    for label in range(CLASSES):
        own = features[mask & (labels == label)]
        size = len(own) if counts == 'noisy' else 50 / CLASSES
        np.testing.assert_allclose(found[label], own.sum(0) / size, atol=1e-5)


def test_frequencies_in_parts_are_those_of_all_rows_at_once(monkeypatch):
    query = FrequencyQuery(**SIZES, features=64)
    images, labels = random_images(90)
    mask = np.arange(90) < 77
    expected = flat(query.sums(images, labels, mask))
    monkeypatch.setattr(frequency, '_FEATURES_AT_ONCE', 64 * 13)
    np.testing.assert_array_equal(flat(query.sums(images, labels, mask)), expected)


@pytest.mark.parametrize('dimensions', [20, 784, 12288])
def test_directions_are_whole_numbers_whose_products_with_pixels_are_exact(dimensions):
    whole, unit = frequency._directions(50, dimensions)
    np.testing.assert_array_equal(whole, np.round(whole))
    assert 255 * np.abs(whole).sum(axis=0, dtype=np.float64).max() <= 2**24
    assert np.std(unit * whole) == pytest.approx(1, abs=0.05) and unit <= 0.5


def test_noise_of_frequencies_is_as_large_as_the_query_says():
    query = FrequencyQuery(classes=4, dimensions=DIMENSIONS, features=1000, class_counts='noisy')
    key = NoiseKey(identifier='k', keys=jax.random.split(jax.random.key(1), 4))
    total = np.zeros((4, 1000), np.float32), np.full(4, 5000 * query._weights[1], np.float32)
    noisy, _ = make_mechanism(query, noise_multiplier=0.5).noisy(
        lambda total: (total, None), key, then=lambda noisy, *_: query.estimate(noisy, 0.0)
    )(0, total)
    assert np.std(noisy) == pytest.approx(query.noise(0.5, 5000.0), rel=0.05)


def test_a_vector_that_is_not_finite_counts_as_the_center():
    query, vectors, labels = make_moments(class_counts='noisy')
    bad, good = vectors.copy(), vectors.copy()
    bad[3, 2], bad[4], good[3:5] = np.nan, np.inf, 0
    mask = np.ones(90, bool)
    np.testing.assert_array_equal(flat(query.sums(bad, labels, mask)), flat(query.sums(good, labels, mask)))


def test_moments_in_parts_are_those_of_all_rows_at_once(monkeypatch):
    query, vectors, labels = make_moments(clip_norm=2.0)
    mask = np.arange(90) % 7 > 0
    expected = flat(query.sums(vectors, labels, mask))
    monkeypatch.setattr(moments, '_PRODUCTS_AT_ONCE', 90 * 13)  # parts of 13 rows, the last one of 12
    np.testing.assert_array_equal(flat(query.sums(vectors, labels, mask)), expected)


# --- What is refused


@pytest.mark.parametrize(
    ('query', 'field', 'value', 'allowed'),
    [
        (MeanQuery, 'classes', 0, 'a whole number, at least 1'),
        (MeanQuery, 'classes', 2.5, 'a whole number, at least 1'),
        (ModeQuery, 'dimensions', 0, 'a whole number, at least 1'),
        (ModeQuery, 'dimensions', None, 'a whole number, at least 1'),
        (MeanQuery, 'pixel_center', -0.1, r'a number in \[0, 0.5\]'),
        (MeanQuery, 'pixel_center', 0.7, r'a number in \[0, 0.5\]'),
        (MeanQuery, 'pixel_center', float('nan'), r'a number in \[0, 0.5\]'),
        (MeanQuery, 'pixel_center', True, r'a number in \[0, 0.5\]'),
        (MeanQuery, 'clip_norm', 0.0, r'a number in \[1e-6, 1e6\], or not set'),
        (MeanQuery, 'clip_norm', 1e-7, r'a number in \[1e-6, 1e6\], or not set'),
        (MeanQuery, 'clip_norm', float('inf'), r'a number in \[1e-6, 1e6\], or not set'),
        (MeanQuery, 'class_counts', 'exact', "'public' or 'noisy'"),
        (MomentsQuery, 'clip_norm', None, r'a number in \[1e-6, 1e6\]'),
        (MomentsQuery, 'clip_norm', 0.0, r'a number in \[1e-6, 1e6\]'),
        (MomentsQuery, 'class_counts', 'exact', "'public' or 'noisy'"),
        (MomentsQuery, 'center', 0.5, r'finite float32 \(3, 20\), or not set'),
        (FrequencyQuery, 'features', 3, r'an even whole number in \[2, 100000\]'),
        (FrequencyQuery, 'features', True, r'an even whole number in \[2, 100000\]'),
        (FrequencyQuery, 'features', 100_002, r'an even whole number in \[2, 100000\]'),
        (FrequencyQuery, 'bandwidth', 0.0, r'a number in \[0.001, 1000\]'),
        (FrequencyQuery, 'bandwidth', float('nan'), r'a number in \[0.001, 1000\]'),
        (FrequencyQuery, 'class_counts', 'exact', "'public' or 'noisy'"),
        (FrequencyQuery, 'dimensions', 70_000, 'at most 65536'),
        (ModeQuery, 'bins', 1, r'a whole number in \[2, 256\]'),
        (ModeQuery, 'bins', 257, r'a whole number in \[2, 256\]'),
        (ModeQuery, 'bins', 2.0, r'a whole number in \[2, 256\]'),
        (ModeQuery, 'bins', True, r'a whole number in \[2, 256\]'),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(query, field, value, allowed):
    with pytest.raises(ValueError, match=f'^{field} is {value!r}; it must be {allowed}$'):
        query(**{**SIZES, field: value})


@pytest.mark.parametrize('kind', QUERIES)
def test_a_query_takes_names_only_and_cannot_be_changed(kind):
    with pytest.raises(TypeError):
        QUERIES[kind](CLASSES, DIMENSIONS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        QUERIES[kind](**SIZES).dimensions = 1


def test_an_unknown_kind_is_refused_with_those_that_are_known():
    names = ' or '.join(map(repr, QUERIES))
    with pytest.raises(ValueError, match=f"^kind is 'median'; it must be {names}$"):
        make_query('median', **SIZES, settings={})


def test_a_query_takes_the_settings_that_are_its_own():
    """And lets those of other kinds be, unless they promise what it cannot keep."""
    shared = {'pixel_center': 0.5, 'clip_norm': 2.0, 'class_counts': 'noisy', 'bins': 7, 'queries': 3}
    mean = make_query('mean', **SIZES, settings=shared)
    assert mean == MeanQuery(**SIZES, pixel_center=0.5, clip_norm=2.0, class_counts='noisy')
    kept = shared | {'clip_norm': None, 'class_counts': 'public'}
    assert make_query('mode', **SIZES, settings=kept) == ModeQuery(**SIZES, bins=7)


@pytest.mark.parametrize(
    ('promise', 'text'),
    [
        ({'clip_norm': 2.0}, 'clip_norm is 2.0, which the mode query cannot use; it must be None'),
        ({'class_counts': 'noisy'}, "class_counts is 'noisy', which the mode query cannot use"),
    ],
)
def test_a_promise_that_a_query_cannot_keep_is_refused(promise, text):
    with pytest.raises(ValueError, match=f'^{text}'):
        make_query('mode', **SIZES, settings=promise)


# --- Over devices and processes


def spread_release(query, rows, device_rows):
    """The query's program for so many devices."""
    return query.noisy(
        make_mechanism(query, noise_multiplier=0.3),
        NoiseKey(identifier='k', keys=jax.random.split(jax.random.key(1), 4)),
        6.0,
        rows,
        spread=Spread(rows=device_rows, axis=devices.AXIS),
        compiled=lambda function: devices.parallel(function, in_axes=(0, 0, None, None)),
    )


def central_images(query, release, arrays, members, indices, processes, number, rows):
    """What `central` gets: every process fetches its share, and each of its devices takes a part of that."""
    parts = []
    people = np.arange(len(arrays['labels'])) % len(members)
    with devices.limited_to(number):
        for index in range(processes):
            share = Share(index, processes)
            keywords = {'capacity': number * -(-rows // number), 'share': share, 'rows': rows}
            own = share.images(people)
            own_arrays = {name: array[own] for name, array in arrays.items()}
            if query.images_per_group:
                fetched = groups.fetch(own_arrays, members, indices, own=own, **keywords)
            else:
                fetched = poisson.fetch(own_arrays, indices, **keywords)
            parts.append(devices.deal_own(fetched))
    result, _ = release(0, *jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))
    for leaf in jax.tree.leaves(result):
        assert (leaf == leaf[0]).all()  # the same noise on each
    return flat(jax.tree.map(lambda leaf: leaf[0], result))


@pytest.mark.parametrize('m', [None, 3])
@pytest.mark.parametrize(
    ('kind', 'own'),
    [
        ('mean', {'clip_norm': 1.5, 'class_counts': 'noisy', 'pixel_center': 0.5}),
        ('mode', {'bins': 2}),
        ('moments', {'clip_norm': 300.0, 'class_counts': 'noisy'}),
        ('frequency', {'features': 50, 'class_counts': 'noisy'}),
    ],
)
def test_central_images_are_the_same_bits_on_any_devices_of_any_processes(kind, own, m):
    """Also of a sample with more rows than a sum has room for, and if one process has all rows."""
    query = QUERIES[kind](**SIZES, **own, images_per_group=m)
    units, rows = 40, 15
    images, labels = random_images(units * (m or 1), seed=3)
    arrays = {'images': images, 'labels': labels}
    members = np.arange(units)[:, None] + units * np.arange(m or 1)
    members[::3, 1:] = -1
    samples = np.arange(5, 18), np.arange(units), np.arange(0, units, 4), np.arange(0)
    found = []
    for processes, number in ((1, 1), (1, 8), (2, 4), (4, 2)):
        with devices.limited_to(processes * number):
            release = spread_release(query, rows, -(-rows // number))
        found.append(
            [
                central_images(query, release, arrays, members, indices, processes, number, rows)
                for indices in samples
            ]
        )
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    assert len({images.tobytes() for images in found[0]}) == len(samples)
