"""What a stage leaves for others: each artefact's files and loader, written once."""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
from pathlib import Path
from typing import Any
import zipfile

from clu import parameter_overview
import jax
import numpy as np

from dpp_jax import files
from dpp_jax.diffusion.model import Model
from dpp_jax.run import digests
from dpp_jax.run.folder import FREE_SETTINGS, WorkDir, differences
from dpp_jax.training import checkpoint

PyTree = Any
_CLASSIFIER_IMAGES = 'classifier_images'
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
    'memorization?': {'*': float},
    'metrics_left_out?': {'*': str},
    'accuracy_of_real_images?': {'*': float},
    'classifiers_left_out?': str,
}

# What can be asked for beside FID, and whether results have it.
METRICS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    'kid': lambda results: 'kid' in results.get('scores', {}),
    'inception_score': lambda results: 'inception_score' in results.get('scores', {}),
    'precision_recall': lambda results: 'precision' in results.get('scores', {}),
    'fid_of_class': lambda results: 'fid_of_class' in results,
    'memorization': lambda results: 'memorization' in results,
}


def central_images(workdir: WorkDir) -> dict[str, np.ndarray]:
    """Load the released central images: `images` (n, H, W, C) uint8 and `labels` (n,).

    Raises:
        FileNotFoundError, ValueError: they are not there, damaged, or not those that this run released.
    """
    found = _unchecked_central_images(workdir)
    digests.check(workdir, 'central_images.npz', _arrays(found))
    return found


def _unchecked_central_images(workdir: WorkDir) -> dict[str, np.ndarray]:
    return files.read_npz(
        workdir.central_images,
        'Restore the file. Or, if private/ is intact, move it away and run --stage=central: it makes the '
        'same images from the same keys',
    )


def _arrays(central: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what the digest of central images is of."""
    return [central['images'], central['labels']]


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


def check_inputs(workdir: WorkDir, shapes: PyTree, stages: Collection[str]) -> None:
    """Check what is there and will be read by these stages, before any of them runs.

    Raises:
        ValueError: it is damaged, or not what this run released.
    """
    if not workdir.digests.exists():  # a new folder, or one of an earlier version
        digests.begin(workdir, dict(_released(workdir, shapes)))
    if 'pretrain' in stages and workdir.central_images.exists():
        central_images(workdir)
    for training, stage in (('pretrain', 'finetune'), ('finetune', 'generate')):
        if stage in stages and files.is_whole(workdir.model(training)):
            weights(workdir, training, shapes)


def _released(workdir: WorkDir, shapes: PyTree) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield name and arrays of what is there; what is damaged is told when it is needed."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        yield 'central_images.npz', _arrays(_unchecked_central_images(workdir))
    for training in ('pretrain', 'finetune'):
        with contextlib.suppress(OSError, ValueError):
            yield f'model/{training}', jax.tree.leaves(_unchecked_weights(workdir, training, shapes))


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


class SyntheticImages:
    """The synthetic images of a work directory.

    Attributes:
        folder: of all of them.
        paths: purpose → file: 'images' for FID and use, 'classifier_images' if they are separate.
        png_tree: folder of single PNG files, if asked for.
    """

    def __init__(self, workdir: WorkDir, settings: Mapping[str, Any]):
        """`settings` are those of `config.generate`, by their full names ('generate.images')."""
        self.folder = workdir.synthetic
        names = ['images']
        if settings['generate.separate_classifier_images']:
            names.append(_CLASSIFIER_IMAGES)
        self.paths = {name: self.folder / f'{name}.npz' for name in names}
        self.png_tree = self.folder / 'png'
        self._settings = {name: value for name, value in settings.items() if name.startswith('generate.')}
        self._settings_file = self.folder / 'settings.json'

    @property
    def picture(self) -> Path:
        """The image grid of the images for FID and use."""
        return self.paths['images'].with_suffix('.png')

    @property
    def for_classifiers(self) -> Path:
        """The file of the images that classifiers are trained on."""
        return self.paths.get(_CLASSIFIER_IMAGES, self.paths['images'])

    @property
    def is_complete(self) -> bool:
        """Whether all files are there and whole, and the tree of PNG files if it is asked for."""
        has_tree = not self._settings['generate.png_tree'] or files.is_whole(self.png_tree)
        return has_tree and all(self.is_whole(path) for path in self.paths.values())

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
        recorded = files.read_json(self._settings_file, f'Restore the file, or {move}')
        found = differences(recorded, self._settings, FREE_SETTINGS)
        if found:
            raise ValueError(
                f'{self.paths["images"]} belongs to other settings:\n  '
                + '\n  '.join(found)
                + f'\nUse those settings, or {move}.'
            )

    def record(self) -> None:
        """Bind the images to the settings that make them, before the first one is there."""
        if not self._settings_file.exists():
            files.write_json(self._settings_file, self._settings)

    def load(self, path: Path) -> dict[str, np.ndarray]:
        """Load `images` (n, H, W, C) uint8 and `labels` (n,) of one of `paths`."""
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

    def __init__(self, workdir: WorkDir, settings: Mapping[str, Any]):
        """`settings` are those of `config.generate` and `config.evaluate`, by their full names."""
        self._path, self._scored_path = workdir.evaluation, workdir.scored
        self._settings = settings
        self._images = SyntheticImages(workdir, settings)
        self.results = self._load()

    @property
    def subject(self) -> dict[str, Any]:
        """What results are of: the images, and the settings that change a result."""
        # Which results there are.
        which = ('evaluate.fid', 'evaluate.metrics', 'evaluate.classifiers', 'evaluate.real_images')
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
