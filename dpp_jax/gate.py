"""What a command may rely on: settings, plan, ledger and what was released fit each other."""

from collections.abc import Collection, Sequence
import functools
from typing import NamedTuple

from ml_collections import ConfigDict

from dpp_jax import build, files
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy.budget import DP_SGD, MECHANISMS, QUERIES, SELECTION
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import already_spent, artefacts, imported, statement
from dpp_jax.run import plan as plan_lib
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.keys import Keys
from dpp_jax.stages import report
from dpp_jax.training import checkpoint, hosts

STAGES = ('central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report')
IMPORT = 'import'


def stages_of(kind: str) -> tuple[str, ...]:
    """Return the stages of a run in order.

    Args:
        kind: of the checkpoint that it imports, which takes the place of the first stages; '' if none.
    """
    return (IMPORT, *STAGES[len(_replaced(kind)) :]) if kind else STAGES


def _replaced(kind: str) -> tuple[str, ...]:
    """Return the stages that an imported checkpoint of this kind takes the place of."""
    return STAGES[: STAGES.index(imported.KINDS[kind]) + 1]


def check_folder(config, workdir: WorkDir, images: artefacts.SyntheticImages, stage: str) -> list[str]:
    """Compare the settings with those that the folder and its images were made with.

    Returns:
        The settings of pre-training that changed and may, see `WorkDir.check`.
    """
    workdir.check_private()
    may_pretrain_again = lambda: not config.imported.kind and not has_finetuned(workdir)
    changed = workdir.check(flatten(config.to_dict()), may_pretrain_again)
    if stage in ('plan', 'generate', 'evaluate', 'report', 'all'):
        images.check()
    return changed


def has_finetuned(workdir: WorkDir) -> bool:
    """Whether a step of DP-SGD was taken: then what it started from cannot change any more."""
    is_there = files.is_whole(workdir.model('finetune')) or checkpoint.latest_training(
        workdir.checkpoints('finetune')
    )
    return bool(is_there) or Ledger(workdir.ledger, read_only=True).count(DP_SGD) > 0


def has_imported(config: ConfigDict, workdir: WorkDir) -> bool:
    """Whether the checkpoint that the run imports is there already; not whether it is whole."""
    return files.is_whole(workdir.model(imported.KINDS[config.imported.kind]))


class Gate(NamedTuple):
    """What a command may rely on: plan, ledger and folder fit each other."""

    plan: plan_lib.Plan  # that the folder follows, or will
    ledger: Ledger | None  # None but in process 0
    done: dict[str, bool]  # stage → whether it has nothing left to do
    released: dict[str, bool]  # mechanism → whether its result is in release/


def read(
    config: ConfigDict,
    workdir: WorkDir,
    model: Model,
    images: artefacts.SyntheticImages,
    read_only: bool = False,
    changed: Sequence[str] = (),
) -> Gate:
    """Read plan, ledger and what is done; a ValueError says what does not fit.

    Of settings of pre-training in `changed` there is no model yet.
    """
    make_plan = functools.partial(build.plan, config, model)
    shares = {query: config[section].epsilon_share for query, section in QUERIES.items()}
    shares[SELECTION] = config.evaluate.selection_share
    run_plan = plan_lib.load(workdir.plan, make_plan, shares)
    evaluation = artefacts.Evaluation(workdir, flatten(config.to_dict()))
    has_selected = run_plan.budget.of(SELECTION) is None or workdir.selection.exists()
    done = find_done(
        workdir,
        images,
        evaluation,
        kind=config.imported.kind,
        queries=[query for query in QUERIES if run_plan.budget.of(query)],
        has_selected=has_selected,
        changed=changed,
    )
    artefacts.check_models(workdir, model.shapes())  # before the ledger: of another network, neither fits
    saved = checkpoint.latest_training(workdir.checkpoints('finetune'))
    stated = {name: statement.stated(workdir, name) for name in MECHANISMS}
    budget = run_plan.budget
    released = {query: path.exists() for query, path in workdir.of_queries.items()}
    released |= {DP_SGD: done['finetune'], SELECTION: has_selected}
    is_over = done['central'] and done['finetune'] and has_selected
    ledger = _open_ledger(workdir, stated, read_only=read_only or is_over)  # last: it may grow
    steps = budget.count(DP_SGD) if done['finetune'] else saved[0] if saved else 0
    used = {name: budget.count(name) * released[name] for name in MECHANISMS} | {DP_SGD: steps}
    if done.get(IMPORT):  # what is declared left nothing but the model
        used |= {part.mechanism.name: part.count for part in budget.releases if part.declared}
    keys = Keys(workdir.keys, config.seed)
    keys.check_planned([part.mechanism.name for part in budget.releases])
    budget.check_ledger(ledger, used)
    statement.check_lost(workdir, keys, ledger, budget, released, stated)
    return Gate(plan=run_plan, ledger=ledger, done=done, released=released)


def find_done(
    workdir: WorkDir,
    images: artefacts.SyntheticImages,
    evaluation: artefacts.Evaluation,
    *,
    kind: str,
    queries: Collection[str],
    has_selected: bool,
    changed: Sequence[str] = (),
) -> dict[str, bool]:
    """Return stage → whether it has nothing left to do, by what is there.

    Args:
        workdir: to look into.
        images: synthetic ones.
        evaluation: of them.
        kind: of the checkpoint that the run imports; '' if none.
        queries: which of them the run asks.
        has_selected: whether no selection by private images is still to be released.
        changed: settings of pre-training that changed: it is to be done again.
    """
    done = {
        'central': all(workdir.of_queries[query].exists() for query in queries),
        'pretrain': not queries or (files.is_whole(workdir.model('pretrain')) and not changed),
        'finetune': files.is_whole(workdir.model('finetune')),
        'generate': images.is_complete and workdir.release_page.exists(),
        'evaluate': evaluation.is_complete and has_selected,
        'report': report.is_done(workdir, images, evaluation),
    }
    if kind:
        is_there = files.is_whole(workdir.model(imported.KINDS[kind]))
        done |= dict.fromkeys((IMPORT, *_replaced(kind)), is_there)
    return done


def tell(config: ConfigDict, model: Model, found: Gate | None) -> Gate:
    """Return in all processes what process 0 found, without the ledger in others; they give None."""

    def told():
        figures = found.plan.figures()
        return {
            'noise': plan_lib.noises(figures),
            'spent_before': figures['spent_before'],
            'done': found.done,
            'released': found.released,
        }

    heard = hosts.from_first(told)
    if found is not None:
        return found
    before = already_spent.from_rows(heard['spent_before'])
    plan = build.plan(config, model, heard['noise'], before)
    return Gate(plan=plan, ledger=None, done=heard['done'], released=heard['released'])


def _open_ledger(workdir: WorkDir, stated: dict[str, int], read_only: bool) -> Ledger:
    """Open the ledger, which grows in private/ and is published with the statement.

    In a folder of an earlier version, or where private/ was deleted, it starts from the published one.
    """
    released = Ledger(workdir.released_ledger, read_only=True)
    for name, count in stated.items():
        if released.entries and released.count(name) < count:
            raise ValueError(
                f'{released.path} has {released.count(name)} entries of {name}, but the privacy statement '
                f'counts {count} releases. Restore the file. Or, if {workdir.own_ledger} is there, '
                'delete it and run --stage=report: it is written again'
            )
    if not read_only and not workdir.own_ledger.exists():
        if released.entries:
            files.write_bytes(workdir.own_ledger, workdir.released_ledger.read_bytes(), mode=0o600)
        return Ledger(workdir.own_ledger)
    ledger = Ledger(workdir.ledger, read_only=read_only)
    if ledger.entries[: len(released.entries)] != released.entries:
        raise ValueError(
            f'{ledger.path} does not begin with the entries of {released.path}: one of them was cut or '
            'exchanged. Restore it: ε cannot be computed without it'
        )
    return ledger
