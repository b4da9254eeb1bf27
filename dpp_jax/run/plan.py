"""What a run spends and how much it trains, and release/plan.json, which fixes it for a work directory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from dpp_jax import files
from dpp_jax.privacy import accounting, checks
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, QUERIES, SELECTION, Budget, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.run import already_spent

# Mechanism → what the figures of a plan call the noise multiplier that was calibrated for it.
NOISES = {
    DP_SGD: 'noise_multiplier',
    **{query: f'{name}_noise_multiplier' for query, name in QUERIES.items()},
    SELECTION: 'selection_noise_multiplier',
}
# What of a plan the guarantee rests on, other than noise that was calibrated: that is read from the file,
# because another version may calibrate it differently in the last digits.
_BINDING = (
    'private_images',
    'unit',
    'private_groups',
    'images_per_group',
    'delta',
    'accountant',
    'relation',
    'epsilon_budget',
    *(
        f'{name}_{figure}'
        for name in QUERIES.values()
        for figure in ('noise_multiplier', 'sampling_probability', 'count')
    ),
    'selection_sensitivity',
    'declared',
    'sampling_probability',
    'steps',
    'expected_batch_size',
)
# What settings of pre-training decide, which may change before DP-SGD begins.
_PRETRAINING = ('pretrain_steps', 'pretrain_noised_images')
# What plans of earlier versions did not say, with the value that they stood for.
_NEW_FIELDS = {
    'relation': accounting.ZERO_OUT,
    'spent_before': [],
    'unit': 'image',
    'private_groups': None,
    'images_per_group': None,
    'selection_noise_multiplier': None,
    'selection_sensitivity': None,
    **{
        f'{name}_{figure}': value
        for query, name in QUERIES.items()
        if query != CENTRAL_QUERY
        for figure, value in (('noise_multiplier', None), ('sampling_probability', None), ('count', 0))
    },
    'declared': [],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The mechanisms of a run, calibrated to its budget, and its size.

    Attributes:
        budget: what may be spent, by which releases.
        private_images: N, a public constant; the exact number of images where the relation has it public.
        groups, images_per_group: as of `groups.Unit`; None where the unit is one image.
        parameters: of the network.
        pretrain_steps: steps of pre-training here, 0 if its model is imported.
        pretrain_noised_images: noised images of pre-training, likewise.
        finetune_noised_images: expected noised images of fine-tuning, likewise.
    """

    budget: Budget
    private_images: int
    parameters: int
    pretrain_steps: int
    pretrain_noised_images: int
    finetune_noised_images: int
    groups: int | None = None
    images_per_group: int | None = None

    @property
    def unit(self) -> Unit:
        """What the sums are over."""
        return Unit(images=self.private_images, groups=self.groups, images_per_group=self.images_per_group)

    @property
    def expected_batch_size(self) -> float:
        """Expected images in a step of fine-tuning, q N; q is one over a whole number of batches."""
        return self.unit.used_images / round(1 / self.budget.of(DP_SGD).mechanism.sampling_probability)

    def noised_images(self, stages: Iterable[str]) -> int:
        """Return how many noised images the trainings among these stages take."""
        trainings = {'pretrain': self.pretrain_noised_images, 'finetune': self.finetune_noised_images}
        return sum(trainings.get(stage, 0) for stage in stages)

    def figures(self) -> dict[str, Any]:
        """Return the plan as plan.json holds it, with the ε of each part."""
        budget = self.budget
        dp_sgd, selection = budget.of(DP_SGD), budget.of(SELECTION)
        asked = {query: budget.of(query) for query in QUERIES}
        # As earlier versions wrote it, where they knew all that is asked.
        shown = {query: found for query, found in asked.items() if found or query == CENTRAL_QUERY}
        return {
            'private_images': self.private_images,
            'unit': self.unit.name,
            'private_groups': self.groups,
            'images_per_group': self.images_per_group,
            'delta': budget.delta,
            'accountant': budget.accountant,
            'relation': budget.relation,
            'epsilon_budget': budget.epsilon,
            **{f'epsilon_{QUERIES[query]}': budget.spent(query) for query in shown},
            'epsilon_finetune': budget.spent(DP_SGD),
            'epsilon_selection': budget.spent(SELECTION),
            'epsilon_total': budget.spent(),
            'spent_before': already_spent.rows(budget.before),
            'declared': [part.mechanism.name for part in budget.releases if part.declared],
            **{
                f'{QUERIES[query]}_{figure}': value
                for query, found in shown.items()
                for figure, value in (
                    ('noise_multiplier', found and found.mechanism.noise_multiplier),
                    ('sampling_probability', found and found.mechanism.sampling_probability),
                    ('count', budget.count(query)),
                )
            },
            'selection_noise_multiplier': selection and selection.mechanism.noise_multiplier,
            'selection_sensitivity': selection and selection.mechanism.sensitivity,
            'noise_multiplier': dp_sgd.mechanism.noise_multiplier,
            'sampling_probability': dp_sgd.mechanism.sampling_probability,
            'steps': dp_sgd.count,
            'expected_batch_size': self.expected_batch_size,
            'pretrain_steps': self.pretrain_steps,
            'parameters': self.parameters,
            'pretrain_noised_images': self.pretrain_noised_images,
            'finetune_noised_images': self.finetune_noised_images,
        }


def load(
    path: Path,
    make: Callable[[Mapping[str, float], Sequence[Releases] | None], Plan],
    shares: Mapping[str, float | None],
) -> Plan:
    """Return the plan that a work directory follows, or the one that it would be given.

    Reads the noise multipliers, and what was spent before, from plan.json and recomputes everything else.

    Args:
        path: of plan.json.
        make: (mechanism → noise multiplier that is decided already; others are calibrated, what was spent
            before; None: as the config says) → plan.
        shares: mechanism → the share of ε that it alone may spend; None: no limit of its own.

    Raises:
        ValueError: the file is damaged or lacks a field, or its plan is not one that this config can have:
            it takes other steps or batches, asks other queries, or does not stay within the budget.
    """
    if not path.exists():
        return make({}, None)
    recorded = _read(path)
    plan = make(noises(recorded), already_spent.from_rows(recorded['spent_before']))
    figures, budget = _NEW_FIELDS | plan.figures(), plan.budget
    for name in _BINDING:
        if recorded[name] != figures[name]:
            raise ValueError(
                f'{path} has {name} = {recorded[name]}; this config gives {figures[name]}. '
                'Someone changed the plan: restore the file, or use another --workdir'
            )
    limits = [
        (NOISES[mechanism], budget.spent(mechanism), _of_share(mechanism), share * budget.epsilon)
        for mechanism, share in shares.items()
        if share is not None
    ]
    for name, spent, limit, allowed in (
        *limits,
        (NOISES[DP_SGD], budget.spent(), 'the budget', budget.epsilon),
    ):
        if spent > allowed:
            raise ValueError(
                f'{path} has {name} = {figures[name]}, which spends ε = '
                f'{accounting.format_epsilon(spent, 6)}; ε must be within {limit}, '
                f'{accounting.format_exact(allowed)}. Someone changed the plan: restore the file, or use '
                'another --workdir'
            )
    return plan


def noises(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return mechanism → noise multiplier, of those that the figures of a plan have."""
    found = {mechanism: figures.get(name) for mechanism, name in NOISES.items()}
    return {mechanism: sigma for mechanism, sigma in found.items() if sigma is not None}


def _of_share(mechanism: str) -> str:
    """Name the share of ε of a mechanism."""
    name = QUERIES.get(mechanism, mechanism)
    ending = "'" if name.endswith('s') else "'s"
    return f'the {name}{ending} share'


def _read(path: Path) -> dict[str, Any]:
    """Read the figures in plan.json; a ValueError says which one is missing, or is no noise at all."""
    recorded = _NEW_FIELDS | files.read_json(path, 'Restore the file')
    try:
        for name in (*_BINDING, 'noise_multiplier'):
            if name not in recorded:
                raise ValueError(f'it has no {name}')
        sigma = recorded['noise_multiplier']
        checks.require('noise_multiplier', sigma, checks.is_positive(sigma), 'a finite number > 0')
        for name in NOISES.values():
            sigma = recorded[name]
            is_good = sigma is None or checks.is_positive(sigma)
            checks.require(name, sigma, is_good, 'a finite number > 0, or null')
        if (recorded['selection_sensitivity'] is None) != (recorded['selection_noise_multiplier'] is None):
            raise ValueError('selection_noise_multiplier and selection_sensitivity go together')
        found = files.fault(recorded, {'spent_before': [already_spent.ROW]})
        if found:
            raise ValueError(found)
        already_spent.from_rows(recorded['spent_before'])
    except ValueError as error:
        raise ValueError(f'{path} is not a valid plan ({error}). Restore the file') from error
    return recorded


def save(path: Path, plan: Plan) -> None:
    """Fix the plan of a work directory that has none, or one of another pre-training."""
    figures = plan.figures()
    known = files.read_json(path, 'Restore the file') if path.exists() else {}
    if any(known.get(name) != figures[name] for name in _PRETRAINING):
        files.write_json(path, figures)
