"""Stage `evaluate`: synthetic images against real ones. No guarantee: results stay in private/."""

from ml_collections import ConfigDict

from dpp_jax.data.sources import Images
from dpp_jax.evaluation import classifiers, features, fid, trainer
from dpp_jax.run import folder as workdir_lib
from dpp_jax.stages import generate
from dpp_jax.training import progress


def is_done(config: ConfigDict, workdir: workdir_lib.WorkDir) -> bool:
    results = load(config, workdir)
    return (not config.evaluate.fid or 'fid' in results) and all(
        name in results.get('accuracy', {}) for name in config.evaluate.classifiers
    )


def load(config: ConfigDict, workdir: workdir_lib.WorkDir) -> dict:
    """The results so far; nothing if they are of other images, or by other settings, than now."""
    path = workdir.private / 'evaluation.json'
    if not path.exists():
        return {}
    results = workdir_lib.read_json(path, 'Delete it: --stage=evaluate computes it again')
    return results if results.get('of') == _subject(config, workdir) else {}


def _subject(config: ConfigDict, workdir: workdir_lib.WorkDir) -> dict:
    """What results are of: the images, and the settings that change a result."""
    settings = workdir_lib.flatten({'evaluate': config.evaluate})
    chosen = ('evaluate.fid', 'evaluate.classifiers')  # which results there are
    return {
        'images': generate.identity(config, workdir),
        'settings': {name: value for name, value in settings.items() if name not in chosen},
    }


def run(config: ConfigDict, workdir: workdir_lib.WorkDir, train: Images, test: Images) -> None:
    """FID against the real training images; accuracy on real test images per classifier.

    Results are written as they come, and what is there already is not computed again.
    """
    settings = config.evaluate
    results = load(config, workdir) or {
        '_note': 'Computed from private images without a guarantee. Do not publish.',
        'of': _subject(config, workdir),
        'accuracy': {},
    }

    def save():
        workdir_lib.write_json(workdir.private / 'evaluation.json', results, mode=0o600)

    paths = generate.files(config, workdir)
    if settings.fid and 'fid' not in results:
        synthetic = generate.load(paths['images'])['images']
        network = _feature_network(config, workdir, train)
        results['fid'] = fid.fid(network, train.images, synthetic)
        # What a perfect generator would score: real images that training did not see.
        results['fid_of_real_test_images'] = fid.fid(network, train.images, test.images)
        results['fid_features'] = network.name
        save()
    data = generate.load(paths.get('classifier_images', paths['images']))
    images, labels = data['images'], data['labels']
    for kind in settings.classifiers:
        if kind in results['accuracy']:
            continue
        key = workdir.keys(f'evaluate/{kind}', config.seed).noise
        with progress.bar(settings.epochs, f'train {kind}', 'step') as bar:
            classifier = classifiers.train_classifier(
                kind,
                images,
                labels,
                classes=config.data.classes,
                key=key,
                settings=trainer.Settings(
                    epochs=settings.epochs,
                    batch_size=settings.batch_size,
                    learning_rate=settings.learning_rate,
                    ema_decay=settings.ema_decay,
                    held_out=settings.held_out,
                ),
                progress=_advance(bar),
            )
        results['accuracy'][kind] = classifiers.accuracy(classifier, test.images, test.labels)
        results.setdefault('held_out_accuracy', {})[kind] = classifier.held_out_accuracy
        save()


def _feature_network(
    config: ConfigDict, workdir: workdir_lib.WorkDir, train: Images
) -> features.FeatureNetwork:
    """The network whose features FID compares, trained once per work directory and number of epochs."""
    path = workdir.private / f'feature_network_{config.evaluate.feature_epochs}.npz'
    if path.exists():
        arrays = workdir_lib.load_npz(path, 'Delete it: --stage=evaluate trains it again')
        return features.FeatureNetwork.from_arrays(arrays, source=path)
    with progress.bar(config.evaluate.feature_epochs, 'fid features', 'step') as bar:
        network = features.train_feature_network(
            train.images,
            train.labels,
            classes=config.data.classes,
            key=workdir.keys('evaluate/features', config.seed).noise,
            epochs=config.evaluate.feature_epochs,
            progress=_advance(bar),
        )
    workdir_lib.write_npz(path, **network.to_arrays())
    return network


def _advance(bar):
    """A callback (done, total, note) that moves a progress bar."""

    def advance(done, total, note):
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    return advance
