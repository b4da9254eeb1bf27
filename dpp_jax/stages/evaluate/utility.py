"""What the synthetic images are good for: classifiers trained on them, tested on real images."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.evaluation import classifiers, needs, trainer
from dpp_jax.run import statement_text
from dpp_jax.run.artefacts import Evaluation, SyntheticImages
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import NOTE, Keys
from dpp_jax.stages.evaluate import common


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    evaluation: Evaluation,
    images: SyntheticImages,
    private: Callable[[], common.InMemory],
    test: Callable[[], Images],
) -> None:
    """Train classifiers on the synthetic images and test them on real ones."""
    settings, results = config.evaluate, evaluation.results
    no_classes = needs.why_no_classes(config.data.classes)
    if no_classes and settings.classifiers:
        common.save(evaluation, {'classifiers_left_out': no_classes})
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
    with common.steps_bar(title) as advance:
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
