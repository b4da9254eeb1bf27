"""Which rows a process keeps: slices and numbers mean the same."""

import numpy as np
import pytest

from dpp_jax.data.rows import Rows

TOTAL = 23
KEPT = [
    None,
    slice(2, None, 3),
    slice(0, 9, 2),
    slice(0),
    slice(22, None),
    slice(None, None, 50),
    slice(30, None),
]


@pytest.mark.parametrize('kept', KEPT, ids=str)
def test_a_slice_is_its_numbers(kept):
    numbers = np.arange(TOTAL)[slice(None) if kept is None else kept]
    one, other = Rows(TOTAL, kept), Rows(TOTAL, numbers)
    for rows in (one, other):
        assert len(rows) == len(numbers)
        np.testing.assert_array_equal(rows.numbers(), numbers)
        np.testing.assert_array_equal(rows.numbers(1, 3), numbers[1:3])
        expected = [numbers.tolist().index(i) if i in numbers else -1 for i in range(TOTAL)]
        np.testing.assert_array_equal(rows.places(np.arange(TOTAL)), expected)
        assert rows.places(np.zeros((2, 3), int)).shape == (2, 3)


@pytest.mark.parametrize('kept', KEPT, ids=str)
@pytest.mark.parametrize('at_once', [1, 4, 7, 100])
def test_blocks_of_the_split_give_all_kept_rows_in_their_places(kept, at_once):
    data = np.arange(100, 100 + TOTAL)
    numbers = data[slice(None) if kept is None else kept] - 100
    for rows in (Rows(TOTAL, kept), Rows(TOTAL, numbers)):
        found = np.full(len(numbers), -1)
        for start in range(0, TOTAL, at_once):
            stop = min(start + at_once, TOTAL)
            places, chosen = rows.within(start, stop)
            found[places] = data[start:stop][chosen]
        np.testing.assert_array_equal(found, 100 + numbers)


@pytest.mark.parametrize(
    'wrong',
    [np.array([3, 2]), np.array([1, 1]), np.array([-1, 2]), np.array([0, TOTAL]), slice(None, None, -1)],
)
def test_rows_that_do_not_ascend_inside_the_split_are_refused(wrong):
    with pytest.raises(ValueError, match='rows is .*; it must be numbers from 0 to 22 that ascend'):
        Rows(TOTAL, wrong)
