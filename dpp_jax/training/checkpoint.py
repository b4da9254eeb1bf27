"""Checkpoints by orbax: of a training in progress, and of a finished model.

One process writes and reads them, whatever the others do. Orbax works in a folder of this machine; what
belongs in an object store is copied there and back, and is whole or not there by the rules of `files`.
"""

from collections.abc import Iterator
from concurrent import futures
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

PyTree = Any
_logger = logging.getLogger(__name__)
# Orbax waits for the disk by the wall clock, 20 minutes at most: a clock that is set forward in the middle of
# a save would end the run. Folders are waited for by a limit of their own, unless they are made at once.
_PATIENT = ocp.AsyncOptions(timeout_secs=10**8, create_directories_asynchronously=False)


class SaveFailed(OSError):
    """A checkpoint could not be written; older ones are untouched."""


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Errors of the file system, which orbax raises as ValueError with many lines, in one line."""
    try:
        yield
    except files.Lost:
        raise
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
        self.folder = folder = files.path(folder)
        self._stack = contextlib.ExitStack()
        self._copy = _Copy(folder, self._stack) if files.is_in_store(folder) else None
        self._local = self._copy.local if self._copy else Path(folder).absolute()
        self._local.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            epath.Path(self._local),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,  # orbax allows it only where all processes take part
                cleanup_tmp_directories=True,
                async_options=_PATIENT,
                multiprocessing_options=_alone(),
            ),
        )

    def save(self, step: int, state: PyTree) -> None:
        """Save `state` (host arrays); returns before all is on disk, an older one stays until then."""
        if step not in self._manager.all_steps():
            with _saving(self.folder):
                self._wait_for_copy()
                self._manager.save(
                    step, args=ocp.args.StandardSave(_to_dict(state)), custom_metadata=_note(self.folder)
                )
                if self._copy:
                    self._copy.begin(self._manager.wait_until_finished)

    def _wait_for_copy(self) -> None:
        if self._copy:
            self._copy.wait()

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
            folder = self._local / str(step)
            try:
                saved = self._manager.restore(step, args=ocp.args.StandardRestore(_like(template)))
            except Exception as error:  # whatever orbax makes of bytes that it does not know
                _compare_readable(folder / 'default', template, self.folder / str(step) / 'default')
                unreadable[step] = str(error).splitlines()[0]
                continue
            self._put_aside(unreadable)
            return _fit(saved, template, self.folder / str(step))
        damaged = [name for name in files.names(self.folder) if name.startswith('damaged_')]
        if unreadable or damaged:
            cause = next(iter(unreadable.values()), 'they were put aside before')
            raise ValueError(
                f'no checkpoint in {self.folder} can be read: '
                f'{", ".join([*map(str, unreadable), *damaged])} ({cause}). If that may pass, '
                'try again. Otherwise restore the folder, or delete it: the same command then starts this '
                'training again, with the same batches and the same noise'
            )
        return None

    def _put_aside(self, unreadable: dict[int, str]) -> None:
        """Rename checkpoints, step → cause, so that nobody takes them for the newest."""
        for step, cause in unreadable.items():
            folder, aside = self.folder / str(step), f'damaged_{step}'
            _logger.warning('The checkpoint %s cannot be read (%s); it is kept as %s', folder, cause, aside)
            if self._copy:
                files.move_folder(folder, self.folder / aside)
            shutil.rmtree(self._local / aside, ignore_errors=True)
            (self._local / str(step)).rename(self._local / aside)
        if unreadable:
            self._manager.reload()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint; waits for one that is being written."""
        self._manager.wait_until_finished()
        self._wait_for_copy()
        return self._manager.latest_step()

    def __enter__(self) -> 'TrainingStore':
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is on disk."""
        with self._stack, _saving(self.folder):
            self._manager.wait_until_finished()
            self._wait_for_copy()
            self._manager.close()


class _Copy:
    """The checkpoints of a training in an object store, and their copy on this machine, in `local`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        """Fetch the checkpoints that are whole; `stack` deletes the copy and ends the thread."""
        self._folder = folder
        self.local = stack.enter_context(files.local_folder())
        for name in self._steps(folder):
            files.fetch_folder(folder / name, self.local / name)
        self._thread = stack.enter_context(futures.ThreadPoolExecutor(1))
        self._running = None

    def begin(self, wait_for_orbax) -> None:
        """Copy to the store what orbax has written when it is done, and delete there what it deleted."""
        self._running = self._thread.submit(self._follow, wait_for_orbax)

    def wait(self) -> None:
        """Wait until the copy is in the store; raises what went wrong."""
        running, self._running = self._running, None
        if running:
            running.result()

    def _follow(self, wait_for_orbax) -> None:
        wait_for_orbax()
        here, there = self._steps(self.local), self._steps(self._folder)
        for name in sorted(here - there, key=int):
            files.put_folder(self.local / name, self._folder / name)
        for name in there - here:  # of this process's own training: `remove_folder` looks at the lease
            files.remove_folder(self._folder / name)

    @staticmethod
    def _steps(folder: Path) -> set[str]:
        return {name for name in files.names(folder) if name.isdigit()}


def _alone() -> ocp.options.MultiprocessingOptions:
    """Tell orbax to wait for no other process."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'process_{own}'
    )


def save_model(folder: Path, model: PyTree, *, scratch: Path | None = None) -> None:
    """Write `model` (a pytree of arrays); the folder appears when it is complete, and tells no time or path.

    Args:
        folder: of the model; plain orbax reads it too.
        model: what is saved.
        scratch: a folder for what is not complete; None: that of `folder`.
    """
    folder = files.path(folder)
    # One file for each array. The other format, OCDBT, holds times, compressed, and names files at random.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=_alone())
    with contextlib.ExitStack() as stack:
        stack.enter_context(_saving(folder))
        stack.enter_context(_without_warning('OCDBT'))
        place = scratch or folder.parent
        if files.is_in_store(place):
            place = stack.enter_context(files.local_folder())
        unfinished = Path(place).absolute() / f'{folder.name}.orbax-checkpoint-tmp'
        checkpointer = stack.enter_context(ocp.Checkpointer(handler, multiprocessing_options=_alone()))
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
    folder = files.path(folder)
    newest = max((int(name) for name in files.names(folder) if name.isdigit()), default=None)
    return None if newest is None else (newest, folder / str(newest) / 'default')


def check_params(folder: Path, params: PyTree) -> None:
    """Raise a ValueError unless the checkpoint `folder` holds parameters shaped as `params`.

    Reads shapes alone, of a model or of a training. One whose shapes cannot be read is passed over:
    whoever needs its values says what is wrong.
    """
    with files.local_copy(files.path(folder)) as local:
        saved = _saved_shapes(local)
    if saved is not None:
        found = saved.get('params') if isinstance(saved, dict) else None
        _compare(_shapes(found), _shapes(_to_dict(params)), folder)


def _saved_shapes(folder: Path) -> PyTree | None:
    """Return the shapes in a checkpoint; None if they cannot be read."""
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        try:
            return checkpointer.metadata(Path(folder).absolute()).item_metadata.tree
        except Exception:  # whatever orbax makes of bytes that it does not know
            return None


def _compare_readable(folder: Path, template: PyTree, where: Path) -> None:
    """Raise if the checkpoint is another network's, as far as it can be read; users know it as `where`."""
    saved = _saved_shapes(folder)
    if saved is not None:
        _compare(_shapes(saved), _shapes(_to_dict(template)), where)


def load_model(folder: Path, template: PyTree) -> PyTree:
    """Load what `save_model` wrote, in the form of `template` (arrays or shapes), as NumPy arrays.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the checkpoint belongs to another network, or cannot be read.
    """
    folder = files.path(folder)
    if not files.is_whole(folder) or not folder.is_dir():
        raise FileNotFoundError(f'no model checkpoint in {folder}')
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(files.local_copy(folder))
        _compare_readable(local, template, folder)
        checkpointer = stack.enter_context(ocp.StandardCheckpointer(multiprocessing_options=_alone()))
        try:
            saved = checkpointer.restore(Path(local).absolute(), _like(template))
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
