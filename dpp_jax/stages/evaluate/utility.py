"""What the synthetic images are good for: classifiers trained on them, tested on real images.

Which candidate of a training counts (an epoch, say), test images never decide:
- selection `synthetic`: each training chooses by a held-out share of its own, synthetic images.
- `as_paper`: nothing chooses. A training uses all synthetic images, and counts as it ends.
- selection `private_noisy`: all trainings come first. Each candidate's sum over the private images
  (`privacy.selection`) and its results on the test images wait in private/candidates/. Then one noisy
  release of all sums, release/selection.json, chooses. After a kill, trainings that are there are not
  repeated, so the same noise meets the same sums.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.evaluation import classifiers, needs, trainer
from dpp_jax.privacy.budget import SELECTION
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.privacy.selection import Selection
from dpp_jax.run import artefacts
from dpp_jax.run.artefacts import Evaluation, SyntheticImages
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import NOTE, Keys
from dpp_jax.run.other_images import OtherImages
from dpp_jax.stages.evaluate import common

_AT_ONCE = 4096  # private images, which may stay in files


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateSelection:
    """How private images select among candidates.

    Attributes:
        query: what is asked.
        mechanism: of the budget, which adds the noise.
        images_per_group: the most of a group that are used; None: the unit is one image.
        ledger: gets the release before it is used; None but in process 0.
        before_release: called when the ledger holds the release and nothing of it is in release/.
    """

    query: Selection
    mechanism: GaussianMechanism
    images_per_group: int | None
    ledger: Ledger | None
    before_release: Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """One training of a classifier on the synthetic images, and what its k candidates can do.

    Attributes:
        kind, seed: which one.
        names: of the candidates.
        sums: float32 (k,), see `Selection.sum`.
        confusions: int64 (k, classes, classes), of the test images.
    """

    kind: str
    seed: int
    names: list[str]
    sums: np.ndarray
    confusions: np.ndarray


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    evaluation: Evaluation,
    images: SyntheticImages | OtherImages,
    private: Callable[[], common.InMemory],
    test: Callable[[], Images],
    settings: trainer.Settings,
    selection: PrivateSelection | None,
) -> None:
    """Train classifiers on the synthetic images and test them on real ones; arguments as `evaluate.run`."""
    chosen, results = config.evaluate.classifiers, evaluation.results
    reason = needs.why_no_classes(config.data.classes) if chosen else None
    released = artefacts.selection(workdir) if selection else None
    if released is not None and released['images'] != images.identity_for_classifiers():
        reason = (
            f'{workdir.selection} is the selection among classifiers of other synthetic images, and the '
            'budget has one. Use the settings of those images, or another --workdir with '
            'config.dp.already_spent'
        )
    if reason is not None:
        common.save(evaluation, {'classifiers_left_out': reason})
        chosen = ()
    else:
        results.pop('classifiers_left_out', None)
    train = _Trainer(config, keys, images, settings)

    def add_ceilings():
        for kind in chosen if config.evaluate.real_images else ():
            if kind not in results.get('accuracy_of_real_images', {}):
                _add_ceiling(config, workdir, keys, kind, evaluation, private, test, settings)

    if selection is None:
        add_ceilings()
        for kind in chosen:
            _add_scores(train, evaluation, kind, test, config.evaluate.seeds)
        if config.evaluate.as_paper and set(classifiers.AS_PAPER) <= set(chosen):
            mean = np.mean([results['accuracy'][kind] for kind in classifiers.AS_PAPER])
            common.save(evaluation, {'accuracy_mean': float(mean)})
    elif chosen:
        found = [
            _candidates(train, workdir, keys, evaluation, kind, seed, private, test, selection)
            for kind in chosen
            for seed in range(classifiers.trainings(kind, config.evaluate.seeds))
        ]
        if released is None:
            _release(workdir, keys, images, found, selection)
        add_ceilings()  # after the release: networks trained on private images must not decide whether it is
        _add_selected(evaluation, found, artefacts.selection(workdir)['trainings'])


class _Trainer:
    """Trains classifiers on the synthetic images, which are read when they are needed."""

    def __init__(
        self,
        config: ConfigDict,
        keys: Keys,
        images: SyntheticImages | OtherImages,
        settings: trainer.Settings,
    ):
        self.classes, self.is_one = config.data.classes, config.evaluate.seeds == 1
        self.as_paper = config.evaluate.as_paper
        self._keys, self._images, self._settings = keys, images, settings
        self._data: dict[str, np.ndarray] = {}

    def __call__(self, function: Callable[..., Any], kind: str, seed: int, **more: Any) -> Any:
        """Call a function of `classifiers` for one training."""
        self._data = self._data or self._images.load(self._images.for_classifiers)
        # The first has the key of runs without a number of seeds.
        part = f'evaluate/{kind}' + (f'/{seed}' if seed else '')
        title = f'train {kind}' + ('' if self.is_one else f' {seed + 1}')
        with common.steps_bar(title) as advance:
            return function(
                kind,
                self._data['images'],
                self._data['labels'],
                classes=self.classes,
                key=self._keys.of_part(part).random,
                settings=self._settings,
                progress=advance,
                **more,
            )


def _add_scores(
    train: _Trainer, evaluation: Evaluation, kind: str, test: Callable[[], Images], seeds: int
) -> None:
    """Train a classifier as often as there are seeds, each chosen by its own held-out images; test it."""
    results = evaluation.results
    if kind in results['accuracy']:
        return
    if train.as_paper:
        seeds = classifiers.trainings(kind, seeds)
    for seed in range(len(results.get('accuracy_of_seeds', {}).get(kind, [])), seeds):
        classifier = train(_function(train.as_paper), kind, seed)
        _add(results, kind, _confusion(classifier, test(), train.classes), classifier.name)
        if classifier.held_out_accuracy is not None:
            means = results.setdefault('held_out_accuracy', {})
            means[kind] = (seed * means.get(kind, 0.0) + classifier.held_out_accuracy) / (seed + 1)
        evaluation.save()
    _summarize(results, kind)
    results['selection'] = (
        'nothing: each is what its training ends with'
        if train.as_paper
        else 'a held-out share of the synthetic images'
    )
    evaluation.save()


def _function(as_paper: bool) -> Callable[..., classifiers.Classifier]:
    """Return what trains a classifier that no private image selects."""
    return classifiers.train_as_paper if as_paper else classifiers.train_classifier


def _confusion(classifier: classifiers.Classifier, test: Images, classes: int) -> np.ndarray:
    return classifiers.confusion(classifier.predict(test.images), test.labels, classes)


def _add(results: dict[str, Any], kind: str, confusion: np.ndarray, name: str) -> None:
    """Add one training to the results; confusion matrices are added up."""
    accuracy = float(np.trace(confusion) / confusion.sum())
    results.setdefault('accuracy_of_seeds', {}).setdefault(kind, []).append(accuracy)
    results.setdefault('selected', {}).setdefault(kind, []).append(name)
    before = results.setdefault('confusion', {}).get(kind, 0)
    results['confusion'][kind] = (confusion + before).tolist()


def _summarize(results: dict[str, Any], kind: str) -> None:
    """Compute mean and spread over the seeds, and accuracies of classes (None: no test image has it)."""
    found = results['accuracy_of_seeds'][kind]
    results['accuracy'][kind] = float(np.mean(found))
    if len(found) > 1:
        results.setdefault('accuracy_spread', {})[kind] = float(np.std(found, ddof=1))
    rows = enumerate(results['confusion'][kind])
    of_class = [row[label] / sum(row) if sum(row) else None for label, row in rows]
    results.setdefault('accuracy_of_class', {})[kind] = of_class


# ---- selection by private images ------------------------------------------------------------------


def _candidates(
    train: _Trainer,
    workdir: WorkDir,
    keys: Keys,
    evaluation: Evaluation,
    kind: str,
    seed: int,
    private: Callable[[], common.InMemory],
    test: Callable[[], Images],
    selection: PrivateSelection,
) -> _Training:
    """Train a classifier on all synthetic images and look at its candidates; or read what was seen before."""
    path, of = workdir.candidates / f'{kind}_{seed}.npz', json.dumps(evaluation.subject, sort_keys=True)
    if path.exists():
        known = files.read_npz(path, 'Delete it: --stage=evaluate trains the classifier again')
        if str(known['of']) == of:
            arrays = {name: known[name] for name in ('sums', 'confusions')}
            return _Training(kind=kind, seed=seed, names=[str(name) for name in known['names']], **arrays)
    real = _all_private(private)
    members = keys.members(real.groups, selection.images_per_group)
    names, sums, confusions = [], [], []

    def judge(candidate: classifiers.Classifier) -> str:
        names.append(candidate.name)
        is_right = [candidate.predict(block)[: len(labels)] == labels for block, labels in _blocks(real)]
        sums.append(selection.query.sum(np.concatenate([np.zeros(0, bool), *is_right]), members))
        confusions.append(_confusion(candidate, test(), train.classes))
        return ''  # nothing of it is shown

    train(classifiers.fit, kind, seed, judge=judge)
    found = _Training(kind=kind, seed=seed, names=names, sums=np.array(sums), confusions=np.array(confusions))
    files.make_folder(workdir.candidates, mode=0o700)
    files.write_npz(
        path, mode=0o600, of=of, names=np.array(names), sums=found.sums, confusions=found.confusions
    )
    return found


def _all_private(private: Callable[[], common.InMemory]) -> Images:
    """Return all private images, in memory or in files.

    Raises:
        ValueError: this process cannot have all of them.
    """
    real, reason = private()
    if len(real.images) != real.total:
        raise ValueError(f'config.evaluate.selection is {classifiers.PRIVATE_NOISY!r}, but {reason}')
    return real


def _blocks(real: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images in blocks of one size, padded with zeros, and their labels.

    So the program that judges an image does not depend on how many images there are.
    """
    for start in range(0, len(real.images), _AT_ONCE):
        block = np.zeros((_AT_ONCE, *real.images.shape[1:]), np.uint8)
        labels = real.labels[start : start + _AT_ONCE]
        block[: len(labels)] = real.images[start : start + _AT_ONCE]
        yield block, labels


def _release(
    workdir: WorkDir,
    keys: Keys,
    images: SyntheticImages,
    found: list[_Training],
    selection: PrivateSelection,
) -> None:
    """Release the noisy scores of all candidates: the ledger first, then its statement, then the file."""
    own_keys = keys.of_mechanism(SELECTION, selection.ledger)
    ask = selection.query.noisy(selection.mechanism, own_keys.noise)
    scores, entry = ask(0, np.concatenate([training.sums for training in found]))
    selection.ledger.append(entry)
    scores = np.asarray(scores)
    keys.bind_release(SELECTION, [scores])
    selection.before_release()
    ends = np.cumsum([len(training.names) for training in found])
    trainings = [
        {
            'classifier': training.kind,
            'seed': training.seed,
            'candidates': training.names,
            'scores': part.tolist(),
        }
        for training, part in zip(found, np.split(scores, ends[:-1]), strict=True)
    ]
    artefacts.save_selection(workdir, images.identity_for_classifiers(), trainings)


def _add_selected(evaluation: Evaluation, found: list[_Training], trainings: list[dict[str, Any]]) -> None:
    """Take the candidate with the highest noisy score of each training."""
    results = evaluation.results
    for name in ('accuracy_of_seeds', 'selected', 'confusion'):
        results.pop(name, None)  # of a command that was interrupted
    for training, released in zip(found, trainings, strict=True):
        best = int(np.argmax(released['scores']))
        _add(results, training.kind, training.confusions[best], training.names[best])
    for kind in results['accuracy_of_seeds']:
        _summarize(results, kind)
    results['selection'] = 'noisy scores of private images (release/selection.json)'
    evaluation.save()


# ---- the ceiling --------------------------------------------------------------------------------


def _add_ceiling(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    kind: str,
    evaluation: Evaluation,
    private: Callable[[], common.InMemory],
    test: Callable[[], Images],
    settings: trainer.Settings,
) -> None:
    """Add the accuracy of a classifier that was trained on the private images: what no generator exceeds.

    Trained once for these settings, whatever the number of seeds, and kept in private/. It is left out where
    a class has too few private images, or they do not fit in memory.
    """
    train, too_large = private()
    if too_large or np.bincount(train.labels, minlength=config.data.classes).min() < 2:
        return
    names = ('epochs', 'batch_size', 'learning_rate', 'ema_decay', 'held_out')
    of = {name: config.evaluate[name] for name in names}
    if config.evaluate.as_paper:
        of['as_paper'] = True
    known = _known_ceiling(workdir)
    accuracy = known['accuracy'] if known.get('of') == of else {}
    if kind not in accuracy:
        with common.steps_bar(f'real {kind}') as advance:
            classifier = _function(config.evaluate.as_paper)(
                kind,
                train.images,
                train.labels,
                classes=config.data.classes,
                key=keys.of_part(f'evaluate/{kind}/real').random,
                settings=dataclasses.replace(settings, candidates=None),
                progress=advance,
            )
        accuracy[kind] = classifiers.accuracy(classifier, test().images, test().labels)
        files.write_json(workdir.ceiling, {'_note': NOTE, 'of': of, 'accuracy': accuracy}, mode=0o600)
    evaluation.results.setdefault('accuracy_of_real_images', {})[kind] = accuracy[kind]
    evaluation.save()


def _known_ceiling(workdir: WorkDir) -> dict[str, Any]:
    """Read what `_add_ceiling` wrote; nothing if there is none."""
    if not workdir.ceiling.exists():
        return {}
    advice = 'Delete the file and run --stage=evaluate: it trains the classifiers on real images again'
    return files.read_json(workdir.ceiling, advice, {'of': dict, 'accuracy': {'*': float}})
