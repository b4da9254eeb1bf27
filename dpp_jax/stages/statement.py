"""The privacy statement of a run: what was spent, on what, and what the figures rest on.

Made from the releases that the ledger names (or, before a run, from those that a plan foresees), so
that nobody types what ran.
"""

from collections import Counter
from collections.abc import Iterable
import importlib.metadata
from pathlib import Path
import subprocess
from typing import Any

import dpp_jax
from dpp_jax.privacy import accounting
from dpp_jax.privacy.ledger import Entry
from dpp_jax.stages import workdir as workdir_lib

TITLES = {'central_query': 'central images (query)', 'dp_sgd': 'fine-tuning (DP-SGD)'}
UNIT = 'one image with its label'
NEIGHBOURS = 'two sets are neighbours if one has exactly one image more (add or remove one)'
COVERED = (
    'everything in release/: central images, models, synthetic images, and whatever is computed '
    'from them',
    'any number of synthetic images, drawn by anybody from the released model',
)
NOT_COVERED = (
    'anything in private/: keys, training losses and gradient norms, FID and accuracies against real '
    'images, reports',
    'other computations on the same images: an earlier run, a run with other settings, choosing '
    'settings by their results. Each spends its own ε, and they add up',
    'a person with several images: k images of one person have k times the ε, with a larger δ',
    'facts about the population: the images show what is common to many',
)
ASSUMPTIONS = (
    'the number of private images, their size and the number of classes are public',
    'noise is drawn as float32 by threefry from a secret 64-bit key: normal draws end at 5.42 standard '
    'deviations and have the granularity of floating point, and sums are rounded to float32; the guarantee is '
    'that of exact sums and exact normal noise',
    'Poisson samples are drawn by Philox from a secret 128-bit key, one independent 53-bit uniform '
    'number per image',
    'the keys in private/ stay secret, also after the run',
    'only one run answered with the same keys: a copy of private/ is not continued elsewhere',
    'how long a run took, and that it ended, is not shown to the adversary',
)
_MOST_FOR_PLD = 100.0  # the distributions' memory grows with ε


def make(
    entries: Iterable[Entry],
    *,
    delta: float,
    accountant: str,
    budget: float,
    seed: int | None,
) -> dict[str, Any]:
    """The statement as JSON's types.

    Args:
        entries: the releases, one per query and per step.
        delta: δ at which ε is stated.
        accountant: 'rdp' or 'pld': whose ε is the run's own.
        budget: the ε that the run was planned for.
        seed: of a test run, which is then not private; None otherwise.
    """
    groups = Counter(
        (e.mechanism, e.noise_multiplier, e.sampling_probability, e.sensitivity) for e in entries
    )
    mechanisms, events = [], []
    for (name, sigma, q, sensitivity), count in groups.items():
        events.append(accounting.subsampled_gaussian(sigma, q, count))
        mechanisms.append(
            {
                'mechanism': name,
                'kind': 'Poisson-sampled Gaussian',
                'noise_multiplier': sigma,
                'sampling_probability': q,
                'count': count,
                'sensitivity': sensitivity,
                'epsilon': _epsilons(events[-1], delta),
            }
        )
    epsilon = _epsilons(accounting.compose(events), delta)
    return {
        'private': seed is None,
        'epsilon': epsilon[accountant],
        'delta': delta,
        'accountant': accountant,
        'budget': budget,
        'unit_of_privacy': UNIT,
        'neighbouring_relation': NEIGHBOURS,
        'epsilon_by_accountant': epsilon,
        'mechanisms': mechanisms,
        'covered': list(COVERED),
        'not_covered': list(NOT_COVERED),
        'assumptions': list(ASSUMPTIONS),
        'code': code_version(),
    } | ({} if seed is None else {'seed': seed})


def write(workdir: workdir_lib.WorkDir, statement: dict[str, Any]) -> None:
    """release/privacy_statement.json and .md."""
    workdir_lib.write_json(workdir.release / 'privacy_statement.json', statement)
    workdir_lib.write_text(workdir.release / 'privacy_statement.md', markdown(statement))


def exists(workdir: workdir_lib.WorkDir) -> bool:
    return all(
        (workdir.release / f'privacy_statement.{kind}').exists() for kind in ('json', 'md')
    )


def markdown(statement: dict[str, Any]) -> str:
    """The statement for people; every ε rounded up."""
    show = accounting.format_epsilon
    epsilon = statement['epsilon_by_accountant']
    lines = ['# Privacy statement', '']
    if not statement['private']:
        lines += [
            f'**THIS RUN IS NOT PRIVATE.** It was made with `config.seed = {statement["seed"]}`: who '
            'guesses the seed can remove the noise. What follows would hold without a seed.',
            '',
        ]
    lines += [
        f'What lies in `release/` is **(ε = {show(statement["epsilon"])}, '
        f'δ = {statement["delta"]:g})**-differentially private '
        f'(budget: ε = {statement["budget"]:g}).',
        '',
        f'- Unit of privacy: {statement["unit_of_privacy"]}.',
        f'- Neighbouring relation: {statement["neighbouring_relation"]}.',
        f'- By Rényi differential privacy: ε = {show(epsilon["rdp"])}, at order '
        f'{epsilon["rdp_order"]:g}.',
        '- By privacy loss distributions: '
        + (f'ε = {show(epsilon["pld"])}.' if epsilon['pld'] is not None else 'not computed.'),
        f'- The run was planned with {statement["accountant"].upper()}, whose ε is the one stated. '
        'Every ε is rounded up.',
        '',
        '## Mechanisms',
        '',
        '| mechanism (Poisson-sampled Gaussian) | noise multiplier σ | sampling probability q | times | '
        'L2 sensitivity Δ | ε alone (RDP) | ε alone (PLD) |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in statement['mechanisms']:
        alone = row['epsilon']
        lines.append(
            f'| {TITLES.get(row["mechanism"], row["mechanism"])} | {row["noise_multiplier"]:.6g} | '
            f'{row["sampling_probability"]:.6g} | {row["count"]} | {row["sensitivity"]:.6g} | '
            f'{show(alone["rdp"])} | {show(alone["pld"]) if alone["pld"] is not None else "–"} |'
        )
    lines += ['', 'The noise has standard deviation σ·Δ in every coordinate.', '']
    for title, name in (
        ('Covered', 'covered'), ('Not covered', 'not_covered'), ('Assumptions', 'assumptions')
    ):
        lines += [f'## {title}', '', *(f'- {text}.' for text in statement[name]), '']
    versions = ', '.join(f'{name} {version}' for name, version in statement['code'].items())
    return '\n'.join([*lines, f'Computed from `ledger.jsonl` by {versions}.', ''])


def code_version() -> dict[str, str]:
    """Versions of this package (with its commit, where it is a git checkout) and of what it counts with."""
    names = ('dp-accounting', 'jax', 'jaxlib', 'numpy')
    versions = {'dpp_jax': dpp_jax.__version__}
    versions |= {name: importlib.metadata.version(name) for name in names}
    folder = Path(__file__).resolve().parents[2]
    if (folder / '.git').exists():
        try:
            commit = subprocess.run(
                ['git', 'describe', '--always', '--dirty', '--abbrev=40'],
                cwd=folder, capture_output=True, text=True, check=True, timeout=10,
            )
            versions['dpp_jax'] += f' ({commit.stdout.strip()})'
        except (OSError, subprocess.SubprocessError):
            pass  # without git there is the version alone
    return versions


def _epsilons(event: Any, delta: float) -> dict[str, float | None]:
    """ε by both accountants, and the order at which RDP attains it."""
    rdp, order = accounting.epsilon_and_order(event, delta)
    pld = accounting.epsilon(event, delta, 'pld') if rdp <= _MOST_FOR_PLD else None
    return {'rdp': rdp, 'rdp_order': order, 'pld': pld}
