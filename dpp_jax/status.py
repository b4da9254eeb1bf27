"""`--stage=status`: how far a run is, from its folder alone. It writes nothing and takes no lock.

Another process may be at work. What it is doing now stands in private/progress.json.
"""

import json
from pathlib import Path
import time
from typing import Any

from dpp_jax import files, gate
from dpp_jax.configs import default
from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import DP_SGD, QUERIES, SELECTION, group, total_event
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts, elsewhere, hours, imported
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.training import checkpoint, progress

_OLD = 60.0  # seconds after which a note is that of a process that is gone
# What is read of plan.json.
_PLAN = {
    'delta': float, 'accountant': str, 'relation?': str, 'epsilon_budget': float, 'epsilon_total': float,
    'query_count': int, 'moments_count?': int, 'frequency_count?': int, 'steps': int, 'pretrain_steps': int,
    'declared?': [str],
}  # fmt: skip


def read(root: str | Path, private: str | Path | None = None) -> dict[str, Any]:
    """Return the state of a work directory, in JSON's types.

    Args:
        root: the work directory.
        private: its private/, if that is elsewhere.

    Returns:
        `workdir`, `name`; `running`: whether a process works there (None: not known); `stages`: stage →
        {'state': 'done', 'begun' or 'to do', and where it counts 'step', 'of'}; `now`: what is in progress,
        as `progress.NOTE_FORM` (None: nothing is known); `next`: the first stage that is not done, or None;
        `epsilon_spent` by the ledger, `epsilon_planned`, `epsilon_budget`, `delta`, `accountant`;
        `releases`: mechanism → [made, planned]; `declared`: mechanisms that ran elsewhere, as the owner of an
        imported checkpoint says; `imported`: what it was, likewise, a name of `imported.KINDS`.

    Raises:
        FileNotFoundError, ValueError: it is no work directory, or a file of it is damaged.
    """
    root = files.path(root)
    workdir = WorkDir(root, private=private or elsewhere.of(root))
    if not workdir.config.exists():
        raise FileNotFoundError(
            f'--workdir={root} has no {workdir.config.relative_to(root)}; it must be the folder of a run'
        )
    settings = _settings(workdir)
    images = artefacts.SyntheticImages(workdir, settings)
    evaluation = artefacts.Evaluation(workdir, settings)
    plan = files.read_json(workdir.plan, 'Restore the file', _PLAN) if workdir.plan.exists() else None
    selects = plan is not None and plan.get('selection_noise_multiplier') is not None
    kind = imported.kind(settings)
    done = gate.find_done(
        workdir,
        images,
        evaluation,
        kind=kind,
        queries=[query for query in QUERIES if _is_asked(settings, query)],
        has_selected=not selects or workdir.selection.exists(),
    )
    done = {stage: done[stage] for stage in gate.stages_of(kind)}
    return {
        'workdir': str(root),
        'name': settings['name'],
        'running': files.is_locked(root / '.lock'),
        'stages': {stage: _stage(workdir, stage, is_done, plan) for stage, is_done in done.items()},
        'now': _now(workdir),
        'next': next((stage for stage, is_done in done.items() if not is_done), None),
        'imported': kind or None,
        **(_spent(workdir, plan) if plan else {}),
    }


def _settings(workdir: WorkDir) -> dict[str, Any]:
    """Return the settings of the run, by full names; of images and scores, those that made what is there."""
    settings = flatten(default.get_config('1').to_dict())
    settings |= artefacts.settings_of_images(workdir)
    if workdir.evaluation.exists():
        found = files.read_json(
            workdir.evaluation, 'Restore the file, or delete it', {'of': {'settings?': dict}}
        )
        settings |= found['of'].get('settings', {})
    return settings


def _is_asked(settings: dict[str, Any], query: str) -> bool:
    """Whether a run with these settings asks this query."""
    return imported.has_query(settings) and settings.get(f'{QUERIES[query]}.enabled', True)


def _stage(workdir: WorkDir, stage: str, is_done: bool, plan: dict[str, Any] | None) -> dict[str, Any]:
    """Describe one stage."""
    found = {'state': 'done' if is_done else 'to do'}
    steps = {'pretrain': 'pretrain_steps', 'finetune': 'steps'}
    if plan is None or stage not in steps:
        return found
    total = plan[steps[stage]]
    saved = None if is_done else checkpoint.latest_training(workdir.checkpoints(stage))
    if saved:
        found['state'] = 'begun'
    return found | {'step': total if is_done else saved[0] if saved else 0, 'of': total}


def _now(workdir: WorkDir) -> dict[str, Any] | None:
    """Read what a process notes of its progress; nothing if it is old."""
    try:
        note = files.read_json(workdir.progress, '', progress.NOTE_FORM)
    except (OSError, ValueError):  # it may vanish at any time
        return None
    return note if time.time() < note['time'] + _OLD else None


def _spent(workdir: WorkDir, plan: dict[str, Any]) -> dict[str, Any]:
    """Compute what was spent by the ledger."""
    ledger = Ledger(workdir.ledger, read_only=True)
    event = total_event(group(ledger.entries))
    relation = plan.get('relation', accounting.ZERO_OUT)
    selections = int(plan.get('selection_noise_multiplier') is not None)
    counts = {query: plan.get(f'{name}_count') for query, name in QUERIES.items()}
    planned = {query: count for query, count in counts.items() if count is not None}
    planned |= {DP_SGD: plan['steps'], SELECTION: selections}
    return {
        'epsilon_spent': accounting.epsilon(event, plan['delta'], plan['accountant'], relation),
        'epsilon_planned': plan['epsilon_total'],
        'epsilon_budget': plan['epsilon_budget'],
        'delta': plan['delta'],
        'accountant': plan['accountant'],
        'declared': plan.get('declared', []),
        'releases': {name: [ledger.count(name), count] for name, count in planned.items()},
    }


def as_json(found: dict[str, Any]) -> str:
    """Write what `read` returns for scripts."""
    return json.dumps(found, ensure_ascii=False)


def text(found: dict[str, Any]) -> str:
    """Write what `read` returns for people."""
    running = {True: 'a process is at work', False: 'no process is at work', None: ''}[found['running']]
    lines = [f'{found["name"]} in {found["workdir"]}' + (f': {running}' if running else ''), '']
    for stage, said in found['stages'].items():
        steps = (
            f'  step {said["step"]:,} of {said["of"]:,}'
            if 'step' in said and said['state'] != 'to do'
            else ''
        )
        lines.append(f'  {stage:<10}{said["state"]:<6}{steps}')
    lines.append('')
    if found['imported']:
        meaning = imported.MEANINGS[found['imported']]
        lines.append(f'imported       a model that was {meaning}, as declared')
    if found['now']:
        now = found['now']
        left = f', {hours.words(now["seconds_left"])} left' if 'seconds_left' in now else ''
        lines.append(
            f'now            {now["name"]}: {now["done"]:,} of {now["total"]:,} '
            f'{progress.plural(now["unit"])}{left}'
        )
    if 'epsilon_spent' in found:
        show, exact = accounting.format_epsilon, accounting.format_exact
        made = ', '.join(
            f'{name} {made:,} of {of:,}{" (declared)" if name in found["declared"] else ""}'
            for name, (made, of) in found['releases'].items()
            if of
        )
        lines += [
            f'spent          ε = {show(found["epsilon_spent"])} of {exact(found["epsilon_budget"])} at '
            f'δ = {exact(found["delta"])}',
            f'releases       {made}',
        ]
    else:
        lines.append('spent          nothing: the run has no plan yet')
    lines.append(f'next           {found["next"] or "nothing: everything is done"}')
    return '\n'.join(lines)
