"""Stage `report`: the final table, and a page with the images. Both show results without a guarantee."""

import base64
import html
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.evaluation import needs
from dpp_jax.evaluation.classifiers import CLASSIFIERS
from dpp_jax.evaluation.fid import FEW_IMAGES
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts, statement, statement_text
from dpp_jax.run.folder import WorkDir, flatten

_METRIC_TITLES = {
    'kid': 'KID',
    'inception_score': 'Inception score',
    'precision': 'precision',
    'recall': 'recall',
    'precision_recall': 'precision, recall',
    'fid_of_class': 'FID of each class',
    'memorization': 'nearest private image',
}
_COLUMNS = 12  # images of a class that the page shows


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
    privacy: dict[str, Any],
) -> None:
    """Write private/report.txt, .json and .html.

    Args:
        config: the settings.
        workdir: to write to.
        images: the synthetic images.
        privacy: the statement, see `run.statement`.
    """
    evaluation = artefacts.Evaluation(workdir, flatten(config.to_dict()))
    results = evaluation.results
    rows = _privacy_rows(privacy) + _score_rows(results)
    if evaluation.scored:
        rows.append(
            ('settings scored so far', f'{len(evaluation.scored)} (a choice by scores is not covered)')
        )
    note = f'FID features: {results["fid_features"]}' if 'fid_features' in results else ''
    text = _text(config, workdir, images, rows, note)
    files.write_text(workdir.report_text, text, mode=0o600)
    shown = {'privacy': privacy, **_shown(images, evaluation)}
    files.write_json(workdir.report, shown, mode=0o600)
    files.write_text(workdir.report_page, _page(config, workdir, images, rows, note), mode=0o600)


def _privacy_rows(privacy: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the table about ε: (what, figure)."""
    show, exact = accounting.format_epsilon, accounting.format_exact
    accountant = privacy['accountant']
    rows = [
        (
            when + statement_text.TITLES.get(row['mechanism'], row['mechanism']),
            f'ε = {show(row["epsilon"][accountant])}',
        )
        for when, name in (('spent before: ', 'spent_before'), ('', 'mechanisms'))
        for row in privacy[name]
    ]
    total = f'ε = {show(privacy["epsilon"])}, δ = {exact(privacy["delta"])}'
    return [*rows, ('total (from the ledger)', total), ('budget', f'ε = {exact(privacy["budget"])}')]


def _score_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the table about quality: (what, figure)."""
    rows = []
    if 'fid' in results:
        counts = results.get('fid_images', {})
        of = lambda kind: (
            f' ({counts[kind]:,} {kind}, {counts["private"]:,} private images)' if counts else ''
        )
        is_public = results.get('fid_features', '').startswith('Inception')
        title = f'FID ({"Inception-v3" if is_public else "small CNN"} features)'
        spread = f' ± {results["fid_spread"]:.2f}' if 'fid_spread' in results else ''
        rows.append((title, f'{results["fid"]:.2f}{spread}{of("synthetic")}'))
        if 'fid_of_real_test_images' in results:
            rows.append(
                ('  FID of real test images', f'{results["fid_of_real_test_images"]:.2f}{of("test")}')
            )
        elif counts:
            rows.append(('  FID of real test images', f'left out: {needs.why_no_reference(counts["test"])}'))
        few = [kind for kind, count in counts.items() if count < FEW_IMAGES]
        if few:
            rows.append(
                (
                    '  few images',
                    f'fewer than {FEW_IMAGES:,} ({", ".join(few)}) make FID too large: compare it only '
                    'with FIDs of as many images',
                )
            )
    elif 'fid_left_out' in results:
        rows.append(('FID', f'left out: {results["fid_left_out"]}'))
    rows += _metric_rows(results)
    for kind, accuracy in results.get('accuracy', {}).items():
        title = CLASSIFIERS[kind].title if kind in CLASSIFIERS else kind
        ceiling = results.get('accuracy_of_real_images', {}).get(kind)
        beside = '' if ceiling is None else f' (trained on the real images: {100 * ceiling:.1f} %)'
        rows.append((f'accuracy {title}', f'{100 * accuracy:.1f} %{beside}'))
    if 'classifiers_left_out' in results:
        rows.append(('accuracy', f'left out: {results["classifiers_left_out"]}'))
    return rows


def _metric_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines about the metrics beside FID."""
    rows = []
    for name, score in results.get('scores', {}).items():
        real = f'; real test images {score["real"]:.4g}' if 'real' in score else ''
        figure = f'{score["value"]:.4g} ± {score["spread"]:.2g} ({score["images"]:,} images{real})'
        rows.append((_METRIC_TITLES.get(name, name), figure))
    if 'fid_of_class' in results:
        figures = ', '.join(f'{label}: {value:.1f}' for label, value in results['fid_of_class'].items())
        rows.append(('FID of each class', figures))
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
        ('page (private)', workdir.report_page),
        ('metrics (private)', workdir.metrics('finetune').parent),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f'{config.name}: {config.generate.images:,} synthetic images', '']
    if config.seed is not None:
        lines += [f'NOT PRIVATE: config.seed = {config.seed} makes the noise repeatable.', '']
    lines += [f'  {name:<{width}}{value}' for name, value in rows]
    lines += ['', f'  {note}'] if note else []
    lines += ['  Scores come from real images and have no privacy guarantee. Do not publish them.', '']
    lines += [f'  {name:<{width}}{path}' for name, path in found]
    return '\n'.join(lines) + '\n'


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2rem }
p.lead { color: #56636f; margin-top: .2rem }
table { border-collapse: collapse } td { padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid #e3e8ec }
td + td { font-variant-numeric: tabular-nums; text-align: right }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #e3e8ec }
.note { background: #fff4e0; border-left: 4px solid #e8a33d; padding: .5rem 1rem }
.side { display: flex; gap: 2rem; flex-wrap: wrap } figure { margin: 0 }
figcaption { color: #56636f; font-size: .9rem }
"""


def _page(config: ConfigDict, workdir: WorkDir, images: artefacts.SyntheticImages, rows, note: str) -> str:
    """Write one HTML file with everything inside."""
    table = '\n'.join(
        f'<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>' for name, value in rows
    )
    warning = (
        f'<p class="note"><b>Not private:</b> config.seed = {config.seed} makes the noise '
        'repeatable. Such a run is for tests.</p>'
        if config.seed is not None
        else ''
    )
    figures = [
        _figure(config, images.load(images.paths['images']), 'Synthetic images, one class per row', _COLUMNS)
    ]
    if config.pretrain.enabled:
        columns = min(config.query.queries, _COLUMNS)
        central = artefacts.central_images(workdir)
        figures.append(_figure(config, central, 'Central images, one query per column', columns))
    relation = accounting.RELATIONS[config.dp.relation].sentence.format(unit=config.dp.unit)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(config.name)} · dpp_jax</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(config.name)}</h1>
<p class="lead">{config.generate.images:,} synthetic images from {config.data.train_images:,} private
ones · unit of privacy: one {config.dp.unit}; {html.escape(relation)}</p>
{warning}
<h2>Privacy and quality</h2>
<table>{table}</table>
<p>{html.escape(note)}</p>
<p class="note">FID and accuracies come from real images and have no privacy guarantee. Do not
publish this page. You may publish everything in <code>release/</code>.</p>
<h2>Images</h2>
<div class="side">{''.join(figures)}</div>
</body></html>
"""


def _figure(config: ConfigDict, data: dict[str, np.ndarray], caption: str, columns: int) -> str:
    """Write an image grid with its caption, embedded."""
    grid = image_grid.rows_by_class(data['images'], data['labels'], config.data.classes, columns)
    encoded = base64.b64encode(image_grid.png(grid)).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}">'
        f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    )
