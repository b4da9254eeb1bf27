"""Stage `evaluate`: synthetic images against real ones. No guarantee: results stay in private/."""

from collections.abc import Iterator
import contextlib
import dataclasses
from typing import Any

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
from dpp_jax.training import progress


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


def _in_memory(train: Images) -> tuple[Images, str | None]:
    """Read images that stay in files, to train networks on them; or say why that cannot be."""
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
    train: Images,
    test: Images,
) -> None:
    """Compute FID against the real training images, and each classifier's accuracy on real test images.

    Results are written as they come, and what is there already is not computed again.

    Args:
        config: the settings.
        workdir: keeps the feature network.
        keys: of the run.
        images: the synthetic images.
        train: the private images.
        test: real images that no training saw.
    """
    settings = config.evaluate
    evaluation = Evaluation(workdir, flatten(config.to_dict()))
    evaluation.begin()
    results = evaluation.results
    train, too_large = _in_memory(train)
    left_out = settings.fid and (too_large or why_no_fid(train.labels, config.data.classes))
    if left_out:
        results['fid_left_out'] = left_out
        evaluation.save()
    elif settings.fid and 'fid' not in results:
        synthetic = images.load(images.paths['images'])['images']
        network = _feature_network(config, workdir, keys, train)
        total = 2 * len(train.images) + len(synthetic) + len(test.images)
        with progress.bar(total, 'fid', 'image') as bar:
            results['fid'] = fid.fid(network, train.images, synthetic, progress=bar.update)
            if not needs.why_no_reference(len(test.images)):
                # What a perfect generator would score: real images that training did not see.
                results['fid_of_real_test_images'] = fid.fid(
                    network, train.images, test.images, progress=bar.update
                )
        results['fid_images'] = {
            'private': len(train.images),
            'synthetic': len(synthetic),
            'test': len(test.images),
        }
        results['fid_features'] = network.name
        evaluation.save()
    no_classes = needs.why_no_classes(config.data.classes)
    if no_classes and settings.classifiers:
        results['classifiers_left_out'] = no_classes
        evaluation.save()
    data = images.load(images.for_classifiers)
    for kind in () if no_classes else settings.classifiers:
        if kind in results['accuracy']:
            continue
        if settings.real_images and not too_large:
            ceiling = _of_real_images(config, workdir, keys, kind, train, test)
            if ceiling is not None:
                results.setdefault('accuracy_of_real_images', {})[kind] = ceiling
        synthetic = Images(images=data['images'], labels=data['labels'])
        classifier = _train(config, keys, kind, f'evaluate/{kind}', synthetic, f'train {kind}')
        results['accuracy'][kind] = classifiers.accuracy(classifier, test.images, test.labels)
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
