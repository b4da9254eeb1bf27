"""Groups as the unit of privacy: who is kept, who is in a batch, and what one group adds to a query."""

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest

from dpp_jax.privacy import groups
from dpp_jax.privacy.poisson import PoissonSampler
from dpp_jax.privacy.queries import QUERIES, MeanQuery

KEY = 2**100 + 17
CLASSES, SHAPE = 3, (4, 5, 1)
SIZES = {'classes': CLASSES, 'dimensions': 20}
ROWS, M = 5, 3
# Of every query, the settings that change what a group may add.
SETTINGS = {
    'mean': [
        {'pixel_center': center, 'clip_norm': norm, 'class_counts': counts}
        for center, norm, counts in itertools.product((0.0, 0.3, 0.5), (None, 0.1, 2.5), ('public', 'noisy'))
    ],
    'mode': [{'bins': bins} for bins in (2, 3, 64)],
    'moments': [{'clip_norm': 2.5, 'class_counts': counts} for counts in ('public', 'noisy')],
    'frequency': [{'features': 16, 'class_counts': counts} for counts in ('public', 'noisy')],
}
EVERY_SETTING = [
    pytest.param(kind, own, id='-'.join([kind, *(f'{name}={value}' for name, value in own.items())]))
    for kind in QUERIES
    for own in SETTINGS[kind]
]

group_numbers = hnp.arrays(
    np.int64, st.integers(1, 40), elements=st.integers(-(2**62), 2**62) | st.integers(0, 5)
)


# --- Who is kept


@settings(deadline=None, derandomize=True)
@given(numbers=group_numbers, m=st.integers(1, 6))
def test_every_group_keeps_its_own_images_up_to_the_public_number(numbers, m):
    members = groups.choose(numbers, m, KEY)
    names = np.unique(numbers)
    assert members.shape == (len(names), m)
    for name, row in zip(names, members):
        kept = row[row >= 0]
        own = np.flatnonzero(numbers == name)
        assert len(kept) == min(m, len(own)) and set(kept) <= set(own)
        assert (np.diff(kept) > 0).all() and (row[len(kept) :] == -1).all()


@settings(deadline=None, derandomize=True)
@given(numbers=group_numbers, m=st.integers(1, 4), data=st.data())
def test_a_groups_choice_knows_nothing_of_other_groups(numbers, m, data):
    """Another group comes, goes, or has other images: each of the others keeps the images that it had."""
    left_out = data.draw(st.sampled_from(sorted(set(numbers.tolist()))))
    stay = np.flatnonzero(numbers != left_out)
    everybody, others = (groups.choose(part, m, KEY) for part in (numbers, numbers[stay]))
    rest = everybody[np.unique(numbers) != left_out]
    if len(stay):
        np.testing.assert_array_equal(np.where(others >= 0, stay[others], -1), rest)


def test_every_image_of_a_group_is_kept_equally_often_and_the_key_decides():
    numbers = np.r_[np.zeros(6, int), np.ones(2, int)]
    kept = np.stack([groups.choose(numbers, 2, key)[0] for key in range(900)])
    counts = np.bincount(kept.ravel(), minlength=6)
    assert (np.abs(counts - 300) < 5 * np.sqrt(300)).all()
    np.testing.assert_array_equal(groups.choose(numbers, 2, KEY), groups.choose(numbers, 2, KEY))


@pytest.mark.parametrize('first', [0, 2**62, -(2**62)])
def test_groups_of_neighboring_numbers_choose_by_themselves(first):
    """Whatever the numbers are: none is rounded."""
    numbers = np.repeat(first + np.arange(40), 12)
    places = groups.choose(numbers, 3, KEY) % 12
    assert len(np.unique(places, axis=0)) > 20


@pytest.mark.parametrize('counts', ['public', 'noisy'])
def test_a_large_group_adds_no_more_to_moments_than_the_sensitivity(counts):
    """Equal images of the largest norm: what rounding adds up over hundreds of them is clipped, too."""
    m = 700
    query = QUERIES['moments'](
        classes=2, dimensions=9, clip_norm=0.7, class_counts=counts, images_per_group=m
    )
    vectors = np.full((1, m, 9), 0.37, np.float32)
    for labels in (np.zeros((1, m), np.int32), np.arange(m, dtype=np.int32)[None] % 2):
        added = query.sums(vectors, labels, np.ones((1, m), bool))
        norm = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(added)))
        assert norm <= query.sensitivity
    assert norm > (0.7 if counts == 'public' else 0.999) * query.sensitivity


def test_a_batch_of_groups_holds_their_images_and_zeros_elsewhere():
    numbers = np.array([7, 3, 7, 3, 7, 9])
    members = groups.choose(numbers, 2, KEY)
    images = np.arange(1, 7, dtype=np.uint8)[:, None] * np.ones((1, 4), np.uint8)
    arrays = {'image': images, 'label': np.arange(1, 7)}
    rows, mask = groups.fetch(arrays, members, np.array([0, 2]), 4)
    assert rows['image'].shape == (4, 2, 4) and mask.shape == (4, 2)
    np.testing.assert_array_equal(mask, [[True, True], [True, False], [False] * 2, [False] * 2])
    np.testing.assert_array_equal(rows['label'], [[2, 4], [6, 0], [0, 0], [0, 0]])
    assert not rows['image'][~mask].any() and (rows['image'][mask] == rows['label'][mask][:, None]).all()
    assert groups.fetch(arrays, members, np.array([], int), 4)[1].shape == (4, 2)


def test_each_group_has_its_own_coin_and_joins_with_all_its_kept_images():
    numbers = np.arange(300) // 3
    members = groups.choose(numbers, 2, KEY)
    sampler = PoissonSampler(size=len(members), probability=0.3, key=KEY, public_size=100)
    together = np.zeros((100, 100))
    for batch in range(2000):
        drawn = sampler.indices(batch)
        rows, mask = groups.fetch({'group': numbers}, members, drawn, 100)
        found = rows['group'][mask]
        np.testing.assert_array_equal(np.unique(found, return_counts=True), [drawn, np.full(len(drawn), 2)])
        together[np.ix_(drawn, drawn)] += 1
    apart = ~np.eye(100, dtype=bool)
    assert (np.abs(np.diag(together) - 600) < 5 * np.sqrt(420)).all()
    assert (np.abs(together[apart] - 180) < 6 * np.sqrt(164)).all()


@pytest.mark.parametrize(
    'change', [{'images': 0}, {'groups': 0}, {'images_per_group': 1.5}, {'groups': None}], ids=repr
)
def test_a_unit_of_bad_numbers_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f'^{name} is .*; it must be a whole number, at least 1'):
        groups.Unit(**{'images': 60, 'groups': 20, 'images_per_group': 2} | change)


@pytest.mark.parametrize('kind', QUERIES)
@pytest.mark.parametrize('m', [0, -1, 2.0, True], ids=repr)
def test_a_query_of_groups_without_images_is_refused(kind, m):
    with pytest.raises(
        ValueError, match=f'^images_per_group is {m!r}; it must be a whole number, at least 1$'
    ):
        QUERIES[kind](**SIZES, images_per_group=m)


def test_what_a_unit_counts():
    image, group = groups.Unit(images=60), groups.Unit(images=60, groups=20, images_per_group=2)
    assert (image.name, image.size, image.used_images, image.places) == ('image', 60, 60, 60)
    assert (group.name, group.size, group.used_images, group.places) == ('group', 20, 40, 40)
    assert groups.Unit(images=60, groups=20, images_per_group=9).used_images == 60


# --- What one group adds to a query


def flat(tree):
    """Return all sums as one vector in float64."""
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@functools.cache
def sums(kind, own, m=M):
    query = QUERIES[kind](**SIZES, **dict(own), images_per_group=m)
    return query, jax.jit(query.sums, static_argnums=3)


sample = {
    'images': hnp.arrays(
        np.uint8, (ROWS, M, *SHAPE), elements=st.integers(0, 255) | st.sampled_from([0, 255])
    ),
    'labels': hnp.arrays(np.int32, (ROWS, M), elements=st.integers(0, CLASSES - 1)),
    'mask': hnp.arrays(bool, (ROWS, M)),
}


@pytest.mark.parametrize(('kind', 'own'), EVERY_SETTING)
def test_one_group_changes_all_sums_together_by_the_sensitivity_at_most(kind, own):
    """Zero-out, add or remove: any images, of any classes and number. Replaced: twice as much."""
    query, total = sums(kind, tuple(own.items()))

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(**sample, alike=st.booleans(), other=hnp.arrays(np.uint8, (M, *SHAPE)))
    def check(images, labels, mask, alike, other):
        if alike:  # the longest sums: one image again and again
            images[-1], labels[-1], mask[-1] = images[-1, 0], labels[-1, 0], True
        without, instead = mask.copy(), images.copy()
        without[-1], instead[-1] = False, other
        with_it, less, replaced = (
            flat(total(*arguments, ROWS))
            for arguments in ((images, labels, mask), (images, labels, without), (instead, labels, mask))
        )
        assert np.linalg.norm(with_it - less) <= query.sensitivity
        assert np.linalg.norm(with_it - replaced) <= 2 * query.sensitivity
        # Groups are sampled as rows: as if the row were not there.
        np.testing.assert_array_equal(flat(total(images[:-1], labels[:-1], mask[:-1], ROWS)), less)

    check()


@pytest.mark.parametrize(('kind', 'own'), EVERY_SETTING)
def test_one_group_attains_the_sensitivity_within_a_hundredth(kind, own):
    query, total = sums(kind, tuple(own.items()))
    rng = np.random.default_rng(7)
    grays = np.broadcast_to(np.arange(256).reshape(-1, 1, 1, 1), (256, *SHAPE)).astype(np.uint8)
    images = np.concatenate([grays, 255 * rng.integers(0, 2, (200, *SHAPE), np.uint8)])
    images = np.repeat(images[:, None, None], M, axis=2)
    labels, mask = np.zeros((1, M), np.int32), np.ones((1, M), bool)
    found = jax.vmap(lambda image: total(image, labels, mask, 1))(images)
    squares = [np.square(np.float64(leaf)).reshape(len(images), -1) for leaf in jax.tree.leaves(found)]
    longest = np.sqrt(np.concatenate(squares, axis=1).sum(axis=1)).max()
    assert 0.99 * query.sensitivity <= longest <= query.sensitivity


@pytest.mark.parametrize(('kind', 'own'), EVERY_SETTING)
def test_more_groups_than_the_public_number_change_the_sums_by_the_sensitivity_at_most(kind, own):
    query, total = sums(kind, tuple(own.items()))
    images, labels = np.full((4 * ROWS, M, *SHAPE), 255, np.uint8), np.zeros((4 * ROWS, M), np.int32)

    def of(count, size):
        mask = np.repeat((np.arange(size) < count)[:, None], M, axis=1)
        return flat(total(images[:size], labels[:size], mask, ROWS))

    sizes = ((ROWS, ROWS, 2 * ROWS), (2 * ROWS, 2 * ROWS - 1, 2 * ROWS), (3 * ROWS, 3 * ROWS, 4 * ROWS))
    changes = [np.linalg.norm(of(count + 1, grown) - of(count, size)) for size, count, grown in sizes]
    assert max(changes) <= query.sensitivity


@pytest.mark.parametrize('kind', QUERIES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(**sample, choice=st.integers(0, 10**6))
def test_groups_of_one_image_and_images_have_the_same_sums_bit_for_bit(kind, images, labels, mask, choice):
    own = tuple(SETTINGS[kind][choice % len(SETTINGS[kind])].items())
    of_groups = sums(kind, own, 1)[1](images[:, :1], labels[:, :1], mask[:, :1], ROWS)
    of_images = sums(kind, own, None)[1](images[:, 0], labels[:, 0], mask[:, 0], ROWS)
    np.testing.assert_array_equal(flat(of_groups), flat(of_images))


@pytest.mark.parametrize('kind', QUERIES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(**sample, other=sample['images'], choice=st.integers(0, 10**6))
def test_what_free_places_hold_changes_no_bit(kind, images, labels, mask, other, choice):
    own = tuple(SETTINGS[kind][choice % len(SETTINGS[kind])].items())
    _, total = sums(kind, own)
    changed = np.where(mask[..., None, None, None], images, other), np.where(mask, labels, 2 - labels)
    np.testing.assert_array_equal(flat(total(*changed, mask, ROWS)), flat(total(images, labels, mask, ROWS)))


def test_the_norm_of_votes_is_that_of_the_histograms():
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 3, (40, M, 6)), rng.integers(0, CLASSES, (40, M))
    mask = rng.random((40, M)) < 0.8
    votes = (values[..., None] == np.arange(3)) & mask[..., None, None]
    by_class = votes[:, :, None] & (labels[:, :, None] == np.arange(CLASSES))[..., None, None]
    expected = np.linalg.norm(by_class.sum(axis=1).reshape(40, -1), axis=1)
    found = jax.jit(groups.norms_of_votes)(values, labels, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_more_pairs_than_an_int32_holds_are_counted():
    """Of a thousand images with 12,288 values each, all alike."""
    counts = np.full((2, 1000), 1000 * 12288, np.int32)
    np.testing.assert_allclose(groups._sum(counts), 1000**2 * 12288.0, rtol=1e-6)


@pytest.mark.parametrize('counts', ['public', 'noisy'])
def test_central_images_of_groups_are_means_over_images(counts):
    """Public: of all images alike. Noisy: the same where groups are alike, whatever was scaled down."""
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (6, 1, *SHAPE), np.uint8), M, axis=1)
    labels = np.repeat(np.arange(6)[:, None] % CLASSES, M, axis=1)
    query = MeanQuery(**SIZES, images_per_group=M, class_counts=counts, pixel_center=0.5)
    images[:] = np.where(images > 127, 255, 0)  # of equal norm
    found = query.estimate(query.sums(images, labels, np.ones((6, M), bool)), 6.0 * M)
    expected = [images[labels == label].mean(0) / 255 for label in range(CLASSES)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
