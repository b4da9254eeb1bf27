"""What a stage leaves for others: each artefact's files and loader, written once."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
from typing import Any
import zipfile

from clu import parameter_overview
from flax import traverse_util
import jax
import numpy as np

from dpp_jax import files
from dpp_jax.data.class_moments import ClassMoments
from dpp_jax.diffusion.model import Model
from dpp_jax.run import digests
from dpp_jax.run.folder import FREE_SETTINGS, WorkDir, differences
from dpp_jax.run.other_images import OtherImages
from dpp_jax.training import checkpoint

PyTree = Any
_REAL_IMAGES = 12  # of a class, that the private page shows
# What selection.json holds.
_SELECTION = {
    'images': [int],
    'trainings': [{'classifier': str, 'seed': int, 'candidates': [str], 'scores': [float]}],
}
_CLASSIFIER_IMAGES = 'classifier_images'
# Settings of images that earlier versions did not have, with the value that they stood for.
_NEW_OF_IMAGES = {
    'generate.class_counts': 'balanced',
    'generate.class_shares': [],
    'generate.moments_share': 0.0,
    'generate.sampler.guidance_min': 0.0,
    'generate.sampler.guidance_max': 1000.0,
    'generate.classifier_sampler.guidance_min': 0.0,
    'generate.classifier_sampler.guidance_max': 1000.0,
}
# What evaluation.json holds.
_SCORES = {
    'of': dict,
    'accuracy': {'*': float},
    'held_out_accuracy?': {'*': float},
    'fid?': float,
    'fid_of_real_test_images?': float,
    'fid_features?': str,
    'fid_left_out?': str,
    'fid_images?': {'private': int, 'synthetic': int, 'test': int},
    # Beside FID, by the same features.
    'fid_spread?': float,
    'scores?': {'*': {'value': float, 'spread': float, 'images': int, 'real?': float}},
    'fid_of_class?': {'*': float},
    'memorization?': {
        'share_near': float,
        'share_near_expected': float,
        'median_ratio': float,
        'p_value': float,
        'synthetic_images': float,
        '*': float,
    },
    'metrics_left_out?': {'*': str},
    'accuracy_of_real_images?': {'*': float},
    'classifiers_left_out?': str,
    'accuracy_spread?': {'*': float},
    'accuracy_of_seeds?': {'*': [float]},
    'accuracy_of_class?': {'*': list},  # numbers, or null for a class without test images
    'confusion?': {'*': [[int]]},
    'protocol?': str,
    'accuracy_mean?': float,
    'selection?': str,
    'selected?': {'*': [str]},
}
# Settings of scores that earlier versions did not have, likewise.
_NEW_OF_SCORES = {'evaluate.seeds': 1, 'evaluate.selection': 'synthetic', 'evaluate.as_paper': False}
# How an evaluation goes, by whether it is the paper's.
PROTOCOLS = {False: 'as this program does by itself', True: 'as in the paper'}
# Settings that change no result with `evaluate.selection` synthetic.
_OF_NOISY = ('evaluate.selection_share', 'evaluate.candidates')

# What can be asked for beside FID, and whether results have it.
METRICS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    'kid': lambda results: 'kid' in results.get('scores', {}),
    'inception_score': lambda results: 'inception_score' in results.get('scores', {}),
    'precision_recall': lambda results: 'precision' in results.get('scores', {}),
    'fid_of_class': lambda results: 'fid_of_class' in results,
    'memorization': lambda results: 'memorization' in results,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How images are drawn from the answer of a query.

    Attributes:
        load: work directory → the answer, dicts of arrays.
        draw: (answer, labels (n,), key of 128 bits, number of the batch) → images (n, H, W, C) uint8, one for
            each label; those of another batch are independent of them.
    """

    load: Callable[[WorkDir], dict[str, Any]]
    draw: Callable[[dict[str, Any], np.ndarray, int, int], np.ndarray]


def central_images(workdir: WorkDir) -> dict[str, np.ndarray]:
    """Load what the queries released.

    Returns:
        `images` (n, H, W, C) uint8, after post-processing, and `labels` (n,) int32. Also `noisy`
        (n, h, w, C) float32, the images before it, in [0, 1] but for the noise (an earlier version kept
        none), and `counts` (queries, classes) float32, the noisy number of images of each class in the
        sample of each query, if the query counts.

    Raises:
        FileNotFoundError, ValueError: they are not there, damaged, or not those that this run released.
    """
    found = _unchecked_central_images(workdir)
    digests.check(workdir, 'central_images.npz', central_arrays(found))
    return found


def _unchecked_central_images(workdir: WorkDir) -> dict[str, np.ndarray]:
    return files.read_npz(
        workdir.central_images,
        'Restore the file. Or, if private/ is intact, move it away and run --stage=central: it makes the '
        'same images from the same keys',
    )


def central_arrays(central: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what the digest of central images is of: what is there of it."""
    needed = [central['images'], central['labels']]
    return needed + [central[name] for name in ('noisy', 'counts') if name in central]


def moments(workdir: WorkDir) -> ClassMoments:
    """Load what the query for class moments released.

    Raises:
        FileNotFoundError, ValueError: it is not there, damaged, or not what this run released.
    """
    found = _unchecked_moments(workdir)
    digests.check(workdir, 'moments.npz', all_arrays(found))
    rest = found.get('rest', np.float32(0))  # earlier versions did not estimate it, nor did anything need it
    return ClassMoments(means=found['means'], factors=found['factors'], rest=np.asarray(rest))


def _unchecked_moments(workdir: WorkDir) -> dict[str, np.ndarray]:
    return files.read_npz(
        workdir.moments,
        'Restore the file. Or, if private/ is intact, move it away and run --stage=central: it makes the '
        'same moments from the same keys',
    )


def frequency(workdir: WorkDir) -> np.ndarray:
    """Load what the frequency query released, (classes, F) float32.

    Raises:
        FileNotFoundError, ValueError: it is not there, damaged, or not what this run released.
    """
    found = _unchecked_frequency(workdir)
    digests.check(workdir, 'frequency.npz', all_arrays(found))
    return found['embedding']


def generator(workdir: WorkDir) -> dict[str, Any]:
    """Load the weights of the generator that was fitted to the answer of the frequency query.

    Raises:
        FileNotFoundError, ValueError: they are not there, damaged, or not those that this run made.
    """
    found = _unchecked_generator(workdir)
    digests.check(workdir, 'generator.npz', all_arrays(found))
    return traverse_util.unflatten_dict(found, sep='/')


def _unchecked_generator(workdir: WorkDir) -> dict[str, np.ndarray]:
    return files.read_npz(workdir.generator, 'Delete the file and run --stage=pretrain: it fits it again')


def _unchecked_frequency(workdir: WorkDir) -> dict[str, np.ndarray]:
    return files.read_npz(
        workdir.frequency,
        'Restore the file. Or, if private/ is intact, move it away and run --stage=central: it makes the '
        'same answer from the same keys',
    )


def all_arrays(found: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what the digest of an answer is of, where that is all of its arrays."""
    return [found[name] for name in sorted(found)]


def weights(workdir: WorkDir, training: str, shapes: PyTree) -> dict[str, PyTree]:
    """Load `params` and `ema_params` of the model that 'pretrain' or 'finetune' released.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint.load_model`; or they are not those that this run
            released.
    """
    found = _unchecked_weights(workdir, training, shapes)
    digests.check(workdir, f'model/{training}', jax.tree.leaves(found))
    return found


def _unchecked_weights(workdir: WorkDir, training: str, shapes: PyTree) -> dict[str, PyTree]:
    return checkpoint.load_model(workdir.model(training), {'params': shapes, 'ema_params': shapes})


def save_imported_step(workdir: WorkDir, step: int) -> None:
    """Note how many updates the imported model had had."""
    files.write_json(workdir.imported, {'step': step})


def imported_step(workdir: WorkDir) -> int:
    """Return how many updates the imported model had had."""
    advice = 'Restore the file. Or write {"step": 0} there: only --stage=export reads it'
    return files.read_json(workdir.imported, advice, {'step': int})['step']


def check_inputs(
    workdir: WorkDir, shapes: PyTree, stages: Collection[str], *, more_read_moments: Collection[str] = ()
) -> None:
    """Check what is there and will be read by these stages, before any of them runs.

    Args:
        workdir: to look into.
        shapes: of the network's parameters.
        stages: that will run.
        more_read_moments: stages that read the class moments, beside `pretrain`.

    Raises:
        ValueError: it is damaged, or not what this run released.
    """
    if not workdir.digests.exists():  # a new folder, or one of an earlier version
        digests.begin(workdir, dict(_released(workdir, shapes)))
    if 'pretrain' in stages and workdir.central_images.exists():
        central_images(workdir)
    if {'pretrain', *more_read_moments} & set(stages) and workdir.moments.exists():
        moments(workdir)
    if 'pretrain' in stages and workdir.frequency.exists():
        frequency(workdir)
    if 'pretrain' in stages and workdir.generator.exists():
        generator(workdir)
    for training, stage in (('pretrain', 'finetune'), ('finetune', 'generate')):
        if stage in stages and files.is_whole(workdir.model(training)):
            weights(workdir, training, shapes)


def _released(workdir: WorkDir, shapes: PyTree) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield name and arrays of what is there; what is damaged is told when it is needed."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        yield 'central_images.npz', central_arrays(_unchecked_central_images(workdir))
    with contextlib.suppress(OSError, ValueError):
        yield 'moments.npz', all_arrays(_unchecked_moments(workdir))
    with contextlib.suppress(OSError, ValueError):
        yield 'frequency.npz', all_arrays(_unchecked_frequency(workdir))
    with contextlib.suppress(OSError, ValueError):
        yield 'generator.npz', all_arrays(_unchecked_generator(workdir))
    for training in ('pretrain', 'finetune'):
        with contextlib.suppress(OSError, ValueError):
            yield f'model/{training}', jax.tree.leaves(_unchecked_weights(workdir, training, shapes))


def selection(workdir: WorkDir) -> dict[str, Any] | None:
    """Load what the selection among classifiers released; None if nothing is there.

    Returns:
        `images`: checksums of the synthetic images that the classifiers were trained on; `trainings`: of each
        its `classifier`, `seed`, names of `candidates` and their `scores`, noisy accuracies.

    Raises:
        ValueError: it is damaged, or not what this run released.
    """
    if not workdir.selection.exists():
        return None
    found = files.read_json(
        workdir.selection,
        'Restore the file. Or, if private/ is intact, delete it and run --stage=evaluate: it makes the same '
        'from the same keys',
        _SELECTION,
    )
    digests.check(workdir, 'selection.json', _scores(found))
    return found


def save_selection(workdir: WorkDir, images: list[int], trainings: list[dict[str, Any]]) -> None:
    """Release the noisy scores; what is named as for `selection`."""
    found = {'images': images, 'trainings': trainings}
    digests.note(workdir, 'selection.json', _scores(found))
    files.write_json(workdir.selection, found)


def _scores(found: Mapping[str, Any]) -> list[np.ndarray]:
    """Return what the digest of a selection is of."""
    return [np.array([score for part in found['trainings'] for score in part['scores']], np.float32)]


def write_parameters(workdir: WorkDir, model: Model) -> None:
    """Write clu's overview of the network, for people."""
    overview = parameter_overview.get_parameter_overview(model.shapes(), include_stats=False)
    files.write_text(workdir.parameters, overview + '\n')
    print(f'parameters     overview in {workdir.parameters}\n', flush=True)


def check_models(workdir: WorkDir, shapes: PyTree) -> None:
    """Check that the models and checkpoints that are there belong to the network of these shapes.

    Raises:
        ValueError: one belongs to another network.
    """
    for training in ('pretrain', 'finetune'):
        saved = checkpoint.latest_training(workdir.checkpoints(training))
        for folder in (workdir.model(training), saved and saved[1]):
            if folder and files.is_whole(folder):
                checkpoint.check_params(folder, shapes)


def write_snapshot(workdir: WorkDir, step: int, vector: np.ndarray) -> None:
    """Keep the averaged weights after `step` steps of fine-tuning, (P,) float32, for pictures.

    In private/: they are covered as far as the ledger is, but published only with the whole run.
    """
    files.write_npz(workdir.snapshots / f'{step:010d}.npz', mode=0o600, vector=vector)


def snapshots(workdir: WorkDir) -> dict[int, Path]:
    """Return the snapshots of fine-tuning that are there, by their steps."""
    return {int(name[:-4]): workdir.snapshots / name for name in files.names(workdir.snapshots)}


def keep_real_images(workdir: WorkDir, images: Any, labels: np.ndarray, classes: int) -> None:
    """Keep the first private images of each class, for the private page, unless they are there.

    Args:
        workdir: to write to, in private/.
        images: (n, H, W, C) uint8, or rows that are read when they are asked for.
        labels: (n,) integers.
        classes: number of classes.
    """
    if workdir.real_images.exists():
        return
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[:_REAL_IMAGES] for k in range(classes)]))
    if len(rows):
        found = {'images': np.asarray(images[rows]), 'labels': labels[rows]}
        files.write_npz(workdir.real_images, mode=0o600, **found)


def add_seconds(workdir: WorkDir, stage: str, seconds: float) -> None:
    """Note in private/ how long a stage took, from where it went on until its end.

    Not for release/: time tells of private images.
    """
    known = seconds_of_stages(workdir)
    files.write_json(workdir.seconds, known | {stage: seconds}, mode=0o600)


def seconds_of_stages(workdir: WorkDir) -> dict[str, float]:
    """Return stage → seconds, as far as they are noted."""
    if not workdir.seconds.exists():
        return {}
    found = files.read_json(workdir.seconds, 'Delete the file: it only tells times', {'*': float})
    return {stage: seconds for stage, seconds in found.items() if not stage.startswith('_')}


def settings_of_images(workdir: WorkDir) -> dict[str, Any]:
    """Return the settings of a run by their full names; `generate.*` are those of the images that are there.

    Raises:
        FileNotFoundError, ValueError: the folder has no settings, or they are damaged.
    """
    settings, path = files.read_json(workdir.config, 'Restore the file'), workdir.synthetic / 'settings.json'
    return settings | (files.read_json(path, 'Restore the file, or delete it') if path.exists() else {})


class SyntheticImages:
    """The synthetic images of a work directory.

    Attributes:
        folder: of all of them.
        paths: purpose → file: 'images' for FID and use, 'classifier_images' if they are separate.
        png_tree: folder of single PNG files, if asked for.
        tfds: folder that tensorflow-datasets reads, likewise.
        dpimagebench: folder that the evaluation of DPImageBench reads, likewise.
        settings: those that make the images, by their full names.
    """

    def __init__(self, workdir: WorkDir, settings: Mapping[str, Any]):
        """`settings` are those of `config.generate`, by their full names ('generate.images')."""
        self.folder = workdir.synthetic
        names = ['images']
        if settings['generate.separate_classifier_images']:
            names.append(_CLASSIFIER_IMAGES)
        self.paths = {name: self.folder / f'{name}.npz' for name in names}
        self.png_tree, self.tfds = self.folder / 'png', self.folder / 'tfds'
        self.dpimagebench = self.folder / 'dpimagebench'
        self.settings = {name: value for name, value in settings.items() if name.startswith('generate.')}
        self._settings_file = self.folder / 'settings.json'

    @property
    def picture(self) -> Path:
        """The image grid of the images for FID and use."""
        return self.paths['images'].with_suffix('.png')

    @property
    def exports(self) -> dict[str, Path]:
        """The folders of the images in other forms, by the settings that ask for them."""
        return {
            'generate.png_tree': self.png_tree,
            'generate.tfds': self.tfds,
            'generate.dpimagebench': self.dpimagebench,
        }

    @property
    def for_classifiers(self) -> Path:
        """The file of the images that classifiers are trained on."""
        return self.paths.get(_CLASSIFIER_IMAGES, self.paths['images'])

    @property
    def is_complete(self) -> bool:
        """Whether all files are there and whole, and the folders in other forms that are asked for."""
        has_folders = all(files.is_whole(path) for name, path in self.exports.items() if self.settings[name])
        return has_folders and all(self.is_whole(path) for path in self.paths.values())

    def check(self) -> None:
        """Check that the images that are there, or begun, were made with these settings.

        Raises:
            ValueError: they were made with others; the message lists the differences.
        """
        if not self._settings_file.exists():
            return
        move = (
            f'move {self.folder} away and run the same command: it makes new images from the released model'
        )
        recorded = _NEW_OF_IMAGES | files.read_json(self._settings_file, f'Restore the file, or {move}')
        found = differences(recorded, self.settings, FREE_SETTINGS)
        if found:
            raise ValueError(
                f'{self.paths["images"]} belongs to other settings:\n  '
                + '\n  '.join(found)
                + f'\nUse those settings, or {move}.'
            )

    def record(self) -> None:
        """Bind the images to the settings that make them, before the first one is there."""
        if not self._settings_file.exists():
            files.write_json(self._settings_file, self.settings)

    def load(self, path: Path) -> dict[str, np.ndarray]:
        """Load `images` (n, H, W, C) uint8 and `labels` (n,) of one of `paths`; and `class_names`, if new.

        With `generate.moments_share` also `source` (n,) uint8: 0 = drawn from the model, 1 = from the class
        moments.
        """
        return files.read_npz(path, 'Run --stage=generate to replace the file')

    def identity(self) -> dict[str, list[int]] | None:
        """Return file → checksums of its arrays, read from the files' directories; None if one is damaged."""
        found = {}
        for name, path in self.paths.items():
            try:
                with files.reading(path) as content, zipfile.ZipFile(content) as file:
                    found[name] = [member.CRC for member in file.infolist()]
            except files.DAMAGE:
                return None
        return found

    def identity_for_classifiers(self) -> list[int]:
        """Return the checksums, as of `identity`, of the images that classifiers are trained on."""
        name = next(name for name, path in self.paths.items() if path == self.for_classifiers)
        return (self.identity() or {}).get(name, [])

    def is_whole(self, path: Path) -> bool:
        """Whether all of a file is there, by its checksums. The same keys make a damaged file again.

        Files appear when they are complete, but not every file system keeps that order when power fails.
        """
        if not path.exists():
            return False
        try:
            with files.reading(path) as content, zipfile.ZipFile(content) as file:
                if file.testzip() is None:
                    return True
        except (*files.DAMAGE, NotImplementedError):  # of a compression that zipfile does not know
            pass
        print(f'{path} is damaged. Run --stage=generate to replace it', flush=True)
        return False


class Evaluation:
    """The scores of the synthetic images, in private/.

    Attributes:
        results: so far: fid, or fid_left_out (why), accuracy by classifier, ...; without what they are of, if
            nothing is there yet.
    """

    def __init__(
        self,
        workdir: WorkDir,
        settings: Mapping[str, Any],
        images: SyntheticImages | OtherImages | None = None,
    ):
        """Read the scores that are there.

        Args:
            workdir: of the run.
            settings: those of `config.generate` and `config.evaluate`, by their full names.
            images: that are scored; None: those of the run.
        """
        self._path, self._scored_path = workdir.evaluation, workdir.scored
        self._settings = settings
        self._images = images or SyntheticImages(workdir, settings)
        self.results = self._load()

    @property
    def subject(self) -> dict[str, Any]:
        """What results are of: the images, and the settings that change a result."""
        # Which results there are.
        which = [
            'evaluate.images',
            'evaluate.fid',
            'evaluate.metrics',
            'evaluate.classifiers',
            'evaluate.real_images',
        ]
        which += [name for name, old in _NEW_OF_SCORES.items() if self._settings[name] == old]
        if 'evaluate.selection' in which:
            which += _OF_NOISY
        return {
            'images': self._images.identity(),
            'settings': {
                name: value
                for name, value in self._settings.items()
                if name.startswith('evaluate.') and name not in which
            },
        }

    def _load(self) -> dict[str, Any]:
        """Return the results so far; nothing if they are of other images, or by other settings, than now."""
        if not self._path.exists():
            return {}
        results = files.read_json(
            self._path, 'Delete the file and run --stage=evaluate: it computes the scores again', _SCORES
        )
        return results if results.get('of') == self.subject else {}

    @property
    def scored(self) -> list[dict[str, Any]]:
        """All subjects that were scored in this folder: a choice by scores is one among them."""
        if not self._scored_path.exists():
            return []
        advice = 'Restore the file. Or delete it: the count begins again'
        return files.read_json(self._scored_path, advice, {'subjects': [dict]})['subjects']

    def begin(self) -> None:
        """Say what the results will be of, if there are none, and count it."""
        scored = self.scored
        if self.subject not in scored:
            note = 'What was scored on real images so far: choosing among it by scores is not covered by ε.'
            found = {'_note': note, 'subjects': [*scored, self.subject]}
            files.write_json(self._scored_path, found, mode=0o600)
        self.results = self.results or {
            '_note': 'Computed from private images without a privacy guarantee. Do not publish.',
            'of': self.subject,
            'protocol': PROTOCOLS[self._settings['evaluate.as_paper']],
            'accuracy': {},
        }

    def save(self) -> None:
        """Write the results so far."""
        files.write_json(self._path, self.results, mode=0o600)

    @property
    def missing_distances(self) -> list[str]:
        """What the settings ask for and is neither there nor left out: 'fid', or a name of METRICS."""
        if not self._settings['evaluate.fid'] or 'fid_left_out' in self.results:
            return []
        known = {'fid'} & self.results.keys() | self.results.get('metrics_left_out', {}).keys()
        known |= {name for name, has in METRICS.items() if has(self.results)}
        return [name for name in ('fid', *self._settings['evaluate.metrics']) if name not in known]

    @property
    def is_complete(self) -> bool:
        """Whether every score that the settings ask for is there."""
        has_fid = not self.missing_distances
        if 'classifiers_left_out' in self.results:
            return has_fid
        accuracy = self.results.get('accuracy', {})
        return has_fid and all(name in accuracy for name in self._settings['evaluate.classifiers'])
