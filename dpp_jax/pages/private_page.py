"""private/report.html: the same for the owner, with all that was computed from real images."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from dpp_jax import files
from dpp_jax.pages import charts, page, release_page, settings_text
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.other_images import OtherImages

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name → (steps, values)
_MOST_CLASSES = 25  # of a confusion matrix that is shown whole
_MOST_CONFUSIONS = 20
_TITLES = {
    'loss': 'Loss',
    'clipped_share': 'Share of gradients that are clipped',
    'gradient_norm': 'Mean norm of a gradient, before clipping',
    'batch_size': 'Images in a batch',
    'non_finite': 'Gradients that are not finite',
}
_TRAININGS = {'pretrain': 'Pre-training', 'finetune': 'Fine-tuning'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What the page shows beside release/.

    Attributes:
        rows: of the table of scores: (what, figure).
        note: below it.
        results: of the evaluation, as private/evaluation.json has them.
        titles: classifier → its title.
        curves: training → its curves.
        real: `images` and `labels` of some private images; None: there are none.
    """

    rows: Sequence[tuple[str, str]]
    note: str
    results: Mapping[str, Any]
    titles: Mapping[str, str]
    curves: Mapping[str, Curves]
    real: Mapping[str, np.ndarray] | None


def write(
    workdir: WorkDir,
    images: artefacts.SyntheticImages,
    class_names: Sequence[str],
    privacy: dict[str, Any],
    contents: Contents,
) -> None:
    """Write the page; arguments as of `release_page.write`."""
    settings = settings_text.of_run(workdir, images)
    made = page.Page(
        settings['name'],
        f'{settings["generate.images"]:,} synthetic images from {settings["data.train_images"]:,} private '
        'ones: the page for their owner.',
    )
    public = 'What may be published is in `release/`, with a page of its own.'
    _add_scores(made, workdir, images, class_names, contents, public)
    _add_curves(made, contents.curves)
    _add_seconds(made, workdir)
    made.add('Privacy', *release_page.privacy_parts(privacy))
    release_page.add_images(made, workdir, images, class_names)
    release_page.add_settings(made, workdir, settings, images)
    files.write_text(workdir.report_page, made.html(), mode=0o600)


def write_beside(
    workdir: WorkDir,
    images: OtherImages,
    class_names: Sequence[str],
    contents: Contents,
    *,
    title: str,
    about: str,
) -> None:
    """Write the page of images from elsewhere: their scores, and nothing of the run.

    Args:
        workdir: with the places of these images, see `WorkDir.beside`.
        images: from elsewhere.
        class_names: in the order of labels.
        contents: `curves` are not shown.
        title, about: at the head of the page.
    """
    made = page.Page(title, about)
    _add_scores(made, workdir, images, class_names, contents)
    files.write_text(workdir.report_page, made.html(), mode=0o600)


def _add_scores(
    made: page.Page,
    workdir: WorkDir,
    images: artefacts.SyntheticImages | OtherImages,
    class_names: Sequence[str],
    contents: Contents,
    public: str = '',
) -> None:
    """Add what an evaluation found, and the images beside real ones; `public`: what may be published."""
    warning = '**Do not publish this page.** Scores, curves and real images have no privacy guarantee.'
    made.add(
        'Scores',
        page.paragraph(f'{warning} {public}'.strip(), 'warning'),
        page.table((), contents.rows, texts=2),
        *([page.paragraph(contents.note, 'faint')] if contents.note else []),
    )
    _add_classes(made, contents, class_names)
    _add_confusion(made, contents, class_names)
    _add_real(made, images, contents.real, class_names)
    _add_nearest(made, workdir, contents.results)


def _add_classes(made: page.Page, contents: Contents, class_names: Sequence[str]) -> None:
    """Add accuracy and FID of each class."""
    results, columns = contents.results, []
    for kind, values in results.get('accuracy_of_class', {}).items():
        title = contents.titles.get(kind, kind)
        found = np.array(values, np.float64)
        least = np.nanmin(found, initial=1.0)
        heat = (found - least) / max(1 - least, 1e-9)
        columns.append((title, heat, ['–' if np.isnan(value) else f'{100 * value:.1f}' for value in found]))
    of_class = results.get('fid_of_class')
    if of_class:
        values = [of_class.get(str(label)) for label in range(len(class_names))]
        words = ['–' if value is None else f'{value:.1f}' for value in values]
        columns.append(('FID', np.full(len(values), np.nan), words))
    if not columns:
        return
    titles, values, words = zip(*columns)
    made.add(
        'Classes',
        page.paragraph('Accuracy in % on real test images, by class; trained on synthetic images.', 'faint'),
        page.heat_table(['class', *titles], class_names, np.stack(values, axis=1), list(zip(*words))),
    )


def _add_confusion(made: page.Page, contents: Contents, class_names: Sequence[str]) -> None:
    """Add the confusion matrix of each classifier: of the best one unfolded."""
    found = contents.results.get('confusion', {})
    if not found:
        return
    accuracy = contents.results.get('accuracy', {})
    best = max(found, key=lambda kind: accuracy.get(kind, 0))
    parts = [f'<h3>{page.inline(contents.titles.get(best, best))}</h3>{_confusion(found[best], class_names)}']
    parts += [
        page.folded(contents.titles.get(kind, kind), _confusion(matrix, class_names))
        for kind, matrix in found.items()
        if kind != best
    ]
    made.add(
        'Confusions',
        page.paragraph(
            'Real test images: true classes in rows, what the classifier says in columns.', 'faint'
        ),
        *parts,
    )


def _confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Return the matrix; of many classes only the most frequent confusions."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if len(counts) <= _MOST_CLASSES:
        words = [[f'{count:,}' if count else '·' for count in row] for row in counts]
        return page.heat_table(['', *class_names], class_names, shares, words)
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    order = np.argsort(wrong, axis=None, kind='stable')[::-1][:_MOST_CONFUSIONS]
    pairs = [np.unravel_index(place, counts.shape) for place in order if wrong.flat[place]]
    rows = (
        (class_names[true], class_names[said], f'{counts[true, said]:,}', f'{100 * shares[true, said]:.1f} %')
        for true, said in pairs
    )
    return page.table(('class', 'taken for', 'images', 'of the class'), rows, texts=2)


def _add_real(
    made: page.Page,
    images: artefacts.SyntheticImages | OtherImages,
    real: Mapping[str, np.ndarray] | None,
    class_names: Sequence[str],
) -> None:
    """Add the first real and synthetic images of each class, side by side."""
    if real is None:
        return
    data = images.load(images.paths['images'])
    columns = min(8, release_page.columns_of(len(class_names), data['images'].shape[2]))
    groups = []
    for found in (real, data):
        chosen = [np.flatnonzero(found['labels'] == label)[:columns] for label in range(len(class_names))]
        tiles = iter(made.sheet(found['images'][np.concatenate(chosen)]))
        groups.append([[next(tiles) for _ in rows] for rows in chosen])
    made.add(
        'Real beside synthetic',
        page.table_of_images(['', 'real (private)', 'synthetic'], zip(class_names, zip(*groups))),
    )


def _add_nearest(made: page.Page, workdir: WorkDir, results: Mapping[str, Any]) -> None:
    """Add the check for copies of private images."""
    numbers = results.get('memorization', {})
    if not numbers:
        return
    parts = [page.table((), [(name.replace('_', ' '), f'{value:.4g}') for name, value in numbers.items()])]
    if workdir.nearest.exists():
        title = 'Synthetic images with their nearest private images'
        parts += [
            page.paragraph(f'{title}, the closest pairs first.'),
            page.picture(workdir.nearest.read_bytes(), title),
        ]
    made.add('Nearest neighbors', *parts)


def _add_curves(made: page.Page, curves: Mapping[str, Curves]) -> None:
    """Add the curves of both trainings."""
    for training, found in curves.items():
        known = [name for name in _TITLES if name in found]
        # Curves of what never happened tell nothing.
        shown = [name for name in known if name != 'non_finite' or np.any(found[name][1])]
        if shown:
            figures = ''.join(charts.line_chart(_TITLES[name], *found[name]) for name in shown)
            made.add(_TRAININGS[training], f'<div class="charts">{figures}</div>')


def _add_seconds(made: page.Page, workdir: WorkDir) -> None:
    """Add how long the stages took."""
    seconds = artefacts.seconds_of_stages(workdir)
    if seconds:
        rows = [(stage, _duration(value)) for stage, value in seconds.items()]
        made.add(
            'Time',
            page.table(('stage', 'time'), [*rows, ('together', _duration(sum(seconds.values())))]),
            page.paragraph('Of an interrupted stage, the time since it went on.', 'faint'),
        )


def _duration(seconds: float) -> str:
    """Write a time as a person would."""
    if seconds < 100:
        return f'{seconds:.1f} s'
    minutes, hours = seconds / 60, seconds / 3600
    return f'{minutes:.1f} min' if minutes < 100 else f'{hours:.1f} h'
