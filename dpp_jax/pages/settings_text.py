"""Settings of a run for readers: what differs from configs/default.py, and how the images were made."""

from typing import Any

import numpy as np

from dpp_jax import files
from dpp_jax.configs import default
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS
from dpp_jax.run import artefacts, imported
from dpp_jax.run.folder import WorkDir, flatten

# How many images a class has, and why: by `generate.class_counts`.
CLASS_COUNTS = {
    'balanced': 'Every class has as many, whatever the private images have.',
    'shares': 'Their number per class was set by hand.',
    'query': 'Their number per class follows the noisy counts that the query released.',
}


def of_run(workdir: WorkDir, images: artefacts.SyntheticImages) -> dict[str, Any]:
    """Return the settings by their full names: as the folder was begun, and as its images were made."""
    return files.read_json(workdir.config, 'Restore the file') | images.settings


def compared(settings: dict[str, Any]) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Return the settings that differ from the default, (name, value, default), and the others.

    Args:
        settings: by their full names, as in release/config.json.
    """
    usual = flatten(default.get_config().to_dict())
    changed, same = [], []
    for name, value in settings.items():
        if name.startswith('_'):
            continue
        if name in usual and usual[name] == value:
            same.append((name, show(value)))
        else:
            changed.append((name, show(value), show(usual[name]) if name in usual else 'none'))
    return changed, same


def show(value: Any) -> str:
    """Write the value of a setting."""
    if value is None:
        return 'not set'
    if isinstance(value, list):
        return ', '.join(map(show, value)) if value else '()'
    if isinstance(value, float):
        return f'{value:.10g}'
    return str(value) if value != '' else "''"


def of_import(settings: dict[str, Any]) -> list[str]:
    """Say, in a list of one sentence or none, where an imported model comes from."""
    kind = imported.kind(settings)
    if not kind:
        return []
    return [
        'The model was imported from a checkpoint of the PyTorch implementation. It was '
        f'{imported.MEANINGS[kind]}, as its owner declares.'
    ]


def drawn_from(data: dict[str, np.ndarray]) -> str:
    """Say what images are drawn from, in words before "under" or "with differential privacy".

    Args:
        data: as of `artefacts.SyntheticImages.load`.
    """
    if 'source' not in data:
        return 'drawn from a diffusion model that was trained'
    of_moments, total = int(data['source'].sum()), len(data['source'])
    return (
        f'{total - of_moments:,} drawn from a diffusion model and {of_moments:,} from class moments (a '
        'normal distribution for each class), both made'
    )


def how_made(settings: dict[str, Any], privacy: dict[str, Any]) -> list[str]:
    """Say in a few lines how the images came to be.

    Args:
        settings: by their full names, as in release/config.json.
        privacy: the statement, see `run.statement`.
    """
    rows = {row['mechanism']: row for row in privacy['mechanisms'] if not row.get('declared')}
    lines = of_import(settings)
    if CENTRAL_QUERY in rows:
        row = rows[CENTRAL_QUERY]
        lines += [
            f'Central images: {row["count"]} noisy {settings["query.kind"]} quer'
            f'{"y" if row["count"] == 1 else "ies"}, one image per class each (noise multiplier '
            f'{row["noise_multiplier"]:.4g}).',
        ]
        sources = []
        if settings['pretrain.epochs']:
            sources.append('the central images')
        if MOMENTS in rows:
            lines.append(
                'Class moments: a noisy query for mean and second moment of '
                f'{settings["moments.frequencies"]} frequencies (noise multiplier '
                f'{rows[MOMENTS]["noise_multiplier"]:.4g}).'
            )
            if settings['pretrain.moments_steps']:
                sources.append('images drawn from the class moments')
            if settings.get('model.around') == MOMENTS:  # earlier versions have no such setting
                lines.append('The diffusion model corrects the best linear denoiser of these moments.')
        if FREQUENCY in rows:
            lines.append(
                f'Frequencies: a noisy query for mean random features, {settings["frequency.features"]:,} '
                f'of every class (noise multiplier {rows[FREQUENCY]["noise_multiplier"]:.4g}), to which a '
                'small generator of images was fitted.'
            )
            if settings['pretrain.frequency_steps']:
                sources.append('images of that generator')
        lines.append(f'Pre-training of a diffusion model on {", then ".join(sources)} alone.')
    if DP_SGD in rows:
        row = rows[DP_SGD]
        lines.append(
            f'Fine-tuning with DP-SGD on the private images: {row["count"]:,} steps, noise multiplier '
            f'{row["noise_multiplier"]:.4g}, sampling probability {row["sampling_probability"]:.4g}.'
        )
    lines.append(
        f'Sampling from the averaged weights ({settings["generate.sampler.name"]}, '
        f'{settings["generate.sampler.steps"]} steps).'
    )
    share = settings.get('generate.moments_share', 0)
    if share:
        lines.append(
            f'In place of {100 * share:.4g} % of the images of each class: images drawn from the class '
            'moments, which costs no further privacy. `source` in `images.npz` is 1 for them, else 0.'
        )
    return lines
