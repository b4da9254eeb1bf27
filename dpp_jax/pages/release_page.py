"""release/report.html: what may be shown to anybody, on one page. All of it comes from release/."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpp_jax import files
from dpp_jax.pages import loading, page, settings_text
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts
from dpp_jax.run import statement_text as words
from dpp_jax.run.folder import WorkDir

_NARROW = 378  # pixels that a page has for images on a screen of 420


def write(
    workdir: WorkDir,
    images: artefacts.SyntheticImages,
    class_names: Sequence[str],
    privacy: dict[str, Any],
) -> None:
    """Write the page.

    Args:
        workdir: to write to.
        images: the synthetic images.
        class_names: in the order of labels.
        privacy: the statement, see `run.statement`.
    """
    settings = settings_text.of_run(workdir, images)
    made = page.Page(
        settings['name'],
        f'{settings["generate.images"]:,} synthetic images under differential privacy. Everything here may '
        'be published.',
    )
    made.add('Privacy', *privacy_parts(privacy))
    add_images(made, workdir, images, class_names)
    add_settings(made, workdir, settings, images)
    files.write_text(workdir.release_page, made.html())


def privacy_parts(privacy: dict[str, Any]) -> list[str]:
    """Return the statement, the figures first."""
    show, exact = accounting.format_epsilon, accounting.format_exact
    parts = []
    if not privacy['private']:
        parts.append(
            page.paragraph(
                '**NOT PRIVATE.** The keys of this run come from `config.seed`: anyone who guesses the seed '
                'can remove the noise. What follows holds only for a run without a seed.',
                'warning',
            )
        )
    figures = f'<span>ε = {show(privacy["epsilon"])}</span><span>δ = {exact(privacy["delta"])}</span>'
    before = (
        [
            page.paragraph(
                'Rows "spent before" are earlier releases from the same private images; ε counts them.'
            )
        ]
        if privacy['spent_before']
        else []
    )
    lists = (('Covered', 'covered'), ('Not covered', 'not_covered'), ('Assumptions', 'assumptions'))
    parts += [
        f'<div class="figure">{figures}</div>',
        page.paragraph(words.claim(privacy)),
        page.bullets(words.facts(privacy)),
        page.table(words.MECHANISM_COLUMNS, words.mechanism_cells(privacy)),
        *before,
        *([page.paragraph(f'{privacy["declared"]}.')] if privacy['declared'] else []),
        *(page.folded(title, page.bullets(f'{text}.' for text in privacy[name])) for title, name in lists),
        page.folded('Code that ran', page.bullets(words.code_lines(privacy))),
    ]
    return parts


def add_images(
    made: page.Page, workdir: WorkDir, images: artefacts.SyntheticImages, class_names: Sequence[str]
) -> None:
    """Add the sections with images."""
    data = images.load(images.paths['images'])
    pixels, labels = data['images'], data['labels']
    counts = np.bincount(labels, minlength=len(class_names))
    made.add(
        'Synthetic images',
        page.paragraph(
            f'The first of each class, of {len(pixels):,} in all: not chosen by anybody. {_per_class(counts)}'
            + _of_moments(data)
        ),
        images_by_class(made, pixels, labels, class_names, columns_of(len(class_names), pixels.shape[2])),
    )
    origin = settings_text.of_import(settings_text.of_run(workdir, images))
    if origin:
        made.add('Imported model', page.paragraph(f'{origin[0]} The checkpoint holds no central images.'))
    if workdir.central_images.exists():
        _add_central(made, artefacts.central_images(workdir), class_names)
    if workdir.over_finetuning.exists():
        advice = 'Delete the file: the page then goes without it'
        _add_over_finetuning(made, files.read_npz(workdir.over_finetuning, advice), class_names)


def images_by_class(
    made: page.Page, pixels: np.ndarray, labels: np.ndarray, class_names: Sequence[str], columns: int
) -> str:
    """Return the first images of each class, a row for each."""
    chosen = [np.flatnonzero(labels == label)[:columns] for label in range(len(class_names))]
    tiles = iter(made.sheet(pixels[np.concatenate(chosen)]))
    return page.rows_of_images((name, [next(tiles) for _ in rows]) for name, rows in zip(class_names, chosen))


def columns_of(classes: int, width: int) -> int:
    """Return how many images of a class a page shows: few of many classes.

    Args:
        classes: their number.
        width: of an image, in its own pixels. Where the page is narrow, two lines are full.
    """
    most = next(columns for most, columns in ((25, 14), (60, 8), (np.inf, 4)) if classes <= most)
    per_line = (_NARROW + page.GAP) // (width * page.zoom_of(width) + page.GAP)
    return min(most, max(8, 2 * per_line))


def _per_class(counts: np.ndarray) -> str:
    """Say how many images the classes have."""
    least, most = counts.min(), counts.max()
    if least == most:
        return f'{most:,} of each class.'
    return f'Between {least:,} and {most:,} of a class.'


def _of_moments(data: dict[str, np.ndarray]) -> str:
    """Say how many images do not come from the model, if any do not."""
    if 'source' not in data:
        return ''
    return (
        f' {int(data["source"].sum()):,} of all are drawn from the class moments, the others from the '
        'diffusion model.'
    )


def _add_central(made: page.Page, central: dict[str, np.ndarray], class_names: Sequence[str]) -> None:
    """Add the answers of the queries, before and after post-processing."""
    after, labels, noisy = central['images'], central['labels'], central.get('noisy')
    zoom = page.zoom_of(after.shape[1])
    groups = [('after post-processing', made.sheet(after, zoom))]
    if noisy is not None:
        pixels = (np.clip(noisy, 0, 1) * 255).astype(np.uint8)
        # Fewer pixels, shown as large.
        groups.insert(
            0, ('as released', made.sheet(pixels, max(1, round(zoom * after.shape[1] / noisy.shape[1]))))
        )
    by_class = [np.flatnonzero(labels == label) for label in range(len(class_names))]
    rows = (
        (name, [[tiles[row] for row in rows] for _, tiles in groups])
        for name, rows in zip(class_names, by_class)
    )
    parts = [page.table_of_images(['', *(title for title, _ in groups)], rows)]
    if 'counts' in central:
        found = central['counts'].sum(axis=0)
        share = np.maximum(found, 0) / max(np.maximum(found, 0).sum(), 1e-9)
        cells = (
            (name, f'{count:,.1f}', f'{100 * part:.1f} %')
            for name, count, part in zip(class_names, found, share)
        )
        parts.append(page.folded('Noisy counts', page.table(('class', 'in the samples', 'share'), cells)))
    made.add(
        'Central images',
        page.paragraph(
            f'What {len(labels) // max(1, len(class_names))} noisy queries told of each class. The model saw '
            'these before any private image.'
        ),
        *parts,
    )


def _add_over_finetuning(made: page.Page, found: dict[str, np.ndarray], class_names: Sequence[str]) -> None:
    """Add the same images at several steps."""
    images, labels, steps = found['images'], found['labels'], found['steps']
    tiles = made.sheet(images.reshape((-1, *images.shape[2:])))
    count = len(labels)
    rows = [
        (
            class_names[label],
            [
                [tiles[step * count + row] for row in np.flatnonzero(labels == label)]
                for step in range(len(steps))
            ],
        )
        for label in np.unique(labels)
    ]
    made.add(
        'Over fine-tuning',
        page.paragraph(
            'The same noise, through the averaged weights after so many steps of DP-SGD. Before step 1 the '
            'model has seen no private image.'
        ),
        page.table_of_images(['', *(f'step {step:,}' for step in steps)], rows),
    )


def add_settings(
    made: page.Page, workdir: WorkDir, settings: dict[str, Any], images: artefacts.SyntheticImages
) -> None:
    """Add how to load the images, and the settings."""
    parts = [
        f'<h3>{page.inline(title)}</h3>{page.code(lines)}'
        for title, lines in loading.snippets(images, images.load(images.paths['images']))
    ]
    made.add('Load the images', *parts)
    changed, same = settings_text.compared(settings)
    made.add(
        'Settings',
        page.bullets(
            settings_text.how_made(settings, files.read_json(workdir.statement, 'Restore the file'))
        ),
        page.folded(
            f'{len(changed)} settings that differ from configs/default.py',
            page.table(('setting', 'here', 'default'), changed, texts=3),
        ),
        page.folded(f'{len(same)} others', page.table(('setting', 'value'), same, texts=2)),
    )
