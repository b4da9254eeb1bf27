"""A page in one file: its frame, its look, and the parts that all pages are made of.

No script, no font, no address: a page shows the same wherever it lies, and asks for nothing. Every text goes
through `inline`, which escapes it.
"""

import base64
from collections.abc import Iterable, Sequence
import html
import re

import numpy as np

from dpp_jax.data import image_grid
from dpp_jax.pages.style import STYLE

GAP = 4  # pixels between images on the screen
_LEAST_PIXELS = 48  # about the height of an image on the screen


def inline(text: object) -> str:
    """Return a text for a page: escaped; `x` is code, **x** is bold, as in the statement."""
    escaped = html.escape(str(text))
    escaped = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', escaped)
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', escaped)


def paragraph(text: str, kind: str = '') -> str:
    """Return a paragraph; `kind`: 'note' or 'warning' for one in a frame, 'faint' for a small one."""
    return f'<p class="{kind}">{inline(text)}</p>' if kind else f'<p>{inline(text)}</p>'


def bullets(texts: Iterable[str]) -> str:
    """Return a list."""
    return f'<ul>{"".join(f"<li>{inline(text)}</li>" for text in texts)}</ul>'


def code(text: str) -> str:
    """Return lines of a program; one click selects all of them."""
    return f'<pre><code>{html.escape(text.strip())}</code></pre>'


def folded(title: str, content: str) -> str:
    """Return what is shown when its title is clicked."""
    return f'<details><summary>{inline(title)}</summary>{content}</details>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Return a table; it scrolls by itself where the page is narrow.

    Args:
        head: titles of the columns; (): none.
        rows: cells of each row.
        texts: how many columns hold texts; those after them hold numbers.
    """
    kind = lambda column: '' if column < texts else ' class="number"'
    titles = ''.join(f'<th scope="col"{kind(i)}>{inline(title)}</th>' for i, title in enumerate(head))
    body = ''.join(
        f'<tr>{"".join(f"<td{kind(i)}>{inline(cell)}</td>" for i, cell in enumerate(row))}</tr>'
        for row in rows
    )
    head_row = f'<thead><tr>{titles}</tr></thead>' if head else ''
    return f'<div class="wide"><table>{head_row}<tbody>{body}</tbody></table></div>'


def heat_table(
    head: Sequence[str], names: Sequence[str], values: np.ndarray, texts: Sequence[Sequence[str]]
) -> str:
    """Return a table whose cells are the darker, the larger their values are.

    Args:
        head: titles of all columns, that of the names first.
        names: of the rows.
        values: (rows, columns) in [0, 1]; NaN: the cell stays plain.
        texts: what stands in the cells.
    """
    titles = ''.join(f'<th scope="col">{inline(title)}</th>' for title in head)
    rows = []
    for name, row, words in zip(names, values, texts):
        cells = ''.join(
            f'<td class="number">{inline(word)}</td>'
            if np.isnan(value)
            else f'<td class="number heat" style="--heat:{min(max(value, 0), 1):.3f}">{inline(word)}</td>'
            for value, word in zip(row, words)
        )
        rows.append(f'<tr><th scope="row">{inline(name)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="heat"><thead><tr>{titles}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div>'
    )


def picture(png: bytes, title: str) -> str:
    """Return a PNG file as it is, inside of the page."""
    encoded = base64.b64encode(png).decode()
    return f'<div class="wide"><img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}"></div>'


class Page:
    """A page that is filled section by section."""

    def __init__(self, title: str, lead: str):
        """`title` stands above all, `lead` below it."""
        self._title, self._lead = title, lead
        self._sections: list[str] = []
        self._rules: list[str] = []  # of the style: each sheet of images once

    def add(self, title: str, *parts: str) -> None:
        """Add a section."""
        self._sections.append(f'<section><h2>{inline(title)}</h2>{"".join(parts)}</section>')

    def sheet(self, images: np.ndarray, zoom: int | None = None) -> list[str]:
        """Take images into the page, once, and return what shows each of them.

        Args:
            images: (n, H, W, C) uint8, n at least 1, C = 1 or 3.
            zoom: by which whole number they are magnified, so that pixels stay squares; None: `zoom_of`.
        """
        count, height, width, _ = images.shape
        zoom = zoom or zoom_of(height)
        columns = min(count, 64)
        name = f's{len(self._rules)}'
        missing = -count % columns
        cells = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
        rows = cells.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)
        encoded = base64.b64encode(
            image_grid.png(rows.reshape(-1, columns * width, images.shape[-1]))
        ).decode()
        size = f'width:{width * zoom}px;height:{height * zoom}px'
        whole = f'{columns * width * zoom}px {len(rows) * height * zoom}px'
        self._rules.append(
            f'.{name}{{{size};background-size:{whole};background-image:url(data:image/png;base64,{encoded})}}'
        )
        return [
            f'<i class="tile {name}" style="background-position:'
            f'{-(i % columns) * width * zoom}px {-(i // columns) * height * zoom}px"></i>'
            for i in range(count)
        ]

    def html(self) -> str:
        """Return the whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f'<title>{html.escape(self._title)} · dpp_jax</title>'
            f'<link rel="icon" href="data:,"><style>{STYLE}{"".join(self._rules)}</style></head>\n'
            f'<body><header><h1>{inline(self._title)}</h1><p class="lead">{inline(self._lead)}</p></header>\n'
            f'<main>{chr(10).join(self._sections)}</main></body></html>\n'
        )


def zoom_of(height: int) -> int:
    """Return by how much images so high are magnified."""
    return max(1, round(_LEAST_PIXELS / height))


def rows_of_images(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return rows of images, each with its name; `rows`: (name, what `Page.sheet` returned of its images)."""
    lines = (
        f'<div class="row"><div class="name">{inline(name)}</div>'
        f'<div class="tiles" role="img" aria-label="{html.escape(name)}">{"".join(tiles)}</div></div>'
        for name, tiles in rows
    )
    return f'<div class="rows">{"".join(lines)}</div>'


def table_of_images(head: Sequence[str], rows: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """Return a table with images in its cells.

    Args:
        head: titles of all columns, that of the names first.
        rows: (name, for each cell what `Page.sheet` returned of its images).
    """
    titles = ''.join(f'<th scope="col">{inline(title)}</th>' for title in head)
    body = ''.join(
        f'<tr><th scope="row">{inline(name)}</th>'
        + ''.join(f'<td><div class="tiles">{"".join(tiles)}</div></td>' for tiles in cells)
        + '</tr>'
        for name, cells in rows
    )
    return (
        f'<div class="wide"><table class="pictures"><thead><tr>{titles}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>'
    )
