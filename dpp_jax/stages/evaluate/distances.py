"""Distances of the synthetic images to the private ones, by features: FID."""

from collections.abc import Callable, Iterable, Iterator
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.evaluation import features, fid, needs
from dpp_jax.run.artefacts import Evaluation, SyntheticImages
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages.evaluate import common
from dpp_jax.training import hosts, progress

_IMAGES_PER_DEVICE = 256  # whose features are computed at once


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    evaluation: Evaluation | None,
    images: SyntheticImages,
    share: Images,
    private: Callable[[], common.InMemory],
    test: Callable[[], Images],
) -> None:
    """Compute what the settings ask for and is not there yet; arguments as of `evaluate.run`.

    `evaluation` is None but in process 0.
    """
    arrays = hosts.from_first(lambda: _begin(config, workdir, keys, evaluation, private))
    if arrays is not None:
        network = features.FeatureNetwork.from_arrays(arrays, source='process 0')
        # Once: it reads the file.
        synthetic = functools.cache(lambda: images.load(images.paths['images'])['images'])
        found = _fid(network, share.images, synthetic, test)
        hosts.at_first(lambda: common.save(evaluation, found | {'fid_features': network.name}))


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


def _begin(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    evaluation: Evaluation,
    private: Callable[[], common.InMemory],
) -> dict[str, Any] | None:
    """Return the arrays of the feature network if FID is to be computed."""
    if not config.evaluate.fid or 'fid' in evaluation.results:
        return None
    train, too_large = private()
    left_out = too_large or why_no_fid(train.labels, config.data.classes)
    if left_out:
        common.save(evaluation, {'fid_left_out': left_out})
        return None
    arrays = _feature_network(config, workdir, keys, train).to_arrays()
    return arrays | {'header': str(arrays['header'])}


def _feature_network(
    config: ConfigDict, workdir: WorkDir, keys: Keys, train: Images
) -> features.FeatureNetwork:
    """Return the network whose features FID compares; it is trained once, and kept in private/."""
    path = workdir.feature_network(config.evaluate.feature_epochs)
    if path.exists():
        arrays = files.read_npz(path, 'Delete it: --stage=evaluate trains it again')
        return features.FeatureNetwork.from_arrays(arrays, source=path)
    with common.steps_bar('fid features') as advance:
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
