"""Stage `evaluate`: synthetic images against real ones. No guarantee: results stay in private/."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.data.stored import StoredImages
from dpp_jax.evaluation import classifiers, features, fid, needs, trainer
from dpp_jax.run import statement_text
from dpp_jax.run.artefacts import Evaluation, SyntheticImages
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.keys import NOTE, Keys
from dpp_jax.training import hosts, progress

_InMemory = tuple[Images, str | None]  # private images, and why they could not be read into memory
_IMAGES_PER_DEVICE = 256  # whose features are computed at once


def left_out(config: ConfigDict, test_images: int) -> list[str]:
    """Say, in a line each, what will be left out; public numbers decide it, before anything is spent."""
    settings = config.evaluate
    return needs.left_out(
        classes=config.data.classes,
        test_images=test_images,
        fid=settings.fid,
        classifiers=len(settings.classifiers),
    )


def why_no_fid(labels: np.ndarray, classes: int) -> str | None:
    """Say why FID cannot be computed with features of these private images; None if it can.

    It refuses nothing: by then all is released, and what single images decide stays in private/.
    """
    no_classes = needs.why_no_classes(classes)
    if no_classes:
        return no_classes
    counts = np.bincount(labels, minlength=classes)
    if counts.min() >= 2:
        return None
    return (
        f'class {counts.argmin()} has {counts.min()} private image(s); the features need at least 2 of each '
        'class'
    )


def _in_memory(private: Callable[[], Images], share: Images) -> _InMemory:
    """Read all private images, to train networks on them; or say why that cannot be, with the share."""
    try:
        train = private()
    except ValueError as error:  # a host holds its share, but not all
        return share, str(error)
    images = train.images
    if not isinstance(images, StoredImages):
        return train, None
    if images.are_too_many:
        return train, (
            f'the private images take {images.nbytes / 2**30:.1f} GiB, more than half of the memory of this '
            'machine; a network that is trained on real images needs them in memory'
        )
    return dataclasses.replace(train, images=images[:]), None


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    images: SyntheticImages,
    share: Images,
    private: Callable[[], Images],
    test: Callable[[], Images],
) -> None:
    """Compute FID against the real training images, and each classifier's accuracy on real test images.

    Results are written as they come, and what is there already is not computed again. Of several processes,
    all compute features; process 0 does the rest.

    Args:
        config: the settings.
        workdir: keeps the feature network.
        keys: of the run.
        images: the synthetic images.
        share: the private images that this process has.
        private: gives all private images; called in process 0 alone, and so is `test`.
        test: gives real images that no training saw.
    """
    evaluation = Evaluation(workdir, flatten(config.to_dict())) if hosts.is_first() else None
    read = functools.cache(lambda: _in_memory(private, share))
    arrays = hosts.from_first(lambda: _begin(config, workdir, keys, evaluation, read))
    if arrays is not None:
        network = features.FeatureNetwork.from_arrays(arrays, source='process 0')
        # Once: it reads the file.
        synthetic = functools.cache(lambda: images.load(images.paths['images'])['images'])
        found = _fid(network, share.images, synthetic, test)
        hosts.at_first(lambda: _save(evaluation, found | {'fid_features': network.name}))
    hosts.at_first(lambda: _classify(config, workdir, keys, evaluation, images, read, test))


def _begin(
    config: ConfigDict, workdir: WorkDir, keys: Keys, evaluation: Evaluation, private: Callable[[], _InMemory]
) -> dict[str, Any] | None:
    """Begin the evaluation; return the arrays of the feature network if FID is to be computed."""
    evaluation.begin()
    if not config.evaluate.fid or 'fid' in evaluation.results:
        return None
    train, too_large = private()
    left_out = too_large or why_no_fid(train.labels, config.data.classes)
    if left_out:
        _save(evaluation, {'fid_left_out': left_out})
        return None
    arrays = _feature_network(config, workdir, keys, train).to_arrays()
    return arrays | {'header': str(arrays['header'])}


def _save(evaluation: Evaluation, found: Mapping[str, Any]) -> None:
    evaluation.results.update(found)
    evaluation.save()


def _fid(
    network: features.FeatureNetwork,
    share: np.ndarray,
    synthetic: Callable[[], np.ndarray],
    test: Callable[[], Images],
) -> dict[str, Any]:
    """Compute FID of the synthetic images, and of real test images; all processes share the work."""
    number = {
        'private': sum(int(word) for word in hosts.meet('evaluation', str(len(share)))),
        'synthetic': hosts.from_first(lambda: len(synthetic())),
        'test': hosts.from_first(lambda: len(test().images)),
    }
    has_reference = not needs.why_no_reference(number['test'])
    total = number['private'] + number['synthetic'] + number['test'] * has_reference
    with progress.bar(total, 'fid', 'image') as bar:
        moments = lambda blocks: fid.moments(_features(network, blocks, bar))
        private = moments(_blocks_of_share(share))
        found = {'fid': fid.frechet_distance(*private, *moments(_blocks_of_first(synthetic)))}
        if has_reference:
            # What a perfect generator would score: real images that training did not see.
            real = moments(_blocks_of_first(lambda: test().images))
            found['fid_of_real_test_images'] = fid.frechet_distance(*private, *real)
    return found | {'fid_images': number}


def _features(
    network: features.FeatureNetwork, blocks: Iterable[np.ndarray], bar: progress.Bar
) -> Iterator[np.ndarray]:
    """Yield the features of a block of images from every process, in all of them.

    Args:
        network: gives the features.
        blocks: at most `_block()` images each, as many blocks in every process; some may be empty.
        bar: of the images.
    """
    for own in blocks:
        padded = np.zeros((_block(), *network.image_shape), np.uint8)
        padded[: len(own)] = own
        numbers = hosts.gather(np.array([len(own)]))[:, 0]
        found = hosts.gather(network.features(padded))
        yield np.concatenate([part[:number] for part, number in zip(found, numbers)])
        bar.update(int(numbers.sum()))


def _block() -> int:
    return _IMAGES_PER_DEVICE * jax.local_device_count()


def _blocks_of_share(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the images of a process in blocks; as many as the process with most images has."""
    longest = max(int(word) for word in hosts.meet('evaluation', str(len(images))))
    for start in range(0, longest, _block()):
        yield images[np.arange(start, max(start, min(start + _block(), len(images))))]


def _blocks_of_first(images: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield this process's part of images that process 0 has, in blocks."""
    together = _block() * hosts.count()
    for start in range(0, hosts.from_first(lambda: len(images())), together):
        block = hosts.from_first(lambda start=start: np.asarray(images()[start : start + together]))
        yield block[hosts.index() :: hosts.count()]


def _classify(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    evaluation: Evaluation,
    images: SyntheticImages,
    private: Callable[[], _InMemory],
    test: Callable[[], Images],
) -> None:
    """Train classifiers on the synthetic images and test them on real ones."""
    settings, results = config.evaluate, evaluation.results
    no_classes = needs.why_no_classes(config.data.classes)
    if no_classes and settings.classifiers:
        _save(evaluation, {'classifiers_left_out': no_classes})
    data = images.load(images.for_classifiers)
    for kind in () if no_classes else settings.classifiers:
        if kind in results['accuracy']:
            continue
        train, too_large = private() if settings.real_images else (None, None)
        if train is not None and not too_large:
            ceiling = _of_real_images(config, workdir, keys, kind, train, test())
            if ceiling is not None:
                results.setdefault('accuracy_of_real_images', {})[kind] = ceiling
        synthetic = Images(images=data['images'], labels=data['labels'])
        classifier = _train(config, keys, kind, f'evaluate/{kind}', synthetic, f'train {kind}')
        results['accuracy'][kind] = classifiers.accuracy(classifier, test().images, test().labels)
        results.setdefault('held_out_accuracy', {})[kind] = classifier.held_out_accuracy
        evaluation.save()
    print(
        f'Settings scored on real images in this folder so far: {len(evaluation.scored)}. Not covered by ε: '
        f'{statement_text.CHOICE}.'
    )


def _train(
    config: ConfigDict, keys: Keys, kind: str, part: str, images: Images, title: str
) -> classifiers.Classifier:
    """Train one classifier with the keys of `part`."""
    settings = config.evaluate
    with _steps_bar(title) as advance:
        return classifiers.train_classifier(
            kind,
            images.images,
            images.labels,
            classes=config.data.classes,
            key=keys.of_part(part).random,
            settings=trainer.Settings(
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                ema_decay=settings.ema_decay,
                held_out=settings.held_out,
            ),
            progress=advance,
        )


def _of_real_images(
    config: ConfigDict, workdir: WorkDir, keys: Keys, kind: str, train: Images, test: Images
) -> float | None:
    """Return the accuracy of a classifier that was trained on the private images: what no generator exceeds.

    Trained once for these settings, and kept in private/. None: a class has too few private images.
    """
    if np.bincount(train.labels, minlength=config.data.classes).min() < 2:
        return None
    names = ('epochs', 'batch_size', 'learning_rate', 'ema_decay', 'held_out')
    of = {name: config.evaluate[name] for name in names}
    known = _known_ceiling(workdir)
    accuracy = known['accuracy'] if known.get('of') == of else {}
    if kind not in accuracy:
        classifier = _train(config, keys, kind, f'evaluate/{kind}/real', train, f'real {kind}')
        accuracy[kind] = classifiers.accuracy(classifier, test.images, test.labels)
        files.write_json(workdir.ceiling, {'_note': NOTE, 'of': of, 'accuracy': accuracy}, mode=0o600)
    return accuracy[kind]


def _known_ceiling(workdir: WorkDir) -> dict[str, Any]:
    """Read what `_of_real_images` wrote; nothing if there is none."""
    if not workdir.ceiling.exists():
        return {}
    advice = 'Delete the file and run --stage=evaluate: it trains the classifiers on real images again'
    return files.read_json(workdir.ceiling, advice, {'of': dict, 'accuracy': {'*': float}})


def _feature_network(
    config: ConfigDict, workdir: WorkDir, keys: Keys, train: Images
) -> features.FeatureNetwork:
    """Return the network whose features FID compares; it is trained once, and kept in private/."""
    path = workdir.feature_network(config.evaluate.feature_epochs)
    if path.exists():
        arrays = files.read_npz(path, 'Delete it: --stage=evaluate trains it again')
        return features.FeatureNetwork.from_arrays(arrays, source=path)
    with _steps_bar('fid features') as advance:
        network = features.train_feature_network(
            train.images,
            train.labels,
            classes=config.data.classes,
            key=keys.of_part('evaluate/features').random,
            epochs=config.evaluate.feature_epochs,
            progress=advance,
        )
    files.write_npz(path, **network.to_arrays())
    return network


@contextlib.contextmanager
def _steps_bar(name: str) -> Iterator[trainer.Progress]:
    """Yield a callback (done, total, note) that shows a progress bar from its first call on.

    Not before: only the training knows how many steps it takes.
    """
    with contextlib.ExitStack() as stack:
        bars = []

        def advance(done: int, total: int, note: str) -> None:
            if not bars:
                bars.append(stack.enter_context(progress.bar(total, name, 'step')))
            if done:
                bars[0].set_postfix_str(note, refresh=False)
            bars[0].update(done - bars[0].n)

        yield advance
