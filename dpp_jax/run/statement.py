"""The privacy statement of a run: what was spent, on what, and what the figures rest on.

Made from the releases that the ledger names (or, before a run, from those that a plan foresees), so
that nobody types what ran.
"""

from collections.abc import Sequence
import functools
import importlib.metadata
from pathlib import Path
import subprocess
from typing import Any

import dpp_jax
from dpp_jax import files
from dpp_jax.privacy import accounting, groups
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, Budget, Releases, group, total_event
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import already_spent
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys, is_seeded

TITLES = {CENTRAL_QUERY: 'central images (query)', DP_SGD: 'fine-tuning (DP-SGD)'}
UNITS = {
    groups.IMAGE: 'one image with its label',
    groups.GROUP: 'one group of images with their labels (all images of a person, as `data.groups` says)',
}
COVERED = (
    'everything in release/: central images, models, synthetic images, and whatever is computed from them',
    'any number of synthetic images that anyone draws from the released model',
)
CHOICE = (
    'choosing settings by scores on real images (FID, accuracies), `generate.*` too: the more settings are '
    'scored, the more the choice tells of these images'
)
NOT_COVERED = (
    'anything in private/: keys, training losses and gradient norms, FID and accuracies against real '
    'images, reports',
    CHOICE,
    'other computations on the same images: an earlier run, a run with other settings. '
    'Each has its own ε; the ε values add up (`dpp-jax --stage=compose` states '
    'them together). What is listed here as spent before is counted',
    'facts about the population: synthetic images show what many private images have in common',
)
_NOT_COVERED_OF = {
    groups.IMAGE: 'a person with several images: for k images, ε is k times as large, and δ is larger '
    "(`dp.unit='group'` covers all images of a person)",
    groups.GROUP: 'a person with images in several groups: for k groups, ε is k times as large, and δ is '
    'larger. One image more, less or other in a group is covered by the ε of replace one (another group in '
    'the place of one)',
}
_PUBLIC = 'the size of the private images and the number of classes are public'
_PUBLIC_NUMBER = {
    groups.IMAGE: 'the number of private images, their size and the number of classes are public',
    groups.GROUP: 'the number of groups, the size of the private images and the number of classes are public',
}
ASSUMPTIONS = (
    'the adversary is computationally bounded: noise comes from threefry with secret keys, four of 64 bits '
    'for each mechanism (one, in a run that an earlier version began)',
    'noise is float32. Each value is half the sum of four normal draws, so it has the granularity of '
    'float32 and ends beyond 10 standard deviations. The guarantee is that of exact normal noise; sums are '
    'exact, and what rounding adds to them is paid for by a smaller bound (for as many images as planned)',
    'Poisson samples are drawn by Philox from a secret 128-bit key, one independent 53-bit uniform '
    'number per image (or group, where that is the unit)',
    'the keys in private/ stay secret, during the run and after it',
    'the keys serve one run only: nobody continues a copy of private/ elsewhere, and nobody makes a '
    'deleted release again on other devices or with other versions',
    'the adversary does not see how long a run took, or whether it ended',
)


def make(
    releases: Sequence[Releases],
    *,
    is_private: bool,
    delta: float,
    accountant: str,
    budget: float,
    relation: str = accounting.ZERO_OUT,
    before: Sequence[Releases] = (),
    code_of_stages: dict[str, list] | None = None,
) -> dict[str, Any]:
    """Make the statement, in JSON's types.

    Args:
        releases: what was released, or would be.
        is_private: whether all keys came from the operating system; a run from a seed is not private.
        delta: δ at which ε is stated.
        accountant: a name in `accounting.ACCOUNTANTS`: whose ε is the run's own.
        budget: the ε that the run was planned for.
        relation: a name in `accounting.RELATIONS`: of which neighbors the run's own ε is.
        before: what earlier runs released from the same private images; the ε of this run includes it.
        code_of_stages: stage → versions of the code that ran it, see `record_code`.
    """
    epsilon = _epsilons([*before, *releases], delta, accountant, relation)
    meaning, unit = accounting.RELATIONS[relation], _unit(releases)
    public = _PUBLIC_NUMBER[unit] if meaning.size_is_public else _PUBLIC
    return {
        'private': is_private,
        'epsilon': epsilon[accountant],
        'epsilon_rounded_up': accounting.format_epsilon(epsilon[accountant]),
        'delta': delta,
        'accountant': accountant,
        'budget': budget,
        'unit': unit,
        'unit_of_privacy': UNITS[unit],
        'relation': relation,
        'neighboring_relation': meaning.sentence.format(unit=unit),
        'epsilon_by_accountant': epsilon,
        'epsilon_of_replace_one': replace_one((*before, *releases), delta),
        'mechanisms': _rows(releases, delta, accountant, relation),
        'spent_before': _rows(before, delta, accountant, relation),
        'covered': list(COVERED),
        'not_covered': [*NOT_COVERED, _NOT_COVERED_OF[unit]],
        'assumptions': [public, *ASSUMPTIONS],
        'code': code_version(),
        'code_of_stages': code_of_stages or {},
    }


def _unit(releases: Sequence[Releases]) -> str:
    """Return what the releases have as their unit; `make` gets those of one run."""
    return next((part.mechanism.unit for part in releases), groups.IMAGE)


def _rows(releases: Sequence[Releases], delta: float, accountant: str, relation: str) -> list[dict[str, Any]]:
    """Describe releases, each with its own ε."""
    return [
        row
        | {
            'kind': 'Poisson-sampled Gaussian',
            'epsilon': _epsilons([part], delta, accountant, relation),
        }
        for part, row in zip(releases, already_spent.rows(releases))
    ]


def of_ledger(workdir: WorkDir, ledger: Ledger, budget: Budget) -> dict[str, Any]:
    """Make the statement of what a work directory's ledger names."""
    return make(
        group(ledger.entries),
        is_private=not any(is_seeded(entry.randomness) for entry in ledger.entries),
        delta=budget.delta,
        accountant=budget.accountant,
        budget=budget.epsilon,
        relation=budget.relation,
        before=budget.before,
        code_of_stages=codes(workdir),
    )


def write(workdir: WorkDir, statement: dict[str, Any]) -> None:
    """Write release/privacy_statement.json and .md, after the ledger that they are computed from."""
    workdir.publish_ledger()
    files.write_json(workdir.statement, statement)
    files.write_text(workdir.statement_text, markdown(statement))


def exists(workdir: WorkDir) -> bool:
    """Whether both files of the statement are there, and the ledger that they are computed from."""
    return all(path.exists() for path in (workdir.statement, workdir.statement_text, workdir.released_ledger))


def stated(workdir: WorkDir, mechanism: str) -> int:
    """Return how many releases of `mechanism` the written statement names."""
    if not workdir.statement.exists():
        return 0
    statement = files.read_json(
        workdir.statement,
        'Restore the file. Or delete it and run --stage=all: it is written again from ledger.jsonl',
        {'mechanisms': [{'mechanism': str, 'count': int}]},
    )
    return sum(row['count'] for row in statement['mechanisms'] if row['mechanism'] == mechanism)


def check_lost(
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger,
    budget: Budget,
    done: dict[str, bool],
    stated: dict[str, int],
) -> None:
    """Refuse to repeat a release of which nothing tells what it was.

    Args:
        workdir: the folder of the run.
        keys: its keys.
        ledger: its ledger.
        budget: its plan's.
        done: stage → whether its output is there.
        stated: mechanism → releases that the statement counts; read before the ledger, which may grow.

    Raises:
        ValueError: the statement counts releases that the ledger lacks; or it covers what a stage released,
            which is not there any more, and the keys of its mechanism do not tell what it was.
    """
    for stage, name in (('central', CENTRAL_QUERY), ('finetune', DP_SGD)):
        count = stated[name]
        if count > ledger.count(name):
            raise ValueError(
                f'{ledger.path} has {ledger.count(name)} entries of {name}, but the privacy statement counts '
                f'{count} releases. Restore the ledger: ε cannot be computed without it'
            )
        is_stated = 0 < budget.count(name) == count
        if not done[stage] and is_stated and not keys.may_repeat(name):
            raise ValueError(
                f'the output of --stage={stage} is missing in {workdir.release}, but the privacy statement '
                'counts it as released. private/keys.json has no digest of it: a new one could differ, and '
                'would be a second release under the same noise. Restore it, or use another --workdir'
            )


def markdown(statement: dict[str, Any], draft: str = '') -> str:
    """Write the statement for people; every ε is rounded up. A `draft` says why it does not hold yet."""
    show, exact = accounting.format_epsilon, accounting.format_exact
    epsilon = statement['epsilon_by_accountant']
    lines = ['# Privacy statement', '']
    if draft:
        note = f'**DRAFT: {draft}.** This is what the statement of a whole run would say.'
        lines = ['# Privacy statement (DRAFT)', '', note, '']
    if not statement['private']:
        lines += [
            '**THIS RUN IS NOT PRIVATE.** Its keys come from `config.seed`: anyone who guesses the seed can '
            'remove the noise. The rest of this page holds only for a run without a seed.',
            '',
        ]
    lines += [
        f'Everything in `release/` is **(ε = {show(statement["epsilon"])}, '
        f'δ = {exact(statement["delta"])})**-differentially private '
        f'(budget: ε = {exact(statement["budget"])}).',
        '',
        f'- Unit of privacy: {statement["unit_of_privacy"]}.',
        f'- Neighboring relation: {statement["neighboring_relation"]}. The budget is for this relation.',
        replace_one_line(statement['relation'], statement['epsilon_of_replace_one'], statement['unit']),
        '- By Rényi differential privacy: '
        + (
            f'ε = {show(epsilon["rdp"])}, at order {epsilon["rdp_order"]:g}.'
            if epsilon['rdp'] is not None
            else 'this relation cannot be counted.'
        ),
        '- By privacy loss distributions: '
        + (f'ε = {show(epsilon["pld"])}.' if epsilon['pld'] is not None else _why_not(statement['delta'])),
        f'- The stated ε is that of the {statement["accountant"].upper()} accountant, with which the run was '
        'planned. Every ε is rounded up.',
        '',
        '## Mechanisms',
        '',
        '| mechanism (Poisson-sampled Gaussian) | noise multiplier σ | sampling probability q | times | '
        'L2 sensitivity Δ | ε alone (RDP) | ε alone (PLD) |',
        '|---|---|---|---|---|---|---|',
    ]
    rows = [('spent before: ', row) for row in statement['spent_before']]
    for when, row in [*rows, *(('', row) for row in statement['mechanisms'])]:
        alone = row['epsilon']
        lines.append(
            f'| {when}{TITLES.get(row["mechanism"], row["mechanism"])} | '
            f'{accounting.format_noise(row["noise_multiplier"])} | '
            f'{row["sampling_probability"]:.6g} | {row["count"]} | {row["sensitivity"]:.6g} | '
            f'{_or_dash(alone["rdp"])} | {_or_dash(alone["pld"])} |'
        )
    lines += ['', 'The noise has standard deviation σ·Δ in every coordinate.', '']
    if rows:
        lines += [
            'Rows "spent before" are earlier releases from the same private images (`dp.already_spent`). '
            'Every ε above this table includes them.',
            '',
        ]
    for title, name in (
        ('Covered', 'covered'),
        ('Not covered', 'not_covered'),
        ('Assumptions', 'assumptions'),
    ):
        lines += [f'## {title}', '', *(f'- {text}.' for text in statement[name]), '']
    named = lambda code: ', '.join(f'{name} {version}' for name, version in code.items())
    lines += [
        '## Code',
        '',
        f'Computed from {"the plan" if draft else "`ledger.jsonl`"} by {named(statement["code"])}.',
        '',
    ]
    stages_of = {}  # versions → the stages that they ran
    for stage, codes in statement['code_of_stages'].items():
        stages_of.setdefault('; then '.join(map(named, codes)), []).append(f'`{stage}`')
    lines += [f'- {", ".join(stages)}: ran with {codes}.' for codes, stages in stages_of.items()]
    return '\n'.join([*lines, ''])


def _why_not(delta: float) -> str:
    """Say why there is no figure by privacy loss distributions."""
    if delta <= accounting.LEAST_DELTA_OF_PLD:
        return 'not available at this δ.'
    return 'not computed: ε is too large, or releases are too many.'


def _or_dash(value: float | None) -> str:
    return '–' if value is None else accounting.format_epsilon(value)


def replace_one_line(relation: str, value: float | None, unit: str = groups.IMAGE) -> str:
    """Say, as an item of a list, what ε is for who reads "neighbors" as "one image (or group) replaced"."""
    if relation == accounting.REPLACE_ONE:
        return '- By zero-out, or add or remove one, ε is smaller.'
    figure = 'not computed' if value is None else f'ε = {accounting.format_epsilon(value)}'
    return (
        f'- By replace one (another {unit} in the place of one), at the same δ: {figure}, by privacy loss '
        'distributions. The budget is not for this relation.'
    )


@functools.lru_cache(maxsize=16)
def replace_one(releases: tuple[Releases, ...], delta: float) -> float | None:
    """Compute ε by privacy loss distributions for replace one; None where they cannot state it."""
    return accounting.epsilon_if_stated(total_event(releases), delta, accounting.REPLACE_ONE)


def record_code(workdir: WorkDir, stage: str) -> None:
    """Note in release/code.json that this version of the code runs (a part of) a stage."""
    recorded, version = codes(workdir), code_version()
    if version not in recorded.get(stage, []):
        recorded.setdefault(stage, []).append(version)
        files.write_json(workdir.code, recorded)


def codes(workdir: WorkDir) -> dict[str, list[dict[str, str]]]:
    """Return stage → versions of the code that ran it."""
    if not workdir.code.exists():
        return {}
    return files.read_json(
        workdir.code,
        'Restore the file. Or delete it: the statement then names no versions of earlier stages',
        {'*': [{'*': str}]},
    )


def code_version() -> dict[str, str]:
    """Return the versions of this package, with its commit in a git checkout, and of what it counts with."""
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


def _epsilons(
    releases: Sequence[Releases], delta: float, accountant: str, relation: str
) -> dict[str, float | None]:
    """Compute ε by the accountants that can, and RDP's order."""
    event = total_event(releases)
    rdp, order = None, None
    if 'rdp' in accounting.RELATIONS[relation].accountants:
        rdp, order = accounting.epsilon_and_order(event, delta, relation)
    pld = _pld(tuple(releases), delta, relation)
    return {'rdp': rdp, 'rdp_order': order, 'pld': pld}


@functools.lru_cache(maxsize=64)
def _pld(releases: tuple[Releases, ...], delta: float, relation: str) -> float | None:
    """Compute ε by privacy loss distributions, which takes seconds; None where they cannot state it."""
    return accounting.epsilon_if_stated(total_event(releases), delta, relation)
