"""The words of the privacy statement: what is claimed, covered and assumed, and the page for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpp_jax.privacy import accounting, groups
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, SELECTION

TITLES = {
    CENTRAL_QUERY: 'central images (query)',
    MOMENTS: 'class moments (query)',
    FREQUENCY: 'random frequencies (query)',
    DP_SGD: 'fine-tuning (DP-SGD)',
    SELECTION: 'selection among classifiers',
}
MECHANISM_COLUMNS = (
    'mechanism (Poisson-sampled Gaussian)',
    'noise multiplier σ',
    'sampling probability q',
    'times',
    'L2 sensitivity Δ',
    'ε alone (RDP)',
    'ε alone (PLD)',
)
UNITS = {
    groups.IMAGE: 'one image with its label',
    groups.GROUP: 'one group of images with their labels (all images of a person, as `data.groups` says)',
}
COVERED = (
    'everything in release/: the answers of the queries (central images, class moments, random frequencies), '
    'models, synthetic images, and whatever is computed from them',
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
    'test images: scores are computed from them. Nothing of them is in release/, but for settings that '
    'were read',
)
NOT_COVERED_OF = {
    groups.IMAGE: 'a person with several images: for k images, ε is k times as large, and δ is larger '
    "(`dp.unit='group'` covers all images of a person)",
    groups.GROUP: 'a person with images in several groups: for k groups, ε is k times as large, and δ is '
    'larger. One image more, less or other in a group is covered by the ε of replace one (another group in '
    'the place of one)',
}
PUBLIC = 'the size of the private images and the number of classes are public'
PUBLIC_NUMBER = {
    groups.IMAGE: 'the number of private images, their size and the number of classes are public',
    groups.GROUP: 'the number of groups, the size of the private images and the number of classes are public',
}
ASSUMPTIONS = (
    'the adversary is computationally bounded: noise comes from threefry with secret keys, four of 64 bits '
    'for each mechanism (one, in a run that an earlier version began)',
    'noise is float32. Each value is half the sum of four normal draws, so it has the granularity of '
    'float32 and ends beyond 10 standard deviations. The guarantee is that of exact normal noise; sums are '
    'exact, and what rounding adds to them is paid for by a smaller bound (for as many images as planned)',
    'Poisson samples are drawn by Philox from a secret 128-bit key: the size of a batch first, from its '
    'binomial distribution, and then so many images (or groups, where that is the unit); in a run that an '
    'earlier version began, by one independent 53-bit uniform number for each',
    'the keys in private/ stay secret, during the run and after it, and so does what the hosts of a run send '
    'each other',
    'the keys serve one run only: nobody continues a copy of private/ elsewhere, and nobody makes a '
    'deleted release again on other devices or with other versions',
    'the adversary does not see how long a run took, or whether it ended',
)


_VOUCH = 'This program did not see that, and cannot vouch for it'
DECLARED = (
    'Rows "declared" are the word of the owner of the private images, who says that an imported checkpoint '
    f'was made so. {_VOUCH}. One reason to doubt it: the PyTorch implementation divides the noisy sums of '
    'its query by the number of images that were sampled, which its noise does not cover. Such a query is '
    'not private as declared'
)
DECLARED_PUBLIC = (
    'The owner of the private images declares that the imported checkpoint was trained without them. '
    f'{_VOUCH}'
)


def title(row: Mapping[str, Any]) -> str:
    """Return what a row of the statement is about."""
    name = TITLES.get(row['mechanism'], row['mechanism'])
    return f'declared: {name}' if row.get('declared') else name


def read_from_images(names: Sequence[str]) -> list[str]:
    """Say, in a list of one sentence or none, which settings were read from the private images."""
    if not names:
        return []
    return [
        'these settings were read from the private images and the test images beside them, and so was what '
        f'follows from them in `config.json`: {", ".join(f"`{name}`" for name in names)}. Their values are '
        'public by declaration: the (ε, δ) does not cover them'
    ]


def markdown(statement: dict[str, Any], draft: str = '') -> str:
    """Write the statement for people; every ε is rounded up. A `draft` says why it does not hold yet."""
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
        claim(statement),
        '',
        *(f'- {fact}' for fact in facts(statement)),
        '',
        '## Mechanisms',
        '',
        f'| {" | ".join(MECHANISM_COLUMNS)} |',
        f'|{"---|" * len(MECHANISM_COLUMNS)}',
        *(f'| {" | ".join(cells)} |' for cells in mechanism_cells(statement)),
    ]
    lines += ['', 'The noise has standard deviation σ·Δ in every coordinate.', '']
    if statement['spent_before']:
        lines += [
            'Rows "spent before" are earlier releases from the same private images (`dp.already_spent`). '
            'Every ε above this table includes them.',
            '',
        ]
    if statement['declared']:
        lines += [f'{statement["declared"]}.', '']
    for heading, name in (
        ('Covered', 'covered'),
        ('Not covered', 'not_covered'),
        ('Assumptions', 'assumptions'),
    ):
        lines += [f'## {heading}', '', *(f'- {text}.' for text in statement[name]), '']
    source = 'the plan' if draft else '`ledger.jsonl`'
    lines += ['## Code', '', f'Computed from {source} by {_versions(statement["code"])}.', '']
    lines += [f'- {line}' for line in code_lines(statement)]
    return '\n'.join([*lines, ''])


def _versions(code: dict[str, str]) -> str:
    return ', '.join(f'{name} {version}' for name, version in code.items())


def code_lines(statement: dict[str, Any]) -> list[str]:
    """Say which versions of the code ran which stages."""
    stages_of = {}  # versions → the stages that they ran
    for stage, codes in statement['code_of_stages'].items():
        stages_of.setdefault('; then '.join(map(_versions, codes)), []).append(f'`{stage}`')
    return [f'{", ".join(stages)}: ran with {codes}.' for codes, stages in stages_of.items()]


def claim(statement: dict[str, Any]) -> str:
    """Say, in a sentence, what the statement claims."""
    show, exact = accounting.format_epsilon, accounting.format_exact
    condition = 'If what is declared below is true, everything' if statement['declared'] else 'Everything'
    return (
        f'{condition} in `release/` is **(ε = {show(statement["epsilon"])}, '
        f'δ = {exact(statement["delta"])})**-differentially private '
        f'(budget: ε = {exact(statement["budget"])}).'
    )


def facts(statement: dict[str, Any]) -> list[str]:
    """Say, a sentence or two each, what the claim means: unit, neighbors, and ε by each accountant."""
    show, epsilon = accounting.format_epsilon, statement['epsilon_by_accountant']
    return [
        f'Unit of privacy: {statement["unit_of_privacy"]}.',
        f'Neighboring relation: {statement["neighboring_relation"]}. The budget is for this relation.',
        _replace_one(statement['relation'], statement['epsilon_of_replace_one'], statement['unit']),
        'By Rényi differential privacy: '
        + (
            f'ε = {show(epsilon["rdp"])}, at order {epsilon["rdp_order"]:g}.'
            if epsilon['rdp'] is not None
            else 'this relation cannot be counted.'
        ),
        'By privacy loss distributions: '
        + (f'ε = {show(epsilon["pld"])}.' if epsilon['pld'] is not None else _why_not(statement['delta'])),
        f'The stated ε is that of the {statement["accountant"].upper()} accountant, with which the run was '
        'planned. Every ε is rounded up.',
    ]


def mechanism_cells(statement: dict[str, Any]) -> list[list[str]]:
    """Describe each mechanism, by the columns above."""
    rows = [('spent before: ', row) for row in statement['spent_before']]
    return [
        [
            when + title(row),
            accounting.format_noise(row['noise_multiplier']),
            f'{row["sampling_probability"]:.6g}',
            str(row['count']),
            f'{row["sensitivity"]:.6g}',
            _or_dash(row['epsilon']['rdp']),
            _or_dash(row['epsilon']['pld']),
        ]
        for when, row in [*rows, *(('', row) for row in statement['mechanisms'])]
    ]


def _why_not(delta: float) -> str:
    """Say why there is no figure by privacy loss distributions."""
    if delta <= accounting.LEAST_DELTA_OF_PLD:
        return 'not available at this δ.'
    return 'not computed: ε is too large, or releases are too many.'


def _or_dash(value: float | None) -> str:
    return '–' if value is None else accounting.format_epsilon(value)


def _replace_one(relation: str, value: float | None, unit: str = groups.IMAGE) -> str:
    """Say, what ε is for who reads "neighbors" as "one image (or group) replaced"."""
    if relation == accounting.REPLACE_ONE:
        return 'By zero-out, or add or remove one, ε is smaller.'
    figure = 'not computed' if value is None else f'ε = {accounting.format_epsilon(value)}'
    return (
        f'By replace one (another {unit} in the place of one), at the same δ: {figure}, by privacy loss '
        'distributions. The budget is not for this relation.'
    )
