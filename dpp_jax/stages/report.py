"""Stage `report`: the final table, and a page for the owner. Both show results without a guarantee."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dpp_jax import files
from dpp_jax.evaluation import needs
from dpp_jax.evaluation.classifiers import CLASSIFIERS
from dpp_jax.evaluation.fid import FEW_IMAGES
from dpp_jax.pages import card, private_page, release_page
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts, other_images, statement, statement_text
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.other_images import OtherImages
from dpp_jax.training import tensorboard

_MOST_CLASSES = 12  # of which a line tells
_METRIC_TITLES = {
    'kid': 'KID',
    'inception_score': 'Inception score',
    'precision': 'precision',
    'recall': 'recall',
    'precision_recall': 'precision, recall',
    'fid_of_class': 'FID of each class',
    'memorization': 'nearest private image',
}


def is_done(workdir: WorkDir, images: artefacts.SyntheticImages, evaluation: artefacts.Evaluation) -> bool:
    """Whether the report that is there shows these images and results."""
    if not workdir.report.exists() or not workdir.report_page.exists():
        return False
    reported = files.read_json(
        workdir.report, 'Delete the file and run --stage=report: it writes the report again'
    )
    reported.pop('privacy', None)
    return statement.exists(workdir) and reported == _shown(images, evaluation)


def _shown(images: artefacts.SyntheticImages, evaluation: artefacts.Evaluation) -> dict[str, Any]:
    """Return what a report shows, other than the privacy statement."""
    scored = {'settings_scored': len(evaluation.scored)} if evaluation.scored else {}
    return {'images': images.identity(), **evaluation.results, **scored}


def run(
    config: ConfigDict,
    workdir: WorkDir,
    *,
    images: artefacts.SyntheticImages,
    class_names: Sequence[str],
    privacy: dict[str, Any],
) -> None:
    """Write private/report.txt, .json and .html; and card and page in release/ again.

    The latter from release/ alone: the statement may have grown since.

    Args:
        config: the settings.
        workdir: to write to.
        images: the synthetic images.
        class_names: in the order of labels.
        privacy: the statement, see `run.statement`.
    """
    evaluation = artefacts.Evaluation(workdir, flatten(config.to_dict()))
    results = evaluation.results
    rows = _privacy_rows(privacy) + _score_rows(results, class_names)
    if evaluation.scored:
        rows.append(
            ('settings scored so far', f'{len(evaluation.scored)} (a choice by scores is not covered)')
        )
    note = _note(results)
    text = _text(config, workdir, images, rows, note)
    files.write_text(workdir.report_text, text, mode=0o600)
    shown = {'privacy': privacy, **_shown(images, evaluation)}
    files.write_json(workdir.report, shown, mode=0o600)
    card.write(workdir, images, class_names, privacy)
    release_page.write(workdir, images, class_names, privacy)
    curves = {name: tensorboard.scalars(workdir.metrics(name)) for name in ('pretrain', 'finetune')}
    contents = _contents(workdir, rows, note, results, curves)
    private_page.write(workdir, images, class_names, privacy, contents)


def run_beside(
    config: ConfigDict, workdir: WorkDir, *, images: OtherImages, class_names: Sequence[str]
) -> None:
    """Write report.txt, .json and .html of images from elsewhere, and print the first.

    Args:
        config: the settings.
        workdir: with the places of these images, see `WorkDir.beside`.
        images: that were scored.
        class_names: in the order of labels.
    """
    results = artefacts.Evaluation(workdir, flatten(config.to_dict()), images).results
    rows, note = _score_rows(results, class_names), _note(results)
    path, count = images.for_classifiers, len(images.load(images.for_classifiers)['labels'])
    about = f'{count:,} {other_images.ABOUT}. They are compared with the private images of {config.name}'
    lines = [f'{path}: {about}.', '', *_table(rows, note)]
    lines += ['', f'  page (private)  {workdir.report_page}']
    text = '\n'.join(lines) + '\n'
    files.write_text(workdir.report_text, text, mode=0o600)
    files.write_json(workdir.report, {'file': str(path), 'about': about, **results}, mode=0o600)
    contents = _contents(workdir, rows, note, results, {})
    private_page.write_beside(workdir, images, class_names, contents, title=str(path), about=f'{about}.')
    print(f'\n{text}')


def _contents(
    workdir: WorkDir, rows: list, note: str, results: dict[str, Any], curves: private_page.Curves
) -> private_page.Contents:
    """Return what the page for the owner shows."""
    return private_page.Contents(
        rows=rows,
        note=note,
        results=results,
        titles={kind: classifier.title for kind, classifier in CLASSIFIERS.items()},
        curves=curves,
        real=_real_images(workdir),
    )


def _note(results: dict[str, Any]) -> str:
    """Return what stands below the table."""
    return f'FID features: {results["fid_features"]}' if 'fid_features' in results else ''


def _real_images(workdir: WorkDir) -> dict[str, Any] | None:
    """Read the private images that the evaluation kept for the page."""
    if not workdir.real_images.exists():
        return None
    return files.read_npz(workdir.real_images, 'Delete the file: the page then goes without real images')


def _privacy_rows(privacy: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the table about ε: (what, figure)."""
    show, exact = accounting.format_epsilon, accounting.format_exact
    accountant = privacy['accountant']
    rows = [
        (
            when + statement_text.title(row),
            f'ε = {show(row["epsilon"][accountant])}',
        )
        for when, name in (('spent before: ', 'spent_before'), ('', 'mechanisms'))
        for row in privacy[name]
    ]
    total = f'ε = {show(privacy["epsilon"])}, δ = {exact(privacy["delta"])}'
    total += ', as declared' if privacy['declared'] else ''
    return [*rows, ('total (from the ledger)', total), ('budget', f'ε = {exact(privacy["budget"])}')]


def _score_rows(results: dict[str, Any], class_names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the lines of the table about quality: (what, figure)."""
    rows = [('evaluated', results['protocol'])] if 'protocol' in results else []
    if 'fid' in results:
        rows += _fid_rows(results)
    elif 'fid_left_out' in results:
        rows.append(('FID', f'left out: {results["fid_left_out"]}'))
    rows += _metric_rows(results, class_names)
    for kind, accuracy in results.get('accuracy', {}).items():
        title = CLASSIFIERS[kind].title if kind in CLASSIFIERS else kind
        rows.append((f'accuracy {title}', f'{100 * accuracy:.1f} %{_beside(results, kind)}'))
    if 'accuracy_mean' in results:
        rows.append(('  mean of the three', f'{100 * results["accuracy_mean"]:.1f} %'))
    if 'classifiers_left_out' in results:
        rows.append(('accuracy', f'left out: {results["classifiers_left_out"]}'))
    if 'selection' in results:
        rows.append(('  classifiers chosen by', results['selection']))
    return rows


def _fid_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines about FID, with the numbers of images."""
    counts, rows = results.get('fid_images', {}), []
    of = lambda kind: f' ({counts[kind]:,} {kind}, {counts["private"]:,} private images)' if counts else ''
    spread = f' ± {results["fid_spread"]:.2f}' if 'fid_spread' in results else ''
    network = results.get('fid_features', 'small CNN').split(' (')[0]
    rows.append((f'FID ({network} features)', f'{results["fid"]:.2f}{spread}{of("synthetic")}'))
    if 'fid_of_real_test_images' in results:
        rows.append(('  FID of real test images', f'{results["fid_of_real_test_images"]:.2f}{of("test")}'))
    elif counts:
        rows.append(('  FID of real test images', f'left out: {needs.why_no_reference(counts["test"])}'))
    few = [kind for kind, count in counts.items() if count < FEW_IMAGES]
    if few:
        rows.append(
            (
                '  few images',
                f'fewer than {FEW_IMAGES:,} ({", ".join(few)}) make FID too large: compare it only with FIDs '
                'of as many images',
            )
        )
    return rows


def _metric_rows(results: dict[str, Any], class_names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the lines about the metrics beside FID."""
    rows = []
    for name, score in results.get('scores', {}).items():
        real = f'; real test images: {score["real"]:.4g}' if 'real' in score else ''
        figure = f'{score["value"]:.4g} ± {score["spread"]:.2g} ({score["images"]:,} images{real})'
        rows.append((_METRIC_TITLES.get(name, name), figure))
    if 'fid_of_class' in results:
        found = sorted(results['fid_of_class'].items(), key=lambda item: int(item[0]))
        figures = [f'{class_names[int(label)]}: {value:.1f}' for label, value in found]
        more = f' … ({len(figures)} classes)' if len(figures) > _MOST_CLASSES else ''
        rows.append(('FID of each class', ', '.join(figures[:_MOST_CLASSES]) + more))
    if 'memorization' in results:
        found = results['memorization']
        figure = (
            f'{100 * found["share_near"]:.1f} % of {found["synthetic_images"]:,} synthetic images are near '
            f'({100 * found["share_near_expected"]:.1f} % expected, p = {found["p_value"]:.2g}); median '
            f'distance {found["median_ratio"]:.2f} x that of real test images'
        )
        rows.append(('nearest private image', figure))
    for name, reason in results.get('metrics_left_out', {}).items():
        rows.append((_METRIC_TITLES.get(name, name), f'left out: {reason}'))
    return rows


def _beside(results: dict[str, Any], kind: str) -> str:
    """Say what stands beside the accuracy of a classifier: spread, number of seeds, and the ceiling."""
    spread, seeds = results.get('accuracy_spread', {}).get(kind), results.get('accuracy_of_seeds', {})
    ceiling = results.get('accuracy_of_real_images', {}).get(kind)
    more = '' if spread is None else f' ± {100 * spread:.1f}'
    if len(seeds.get(kind, ())) > 1:
        more += f' over {len(seeds[kind])} seeds'
    return more + ('' if ceiling is None else f' (trained on the real images: {100 * ceiling:.1f} %)')


def _text(config: ConfigDict, workdir: WorkDir, images: artefacts.SyntheticImages, rows, note: str) -> str:
    """Write the table, and where the files are."""
    found = [
        *(
            ('synthetic images' if name == 'images' else 'images for classifiers', path)
            for name, path in images.paths.items()
        ),
        ('image grid', images.picture),
        ('model', workdir.model('finetune')),
        ('privacy statement', workdir.statement_text),
        ('privacy ledger', workdir.released_ledger),
        ('page', workdir.release_page),
        ('page (private)', workdir.report_page),
        ('metrics (private)', workdir.metrics('finetune').parent),
    ]
    lines = [f'{config.name}: {config.generate.images:,} synthetic images', '']
    if config.seed is not None:
        lines += [f'NOT PRIVATE: config.seed = {config.seed} makes the noise repeatable.', '']
    width = _width(rows)
    lines += [*_table(rows, note), '', *(f'  {name:<{width}}{path}' for name, path in found)]
    return '\n'.join(lines) + '\n'


def _width(rows: list[tuple[str, str]]) -> int:
    return max(len(name) for name, _ in rows) + 2


def _table(rows: list[tuple[str, str]], note: str) -> list[str]:
    """Return the lines of the table, and those below it."""
    return [
        *(f'  {name:<{_width(rows)}}{value}' for name, value in rows),
        *(['', f'  {note}'] if note else []),
        '  Scores come from real images and have no privacy guarantee. Do not publish them.',
    ]
