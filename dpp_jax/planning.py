"""`--stage=plan`: the place where a user hears everything at once. It writes nothing but a picture.

Settings, source and folder are looked at, each as far as it goes. What can be planned is printed, with every
setting that follows from the images (`derive`); then all problems are told together.
"""

from collections.abc import Callable
from pathlib import Path
import threading
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import build, derive, gate, settings
from dpp_jax.data.sources import SourceInfo
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.stages import evaluate, import_checkpoint, plan
from dpp_jax.training import devices, hosts

_CLASSES_SHOWN = 6  # the smallest, where there are many
_PATIENCE = 10.0  # seconds, for a source that asks a network


def run(config: ConfigDict, root: str | Path, private: str | Path | None = None) -> None:
    """Print the plan, then all problems.

    Raises:
        ValueError: there are problems, one line each.
    """
    problems, workdir = [], WorkDir(root, private=private)
    config, info, derived = _look(config, workdir, problems)
    if derived:
        print(f'Settings that follow from the images:\n\n{derive.table(derived)}\n')
    images = artefacts.SyntheticImages(workdir, flatten(config.to_dict()))
    is_complete = not derive.unset(config)
    are_settings_good = is_complete and _try([], lambda: settings.check(config) or True)
    changed = None
    if is_complete:
        changed = _try(problems, lambda: gate.check_folder(config, workdir, images, 'plan'))
    if are_settings_good:
        _try(problems, devices.check)
        model = build.model(config)
        found = _try(
            problems,
            lambda: gate.read(config, workdir, model, images, read_only=True, changed=changed or ()),
        )
        if found is not None:
            _try(problems, lambda: _plan(config, workdir, model, found, info))
        if config.imported.path and not gate.has_imported(config, workdir):
            _try(problems, lambda: import_checkpoint.read(config, model))
    if problems:
        raise ValueError('\n'.join(problems))


def _look(
    config: ConfigDict, workdir: WorkDir, problems: list[str]
) -> tuple[ConfigDict, SourceInfo | None, tuple[derive.Derived, ...]]:
    """Look at settings and source, and derive what is unset as far as they allow it.

    Returns:
        The config, what the source says (None if it is not there), and what was derived or is recorded.
    """
    config = derive.timed(config)
    known = _try(problems, lambda: derive.recorded(config, workdir)) or {}
    derived = tuple(
        derive.Derived(name=name, value=known[name], why=f'as {workdir.root} was begun')
        for name in derive.unset(config)
        if name in known
    )
    config = derive.with_values(config, known) if known else config
    unset = derive.unset(config)
    _try(problems, lambda: settings.check(config, unset))
    if any(line.startswith(('config.data.', 'config.dp.relation')) for line in _lines(problems)):
        return config, None, derived
    info, found = _ask_source(config)
    if info is None or not unset:
        problems += found
        return config, info, derived
    if problems:  # rules rest on settings that are allowed
        return config, info, derived
    resolved = _try(problems, lambda: derive.resolve(config, info))
    if resolved is None:
        return config, info, derived
    config, derived = resolved
    _try(problems, lambda: settings.check(config))
    problems += build.misfits(config, info)
    return config, info, derived


def _plan(
    config: ConfigDict, workdir: WorkDir, model: Model, found: gate.Gate, info: SourceInfo | None
) -> None:
    """Print the plan; a ValueError says why these devices cannot follow it."""
    sizes = build.sizes(config, model)
    todo = [name for name in gate.stages_of(config.imported.kind) if not found.done[name]]
    if 'finetune' in todo:
        sizes.check_devices()
    plan.run(
        config,
        workdir,
        plan=found.plan,
        todo=todo,
        model=model,
        sizes=sizes,
        made=len(found.ledger.entries),
        source=_words(config, info),
        is_there=info is not None,
        smallest_class=min(info.class_counts) if info and info.class_counts else None,
    )


def _try(problems: list[str], look: Callable[[], Any]) -> Any:
    """Return what `look` finds, or None with one more problem."""
    try:
        return look()
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return None


def _lines(problems: list[str]) -> list[str]:
    return '\n'.join(problems).splitlines()


def _ask_source(config: ConfigDict) -> tuple[SourceInfo | None, list[str]]:
    """Describe the source, as `build.source_problems`; wait for a network no longer than `_PATIENCE`."""
    if not str(config.data.source).startswith('tfds:'):  # headers of many files may take a while
        return _answer(config)
    answers = []
    # A daemon: a thread that waits for a network keeps no process alive.
    asking = threading.Thread(target=lambda: answers.append(_answer(config)), daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    late = f'config.data.source is {config.data.source!r}, which did not answer within {_PATIENCE:g} s'
    return answers[0] if answers else (None, [late])


def _answer(config: ConfigDict) -> tuple[SourceInfo | None, list[str]]:
    try:
        return build.source_problems(config, processes=hosts.count())
    except Exception as error:  # a library's own: the user hears of it with the other problems
        return None, [f'config.data.source is {config.data.source!r}: {type(error).__name__}: {error}']


def _words(config: ConfigDict, info: SourceInfo | None) -> str:
    """Describe the source for people."""
    if info is None:
        return 'NOT FOUND: see the last lines. The figures are those of the config'
    height, width, channels = info.image_shape
    size = 'several sizes' if height is None or width is None else f'{height}x{width}x{channels}'
    said = (
        f'{info.name}: {info.train_images:,} private and {info.test_images:,} test images of '
        f'{size}, {info.classes} {"class" if info.classes == 1 else "classes"}'
    )
    if not accounting.RELATIONS[config.dp.relation].size_is_public:
        said += '. Their true number is private: keep this line'
    lines = [said]
    if info.sides is not None and len(set(info.sides)) > 1:
        lines.append(
            'short sides: {} to {} pixels, {} in the median'.format(*np.array(info.sides)[[0, 2, 1]])
        )
    if info.class_counts:
        names = info.class_names or tuple(map(str, range(info.classes)))
        counts = sorted(zip(info.class_counts, names))
        shown = counts if len(counts) <= 2 * _CLASSES_SHOWN else counts[:_CLASSES_SHOWN]
        rest = '' if shown is counts else f' … {counts[-1][1]} {counts[-1][0]:,}'
        lines.append('private images by class: ' + ', '.join(f'{n} {count:,}' for count, n in shown) + rest)
    return '\n'.join([*lines, *info.notes, *evaluate.left_out(config, info.test_images)])
