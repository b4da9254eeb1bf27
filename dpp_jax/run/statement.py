"""The privacy statement of a run: what was spent, on what, and what the figures rest on.

Made from the releases that the ledger names (or, before a run, from those that a plan foresees), so
that nobody types what ran.
"""

from collections.abc import Iterable
import importlib.metadata
from pathlib import Path
import subprocess
from typing import Any

import dpp_jax
from dpp_jax.privacy import accounting
from dpp_jax.privacy.ledger import Entry, composition
from dpp_jax.run import folder as workdir_lib

TITLES = {'central_query': 'central images (query)', 'dp_sgd': 'fine-tuning (DP-SGD)'}
UNIT = 'one image with its label'
NEIGHBOURS = 'two sets are neighbours if one has exactly one image more (add or remove one)'
COVERED = (
    'everything in release/: central images, models, synthetic images, and whatever is computed from them',
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
    'noise is drawn as float32 by threefry from a secret 64-bit key, each value as half the sum of four '
    'normal draws: it has the granularity of float32 and ends beyond 10 standard deviations; sums are '
    'rounded to float32. The guarantee is that of exact sums and exact normal noise',
    'Poisson samples are drawn by Philox from a secret 128-bit key, one independent 53-bit uniform '
    'number per image',
    'the keys in private/ stay secret, also after the run',
    'only one run answered with the same keys: a copy of private/ is not continued elsewhere, and what '
    'was released and then deleted is not made again on other devices or with other versions',
    'how long a run took, and that it ended, is not shown to the adversary',
)
_MOST_FOR_PLD = 100.0  # the distributions' memory grows with ε


def make(
    entries: Iterable[Entry],
    *,
    delta: float,
    accountant: str,
    budget: float,
    code_of_stages: dict[str, list] | None = None,
) -> dict[str, Any]:
    """The statement as JSON's types.

    Args:
        entries: the releases, one per query and per step. Keys made from a seed show in their names:
            such a run is not private.
        delta: δ at which ε is stated.
        accountant: 'rdp' or 'pld': whose ε is the run's own.
        budget: the ε that the run was planned for.
        code_of_stages: stage → versions of the code that ran it, see `record_code`.
    """
    entries = list(entries)
    groups = {}
    for e in entries:
        kind = (e.mechanism, e.noise_multiplier, e.sampling_probability, e.sensitivity)
        groups.setdefault(kind, []).append(e)
    mechanisms = [
        {
            'mechanism': name,
            'kind': 'Poisson-sampled Gaussian',
            'noise_multiplier': sigma,
            'sampling_probability': q,
            'count': len(group),
            'sensitivity': sensitivity,
            'epsilon': _epsilons(composition(group), delta, accountant),
        }
        for (name, sigma, q, sensitivity), group in groups.items()
    ]
    epsilon = _epsilons(composition(entries), delta, accountant)
    return {
        'private': not any(workdir_lib.is_seeded(e.randomness) for e in entries),
        'epsilon': epsilon[accountant],
        'epsilon_rounded_up': accounting.format_epsilon(epsilon[accountant]),
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
        'code_of_stages': code_of_stages or {},
    }


def write(workdir: workdir_lib.WorkDir, statement: dict[str, Any]) -> None:
    """release/privacy_statement.json and .md."""
    workdir_lib.write_json(workdir.release / 'privacy_statement.json', statement)
    workdir_lib.write_text(workdir.release / 'privacy_statement.md', markdown(statement))


def exists(workdir: workdir_lib.WorkDir) -> bool:
    return all((workdir.release / f'privacy_statement.{kind}').exists() for kind in ('json', 'md'))


def stated(workdir: workdir_lib.WorkDir, mechanism: str) -> int:
    """How many releases of `mechanism` the written statement names."""
    path = workdir.release / 'privacy_statement.json'
    if not path.exists():
        return 0
    rows = workdir_lib.read_json(
        path, 'Restore it; or delete it: --stage=all writes it again from ledger.jsonl'
    )['mechanisms']
    return sum(row['count'] for row in rows if row['mechanism'] == mechanism)


def markdown(statement: dict[str, Any]) -> str:
    """The statement for people; every ε rounded up."""
    show, exact = accounting.format_epsilon, accounting.format_exact
    epsilon = statement['epsilon_by_accountant']
    lines = ['# Privacy statement', '']
    if not statement['private']:
        lines += [
            '**THIS RUN IS NOT PRIVATE.** Its keys were made from `config.seed`: who guesses the seed can '
            'remove the noise. What follows would hold without a seed.',
            '',
        ]
    lines += [
        f'What lies in `release/` is **(ε = {show(statement["epsilon"])}, '
        f'δ = {exact(statement["delta"])})**-differentially private '
        f'(budget: ε = {exact(statement["budget"])}).',
        '',
        f'- Unit of privacy: {statement["unit_of_privacy"]}.',
        f'- Neighbouring relation: {statement["neighbouring_relation"]}.',
        f'- By Rényi differential privacy: ε = {show(epsilon["rdp"])}, at order {epsilon["rdp_order"]:g}.',
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
            f'| {TITLES.get(row["mechanism"], row["mechanism"])} | '
            f'{accounting.format_noise(row["noise_multiplier"])} | '
            f'{row["sampling_probability"]:.6g} | {row["count"]} | {row["sensitivity"]:.6g} | '
            f'{show(alone["rdp"])} | {show(alone["pld"]) if alone["pld"] is not None else "–"} |'
        )
    lines += ['', 'The noise has standard deviation σ·Δ in every coordinate.', '']
    for title, name in (
        ('Covered', 'covered'),
        ('Not covered', 'not_covered'),
        ('Assumptions', 'assumptions'),
    ):
        lines += [f'## {title}', '', *(f'- {text}.' for text in statement[name]), '']
    named = lambda code: ', '.join(f'{name} {version}' for name, version in code.items())
    lines += ['## Code', '', f'Computed from `ledger.jsonl` by {named(statement["code"])}.', '']
    lines += [
        f'- `{stage}` was run by {"; then ".join(map(named, codes))}.'
        for stage, codes in statement['code_of_stages'].items()
    ]
    return '\n'.join([*lines, ''])


def record_code(workdir: workdir_lib.WorkDir, stage: str) -> None:
    """Note in release/code.json that this version of the code runs (a part of) a stage."""
    recorded, version = codes(workdir), code_version()
    if version not in recorded.get(stage, []):
        recorded.setdefault(stage, []).append(version)
        workdir_lib.write_json(workdir.release / 'code.json', recorded)


def codes(workdir: workdir_lib.WorkDir) -> dict[str, list[dict[str, str]]]:
    """Stage → versions of the code that ran it."""
    path = workdir.release / 'code.json'
    if not path.exists():
        return {}
    return workdir_lib.read_json(
        path, 'Restore it; or delete it: only the statement names the versions in it'
    )


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
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
            versions['dpp_jax'] += f' ({commit.stdout.strip()})'
        except (OSError, subprocess.SubprocessError):
            pass  # without git there is the version alone
    return versions


def _epsilons(event: Any, delta: float, accountant: str) -> dict[str, float | None]:
    """ε by both accountants, and the order at which RDP attains it; PLD's only where it is cheap or asked."""
    rdp, order = accounting.epsilon_and_order(event, delta)
    computed = accountant == 'pld' or rdp <= _MOST_FOR_PLD
    pld = accounting.epsilon(event, delta, 'pld') if computed else None
    return {'rdp': rdp, 'rdp_order': order, 'pld': pld}
