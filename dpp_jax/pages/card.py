"""The data card, release/README.md: what the images are, what is claimed of them, how they are loaded."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpp_jax import files
from dpp_jax.pages import loading, settings_text
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts, statement_text
from dpp_jax.run.folder import RELEASE_NOTE, WorkDir


def in_short(name: str, data: dict[str, np.ndarray], privacy: dict[str, Any]) -> str:
    """Return the claim in a few sentences of plain text.

    Args:
        name: of the run.
        data: the images, as of `artefacts.SyntheticImages.load`.
        privacy: the statement, see `run.statement`.
    """
    epsilon, delta = accounting.format_epsilon(privacy['epsilon']), accounting.format_exact(privacy['delta'])
    holds = '' if privacy['private'] else 'NOT PRIVATE: the keys of this run come from a seed. '
    condition = (
        ', if what the owner of the imported checkpoint declares is true' if privacy['declared'] else ''
    )
    return (
        f'{holds}{len(data["images"]):,} synthetic images ({name}), {settings_text.drawn_from(data)} under '
        f'(ε = {epsilon}, δ = {delta})-differential privacy{condition}. '
        f'Unit of privacy: {privacy["unit_of_privacy"]}; {privacy["neighboring_relation"]}.'
    )


def write(
    workdir: WorkDir,
    images: artefacts.SyntheticImages,
    class_names: Sequence[str],
    privacy: dict[str, Any],
) -> None:
    """Write the card, from what is in release/ alone."""
    settings = settings_text.of_run(workdir, images)
    data = images.load(images.paths['images'])
    files.write_text(workdir.card, _text(settings, images, data, class_names, privacy))


def _text(
    settings: dict[str, Any],
    images: artefacts.SyntheticImages,
    data: dict[str, np.ndarray],
    class_names: Sequence[str],
    privacy: dict[str, Any],
) -> str:
    pixels, labels = data['images'], data['labels']
    counts = np.bincount(labels, minlength=len(class_names))
    height, width, channels = pixels.shape[1:]
    lines = [
        f'# {settings["name"]}: synthetic images',
        '',
        in_short(settings['name'], data, privacy),
        '',
        'The whole statement, with what is covered and what is assumed: `privacy_statement.md`. What it is '
        'computed from: `ledger.jsonl`. Everything at a glance: `report.html`.',
        '',
        '## Images',
        '',
        f'{len(pixels):,} images of {height} x {width} pixels, {"gray" if channels == 1 else "RGB"}, 8 bits, '
        f'in {len(class_names)} class{"" if len(class_names) == 1 else "es"}. '
        + settings_text.CLASS_COUNTS[settings.get('generate.class_counts', 'balanced')],
        '',
        '| label | class | images |',
        '|---|---|---|',
        *(
            f'| {label} | {_cell(name)} | {count:,} |'
            for label, (name, count) in enumerate(zip(class_names, counts))
        ),
        '',
        '## How they were made',
        '',
        *(f'- {line}' for line in settings_text.how_made(settings, privacy)),
        '',
        'The settings are in `config.json`, the versions of the code in `code.json`.',
        '',
        '## How to load them',
        '',
    ]
    for title, program in loading.snippets(images, data):
        lines += [f'{title}:', '', '```python', program.strip(), '```', '']
    lines += [
        '## What they are not',
        '',
        '- No image is a copy of a private one by intent; how much all of them together may tell of any one '
        f'is what ε and δ bound. Not covered: {statement_text.CHOICE}.',
        '- They were not looked at by a person. They may be wrong, and as one-sided as the private images.',
        '',
        '## License',
        '',
        'Not chosen yet. The owner of the private images says in a file `LICENSE` beside this one how these '
        'images may be used; this page is written anew by the program.',
        '',
        '---',
        '',
        RELEASE_NOTE,
    ]
    return '\n'.join(lines)


def _cell(text: str) -> str:
    """Return a text for a table of Markdown."""
    return ' '.join(text.split()).replace('|', '\\|')
