"""Shares of a batch: together the whole batch, of one shape everywhere, wherever its rows are."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dpp_jax.privacy import groups, poisson, shares
from dpp_jax.privacy.shares import Share
from dpp_jax.training import devices, steps


@st.composite
def dealt_batches(draw):
    """(number of units, batch, number of shares): fewer units than shares, all rows in one share, none."""
    size, count = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    batch = draw(st.sets(st.integers(0, size - 1)))
    if draw(st.booleans()):
        batch = {unit for unit in batch if unit % count == draw(st.integers(0, count - 1))}
    return size, np.array(sorted(batch), np.int64), count


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dealt=dealt_batches(), number=st.sampled_from([1, 2, 3, 8]), microbatch=st.integers(1, 4), data=st.data()
)
def test_shares_hold_the_whole_batch_once_in_arrays_of_one_shape(dealt, number, microbatch, data):
    """Every row is visited by a microbatch, of which every process has the same number."""
    size, indices, count = dealt
    capacity = number * microbatch * data.draw(st.integers(1, 3))
    rows = data.draw(st.none() | st.integers(1, 60))
    images, labels = np.arange(1, size + 1, dtype=np.uint8)[:, None], np.arange(size)
    met, shapes = [], set()
    with devices.limited_to(number):
        for index in range(count):
            share = Share(index, count)
            own = np.arange(size)[index::count]
            assert share.size(size) == len(own)
            batch = steps.make_batch(images[own], labels[own], indices, capacity, share=share, rows=rows)
            used = steps.used_microbatches(share.largest(indices), microbatch)
            shapes.add((len(batch['mask']), int(used)))
            dealt_rows = devices.deal_own(batch)
            visited = {name: leaf[:, : used * microbatch] for name, leaf in dealt_rows.items()}
            assert visited['mask'].sum() == dealt_rows['mask'].sum()
            here = visited['index'][visited['mask']]
            np.testing.assert_array_equal(visited['label'][visited['mask']], here)
            np.testing.assert_array_equal(visited['image'][visited['mask']][:, 0], here + 1)
            assert not batch['image'][~batch['mask']].any()
            met.append(here)
    np.testing.assert_array_equal(np.sort(np.concatenate(met)), indices)
    ((arrays, _),) = shapes
    is_large = rows is not None and len(indices) > rows
    assert arrays % capacity == 0 and (arrays == capacity) == (
        max(map(len, met)) <= capacity and not is_large
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    people=st.lists(st.integers(-3, 5), min_size=1, max_size=40),
    m=st.integers(1, 3),
    count=st.integers(1, 7),
    data=st.data(),
)
def test_shares_of_groups_hold_their_images_and_nobody_elses(people, m, count, data):
    people = np.array(people)
    members = groups.choose(people, m, key=3)
    indices = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(members), max_size=len(members))))
    everything = steps.make_batch(people, np.arange(len(people)), indices, 8, members)
    met, kept = [], []
    for index in range(count):
        share = Share(index, count)
        own = share.images(people)
        kept.append(own)
        batch = steps.make_batch(
            people[own], np.arange(len(people))[own], indices, 8, members, share=share, own=own
        )
        here = batch['index'][batch['present']]
        np.testing.assert_array_equal(batch['label'][batch['present']], here)
        np.testing.assert_array_equal(batch['image'][batch['present']], people[here])
        assert not batch['image'][~batch['present']].any()
        np.testing.assert_array_equal(batch['mask'], batch['present'].any(1))
        met.append(here)
    np.testing.assert_array_equal(np.sort(np.concatenate(kept)), np.arange(len(people)))
    expected = everything['index'][everything['present']]
    np.testing.assert_array_equal(np.sort(np.concatenate(met)), np.sort(expected))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 5000), q=st.floats(1e-6, 1), count=st.integers(1, 40), multiple=st.integers(1, 64))
def test_a_usual_batch_leaves_the_shapes_of_all_shares_as_they_are(size, q, count, multiple):
    sampler = poisson.PoissonSampler(size=size, probability=q, key=5)
    capacity, rows = sampler.capacity(multiple, count), sampler.capacity(1)
    assert capacity % multiple == 0
    for number in range(3):
        indices = sampler.indices(number)
        lengths = {len(shares.pad(indices, capacity, Share(p, count), rows)[0]) for p in range(count)}
        assert lengths == {capacity}


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        ((0, 0), 'count is 0; it must be a whole number, at least 1'),
        ((2, 2), r'index is 2; it must be a whole number in \[0, 1\]'),
        ((-1, 2), r'index is -1; it must be a whole number in \[0, 1\]'),
    ],
)
def test_a_share_out_of_range_is_refused(arguments, told):
    with pytest.raises(ValueError, match=f'^{told}'):
        Share(*arguments)


def test_groups_are_dealt_as_a_whole_in_the_order_of_their_numbers():
    groups = np.array([70, 5, 70, -3, 5, 90])  # in order: -3, 5, 70, 90
    np.testing.assert_array_equal(Share(0, 2).images(groups), [0, 2, 3])
    np.testing.assert_array_equal(Share(1, 2).images(groups), [1, 4, 5])
