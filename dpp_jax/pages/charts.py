"""Line charts as SVG, small enough to write here: the page's colors hold in them, light and dark."""

from collections.abc import Sequence
import html
import math

import numpy as np

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_MOST_POINTS = 300
_WINDOW = 0.04  # of all points, over which a curve is smoothed


def line_chart(title: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """Return a figure: the values, faint, and their running mean.

    Args:
        title: above it.
        steps: (n,), ascending.
        values: (n,); those that are not finite are left out.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    is_there = np.isfinite(y)
    x, y = _thinned(x[is_there], y[is_there])
    caption = f'<figcaption>{html.escape(title)}</figcaption>'
    if not len(x):
        return f'<figure>{caption}<p class="faint">No finite value was written.</p></figure>'
    low, high = np.quantile(y, [0.0, 1.0] if len(y) < 50 else [0.005, 0.995])
    y_ticks = ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x_ticks = ticks(0.0, x[-1])
    place_x = lambda value: _LEFT + (value / (x[-1] or 1)) * (_WIDTH - _LEFT - _RIGHT)
    place_y = lambda value: _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
    parts = []
    for tick in y_ticks:
        at = place_y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, at + 4, label(tick), 'end'))
    for tick in x_ticks:
        if tick <= x[-1]:
            anchor = 'end' if place_x(tick) > _WIDTH - 24 else 'middle'
            parts.append(_text(place_x(tick), _HEIGHT - 8, label(tick), anchor))
    curve = lambda heights: (
        'M'
        + 'L'.join(
            f'{place_x(a):.1f} {place_y(b):.1f}' for a, b in zip(x, np.clip(heights, low, high), strict=True)
        )
    )
    if len(y) > 1:
        parts.append(f'<path class="curve raw" d="{curve(y)}"/>')
        parts.append(f'<path class="curve" d="{curve(_smooth(y))}"/>')
    else:
        parts.append(f'<circle cx="{place_x(x[0]):.1f}" cy="{place_y(y[0]):.1f}" r="2.5"/>')
    return (
        f'<figure>{caption}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers from below `low` to above `high`."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def label(value: float) -> str:
    """Write a number on an axis: short, k for thousands."""
    if abs(value) >= 10_000:
        return f'{value / 1000:g}k'
    return f'{round(value, 10):.4g}'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{html.escape(text)}</text>'
    )


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `_MOST_POINTS` points: means of neighbors."""
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _smooth(y: np.ndarray) -> np.ndarray:
    """Return the running mean; at the ends over what is there."""
    half = max(1, int(len(y) * _WINDOW))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - half, 0)
    last = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[last] - sums[first]) / (last - first)
