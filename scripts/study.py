"""What each query is worth: accuracy and FID of runs that differ in their queries, at equal ε and equal work.

    python -m scripts.study --config=digits_8 --rows=none,paper,mean,mode --epsilons=1,10 --seeds=1,2,3 \\
        --out=runs/study

For PUBLIC sets: runs have seeds, and their scores are compared. Each row has the same number of noised images
in both trainings together as the config itself: a row without pre-training gets more DP-SGD. Every run has a
work directory of its own, OUT/ROW/EPSILON/SEED. The same command goes on after an interruption, and
makes only what is missing. It writes OUT/study.md, study.json, study.png (quality against ε) and images.png
(a line of images for each row, of the largest ε and the first seed). This file is also the config of
its cells: --config=scripts/study.py:digits_8/mode/10.

Settings after `--` change every run, as in `-- --config.generate.images=2000`.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import math
from pathlib import Path
import statistics
import subprocess
import sys
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import command_line
from dpp_jax.configs import default
from dpp_jax.data import image_grid
from dpp_jax.privacy import budget as budget_lib

_SHARE = 0.125  # of ε, for the queries: that of digits_8 at ε = 10
_ALMOST_ALL = 0.9  # where nothing else is asked
_NO_STEP = {'finetune.epochs': 1e-9, 'finetune.learning_rate': 1e-12}
_SCORES = ('cnn', 'mlp', 'logistic', 'fid')
_PICTURES = 12  # of a row


def _paper(config: ConfigDict) -> dict[str, Any]:
    """Return the paper's query: samples, half the pixels, nothing centered or clipped."""
    size = config.data.image_size
    return {
        'query.kind': 'mean',
        'query.epsilon_share': _SHARE,
        'query.sampling_probability': 0.1,
        'query.queries': 5,
        'query.downsample': 2 if size >= 14 else 1,
        'query.pixel_center': 0.0,
        'query.clip_norm': None,
    }


def _moments(config: ConfigDict) -> dict[str, Any]:
    """Return class moments around central images; half of the share is each query's."""
    size = config.data.image_size
    return {
        'query.epsilon_share': _SHARE / 2,
        'query.queries': 1,
        'moments.enabled': True,
        'moments.epsilon_share': _SHARE / 2,
        'moments.frequencies': 36 if size < 14 else 64,
        'moments.clip_norm': size / 8,
        'moments.average_down': 2 if size >= 28 else 1,
        'pretrain.epochs': 0,
        'pretrain.moments_steps': 200 if size < 14 else 1000,
    }


def _frequency(config: ConfigDict) -> dict[str, Any]:
    """Return random frequencies beside central images; half of the share is each query's."""
    size = config.data.image_size
    return {
        'query.epsilon_share': _SHARE / 2,
        'query.queries': 1,
        'frequency.enabled': True,
        'frequency.epsilon_share': _SHARE / 2,
        'pretrain.epochs': 0,
        'pretrain.frequency_steps': 200 if size < 14 else 1000,
    }


def _after_mean(config: ConfigDict, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a query's row with a third of the passes over central images first, and half of its steps."""
    steps = {name: count // 2 for name, count in changes.items() if name.endswith('_steps')}
    return {**changes, 'pretrain.epochs': config.pretrain.epochs // 3, **steps}


# Row → what differs from the config, given the config.
ROWS: dict[str, Callable[[ConfigDict], dict[str, Any]]] = {
    'none': lambda config: {'pretrain.enabled': False},
    'paper': _paper,
    'mean': lambda config: {'query.epsilon_share': _SHARE},
    'mode': lambda config: {
        'query.kind': 'mode',
        'query.epsilon_share': _SHARE,
        'query.clip_norm': None,
        'query.pixel_center': 0.0,
    },
    'moments': _moments,
    'around moments': lambda config: {**_moments(config), 'model.around': 'moments'},
    'frequency': _frequency,
    'mean → moments': lambda config: _after_mean(config, _moments(config)),
    'mean → frequency': lambda config: _after_mean(config, _frequency(config)),
    # A third of the share is each query's.
    'all three': lambda config: {
        **_after_mean(config, {**_moments(config), **_frequency(config)}),
        **{f'{name}.epsilon_share': _SHARE / 3 for name in ('query', 'moments', 'frequency')},
    },
    # One step of DP-SGD that moves nothing, and has hardly any budget: the pre-trained model.
    'mean only': lambda config: {
        'query.epsilon_share': _ALMOST_ALL,
        **_NO_STEP,
    },
    'moments only': lambda config: {
        **_moments(config),
        'query.epsilon_share': _ALMOST_ALL / 3,
        'moments.epsilon_share': 2 * _ALMOST_ALL / 3,
        **_NO_STEP,
    },
    'frequency only': lambda config: {
        **_frequency(config),
        'query.epsilon_share': _ALMOST_ALL / 3,
        'frequency.epsilon_share': 2 * _ALMOST_ALL / 3,
        **_NO_STEP,
    },
}


def load(name: str, epsilon: str, changes: dict[str, Any] | None = None) -> ConfigDict:
    """Return a config with changes."""
    config = command_line.load_config(command_line.find_config(f'{name}:{epsilon}'))
    with config.ignore_type():
        config.update_from_flattened_dict(changes or {})
    return config


def noised_images(config: ConfigDict) -> tuple[float, float]:
    """Return the noised images of pre-training and of one epoch of fine-tuning."""
    settings = config.pretrain
    central = config.query.queries * config.data.classes
    batch = min(settings.batch_size, central)
    of_central = settings.epochs * math.ceil(central / batch) * batch
    drawn = (settings.moments_steps + settings.frequency_steps) * settings.batch_size
    pretrain = (of_central + drawn) * settings.draws * settings.enabled
    q, steps = budget_lib.schedule(config.data.train_images, config.finetune.batch_size, 1.0)
    return pretrain, steps * q * config.data.train_images * config.finetune.draws


def changes_of(row: str, name: str, epsilon: str) -> dict[str, Any]:
    """Return what a row changes, with the epochs of fine-tuning that make its work that of the config."""
    config = load(name, epsilon)
    # Of a config that asks for moments, too: a row has the queries that it names.
    alone = {'model.around': 'none', 'moments.enabled': False, 'frequency.enabled': False}
    alone |= {'pretrain.moments_steps': 0, 'pretrain.frequency_steps': 0}
    changes = {**alone, **ROWS[row](config)}
    if 'finetune.epochs' in changes:
        return changes
    before, epoch = noised_images(config)
    pretrain, _ = noised_images(load(name, epsilon, changes))
    epochs = config.finetune.epochs + (before - pretrain) / epoch
    if epochs <= 0:
        raise ValueError(f'{row}: pre-training alone has more noised images than all of {name}')
    return {**changes, 'finetune.epochs': epochs}


def get_config(cell: str) -> ConfigDict:
    """Return the config of a cell, given as CONFIG/ROW/EPSILON."""
    name, row, epsilon = cell.rsplit('/', 2)
    return load(name, epsilon, changes_of(row, name, epsilon))


def folder_of(out: Path, row: str, epsilon: str, seed: str) -> Path:
    """Return the work directory of a cell."""
    return out / row.replace(' ', '_') / epsilon / seed


def run(name: str, row: str, epsilon: str, seed: str, folder: Path, more: Sequence[str]) -> dict | str:
    """Run one cell, or go on with it; its scores by name, or why there are none."""
    command = [sys.executable, '-m', 'dpp_jax.main', f'--config={__file__}:{name}/{row}/{epsilon}']
    command += [f'--workdir={folder}', f'--config.seed={seed}', *more]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix('.log'), 'a', encoding='utf-8') as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        return (folder.with_suffix('.log')).read_text(encoding='utf-8').strip().splitlines()[-1]
    found = json.loads((folder / 'private' / 'evaluation.json').read_text(encoding='utf-8'))
    return {**found['accuracy'], **({'fid': found['fid']} if 'fid' in found else {})}


def table(cells: dict[str, dict[str, list]], epsilons: Sequence[str]) -> str:
    """Write the table: a line for each row and score, a column for each ε."""
    lines = [
        f'| row | score | {" | ".join(f"ε = {e}" for e in epsilons)} |',
        '|---' * (2 + len(epsilons)) + '|',
    ]
    for row, of_epsilon in cells.items():
        for score in _SCORES:
            texts = [_text([c[score] for c in of_epsilon.get(e, []) if score in c], score) for e in epsilons]
            lines.append(f'| {row} | {score} | {" | ".join(texts)} |')
    return '\n'.join(lines) + '\n'


def _text(values: list[float], score: str) -> str:
    if not values:
        return '–'
    factor, unit = (1, '') if score == 'fid' else (100, ' %')
    spread = f' ± {factor * statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{factor * statistics.mean(values):.1f}{spread}{unit} ({len(values)})'


def draw(cells: dict[str, dict[str, list]], path: Path) -> None:
    """Draw the CNN's accuracy and FID against ε."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for axis, score, factor in zip(axes, ('cnn', 'fid'), (100, 1)):
        for row, of_epsilon in cells.items():
            points = sorted(
                (float(e), factor * statistics.mean(c[score] for c in found if score in c))
                for e, found in of_epsilon.items()
                if any(score in c for c in found)
            )
            if points:
                axis.plot(*zip(*points), marker='o', label=row)
        axis.set(xscale='log', xlabel='ε', ylabel='CNN, %' if score == 'cnn' else 'FID (small CNN)')
        axis.grid(alpha=0.3)
    axes[1].set_yscale('log')
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def picture(folders: Sequence[Path]) -> bytes | None:
    """Return a PNG with a line of synthetic images of each run that has some."""
    shown = []
    for folder in folders:
        path = folder / 'release/synthetic/images.npz'
        if path.exists():
            with np.load(path) as found:
                shown.append(found['images'][:_PICTURES])
    return image_grid.png(image_grid.grid(np.concatenate(shown), _PICTURES)) if shown else None


def main(argv: list[str]) -> None:
    split = argv.index('--') if '--' in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default='digits_8', help='name or path, without ε')
    parser.add_argument('--rows', default=','.join(ROWS))
    parser.add_argument('--epsilons', default='0.3,1,3,10')
    parser.add_argument('--seeds', default='1,2,3')
    parser.add_argument('--out', default='runs/study', type=Path)
    chosen = parser.parse_args(argv[:split])
    rows, epsilons, seeds = (getattr(chosen, name).split(',') for name in ('rows', 'epsilons', 'seeds'))
    if unknown := set(rows) - set(ROWS):
        parser.error(f'--rows has {", ".join(sorted(unknown))}; they may be {", ".join(ROWS)}')
    for epsilon in epsilons:
        try:
            default.parse_epsilon(epsilon)
        except ValueError as error:
            parser.error(f'--epsilons: {error}')
    out, cells, failed = chosen.out, {}, []
    for seed in seeds:  # a table with one seed of every cell first
        for row in rows:
            for epsilon in epsilons:
                folder = folder_of(out, row, epsilon, seed)
                found = run(chosen.config, row, epsilon, seed, folder, argv[split + 1 :])
                print(f'{row}, ε = {epsilon}, seed {seed}: {found}', flush=True)
                if isinstance(found, str):
                    failed.append(f'- {row}, ε = {epsilon}, seed {seed}: {found}')
                else:
                    cells.setdefault(row, {}).setdefault(epsilon, []).append(found)
                    draw(cells, out / 'study.png')
                text = table(cells, epsilons) + '\n'.join(['', *failed]) + '\n'
                (out / 'study.md').write_text(text, encoding='utf-8')
                (out / 'study.json').write_text(json.dumps(cells, indent=1) + '\n', encoding='utf-8')
    shown = picture([folder_of(out, row, max(epsilons, key=float), seeds[0]) for row in rows])
    if shown:
        (out / 'images.png').write_bytes(shown)
    print((out / 'study.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
    main(sys.argv[1:])
