"""`--stage=plan`: the place where a user hears everything at once. It writes nothing but a picture.

Settings, source and folder are looked at, each as far as it goes. What can be planned is printed; then all
problems are told together.
"""

from collections.abc import Callable
from pathlib import Path
import threading
from typing import Any

from ml_collections import ConfigDict

from dpp_jax import build, gate, settings
from dpp_jax.data.sources import SourceInfo
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.stages import evaluate, plan
from dpp_jax.training import devices, hosts

_PATIENCE = 10.0  # seconds, for a source: a network or a disk may not answer


def run(config: ConfigDict, root: str | Path, private: str | Path | None = None) -> None:
    """Print the plan, then all problems.

    Raises:
        ValueError: there are problems, one line each.
    """
    problems, workdir = [], WorkDir(root, private=private)
    _try(problems, lambda: settings.check(config))
    are_settings_good = not problems
    info = None
    if not any(line.startswith(('config.data.', 'config.dp.relation')) for line in _lines(problems)):
        info, found = _ask_source(config)
        problems += found
    images = artefacts.SyntheticImages(workdir, flatten(config.to_dict()))
    changed = _try(problems, lambda: gate.check_folder(config, workdir, images, 'plan'))
    if are_settings_good:
        _try(problems, devices.check)
        model = build.model(config)
        found = _try(
            problems,
            lambda: gate.read(config, workdir, model, images, read_only=True, changed=changed or ()),
        )
        if found is not None:
            _try(problems, lambda: _plan(config, workdir, model, found, _words(config, info)))
    if problems:
        raise ValueError('\n'.join(problems))


def _plan(config: ConfigDict, workdir: WorkDir, model: Model, found: gate.Gate, source: str) -> None:
    """Print the plan; a ValueError says why these devices cannot follow it."""
    sizes = build.sizes(config, model)
    if not found.done['finetune']:
        sizes.check_devices()
    plan.run(
        config,
        workdir,
        plan=found.plan,
        todo=[name for name in gate.STAGES if not found.done[name]],
        model=model,
        sizes=sizes,
        made=len(found.ledger.entries),
        source=source,
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
    """Describe the source, as `build.source_problems`, but not for longer than `_PATIENCE`."""
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
    said = (
        f'{info.name}: {info.train_images:,} private and {info.test_images:,} test images of '
        f'{height}x{width}x{channels}, {info.classes} classes'
    )
    if not accounting.RELATIONS[config.dp.relation].size_is_public:
        said += '. Their true number is private: keep this line'
    return '\n'.join([said, *evaluate.left_out(config, info.test_images)])
