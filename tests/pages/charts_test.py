"""Charts: what cannot be drawn is left out, and axes have round numbers around all values."""

import math
import re

import pytest

from dpp_jax.pages import charts


@pytest.mark.parametrize(
    'low, high', [(0, 1), (0.31, 0.78), (-5, 1e5), (2, 2), (0, 0), (1e-9, 3e-9), (0.992, 1)]
)
def test_ticks_are_round_few_and_around_all_values(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert found[0] <= low + 1e-9 * abs(low) and high - 1e-9 * abs(high) <= found[-1]
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - each) for each in (1, 2, 2.5, 5, 10)) < 1e-6


def points(figure):
    return [
        tuple(map(float, pair.split()))
        for path in re.findall('d="M([^"H]+)"', figure)
        for pair in path.split('L')
    ]


@pytest.mark.parametrize('count', [2, 40, 5000])
def test_curves_stay_inside_of_their_frame_with_few_points(count):
    values = [math.nan if i % 7 == 3 else 1 / (i + 1) for i in range(count)]
    figure = charts.line_chart('Loss <of> all', range(0, 10 * count, 10), values)
    assert 'Loss &lt;of&gt; all' in figure and 'nan' not in figure
    found = points(figure)
    assert 2 <= len(found) <= 700
    assert all(0 <= x <= charts._WIDTH and 0 <= y <= charts._HEIGHT for x, y in found)


def test_one_value_is_a_point_and_no_value_a_sentence():
    assert '<circle' in charts.line_chart('x', [3], [0.5])
    assert 'No finite value' in charts.line_chart('x', [3, 4], [math.nan, math.inf])
