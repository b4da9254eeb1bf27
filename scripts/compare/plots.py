"""Small plots as inline SVG: lines and points, colors from the page's style.

A plot is 400 units wide, so that its text is readable on a telephone. Series have a CSS class each.
"""

from collections.abc import Sequence
import dataclasses
import html
import math

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend and when pointed at; '' for none.
        style: CSS class.
        points: (x, y); those that a logarithmic axis cannot show are left out.
        has_line: join them.
        has_dots: mark each.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    has_line: bool = True
    has_dots: bool = True


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A scale from values to units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            every = max(1, math.ceil((last - first) / 5))
            found = [10.0**exponent for exponent in range(first, last + 1, every)]
            if len(found) >= 2:
                return found
            finer = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
            found = [value for value in finer if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]
            return found if len(found) >= 2 else _round_numbers(10.0**self.low, 10.0**self.high)
        return _round_numbers(self.low, self.high)


def _round_numbers(low: float, high: float) -> list[float]:
    """Return some round numbers in [low, high], equally spaced."""
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    x_names: Sequence[str] = (),
    x_ticks: Sequence[float] = (),
) -> str:
    """Draw series as an SVG element.

    Args:
        series: at least one with a point.
        title: for those who cannot see it.
        x, y: what the axes show.
        log_x, log_y: logarithmic axes.
        x_names: text in place of numbers at x = 0, 1, ...
        x_ticks: which numbers the x axis shows; none: round ones.
    """
    can_show = lambda point: (
        all(map(math.isfinite, point)) and not ((log_x and point[0] <= 0) or (log_y and point[1] <= 0))
    )
    shown = [dataclasses.replace(each, points=[p for p in each.points if can_show(p)]) for each in series]
    values = [point for each in shown for point in each.points]
    across = _axis([p[0] for p in values], _LEFT, _WIDTH - _RIGHT, log_x, bool(x_names))
    up = _axis([p[1] for p in values], _HEIGHT - _BOTTOM, _TOP, log_y, False)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        *_grid(across, up, x, y, list(enumerate(x_names)) or _ticks(across, x_ticks)),
    ]
    for each in shown:
        places = [(across.place(a), up.place(b)) for a, b in each.points]
        if each.has_line and len(places) > 1:
            path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in places)
            parts.append(f'<polyline class="line {each.style}" points="{path}"/>')
        if each.has_dots:
            parts += [
                f'<circle class="dot {each.style}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">'
                f'<title>{html.escape(each.name)}: {number(point[1])}</title></circle>'
                for (a, b), point in zip(places, each.points)
            ]
    return '\n'.join([*parts, '</svg>'])


def legend(series: Sequence[Series]) -> str:
    """List the named series with their colors."""
    names = dict.fromkeys((each.name, each.style) for each in series if each.name)
    items = ''.join(
        f'<span class="key"><i class="{style}"></i>{html.escape(name)}</span>' for name, style in names
    )
    return f'<p class="legend">{items}</p>'


def number(value: float) -> str:
    """Write a number with three digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f'{value:,.3g}' if abs(value) < 100 else f'{value:,.0f}'
    return f'{value:.1e}'


def _tick(value: float, is_log: bool) -> str:
    if is_log and not 1e-3 < value < 1e5:
        return f'1e{round(math.log10(value))}'
    return f'{value:,.6g}'


def _axis(values: Sequence[float], start: float, end: float, is_log: bool, has_names: bool) -> _Axis:
    if is_log:
        values = [math.log10(value) for value in values]
    low, high = min(values), max(values)
    room = 0.5 if has_names else 0.06 * (high - low) or 0.5 * max(abs(high), 1)
    return _Axis(low - room, high + room, start, end, is_log)


def _ticks(axis: _Axis, wanted: Sequence[float] = ()) -> list[tuple[float, str]]:
    return [(value, _tick(value, axis.is_log)) for value in wanted or axis.ticks()]


def _grid(across: _Axis, up: _Axis, x: str, y: str, named: Sequence[tuple[float, str]]) -> list[str]:
    bottom, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
    parts = []
    for value in up.ticks():
        place = up.place(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 5}" y="{place + 4:.1f}" text-anchor="end">{_tick(value, up.is_log)}</text>'
        )
    for value, text in named:
        place = across.place(value)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{html.escape(text)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x)}</text>'
    )
    parts.append(
        f'<text class="axis" x="12" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(_TOP + bottom) / 2})">{html.escape(y)}</text>'
    )
    return parts
