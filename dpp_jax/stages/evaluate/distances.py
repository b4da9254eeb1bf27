"""How near the synthetic images are to the private ones, by features: FID, and the metrics beside it.

How it goes: process 0 finds the feature network, and tells it to all. All processes compute features, of the
synthetic, the test and the private images in turn, block by block; process 0 keeps what the metrics need:
moments of all images, and the features of as many as fit. Those of the private images stay in private/ for
the next evaluation. Process 0 computes the metrics.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import image_grid
from dpp_jax.data.images import Images
from dpp_jax.evaluation import (
    features,
    fid,
    held_out,
    inception,
    inception_weights,
    memorization,
    needs,
    scores,
)
from dpp_jax.run import fingerprint
from dpp_jax.run.artefacts import Evaluation, SyntheticImages
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.run.other_images import OtherImages
from dpp_jax.stages.evaluate import common
from dpp_jax.training import hosts, progress

Network = features.FeatureNetwork | inception.Inception

_MOST_KEPT = 2**28  # values of features of a set that are kept: 1 GiB
_LEAST_OF_CLASS = 100  # images of a class, in both sets, for an FID of the class
_PAIRS = 10  # in the picture of the nearest neighbors
_CACHE_FORMAT = 'dpp_jax features of private images 1'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Features:
    """What is kept of a set of images; their features may be those of a part of them.

    Attributes:
        count: of all images.
        mean, covariance: of the features of all, float64 (D,) and (D, D).
        features: float32 (n, D).
        logits: float32 (n, classes), or (n, 0) where they are not needed.
        labels: int32 (n,).
        rows: numbers of the n in the whole set, int64 (n,).
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    @functools.cached_property
    def gaussian(self) -> fid.Gaussian:
        if len(self.features) == self.count:
            return fid.Gaussian.of_features(self.features)
        return fid.Gaussian.of_moments(self.mean, self.covariance)


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    evaluation: Evaluation | None,
    images: SyntheticImages | OtherImages,
    share: Images,
    private: Callable[[], common.InMemory],
    test: Callable[[], Images],
) -> None:
    """Compute what the settings ask for and is not there yet; arguments as of `evaluate.run`.

    `evaluation` is None but in process 0.
    """
    told = hosts.from_first(lambda: _begin(config, workdir, keys, evaluation, private))
    if told is None:
        return
    network = _network_of(told)
    load = functools.cache(lambda: images.load(images.paths['images']))  # once: it reads the file
    synthetic = lambda: Images(images=load()['images'], labels=load()['labels'])
    cached = functools.cache(lambda: _cached(workdir, told))
    number = {
        'private': sum(int(word) for word in hosts.meet('evaluation', str(len(share.images)))),
        'synthetic': hosts.from_first(lambda: len(synthetic().images)),
        'test': hosts.from_first(lambda: len(test().images)),
    }
    is_cached = hosts.from_first(lambda: cached() is not None)
    has_reference = not needs.why_no_reference(number['test'])
    total = number['synthetic'] + number['test'] * has_reference + number['private'] * (not is_cached)
    with progress.bar(total, 'features', 'image') as bar:
        of = lambda blocks, count, **options: _keep(_outputs(network, blocks, bar), count, keys, **options)
        made = of(_blocks_of_first(synthetic, network), number['synthetic'])
        real = of(_blocks_of_first(test, network), number['test']) if has_reference else None
        if is_cached:
            reference = cached()
        else:
            reference = of(_blocks_of_share(share, network), number['private'], has_logits=False)
            hosts.at_first(lambda: _write_cache(workdir, told, reference))
    found = hosts.from_first(
        lambda: _Scores(network, keys, made, real, reference).of(
            evaluation.missing_distances, evaluation.results
        )
    )
    pairs = found.pop('pairs', None)
    if pairs is not None:
        _picture(workdir, synthetic, share, pairs)
    more = {'fid_images': number, 'fid_features': network.name}
    hosts.at_first(lambda: common.save(evaluation, found | more))


# ---- the feature network ------------------------------------------------------------------------


# Results that rest on the features.
OF_FEATURES = (
    'fid', 'fid_spread', 'fid_of_real_test_images', 'fid_images', 'fid_features', 'fid_of_class', 'scores',
    'memorization', 'metrics_left_out',
)  # fmt: skip


def check(config: ConfigDict) -> list[str]:
    """Say what will be downloaded, before anything is spent.

    Raises:
        ValueError: `evaluate.inception` is not there.
    """
    settings = config.evaluate
    if settings.inception and not files.path(settings.inception).is_file():
        raise ValueError(
            f'config.evaluate.inception is {settings.inception!r}, which is no file; it must be the path of '
            f'pt_inception-2015-12-05-6726825d.pth ({inception_weights.URL})'
        )
    if settings.fid and _features(settings) != 'cnn' and inception_weights.is_missing(settings.inception):
        return [
            f'Evaluation will try to download the weights of Inception-v3, 91 MB: {inception_weights.URL}'
        ]
    return []


def _begin(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    evaluation: Evaluation,
    private: Callable[[], common.InMemory],
) -> dict[str, Any] | None:
    """Return the feature network if anything is to be computed: its kind, its arrays, and their digest."""
    if not evaluation.missing_distances:
        return None
    network = _inception(config)
    if network is None:
        train, left_out = private()
        left_out = left_out or features.why_no_network(len(train.images))
        if left_out:
            # It refuses nothing: by then all is released, and what images decide stays in private/.
            common.save(evaluation, {'fid_left_out': left_out})
            return None
        network = _feature_network(config, workdir, keys, train)
    results = evaluation.results
    if results.get('fid_features', network.name) != network.name:
        # Figures of two networks cannot stand side by side.
        for name in OF_FEATURES:
            results.pop(name, None)
    arrays = network.to_arrays()
    kind = 'inception' if isinstance(network, inception.Inception) else 'cnn'
    plain = {name: str(array) if array.ndim == 0 else array for name, array in arrays.items()}
    return {'kind': kind, 'arrays': plain, 'digest': files.digest(arrays[name] for name in sorted(arrays))}


def _network_of(told: dict[str, Any]) -> Network:
    """Return the network that `_begin` told."""
    if told['kind'] == 'inception':
        return inception.Inception.from_arrays(told['arrays'])
    return features.FeatureNetwork.from_arrays(told['arrays'], source='process 0')


def _features(settings: ConfigDict) -> str:
    """Return whose features are asked for; those of the paper are Inception's."""
    return 'inception' if settings.as_paper else settings.features


def _inception(config: ConfigDict) -> inception.Inception | None:
    """Return Inception-v3 if the settings ask for it, or allow it and its weights can be had."""
    settings, asked = config.evaluate, _features(config.evaluate)
    if asked == 'cnn':
        return None
    try:
        return inception_weights.load(settings.inception)
    except inception_weights.NotAvailable as error:
        if asked == 'inception':
            found, other = "features is 'inception'", "features to 'cnn'"
            if settings.as_paper:
                found, other = 'as_paper is True', 'fid to False'
            raise ValueError(
                f'config.evaluate.{found}, but {error}. Download it elsewhere, and name it by '
                f'config.evaluate.inception; or set config.evaluate.{other}'
            ) from error
        print(
            f'FID takes the features of a small CNN: {error}. To compare with other work, download the file '
            'elsewhere, and name it by --config.evaluate.inception',
            flush=True,
        )
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f'config.evaluate.inception is {settings.inception!r}: {error}') from error


def _feature_network(
    config: ConfigDict, workdir: WorkDir, keys: Keys, train: Images
) -> features.FeatureNetwork:
    """Return our own network whose features FID compares; it is trained once, and kept in private/."""
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
    files.write_npz(path, mode=0o600, **network.to_arrays())
    return network


# ---- features of a set, by all processes --------------------------------------------------------


def _keep(
    outputs: Iterator[dict[str, np.ndarray]], count: int, keys: Keys, *, has_logits: bool = True
) -> _Features | None:
    """Keep moments of all outputs, and as many features as fit, chosen by chance; None but in process 0.

    Args:
        outputs: of blocks, see `_outputs`; every process takes part in computing them.
        count: of all.
        keys: of the run.
        has_logits: whether to keep them too.
    """
    names = ('features', 'labels', 'rows') + ('logits',) * has_logits
    random = _random(keys, 'kept')  # here: all processes ask for it
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    chosen = None

    def values() -> Iterator[np.ndarray]:
        nonlocal chosen
        for block in outputs:
            if not hosts.is_first():
                continue
            if chosen is None:
                most = max(2, _MOST_KEPT // block['features'].shape[1])
                chosen = np.zeros(count, bool)
                chosen[random.permutation(count)[:most]] = True
            for name in names:
                kept[name].append(block[name][chosen[block['rows']]])
            yield block['features']

    if not hosts.is_first():
        list(values())
        return None
    mean, covariance = fid.moments(values())
    found = {name: np.concatenate(arrays) for name, arrays in kept.items()}
    order = np.argsort(found['rows'])  # the same for any number of processes
    found = {'logits': np.zeros((0, 0))} | {name: array[order] for name, array in found.items()}
    return _Features(count=count, mean=mean, covariance=covariance, **found)


def _random(keys: Keys, what: str) -> np.random.Generator:
    return held_out.random_generator(keys.of_part(f'evaluate/{what}').random)


def _outputs(
    network: Network, blocks: Iterator[dict[str, np.ndarray]], bar: progress.Bar
) -> Iterator[dict[str, np.ndarray]]:
    """Yield features, logits, labels and rows of a block of images from every process, in all of them.

    Args:
        network: gives the features.
        blocks: images, labels and rows, at most `_block()` in each process; as many blocks in every process;
            some may be empty.
        bar: of the images.
    """
    size = _block(network)
    for own in blocks:
        numbers = hosts.gather(np.array([len(own['images'])]))[:, 0]
        logits, values = network.outputs(_filled(own['images'], size))
        found = {'features': values, 'logits': logits}
        found |= {name: _filled(own[name].astype(np.int32), size) for name in ('labels', 'rows')}
        yield {
            name: np.concatenate([part[:number] for part, number in zip(hosts.gather(array), numbers)])
            for name, array in found.items()
        }
        bar.update(int(numbers.sum()))


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Fill up with zeros to (size, ...): all blocks have one shape, and there is one program."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))


def _block(network: Network) -> int:
    return network.images_at_once * jax.local_device_count()


def _blocks_of_share(share: Images, network: Network) -> Iterator[dict[str, np.ndarray]]:
    """Yield the images of a process in blocks; as many as the process with most images has."""
    longest, size = (
        max(int(word) for word in hosts.meet('evaluation', str(len(share.images)))),
        _block(network),
    )
    for start in range(0, longest, size):
        part = np.arange(start, max(start, min(start + size, len(share.images))))
        yield {
            'images': share.images[part],
            'labels': share.labels[part],
            'rows': share.kept.numbers(start, start + size),
        }


def _blocks_of_first(images: Callable[[], Images], network: Network) -> Iterator[dict[str, np.ndarray]]:
    """Yield this process's part of images that process 0 has, in blocks."""
    together = _block(network) * hosts.count()
    for start in range(0, hosts.from_first(lambda: len(images().images)), together):

        def read(start=start) -> dict[str, np.ndarray]:
            part = slice(start, start + together)
            return {'images': np.asarray(images().images[part]), 'labels': np.asarray(images().labels[part])}

        block = hosts.from_first(read)
        block['rows'] = start + np.arange(len(block['labels']))
        yield {name: array[hosts.index() :: hosts.count()] for name, array in block.items()}


# ---- features of the private images, kept -------------------------------------------------------


def _cache_key(workdir: WorkDir, told: dict[str, Any]) -> str | None:
    """Say what the features in the cache are of, as JSON: images and network; None: not known."""
    if not workdir.fingerprints.exists():
        return None
    known = files.read_json(workdir.fingerprints, 'Restore the file', fingerprint.FORM).get('train', {})
    of = {name: known[name] for name in ('count', 'row_sum') if name in known}
    return json.dumps({'format': _CACHE_FORMAT, 'network': told['digest'], **of}) if 'row_sum' in of else None


def _cached(workdir: WorkDir, told: dict[str, Any]) -> _Features | None:
    """Return the features of the private images that an earlier evaluation computed."""
    path, key = workdir.private_features(told['kind']), _cache_key(workdir, told)
    if key is None or not path.exists():
        return None
    arrays = files.read_npz(path, 'Delete it: --stage=evaluate computes it again')
    if str(arrays.pop('key', '')) != key:
        return None
    return _Features(count=int(arrays.pop('count')), logits=np.zeros((0, 0)), **arrays)


def _write_cache(workdir: WorkDir, told: dict[str, Any], found: _Features) -> None:
    key = _cache_key(workdir, told)
    if key is not None:
        arrays = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        del arrays['logits']
        arrays |= {'count': np.array(found.count), 'key': np.array(key)}
        files.write_npz(workdir.private_features(told['kind']), mode=0o600, **arrays)


# ---- the metrics, in process 0 ------------------------------------------------------------------


class _Scores:
    """The metrics of synthetic images, and beside them those of real test images."""

    def __init__(
        self, network: Network, keys: Keys, made: _Features, real: _Features | None, reference: _Features
    ):
        self._keys = keys
        self._made, self._real, self._reference = made, real, reference
        self._tells_classes = getattr(network, 'tells_classes', True)

    def of(self, wanted: list[str], results: dict[str, Any]) -> dict[str, Any]:
        """Return results by their names in evaluation.json, and `pairs` for the picture.

        Args:
            wanted: 'fid', or names of metrics.
            results: so far.
        """
        found: dict[str, Any] = {'scores': dict(results.get('scores', {}))}
        left_out = dict(results.get('metrics_left_out', {}))
        with progress.bar(len(wanted), 'distances', 'metric', compiles=False) as bar:
            for name in wanted:
                try:
                    found |= getattr(self, f'_{name}')(found['scores'])
                except _LeftOut as reason:
                    left_out[name] = str(reason)
                bar.update(1)
        return found | ({'metrics_left_out': left_out} if left_out else {})

    def _fid(self, _: dict) -> dict[str, Any]:
        reference = self._reference.gaussian
        found: dict[str, Any] = {'fid': fid.distance(self._made.gaussian, reference)}
        spread = fid.spread(self._made.features, reference, _random(self._keys, 'fid'))
        if spread is not None:
            found['fid_spread'] = spread
        if self._real is not None:
            found['fid_of_real_test_images'] = fid.distance(self._real.gaussian, reference)
        return found

    def _fid_of_class(self, _: dict) -> dict[str, Any]:
        made, reference = self._made, self._reference
        classes = np.union1d(made.labels, reference.labels)
        if len(classes) < 2:
            raise _LeftOut('there is one class')
        found = {}
        for label in classes:
            own, private = (of.features[of.labels == label] for of in (made, reference))
            if min(len(own), len(private)) >= _LEAST_OF_CLASS:
                gaussians = map(fid.Gaussian.of_features, (own, private))
                found[str(int(label))] = fid.distance(*gaussians)
        if not found:
            raise _LeftOut(f'no class has {_LEAST_OF_CLASS} synthetic and {_LEAST_OF_CLASS} private images')
        return {'fid_of_class': found}

    def _kid(self, known: dict) -> dict[str, Any]:
        if min(len(self._made.features), len(self._reference.features)) < 4:
            raise _LeftOut('there are fewer than 4 images')
        kid = lambda of: scores.kid(of.features, self._reference.features, _random(self._keys, 'kid'))
        known['kid'] = kid(self._made).to_dict()
        if self._real is not None and len(self._real.features) >= 4:
            known['kid']['real'] = kid(self._real).value
        return {}

    def _inception_score(self, known: dict) -> dict[str, Any]:
        if not self._tells_classes:
            raise _LeftOut('the features are of a network that knows no classes')
        if len(self._made.logits) < scores.SPLITS:
            raise _LeftOut(f'there are fewer than {scores.SPLITS} images')
        score = lambda of: scores.inception_score(of.logits, _random(self._keys, 'inception_score'))
        known['inception_score'] = score(self._made).to_dict()
        if self._real is not None and len(self._real.logits) >= scores.SPLITS:
            known['inception_score']['real'] = score(self._real).value
        return {}

    def _precision_recall(self, known: dict) -> dict[str, Any]:
        if min(len(self._made.features), len(self._reference.features)) < scores.LEAST_IMAGES:
            raise _LeftOut(f'there are fewer than {scores.LEAST_IMAGES} images')
        some = lambda of: _some(of.features, scores.MOST_IMAGES, _random(self._keys, 'precision'))[0]
        private = some(self._reference)
        score = lambda of: scores.precision_recall(some(of), private, _random(self._keys, 'halves'))
        found = {name: score.to_dict() for name, score in score(self._made).items()}
        if self._real is not None and len(self._real.features) >= scores.LEAST_IMAGES:
            for name, real in score(self._real).items():
                found[name]['real'] = real.value
        known |= found
        return {}

    def _memorization(self, _: dict) -> dict[str, Any]:
        if self._real is None:
            raise _LeftOut('there are too few real test images to compare with')
        rng, most = _random(self._keys, 'memorization'), memorization.MOST_IMAGES
        made, chosen = _some(self._made.features, most, rng)
        real, _ = _some(self._real.features, most, rng)
        private = self._reference.features
        distances, places = memorization.nearest(made, private)
        found = memorization.compare(distances, memorization.nearest(real, private)[0])
        numbers = {'synthetic_images': len(made), 'real_images': len(real), 'private_images': len(private)}
        closest = np.argsort(distances, kind='stable')[:_PAIRS]
        pairs = {
            'synthetic': self._made.rows[chosen[closest]],
            'private': self._reference.rows[places[closest]],
        }
        return {'memorization': {**found, **numbers}, 'pairs': pairs}


class _LeftOut(Exception):
    """Why a metric cannot be computed."""


def _some(values: np.ndarray, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return at most so many rows, chosen by chance, and which they are."""
    chosen = np.sort(rng.permutation(len(values))[:most])
    return values[chosen], chosen


def _picture(
    workdir: WorkDir, synthetic: Callable[[], Images], share: Images, pairs: dict[str, np.ndarray]
) -> None:
    """Write the picture of the closest pairs: a row for each, the private image on the right.

    A private image comes from the process that has it.
    """
    places = share.kept.places(pairs['private'])
    own = np.zeros((len(places), *share.images.shape[1:]), np.uint8)
    own[places >= 0] = share.images[places[places >= 0]]
    private = hosts.gather(own).max(axis=0)  # zeros where it is another's

    def write():
        made = synthetic().images[pairs['synthetic']]
        both = np.stack([made, private], axis=1).reshape(-1, *made.shape[1:])
        files.write_bytes(workdir.nearest, image_grid.png(image_grid.grid(both, columns=2)), mode=0o600)

    hosts.at_first(write)
