"""Sampling on all devices: every image from its own number, whatever else is sampled."""

import collections
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax import files
from dpp_jax.diffusion import microbatch as parts_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.training import devices, hosts, progress

_IN_FLIGHT = 2  # batches: an accelerator goes on while the older one is written to the disk


def image_labels(index: np.ndarray, classes: int) -> np.ndarray:
    """Return the labels of images by number, as `sample_function` has them: the remainders."""
    return (index % classes).astype(np.int32)


def image_numbers(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return numbers of images with these labels: k · classes + c for image k of class c.

    Image k of a class is the same, however many there are of others.

    Args:
        labels: (n,) integers in 0 .. classes - 1.
        classes: their number.

    Returns:
        (n,) int32, all different; 0, 1, ... where labels are the classes in turn.
    """
    numbers = np.empty(len(labels), np.int32)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        numbers[rows] = np.arange(len(rows)) * classes + label
    return numbers


def with_two_of_each(shares: np.ndarray, images: int) -> np.ndarray:
    """Return shares of classes with which each has two of so many images, however small its share was.

    Args:
        shares: (classes,) numbers >= 0, not all 0.
        images: at least 2 for each class.

    Returns:
        (classes,) float64, which add up to 1.
    """
    counts = np.asarray(shares, np.float64) / np.sum(shares) * images
    few = np.zeros(len(counts), bool)
    while (small := ~few & (counts < 2)).any():
        few |= small
        left = max(images - 2.0 * few.sum(), 0.0)
        counts = np.where(few, 2.0, counts * left / max(counts[~few].sum(), 1e-300))
    return counts / counts.sum()


def labels_by_share(total: int, shares: np.ndarray) -> np.ndarray:
    """Return labels in an order of which every beginning has the classes in about these shares.

    Image k of class c has its place at (k + 1/2) / share of c (Webster's method). Equal shares give the
    classes in turn.

    Args:
        total: how many.
        shares: (classes,) numbers > 0, which add up to 1.

    Returns:
        (total,) int32.
    """
    places, labels = [], []
    for label, share in enumerate(shares):
        number = int(total * share) + len(shares) + 2
        places.append((np.arange(number) + 0.5) / share)
        labels.append(np.full(number, label, np.int32))
    order = np.argsort(np.concatenate(places), kind='stable')
    return np.concatenate(labels)[order[:total]]


def sample_function(model: Model, sampler: Callable, at_once: int) -> Callable:
    """Make ((params, gaussians), index (n,) int32, key) → (n, H, W, C) uint8, for devices.

    At most `at_once` images, in equal groups, go through the sampler together.

    All randomness of an image comes from its index, so that neither the batch size nor the number
    of devices nor a restart changes it (but for rounding).
    """

    def sample_group(params, index, key):
        image_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

        def noise(number):
            return jax.vmap(
                lambda image_key: jax.random.normal(jax.random.fold_in(image_key, number), model.image_shape)
            )(image_keys)

        images = sampler(
            model.denoiser(*params), noise(0), index % model.classes, noise=lambda i: noise(i + 1)
        )
        return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def sample(params, index, key):
        groups = index.reshape(parts_lib.count(index.size, at_once), -1)
        images = jax.lax.map(lambda group: sample_group(params, group, key), groups)
        return images.reshape((-1,) + model.image_shape)

    return devices.parallel(sample, in_axes=(0, 0, None))


def sample_images(
    sample: Callable, params, key: jax.Array, index: np.ndarray, *, batch_size: int, at_once: int
) -> np.ndarray:
    """Sample the images of these numbers, (n,) → uint8 (n, H, W, C), by a `sample_function`."""
    batch, done = _whole_batch(len(index), batch_size, at_once), []
    for first in range(0, len(index), batch):
        rows = np.resize(index[first : first + batch], batch).astype(np.int32)  # the last are repeated
        done.append(devices.collect(sample(params, devices.deal(rows), key)))
    return np.concatenate(done)[: len(index)]


def _whole_batch(total: int, batch_size: int, at_once: int) -> int:
    """Return how many images all devices sample in a call: groups of equal size."""
    per_device = min(batch_size, -(-total // devices.count()))
    groups = -(-per_device // at_once)
    return devices.count() * groups * -(-per_device // groups)


def sample_all(
    sample: Callable,
    params,
    key: jax.Array,
    numbers: np.ndarray,
    *,
    batch_size: int,
    at_once: int,
    parts: Path,
    title: str,
) -> np.ndarray | None:
    """Sample the images of these numbers, (n,) int32, after the parts that an interrupted run left.

    Every process samples its rows of each batch; process 0 has all of them in the end, the others nothing.
    """
    total = len(numbers)
    batch = _whole_batch(total, batch_size, at_once)
    done = _read_parts(parts) if hosts.is_first() else []
    start = hosts.from_first(lambda: sum(len(part) for part in done))
    # A CPU gains nothing by a second batch, and whoever kills the process would lose two.
    in_flight, at_most = collections.deque(), 1 if jax.default_backend() == 'cpu' else _IN_FLIGHT

    def keep_oldest():
        first, rows = in_flight.popleft()
        images = devices.collect(rows)[: total - first]
        if hosts.is_first():
            done.append(images)
        # The others wait: for a store it may take long.
        hosts.at_first(lambda: files.write_npz(parts / f'{first:010d}.npz', images=images))
        bar.update(len(images))

    with progress.bar(total, title, 'image', start) as bar:
        for first in range(start, total, batch):
            index = np.resize(numbers[first : first + batch], batch)  # the last are repeated
            in_flight.append((first, sample(params, devices.deal(index), key)))
            if len(in_flight) == at_most:
                keep_oldest()
        while in_flight:
            keep_oldest()
    return np.concatenate(done)[:total] if done else None


def _read_parts(folder: Path) -> list[np.ndarray]:
    """Read the parts in order, as far as none is missing or damaged."""
    parts, expected = [], 0
    for path in (folder / name for name in files.names(folder) if name.endswith('.npz')):
        if int(path.stem) != expected:
            break
        try:
            parts.append(files.read_npz(path, '')['images'])
        except (ValueError, KeyError):
            print(f'{path} is damaged; making it again', flush=True)
            break
        expected += len(parts[-1])
    return parts
