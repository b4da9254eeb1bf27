"""The work directory: release/ for what may be published, private/ for the rest."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import copy
from os import PathLike
from pathlib import Path
from typing import Any

import filelock

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.data.preparation import LABELS
from dpp_jax.privacy.budget import CENTRAL_QUERY, FREQUENCY, MOMENTS
from dpp_jax.run import elsewhere, fingerprint
from dpp_jax.run.keys import NOTE as PRIVATE_NOTE

# Settings that change no result: a run may be continued with other values.
FREE_SETTINGS = (
    'loop.log_every_steps',
    'loop.checkpoint_every_seconds',
    'loop.images_at_once',
    'data.in_memory',
    'finetune.microbatch',
    'finetune.devices_per_image',
    'finetune.snapshots',
    'generate.batch_size',
    'generate.png_tree',
    'generate.tfds',
    'generate.dpimagebench',
    'imported.trust',
    'export.',
)
# Settings of what is made from the released model. They bind the images and the scores that they made
# (`artefacts.check_images`, `artefacts.evaluation`), not the folder.
_LATER_SETTINGS = ('generate.', 'evaluate.')
# But a selection that private images take part in is a mechanism: what decides it binds the folder, if it is,
# or was, asked for.
_SELECTION, _NOISY = 'evaluate.selection', 'private_noisy'
_SELECTION_SETTINGS = (
    _SELECTION,
    'evaluate.selection_share',
    'evaluate.classifiers',
    'evaluate.seeds',
    'evaluate.candidates',
    'evaluate.epochs',
    'evaluate.batch_size',
    'evaluate.learning_rate',
    'evaluate.ema_decay',
)
# Settings of pre-training, which costs no privacy: as long as no step of DP-SGD was taken, it may begin again
# with others. Whether there is any decides what is asked, and may not change.
_PRETRAIN, _HAS_PRETRAINING = 'pretrain.', 'pretrain.enabled'
# Settings that earlier versions did not have, with the value that they stood for.
_NEW_SETTINGS = {
    'model.network': 'unet',
    'dp.relation': 'zero_out',
    'dp.already_spent': '',
    'dp.unit': 'image',
    'dp.images_per_group': None,
    'data.groups': '',
    'data.train_groups': None,
    'data.class_names': [],
    # Images as they are.
    'data.fit': 'none',
    'data.resize': 'area',
    'data.test_share': 0.1,
    'data.split_seed': 0,
    'data.validation': 'unused',
    'data.labels': '',
    'data.image_key': 'image',
    'data.label_key': 'label',
    'data.derived': [],
    'finetune.time_limit': '',
    'imported.path': '',
    'imported.kind': '',
    'imported.noise_multiplier': None,
    _SELECTION: 'synthetic',
    'moments.enabled': False,
    'moments.noise_multiplier': 10.0,
    'moments.epsilon_share': None,
    'moments.sampling_probability': 1.0,
    'moments.average_down': 1,
    'moments.frequencies': 64,
    'moments.clip_norm': 2.5,
    'moments.class_counts': 'public',
    'pretrain.moments_steps': 0,
    'frequency.enabled': False,
    'frequency.noise_multiplier': 26.6,
    'frequency.epsilon_share': None,
    'frequency.sampling_probability': 1.0,
    'frequency.features': 10_000,
    'frequency.bandwidth': 0.366,
    'frequency.class_counts': 'public',
    'pretrain.frequency_steps': 0,
    'pretrain.generator_steps': 1000,
    'model.patch': 1,
    'model.around': 'none',
    'pretrain.schedule': 'constant',
    'finetune.schedule': 'constant',
    'finetune.noise_correction': False,
}
_PATH = '<path>'
# Settings that hold paths, with what release/config.json says in their place.
_PATHS: dict[str, Callable[[str], str]] = {
    'data.source': lambda source: _source_without_path(source),
    'data.dir': lambda _: _PATH,
    'data.labels': lambda labels: labels if labels in LABELS else _PATH,
    'dp.already_spent': lambda _: _PATH,
    'evaluate.inception': lambda _: _PATH,
    'imported.path': lambda _: _PATH,
    'export.path': lambda _: _PATH,
}
RELEASE_NOTE = (
    'The (ε, δ) in privacy_statement.md covers every file in this folder. It is computed from '
    'ledger.jsonl. If config.json has a seed, nothing here is private.\n'
)


class WorkDir:
    """Paths of one run, and what binds them to its settings and images."""

    def __init__(
        self, root: str | PathLike, release: Path | None = None, private: str | PathLike | None = None
    ):
        """`release`: where what may be published lies, if it is not in `root`/release; `private` likewise."""
        self.root = files.path(root)
        self.release = release or self.root / 'release'
        self.private = self.root / 'private' if private is None else files.path(private)
        if files.absolute(self.private) == files.absolute(self.root / 'private'):
            self.private = self.root / 'private'
        self.config = self.release / 'config.json'
        self.plan = self.release / 'plan.json'
        self.released_ledger = self.release / 'ledger.jsonl'
        self.statement = self.release / 'privacy_statement.json'
        self.statement_text = self.release / 'privacy_statement.md'
        self.code = self.release / 'code.json'
        self.parameters = self.release / 'parameters.txt'
        self.central_images = self.release / 'central_images.npz'
        self.moments = self.release / 'moments.npz'
        self.frequency = self.release / 'frequency.npz'
        self.generator = self.release / 'generator.npz'
        self.digests = self.release / 'digests.json'
        self.imported = self.release / 'imported.json'
        self.synthetic = self.release / 'synthetic'
        self.over_finetuning = self.release / 'over_finetuning.npz'
        self.card = self.release / 'README.md'
        self.release_page = self.release / 'report.html'
        self.keys = self.private / 'keys.json'
        self.own_ledger = self.private / 'ledger.jsonl'
        self.own_config = self.private / 'config_of_keys.json'
        self.fingerprints = self.private / 'data.json'
        self.decoded = self.private / 'images'
        self.sizes = self.private / 'images_at_once.json'
        self.evaluation = self.private / 'evaluation.json'
        self.scored = self.private / 'scored.json'
        self.selection = self.release / 'selection.json'
        self.candidates = self.private / 'candidates'
        self.ceiling = self.private / 'accuracy_of_real_images.json'
        self.progress = self.private / 'progress.json'
        self.nearest = self.private / 'nearest.png'
        self.report = self.private / 'report.json'
        self.report_text = self.private / 'report.txt'
        self.report_page = self.private / 'report.html'
        self.snapshots = self.private / 'snapshots'
        self.real_images = self.private / 'real_images.npz'
        self.seconds = self.private / 'seconds.json'
        self.curve = self.root / 'plan.png'

    def beside(self, name: str) -> 'WorkDir':
        """Return the same folder with other places for scores and report: those of images from elsewhere.

        What is computed of the private images, such as their features, is in the same place for all.
        """
        found, folder = copy.copy(self), self.private / 'other_images' / name
        for place in ('evaluation', 'scored', 'nearest', 'report', 'report_text', 'report_page'):
            setattr(found, place, folder / getattr(self, place).name)
        return found

    @property
    def of_queries(self) -> dict[str, Path]:
        """Mechanism of a query → where its result is."""
        return {CENTRAL_QUERY: self.central_images, MOMENTS: self.moments, FREQUENCY: self.frequency}

    @classmethod
    def to_read(cls, root: str | PathLike) -> 'WorkDir':
        """Return the work directory of a run with its private/, wherever that is.

        Raises:
            FileNotFoundError, ValueError: private/ is elsewhere, and not there.
        """
        return cls(root, private=elsewhere.of(files.path(root)))

    def check_private(self) -> None:
        """Check that private/ is what this run has used so far; a ValueError says what to do."""
        elsewhere.check(self.root, self.private)

    def delete_private(self) -> None:
        """Delete private/, and what says that it is elsewhere."""
        files.delete_private(self.private)
        elsewhere.forget(self.root)

    @property
    def ledger(self) -> Path:
        """The ledger that names all that was spent: the one that grows in private/, where it is there."""
        return self.own_ledger if self.own_ledger.exists() else self.released_ledger

    def publish_ledger(self) -> None:
        """Put the ledger as it is now in release/. There it does not grow: that would tell times."""
        if self.own_ledger.exists():
            content = self.own_ledger.read_bytes()
            files.write_bytes(self.released_ledger, content[: content.rfind(b'\n') + 1])

    def model(self, training: str) -> Path:
        """Folder of the model that 'pretrain' or 'finetune' releases."""
        return self.release / 'model' / training

    def exported(self, training: str) -> Path:
        """File of the same model for the PyTorch implementation, if no other is asked for."""
        return self.release / 'model' / f'{training}.pth'

    def checkpoints(self, training: str) -> Path:
        """Folder of the checkpoints of a training in progress."""
        return self.private / 'resume' / training

    def metrics(self, training: str) -> Path:
        """Folder of a training's TensorBoard files."""
        return self.private / 'metrics' / training

    def feature_network(self, epochs: int) -> Path:
        """File of the network whose features FID compares."""
        return self.private / f'feature_network_{epochs}.npz'

    def private_features(self, network: str) -> Path:
        """File of the features of the private images, by 'cnn' or 'inception'."""
        return self.private / f'private_features_{network}.npz'

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folders if they are not there, and keep other processes out.

        Raises:
            PermissionError: they cannot be written, or another process works in them.
            ValueError: private/ is not what this run has used so far.
        """
        self.check_private()
        with contextlib.ExitStack() as stack:
            try:
                files.make_folder(self.release)
                is_closed = files.make_folder(self.private, mode=0o700)
                for folder in (self.root, self.release, self.private):
                    files.check_writable(folder)
                stack.enter_context(files.locked(self.root / '.lock'))
            except filelock.Timeout as error:
                raise PermissionError(
                    f'--workdir={self.root} is in use by another process. Wait for it, stop it, or '
                    'use another --workdir'
                ) from error
            except files.InUse as error:
                raise PermissionError(
                    f'--workdir={self.root} is in use by another process: {error}'
                ) from error
            except (OSError, NotImplementedError) as error:  # the second: of a file system without locks
                raise PermissionError(
                    f'--workdir={self.root} cannot be written ({error}); it must be a folder that this '
                    'user may create and write'
                ) from error
            self.check_private()  # again: another process may have worked here
            if not self.keys.exists():
                for advice in files.store_advice(self.release, self.private, is_closed):
                    print(advice, flush=True)
            elsewhere.bind(self.root, self.private)
            files.remove_unfinished(self.root, (self.release, self.private))
            stack.enter_context(files.timeless(self.release, like=self.config))
            yield

    def check(
        self, settings: Mapping[str, Any], may_pretrain_again: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Check that the folder was made with these settings, by their full names.

        The keys in private/ belong to the settings in `own_config`, also if release/ is moved away.

        Args:
            settings: of this run.
            may_pretrain_again: asked if nothing but settings of pre-training differs, which are allowed then.

        Returns:
            The settings of pre-training that differ, a line each: `pretrain_again` puts the old one aside.

        Raises:
            ValueError: other settings are recorded; the message lists the differences.
        """
        recorded = self._recorded()
        if recorded is None:
            return []
        path = self._path_of_settings()
        recorded |= self._paths(settings, recorded)
        found = differences(recorded, settings, FREE_SETTINGS + _LATER_SETTINGS)
        # Among scores of images from elsewhere none runs.
        selects = not settings.get('evaluate.images')
        if selects and _NOISY in (recorded[_SELECTION], settings.get(_SELECTION)):
            of_selection = lambda told: {name: told[name] for name in _SELECTION_SETTINGS if name in told}
            found += differences(of_selection(recorded), of_selection(settings), ())
        is_pretraining = all(
            line.startswith(f'config.{_PRETRAIN}') and not line.startswith(f'config.{_HAS_PRETRAINING}:')
            for line in found
        )
        if found and is_pretraining and may_pretrain_again():
            return found
        if found:
            raise ValueError(
                f'--workdir={self.root} belongs to another config ({path}):\n  '
                + '\n  '.join(found)
                + '\nUse those settings, or another --workdir. What this folder spent adds up with what '
                f'another one spends: --config.dp.already_spent={self.root} counts it there.'
            )
        return []

    def recorded(self) -> dict[str, Any] | None:
        """Return the settings that the folder was made with, by their full names; None if it has none.

        Paths are those of private/; without it, '<path>' stands for each.
        """
        found = self._recorded()
        if found is None or not self.own_config.exists():
            return found
        own = files.read_json(self.own_config, 'Restore the file, or use another --workdir')
        return found | {name: own[name] for name in _PATHS if name in own}

    def _recorded(self) -> dict[str, Any] | None:
        path = self._path_of_settings()
        if not path.exists():
            return None
        found = files.read_json(
            path,
            'Restore the file. Or delete it and run with the settings of this run: it is written again',
        )
        found.pop('_note', None)
        return _NEW_SETTINGS | found

    def _path_of_settings(self) -> Path:
        return self.config if self.config.exists() else self.own_config

    def pretrain_again(self, settings: Mapping[str, Any], changed: list[str]) -> None:
        """Put a pre-training aside that other settings made, and bind the folder to the new ones.

        Nothing of it is mixed into the new one, and nothing of it stays in release/.

        Args:
            settings: of this run.
            changed: what `check` returned, not empty.
        """
        old = [self.model('pretrain'), self.checkpoints('pretrain'), self.metrics('pretrain')]
        number = 1
        while (aside := self.private / 'earlier' / f'pretrain_{number}').exists():
            number += 1
        for folder, name in zip(old, ('model', 'resume', 'metrics')):
            if folder.exists():
                files.move_folder(folder, aside / name)
        self.exported('pretrain').unlink(missing_ok=True)
        self.generator.unlink(missing_ok=True)
        # Last: if this is interrupted, the next command does the rest.
        files.write_json(self.own_config, {'_note': PRIVATE_NOTE, **settings}, mode=0o600)
        files.write_json(self.config, without_paths(settings))
        kept = f' What the old ones made is kept in {aside}.' if aside.exists() else ''
        print(
            'Pre-training begins again with other settings, from the same central images. It costs no '
            f'privacy.{kept}\n  ' + '\n  '.join(changed),
            flush=True,
        )

    def _paths(self, settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Return the paths that release/config.json does not tell: those in private/, or, without it, any."""
        told = without_paths(settings)
        hidden = [name for name in _PATHS if name in told and recorded.get(name) == told[name]]
        if hidden and self.own_config.exists():
            own = files.read_json(self.own_config, 'Restore the file, or use another --workdir')
            return {name: own[name] for name in hidden if name in own}
        return {name: settings[name] for name in hidden}

    def record(self, settings: Mapping[str, Any]) -> None:
        """Bind the folder to these settings, and put a note in each half of what may be done with it."""
        if not self.config.exists():  # before all others: they have its time
            files.write_json(self.config, without_paths(settings))
        if not self.own_config.exists():
            files.write_json(self.own_config, {'_note': PRIVATE_NOTE, **settings}, mode=0o600)
        for path, text in (
            (self.card, f'# Synthetic images\n\n{RELEASE_NOTE}'),  # until there are any
            (self.private / 'README.txt', PRIVATE_NOTE + '\n'),
        ):
            if not path.exists():
                files.write_text(path, text)

    def check_fingerprint(self, name: str, images: Images, **processes: Callable) -> None:
        """Check that `name` ('train') names the images with which it was first seen in this folder.

        Args:
            name: of the split.
            images: of this process.
            processes: `gather` and `at_first`, where there are several, see `fingerprint.check`.

        Raises:
            ValueError: they are other images.
        """
        fingerprint.check(self.fingerprints, name, images, **processes)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name settings by their full names ('finetune.draws'), in JSON's types.

    Args:
        settings: nested mappings, as `ConfigDict.to_dict` gives them.
    """
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f'{name}.{inner}': found for inner, found in flatten(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the paths of this machine: '<path>' stands for each."""
    return {
        name: _PATHS[name](value) if name in _PATHS and value else value for name, value in settings.items()
    }


def _source_without_path(source: str) -> str:
    kind, colon, _ = source.partition(':')
    return source if kind == 'tfds' or not colon else f'{kind}:{_PATH}'


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """List the settings that differ, one line each, without those whose name begins with one in `free`."""
    return [
        f'config.{name}: {old.get(name, "not set")} there, {new.get(name, "not set")} now'
        for name in sorted(set(old) | set(new))
        if old.get(name, '') != new.get(name, '') and not name.startswith(free)
    ]
