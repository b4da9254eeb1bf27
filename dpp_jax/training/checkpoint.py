"""Checkpoints by orbax: of a training in progress, and of a finished model."""

from collections.abc import Iterator
import contextlib
import json
import logging
from pathlib import Path
import shutil
from typing import Any

from etils import epath
import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from dpp_jax import files
from dpp_jax.training import hosts

PyTree = Any
_logger = logging.getLogger(__name__)
# Orbax waits for the disk by the wall clock, 20 minutes at most: a clock that is set forward in the middle of
# a save would end the run. Folders are waited for by a limit of their own, unless they are made at once.
_PATIENT = ocp.AsyncOptions(timeout_secs=10**8, create_directories_asynchronously=False)


def _apart() -> ocp.options.MultiprocessingOptions:
    """Let orbax work in this process without the others of the run: there is one writer."""
    if hosts.count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = hosts.index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'process_{own}'
    )


class SaveFailed(OSError):
    """A checkpoint could not be written; older ones are untouched."""


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Errors of the file system, which orbax raises as ValueError with many lines, in one line."""
    try:
        yield
    except Exception as error:
        text = str(error)
        cause = 'no space left on the device' if 'No space left' in text else text.splitlines()[0]
        raise SaveFailed(
            f'a checkpoint could not be written to {folder} ({cause}). Earlier checkpoints are intact: '
            'solve the problem, then run the same command to continue'
        ) from error


class TrainingStore:
    """The last checkpoints of one training, in `folder`.

    A context manager: leaving it, also by an exception, waits until everything is on disk.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            epath.Path(self.folder.absolute()),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                cleanup_tmp_directories=True,
                async_options=_PATIENT,
                multiprocessing_options=_apart(),
            ),
        )

    def save(self, step: int, state: PyTree) -> None:
        """Save `state` (host arrays); returns before all is on disk, an older one stays until then."""
        if step not in self._manager.all_steps():
            with _saving(self.folder):
                self._manager.save(
                    step, args=ocp.args.StandardSave(_to_dict(state)), custom_metadata=_note(self.folder)
                )

    def restore(self, template: PyTree) -> PyTree | None:
        """Load the newest state, in the form of `template`; None if there is none.

        Of checkpoints that cannot be read, as a power failure may leave them, the one before is taken: the
        steps after it are repeated, with the same batches and the same noise. They are put aside under
        the name `damaged_<step>`, but only when another was read: an error that passes, as of too many
        open files, must not take all checkpoints away.

        Raises:
            ValueError: the checkpoint belongs to another network, or there are some and none can be read.
        """
        unreadable = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.folder / str(step)
            try:
                saved = self._manager.restore(step, args=ocp.args.StandardRestore(_like(template)))
            except Exception as error:  # whatever orbax makes of bytes that it does not know
                _compare_readable(folder / 'default', template)
                unreadable[folder] = str(error).splitlines()[0]
                continue
            self._put_aside(unreadable)
            return _fit(saved, template, folder)
        damaged = sorted(path.name for path in self.folder.glob('damaged_*'))
        if unreadable or damaged:
            cause = next(iter(unreadable.values()), 'they were put aside before')
            raise ValueError(
                f'no checkpoint in {self.folder} can be read: '
                f'{", ".join([path.name for path in unreadable] + damaged)} ({cause}). If that may pass, '
                'try again. Otherwise restore the folder, or delete it: the same command then starts this '
                'training again, with the same batches and the same noise'
            )
        return None

    def _put_aside(self, unreadable: dict[Path, str]) -> None:
        """Rename checkpoints, folder → cause, so that nobody takes them for the newest."""
        for folder, cause in unreadable.items():
            aside = folder.with_name(f'damaged_{folder.name}')
            _logger.warning(
                'The checkpoint %s cannot be read (%s); it is kept as %s', folder, cause, aside.name
            )
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if unreadable:
            self._manager.reload()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def __enter__(self) -> 'TrainingStore':
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is on disk."""
        with _saving(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()


def save_model(folder: Path, model: PyTree, *, scratch: Path | None = None) -> None:
    """Write `model` (a pytree of arrays); the folder appears when it is complete, and tells no time or path.

    Args:
        folder: of the model; plain orbax reads it too.
        model: what is saved.
        scratch: a folder for what is not complete; None: that of `folder`.
    """
    folder = Path(folder)
    unfinished = (scratch or folder.parent).absolute() / f'{folder.name}.orbax-checkpoint-tmp'
    # One file for each array. The other format, OCDBT, holds times, compressed, and names files at random.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=_apart())
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=_apart())
    with _saving(folder), _without_warning('OCDBT'), checkpointer:
        checkpointer.save(unfinished, ocp.args.PyTreeSave(_to_dict(model)), force=True)
        _edit_metadata(unfinished, custom_metadata=_note(folder))
        files.move_folder(unfinished, folder)


@contextlib.contextmanager
def _without_warning(text: str) -> Iterator[None]:
    """Keep to ourselves that orbax has nothing to merge."""
    absl_logger = logging.getLogger('absl')
    about_else = lambda record: text not in record.getMessage()
    absl_logger.addFilter(about_else)
    try:
        yield
    finally:
        absl_logger.removeFilter(about_else)


def _note(folder: Path) -> dict[str, str] | None:
    """Return what a checkpoint says of itself, if its folder has a note."""
    note = files.note_of(folder)
    return {'note': note} if note else None


def _edit_metadata(folder: Path, **more: Any) -> None:
    """Remove what orbax notes of the time and the place at which a checkpoint was written; add `more`."""
    (folder / 'commit_success.txt').unlink(missing_ok=True)
    path = folder / '_CHECKPOINT_METADATA'
    found = json.loads(path.read_bytes())
    times = dict.fromkeys(name for name in found if 'timestamp' in name)
    path.write_text(json.dumps(found | times | {'performance_metrics': {}} | more), encoding='utf-8')


def latest_training(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint of the `TrainingStore` in `folder`."""
    steps = [path for path in Path(folder).glob('*') if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name), default=None)
    return newest and (int(newest.name), newest / 'default')


def check_params(folder: Path, params: PyTree) -> None:
    """Raise a ValueError unless the checkpoint `folder` holds parameters shaped as `params`.

    Reads shapes alone, of a model or of a training. One whose shapes cannot be read is passed over:
    whoever needs its values says what is wrong.
    """
    saved = _saved_shapes(folder)
    if saved is not None:
        found = saved.get('params') if isinstance(saved, dict) else None
        _compare(_shapes(found), _shapes(_to_dict(params)), folder)


def _saved_shapes(folder: Path) -> PyTree | None:
    """Return the shapes in a checkpoint; None if they cannot be read."""
    with ocp.StandardCheckpointer(multiprocessing_options=_apart()) as checkpointer:
        try:
            return checkpointer.metadata(Path(folder).absolute()).item_metadata.tree
        except Exception:  # whatever orbax makes of bytes that it does not know
            return None


def _compare_readable(folder: Path, template: PyTree) -> None:
    """Raise if the checkpoint is another network's, as far as it can be read."""
    saved = _saved_shapes(folder)
    if saved is not None:
        _compare(_shapes(saved), _shapes(_to_dict(template)), folder)


def load_model(folder: Path, template: PyTree) -> PyTree:
    """Load what `save_model` wrote, in the form of `template` (arrays or shapes), as NumPy arrays.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the checkpoint belongs to another network, or cannot be read.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f'no model checkpoint in {folder}')
    _compare_readable(folder, template)
    with ocp.StandardCheckpointer(multiprocessing_options=_apart()) as checkpointer:
        try:
            saved = checkpointer.restore(folder, _like(template))
        except Exception as error:  # whatever orbax makes of bytes that it does not know
            raise ValueError(
                f'the checkpoint {folder} cannot be read ({str(error).splitlines()[0]}). Restore it; or '
                'move it away, if private/ is whole: the stage that made it writes it again from there'
            ) from error
    return _fit(saved, template, folder)


def _to_dict(tree: PyTree) -> PyTree:
    """Nested dicts with string keys: a form that does not depend on Python classes."""
    return flax.serialization.to_state_dict(tree)


def _like(template: PyTree) -> PyTree:
    """Empty host arrays of the template's shapes: orbax then restores NumPy arrays."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _to_dict(template))


def _shapes(tree: PyTree) -> dict[str, tuple]:
    """Path of every leaf → its shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    return {
        '/'.join(str(getattr(key, 'key', key)) for key in path): tuple(leaf.shape) for path, leaf in leaves
    }


def _compare(saved: dict[str, tuple], wanted: dict[str, tuple], where: Path) -> None:
    """Raise if a checkpoint does not fit, naming the first parameter that differs."""
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f'the checkpoint {where} belongs to another network: {name} is '
                f'{saved.get(name, "missing")} there and {wanted.get(name, "missing")} in the '
                'network of this config (config.model and config.data must be those it was '
                'made with)'
            )


def _fit(saved: PyTree, template: PyTree, where: Path) -> PyTree:
    """Put `saved` into the template's classes."""
    _compare(_shapes(saved), _shapes(_to_dict(template)), where)
    return flax.serialization.from_state_dict(template, saved)
