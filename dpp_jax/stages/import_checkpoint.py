"""Stage `import`: begin a run with the model of a checkpoint of the PyTorch implementation.

What it spent of the budget, its owner declares by the settings (`run/imported.py`). How it goes:
  1. The digest of the weights is noted: no other checkpoint may follow.
  2. The ledger gets what is declared; its entries name the weights. The statement is written,
     also if nothing is.
  3. The model appears in release/. A command that was killed before that is given again, and does the rest.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.diffusion.model import Model
from dpp_jax.interop import pytorch
from dpp_jax.privacy import budget
from dpp_jax.privacy.budget import Releases
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import artefacts, digests, imported
from dpp_jax.run.folder import WorkDir
from dpp_jax.training import checkpoint


def read(config: ConfigDict, model: Model) -> dict[str, Any]:
    """Return the checkpoint as `pytorch.read_checkpoint` does; nothing is written.

    It prints a line if the file had fewer updates of DP-SGD than are declared.

    Raises:
        FileNotFoundError, ValueError: it is not there, damaged, of another network or another kind of file,
            has weights that are not finite, comes from a run with a seed, had more updates of DP-SGD than are
            declared, or PyTorch is not installed.
    """
    path = files.path(config.imported.path)
    if not path.is_file():
        raise FileNotFoundError(f'config.imported.path is {config.imported.path}, which is no file')
    try:
        found = pytorch.read_checkpoint(path, model, trust=config.imported.trust)
    except pytorch.RunsCode as error:
        raise ValueError(f'config.imported.path: {error}: --config.import.trust=True') from error
    except (ValueError, ImportError) as error:
        raise ValueError(f'config.imported.path: {error}') from error
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(_weights(found))):
        raise ValueError(f'config.imported.path: {path} has weights that are not finite')
    if config.seed is None and (found['note'] or '').startswith(files.NOT_PRIVATE):
        raise ValueError(
            f'config.imported.path: {path} comes from a run with a seed and says "{found["note"]}". Use a '
            'checkpoint of a run without a seed'
        )
    if config.imported.kind == imported.FINETUNED:
        _compare_steps(config, found['step'])
    return found


def _weights(found: dict[str, Any]) -> dict[str, Any]:
    """Return the weights, in the form of all released models."""
    return {name: found[name] for name in ('params', 'ema_params')}


def _compare_steps(config: ConfigDict, step: int) -> None:
    """Compare the updates that the file had (0: not known) with the steps of DP-SGD that are declared."""
    q, declared = budget.schedule(
        config.data.train_images, config.finetune.batch_size, config.finetune.epochs
    )
    if step > declared:
        raise ValueError(
            f'config.finetune.epochs is {config.finetune.epochs:g}, which declares {declared:,} steps of '
            f'DP-SGD; it must be at least {step * q:.8g}, because config.imported.path says {step:,} updates'
        )
    if 0 < step < declared:
        print(f'config.imported.path says {step:,} updates; {declared:,} are declared (finetune.epochs).')


def run(
    config: ConfigDict,
    workdir: WorkDir,
    ledger: Ledger,
    before_release: Callable[[], object],
    *,
    found: dict[str, Any],
    declared: Iterable[Releases],
) -> None:
    """Record what is declared, and save the model in release/. For process 0.

    Args:
        config: the settings.
        workdir: to write to.
        ledger: gets what is declared.
        before_release: called when the ledger holds that, and the model is not there yet.
        found: what `read` returns.
        declared: what the budget says was released elsewhere.

    Raises:
        ValueError: another checkpoint was imported here, or begun to be.
    """
    training = imported.KINDS[config.imported.kind]
    weights, name = _weights(found), f'model/{training}'
    arrays = jax.tree.leaves(weights)
    digest, before = files.digest(arrays), digests.noted(workdir, name)
    if before not in (None, digest):
        raise ValueError(
            f'config.imported.path is {config.imported.path}, whose weights are not those that '
            f'{workdir.root} was begun with (SHA-256 {digest[:12]} now, {before[:12]} in {workdir.digests}). '
            'Restore that checkpoint, or use another --workdir'
        )
    digests.note(workdir, name, arrays)
    identifier = f'declared-{digest[:16]}'
    entries = [part.entry(index, identifier) for part in declared for index in range(part.count)]
    artefacts.save_imported_step(workdir, found['step'])
    ledger.extend(entries)
    before_release()
    checkpoint.save_model(workdir.model(training), weights, scratch=workdir.private)
