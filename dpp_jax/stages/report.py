"""Stage `report`: the final table, and a page with the images. Both show results without guarantee."""

import base64
import html

from ml_collections import ConfigDict
import numpy as np

from dpp_jax.data import image_grid
from dpp_jax.privacy import accounting
from dpp_jax.run import folder as workdir_lib
from dpp_jax.run import statement
from dpp_jax.stages import central, evaluate, generate

_CLASSIFIERS = {'logistic': 'logistic regression', 'mlp': 'MLP', 'cnn': "CNN (the paper's)"}


def is_done(config: ConfigDict, workdir: workdir_lib.WorkDir) -> bool:
    path = workdir.private / 'report.json'
    if not path.exists() or not (workdir.private / 'report.html').exists():
        return False
    reported = workdir_lib.read_json(path, 'Delete it: --stage=report writes it again')
    reported.pop('privacy', None)
    return statement.exists(workdir) and reported == _shown(config, workdir)


def _shown(config: ConfigDict, workdir: workdir_lib.WorkDir) -> dict:
    """What a report shows, other than the privacy statement."""
    return {'images': generate.identity(config, workdir), **evaluate.load(config, workdir)}


def run(config: ConfigDict, workdir: workdir_lib.WorkDir, privacy: dict) -> None:
    """Write private/report.txt, .json and .html from the privacy statement and the evaluation."""
    results = _shown(config, workdir)
    show, exact = accounting.format_epsilon, accounting.format_exact
    accountant = privacy['accountant']
    rows = [
        (statement.TITLES.get(row['mechanism'], row['mechanism']), f'ε = {show(row["epsilon"][accountant])}')
        for row in privacy['mechanisms']
    ]
    rows += [
        ('total (by the ledger)', f'ε = {show(privacy["epsilon"])}, δ = {exact(privacy["delta"])}'),
        ('budget', f'ε = {exact(privacy["budget"])}'),
    ]
    if 'fid' in results:
        rows.append(('FID (small CNN features)', f'{results["fid"]:.2f}'))
        rows.append(('  real test images for scale', f'{results["fid_of_real_test_images"]:.2f}'))
    for kind, accuracy in results.get('accuracy', {}).items():
        rows.append((f'accuracy {_CLASSIFIERS.get(kind, kind)}', f'{100 * accuracy:.1f} %'))
    note = f'FID features: {results["fid_features"]}' if 'fid' in results else ''
    text = _text(config, workdir, rows, note)
    workdir_lib.write_text(workdir.private / 'report.txt', text, mode=0o600)
    workdir_lib.write_json(workdir.private / 'report.json', {'privacy': privacy, **results}, mode=0o600)
    page = _page(config, workdir, rows, note)
    workdir_lib.write_text(workdir.private / 'report.html', page, mode=0o600)


def _text(config: ConfigDict, workdir: workdir_lib.WorkDir, rows, note: str) -> str:
    """The table, and where the files are."""
    release, private = workdir.release, workdir.private
    files = [
        *(
            ('synthetic images' if name == 'images' else 'for classifiers', path)
            for name, path in generate.files(config, workdir).items()
        ),
        ('picture of them', release / 'synthetic' / 'images.png'),
        ('model', release / 'model' / 'finetune'),
        ('privacy statement', release / 'privacy_statement.md'),
        ('privacy ledger', release / 'ledger.jsonl'),
        ('page (private)', private / 'report.html'),
        ('metrics (private)', private / 'metrics'),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f'{config.name}: {config.generate.images:,} synthetic images', '']
    if config.seed is not None:
        lines += [f'NOT PRIVATE: config.seed = {config.seed} makes the noise repeatable.', '']
    lines += [f'  {name:<{width}}{value}' for name, value in rows]
    lines += ['', f'  {note}'] if note else []
    lines += ['  Scores are computed from real images without a guarantee: do not publish them.', '']
    lines += [f'  {name:<{width}}{path}' for name, path in files]
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


def _page(config: ConfigDict, workdir: workdir_lib.WorkDir, rows, note: str) -> str:
    """One HTML file with everything inside."""
    table = '\n'.join(
        f'<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>' for name, value in rows
    )
    warning = (
        f'<p class="note"><b>Not private:</b> config.seed = {config.seed} makes the noise '
        'repeatable. Such a run is for tests.</p>'
        if config.seed is not None
        else ''
    )
    figures = []
    data = generate.load(generate.files(config, workdir)['images'])
    grid = image_grid.rows_by_class(data['images'], data['labels'], config.data.classes, 12)
    figures.append(_figure(grid, 'Synthetic images, one class per row'))
    if config.pretrain.enabled:
        data, columns = central.load(workdir), min(config.query.queries, 12)
        grid = image_grid.rows_by_class(data['images'], data['labels'], config.data.classes, columns)
        figures.append(_figure(grid, 'Central images, one query per column'))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(config.name)} · dpp_jax</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(config.name)}</h1>
<p class="lead">{config.generate.images:,} synthetic images from {config.data.train_images:,} private
ones · unit of privacy: one image, add or remove</p>
{warning}
<h2>Privacy and quality</h2>
<table>{table}</table>
<p>{html.escape(note)}</p>
<p class="note">FID and accuracies are computed from real images without a privacy guarantee. Keep this
page inside; what may be published lies in <code>release/</code>.</p>
<h2>Images</h2>
<div class="side">{''.join(figures)}</div>
</body></html>
"""


def _figure(grid: np.ndarray, caption: str) -> str:
    """An image with its caption, embedded."""
    data = base64.b64encode(image_grid.png(grid)).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    )
