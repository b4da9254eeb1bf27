"""The comparison as Markdown and as one HTML file without anything from elsewhere.

Both are made of the report, the plain dict that `comparison.json` holds: its keys are described where
`scripts/compare_pytorch.py` makes it.
"""

from collections.abc import Iterator, Sequence
import html
import math
from typing import Any

from scripts.compare import plots

Table = tuple[list[str], list[list[str]]]  # columns, rows
OURS, THEIRS = 'dpp_jax', 'PyTorch'
_STYLE = """
:root { --paper: #fff; --ink: #1c2330; --soft: #5b6577; --line: #dde2ea; --card: #f5f7fa;
  --ours: #1f6feb; --theirs: #d9622b; --third: #7a4fc4; --good: #1a7f4b; --bad: #b42318;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --ink: #e6eaf2; --soft: #9aa5b8;
  --line: #2b3442; --card: #1a212c; --ours: #6ea8fe; --theirs: #ff9d66; --third: #bb9af7; --good: #56d18c;
  --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; } h2 { margin: 44px 0 4px; font-size: 1.25rem; }
h3 { margin: 26px 0 6px; font-size: 1rem; } p { margin: 6px 0; } .soft, figcaption { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px;
  margin: 20px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.35rem; line-height: 1.3; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
figure { margin: 8px 0; } figcaption { font-size: .88rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; } svg .axis { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--line); } .line { fill: none; stroke-width: 2; stroke: currentColor; }
.dot { fill: currentColor; } .ours { color: var(--ours); } .theirs { color: var(--theirs); }
.third { color: var(--third); } .limit { color: var(--soft); } .faint { opacity: .35; stroke-width: 1; }
.line.limit { stroke-dasharray: 4 4; }
.legend { font-size: .88rem; } .key { margin-right: 16px; display: inline-block; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: currentColor;
  margin-right: 6px; vertical-align: -1px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; min-width: 170px; padding-left: 0; }
td:last-child, th:last-child { text-align: left; min-width: 110px; }
.note { min-width: 250px; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
code { background: var(--card); padding: 1px 5px; border-radius: 4px; overflow-wrap: anywhere; }
"""


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ['# dpp_jax beside PyTorch and Opacus', '', *_about(report), '']
    lines += [f'- **{title}**: {value}, {note}' for title, value, note, _ in cards(report)]
    for title, text, blocks in _sections(report):
        lines += ['', f'## {title}', *text]
        for heading, table, _ in blocks:
            lines += ['', f'### {heading}', *_markdown_table(table)]
    return '\n'.join(lines) + '\n'


def page(report: dict[str, Any]) -> str:
    """Return the report as an HTML page, with plots."""
    first = ''.join(
        f'<div class="card">{html.escape(title)}<b class="{style}">{html.escape(value)}</b>'
        f'<span class="soft">{html.escape(note)}</span></div>'
        for title, value, note, style in cards(report)
    )
    parts = [f'<div class="cards">{first}</div>']
    for title, text, blocks in _sections(report):
        parts.append(f'<h2>{html.escape(title)}</h2>')
        parts += [f'<p class="soft">{html.escape(line)}</p>' for line in text]
        parts.append(_plots_of(title, report))
        for heading, table, is_long in blocks:
            found = _html_table(table)
            if is_long:
                parts.append(f'<details><summary>{html.escape(heading)}</summary>{found}</details>')
            else:
                parts.append(f'<h3>{html.escape(heading)}</h3>{found}')
    about = ''.join(f'<p class="soft">{html.escape(line)}</p>' for line in _about(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>dpp_jax beside PyTorch</title><style>{_STYLE}</style></head><body><main>'
        f'<h1>dpp_jax beside PyTorch and Opacus</h1>{about}{"".join(parts)}</main></body></html>\n'
    )


def _about(report: dict[str, Any]) -> list[str]:
    versions = ', '.join(f'{name} {number}' for name, number in report['versions'].items())
    lines = [
        f'Config {report["config"]}, {report["parameters"]:,} parameters; weights: {report["weights"]}. '
        f'{report["date"]}, {report["machine"]}.',
        f'Versions: {versions}.',
    ]
    if report['is_quick']:
        lines.append(
            'A quick form (--quick): it shows that everything runs; its speeds and scores say little.'
        )
    if report['load'] > report['cores'] + 0.5:
        lines.append(
            f'Other programs ran on this machine: its load was up to {report["load"]:.1f} on '
            f'{report["cores"]} cores. Do not trust these speeds. '
            'PyTorch loses more by it: its threads wait for each other.'
        )
    return lines


def cards(report: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Title, value, note and style of what is said first."""
    if numbers := report.get('numbers'):
        within = sum(each['is_within'] for each in numbers)
        style = 'good' if within == len(numbers) else 'bad'
        yield 'Same numbers', f'{within} of {len(numbers)}', 'checks within their tolerance', style
    for part in report.get('speed', []):
        if part['ratios']:
            best = _largest_common(part)
            note = f'as fast as PyTorch ({best["form"]}), batch of {best["batch"]}'
            yield f'Speed, {part["work"]}', f'{best["ratio"]:.2f} ×', note, ''
    if training := report.get('training'):
        equal = sum(row['verdict'].startswith('equal') for row in training['rows'])
        note = f'scores equal within the spread of {training["seeds"]} seeds'
        yield 'Same training', f'{equal} of {len(training["rows"])}', note, ''


def _largest_common(part: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's fastest form at the largest batch that it and ours can take."""
    batch = max(each['batch'] for each in part['ratios'])
    return min((each for each in part['ratios'] if each['batch'] == batch), key=lambda each: each['ratio'])


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[tuple[str, Table, bool]]]]:
    """Title, text, and tables with their headings; True for those that are long."""
    if numbers := report.get('numbers'):
        text = [
            'The same weights and the same random numbers on both sides, on the CPU in float32. Relative '
            'error: norm of the difference over the norm of the whole.'
        ]
        yield 'Numbers', text, [('All checks', _numbers_table(numbers), False)]
    if speed := report.get('speed'):
        text = [
            'Both sides take turns, each in a process of its own and in its best form; medians. A step is '
            'complete: random draws, gradient, noise, Adam, averaged weights. Memory is the most during a '
            'call, beside loaded modules.',
            f'A step of DP-SGD has {report["draws"]} noise draws for each image. PyTorch spreads an '
            'operation over all cores; one process for each core was not tried.',
        ]
        blocks = []
        for part in speed:
            blocks.append((f'{part["work"]}, {part["unit"]}', _sweep_table(part), False))
            blocks.append(
                (f'{part["work"]}: every form that was tried', _figures_table(part['trials']), True)
            )
        yield 'Speed and memory', text, blocks
    if training := report.get('training'):
        text = [
            f'{training["config"]}: {training["steps"]} steps of DP-SGD from the same weights, on the same '
            f'images and batches, σ = {training["noise_multiplier"]:.4f}, q = '
            f'{training["sampling_probability"]:.4f}, clip norm {training["clip_norm"]:g}; '
            f'{training["seeds"]} seeds; {training["images"]} synthetic images each. FID '
            'by one small network for both, not Inception. Each side draws its own noise, so that only means '
            'and spreads can agree.'
        ]
        yield 'Training', text, [('Scores', _training_table(training), False)]


def _numbers_table(numbers: Sequence[dict]) -> Table:
    rows = [
        [
            f'{each["part"]}: {each["name"]}',
            'within' if each['is_within'] else 'NOT within',
            f'{each["relative"]:.1e}',
            f'{each["tolerance"]:.0e}',
            f'{each["error"]:.1e}',
            each['note'],
        ]
        for each in numbers
    ]
    return ['check', 'verdict', 'relative error', 'tolerance', 'largest error', 'note'], rows


def _sweep_table(part: dict[str, Any]) -> Table:
    ratios = {(each['form'], each['batch']): each['ratio'] for each in part['ratios']}
    rows = []
    for each in part['sweep']:
        ratio = ratios.get((each['form'], each['batch'])) if each['side'] == THEIRS else None
        rows.append([*_figure_row(each, each['batch']), '' if ratio is None else f'{ratio:.2f}'])
    return ['form', 'batch', 'rate', 'memory, MiB', 'first call, s', 'ours is × as fast'], rows


def _figures_table(figures: Sequence[dict]) -> Table:
    rows = [[*_figure_row(each, each['batch']), each['failure']] for each in figures]
    return ['form', 'batch', 'rate', 'memory, MiB', 'first call, s', 'failed'], rows


def _figure_row(each: dict[str, Any], batch: int) -> list[str]:
    name = f'{each["side"]}: {each["form"]}'
    if each['rate'] is None:
        return [name, str(batch), each['failure'], '', '']
    memory = '' if each['memory'] is None else f'{each["memory"] / 2**20:,.0f}'
    return [name, str(batch), plots.number(each['rate']), memory, f'{each["build_seconds"]:.1f}']


def _training_table(training: dict[str, Any]) -> Table:
    spread = lambda values: f'{_mean(values):.4g} ± {_std(values):.2g}'
    rows = [
        [
            row['name'],
            spread(row['ours']),
            spread(row['theirs']),
            f'{row["difference"]:+.3g}',
            '' if row['error'] is None else f'{row["error"]:.2g}',
            '' if row['p_value'] is None else f'{row["p_value"]:.2f}',
            row['verdict'],
        ]
        for row in training['rows']
    ]
    columns = ['score', OURS, THEIRS, 'difference', 'its standard error', "p (Welch's t)", 'verdict']
    return columns, rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(sum((value - _mean(values)) ** 2 for value in values) / (len(values) - 1))


def _plots_of(title: str, report: dict[str, Any]) -> str:
    drawn = {'Numbers': _numbers_plots, 'Speed and memory': _speed_plots, 'Training': _training_plots}[title]
    return '<div class="plots">' + ''.join(drawn(report)) + '</div>'


def _figure(series: Sequence[plots.Series], caption: str, **axes: Any) -> str:
    if not any(each.points for each in series):
        return ''
    return (
        f'<figure>{plots.plot(series, title=caption, **axes)}{plots.legend(series)}'
        f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _numbers_plots(report: dict[str, Any]) -> Iterator[str]:
    styles = ('ours', 'theirs', 'third')
    numbers = report['numbers']
    for part, caption, x in (
        ('trajectories', 'Samplers: how far the two are apart at every call of the denoiser', 'call'),
        ('updates', 'Trainings: how far weights and losses are apart after every update', 'update'),
    ):
        rows = [each for each in numbers if each['part'] == part and each['steps']]
        if part == 'updates':
            rows = [each for each in rows if 'own gradients' in each['name']]
        series = [
            plots.Series(
                name=each['name'].removeprefix('training with own gradients: '),
                style=style,
                points=list(enumerate(each['steps'], start=1)),
                has_dots=False,
            )
            for each, style in zip(rows, styles)
        ]
        if rows:
            longest = max(len(each['steps']) for each in rows)
            limit = max(each['tolerance'] for each in rows)
            series.append(
                plots.Series(
                    name='tolerance', style='limit', points=[(1, limit), (longest, limit)], has_dots=False
                )
            )
        yield _figure(series, caption, x=x, y='relative error', log_y=True)


def _speed_plots(report: dict[str, Any]) -> Iterator[str]:
    for part in report['speed']:
        forms = list(dict.fromkeys((each['side'], each['form']) for each in part['sweep']))
        styles = dict(zip(forms, ('ours', 'theirs', 'third')))
        for value, y, caption in (
            ('rate', part['unit'].split(' (')[0], f'{part["work"]}: speed'),
            ('memory', 'MiB', f'{part["work"]}: memory'),
        ):
            scale = 1 if value == 'rate' else 2**-20
            series = [
                plots.Series(
                    name=f'{side}: {form}',
                    style=styles[side, form],
                    points=[
                        (each['batch'], each[value] * scale)
                        for each in part['sweep']
                        if (each['side'], each['form']) == (side, form) and each[value]
                    ],
                )
                for side, form in forms
            ]
            batches = sorted({each['batch'] for each in part['sweep']})
            axes = {'x': 'images in a batch', 'y': y, 'log_x': True, 'log_y': True, 'x_ticks': batches}
            yield _figure(series, caption, **axes)


def _training_plots(report: dict[str, Any]) -> Iterator[str]:
    training = report['training']
    sides = ((OURS, 'ours'), (THEIRS, 'theirs'))
    series = []
    for side, style in sides:
        curves = [each['losses'] for each in training['outcomes'] if each['side'] == side]
        for curve in curves:
            points = list(enumerate(curve, start=1))
            series.append(plots.Series(name='', style=f'{style} faint', points=points, has_dots=False))
        mean = [(step, _mean(values)) for step, values in enumerate(zip(*curves), start=1)]
        series.append(plots.Series(name=side, style=style, points=mean, has_dots=False))
    caption = 'Loss of every step: thin lines are seeds, thick ones their means'
    yield _figure(series, caption, x='step', y='loss')
    for row in training['rows']:
        if row['name'].startswith('loss'):
            continue
        series = [
            plots.Series(
                name=side,
                style=style,
                points=[(place, value) for value in row[style]],
                has_line=False,
            )
            for place, (side, style) in enumerate(sides)
        ]
        yield _figure(
            series,
            f'{row["name"]}: a dot is a seed',
            x='',
            y=row['name'].split(',')[0],
            x_names=(OURS, THEIRS),
        )


def _markdown_table(table: Table) -> list[str]:
    columns, rows = table
    line = lambda cells: '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'
    return [line(columns), '|---' * len(columns) + '|', *map(line, rows)]


def _html_table(table: Table) -> str:
    columns, rows = table
    wide = lambda name: ' class="note"' if name in ('note', 'failed') else ''
    head = ''.join(f'<th{wide(name)}>{html.escape(name)}</th>' for name in columns)

    def cell(text: str) -> str:
        style = {'within': 'good', 'NOT within': 'bad'}.get(text, '')
        return f'<td class="{style}">{html.escape(text)}</td>'

    body = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
