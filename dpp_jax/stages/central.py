"""Stage `central`: a few noisy "central images" of the private set (DP-FETA, section 4.1).

Formal guarantee. A query takes a Poisson sample of the private images and releases, for every class,
the sum of its sampled images (mean query) or its sum of one-hot histograms (mode query), with Gaussian
noise of standard deviation σ·Δ. One image belongs to one class, so adding or removing it changes all
classes' sums together by at most one image's norm Δ:
  - mean: d pixels in [-center, 1 - center] have Δ = sqrt(d) max(center, 1 - center). If images are
    scaled down to a norm of `clip_norm` first, Δ is at most that.
  - mean with noisy class counts: the image brings one more coordinate of value w to its class, so that
    its norm is at most sqrt(Δ² + w²). The noisy coordinates divided by w are the classes' counts.
  - mode: d one-hot histograms have Δ = sqrt(d).
Division by n_c = q N / classes, a public constant, or by the noisy counts, and everything after it is
post-processing. (The PyTorch code divides by the sampled count of the class, which the noise does not cover.)
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from scipy import ndimage

from dpp_jax.data import image_grid
from dpp_jax.privacy import accounting, poisson
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.privacy.mechanism import GaussianMechanism, clip_weights
from dpp_jax.run import folder as workdir_lib
from dpp_jax.training import progress

# Of a noisy class count, relative to the image's norm: 2 % more noise on the image, and on the count
# of a class noise of 5 σ images (MNIST in the paper's query: 26 of 600).
COUNT_WEIGHT = 0.2


def is_done(workdir: workdir_lib.WorkDir) -> bool:
    return (workdir.release / 'central_images.npz').exists()


def run(
    config: ConfigDict,
    workdir: workdir_lib.WorkDir,
    ledger: ledger_lib.Ledger,
    sigma: float,
    images: np.ndarray,
    labels: np.ndarray,
    before_release: Callable[[], None] = lambda: None,
) -> None:
    """Ask all queries and save images, labels and a picture in release/.

    `sigma` is the noise multiplier of the plan that the ledger is checked against. `before_release` is
    called when the ledger holds all queries and nothing of them is in release/.
    """
    query = config.query
    keys = workdir.secret_keys(ledger, 'central_query', config.seed)
    small = nearest(images, query.downsample)
    mechanism = make_mechanism(config, sigma, keys.identifier)
    sampler = poisson.PoissonSampler(len(images), query.sampling_probability, keys.sampling)
    release = mechanism.recorded(jax.jit(_make_query(config, mechanism, sampler.expected_size)))
    results = []
    with progress.bar(query.queries, 'central', 'query') as bar:
        for number in range(query.queries):
            indices, mask = poisson.pad(sampler.indices(number), sampler.capacity(1))
            noise_key = jax.random.fold_in(keys.noise, number)
            noisy, entry = release(number, small[indices], labels[indices], mask, noise_key)
            ledger.append(entry)
            results.append(np.asarray(noisy))
            bar.update()
    size = config.data.image_size
    central = to_images(np.concatenate(results), (size, size), post_process=query.post_process)
    central_labels = np.tile(np.arange(config.data.classes, dtype=np.int32), query.queries)
    picture = image_grid.rows_by_class(central, central_labels, config.data.classes, query.queries)
    workdir.bind_release('central_query', [central, central_labels])
    before_release()
    # First what counts as the release: without it the picture would be one that no command knows of.
    workdir_lib.write_npz(workdir.release / 'central_images.npz', images=central, labels=central_labels)
    workdir_lib.write_bytes(workdir.release / 'central_images.png', image_grid.png(picture))


def load(workdir: workdir_lib.WorkDir) -> dict[str, np.ndarray]:
    """The released `images` (n, H, W, C) uint8 and `labels` (n,); n = queries x classes."""
    return workdir_lib.load_npz(
        workdir.release / 'central_images.npz',
        'Restore it; or move it away, if private/ is whole: --stage=central then makes the same images '
        'again, with the keys in there',
    )


def make_mechanism(config: ConfigDict, sigma: float, randomness: str) -> GaussianMechanism:
    """The mechanism of one query, with the sensitivity that the module's docstring derives.

    Args:
        config: the settings of the query.
        sigma: noise multiplier; a plan's, or of `noise_multiplier`.
        randomness: public identifier of the keys.
    """
    bound = _image_bound(config)
    if config.query.kind == 'mean' and config.query.class_counts == 'noisy':
        bound = float(np.hypot(bound, COUNT_WEIGHT * bound))
    return GaussianMechanism(
        name='central_query',
        noise_multiplier=sigma,
        sampling_probability=config.query.sampling_probability,
        sensitivity=bound,
        randomness=randomness,
    )


def noise_multiplier(config: ConfigDict) -> float:
    """σ of one query: as set, or such that all queries alone spend their share of ε.

    Raises:
        ValueError: no noise keeps them within their share.
    """
    dp, query = config.dp, config.query
    if query.epsilon_share is None:
        return query.noise_multiplier
    budget = query.epsilon_share * dp.epsilon
    try:
        return accounting.calibrate(
            lambda sigma: accounting.subsampled_gaussian(sigma, query.sampling_probability, query.queries),
            budget,
            dp.delta,
            dp.accountant,
        )
    except accounting.BudgetTooSmall as error:
        least = accounting.format_epsilon(error.least)
        raise ValueError(
            f'config.query.epsilon_share is {query.epsilon_share:g}, which leaves the queries '
            f'{query.epsilon_share:g} x dp.epsilon = {budget:.6g}; with any noise the accountant '
            f"'{dp.accountant}' states at least {least} for them: it must be at least "
            f'{accounting.format_epsilon(error.least / dp.epsilon)} at this dp.epsilon'
        ) from error


def _image_bound(config: ConfigDict) -> float:
    """Δ of one image, without its count."""
    query, data = config.query, config.data
    side = -(-data.image_size // query.downsample)
    bound = float(np.sqrt(data.channels * side * side))
    if query.kind == 'mode':
        return bound
    bound *= max(query.pixel_center, 1 - query.pixel_center)
    return bound if query.clip_norm is None else min(bound, query.clip_norm)


def _make_query(config: ConfigDict, mechanism: GaussianMechanism, expected_size: float) -> Callable:
    """(images, labels, mask, key) → noisy central images of all classes."""
    query, classes = config.query, config.data.classes
    if query.kind == 'mode':
        return functools.partial(mode_query, mechanism=mechanism, classes=classes, bins=query.bins)
    noisy_counts = query.class_counts == 'noisy'
    return functools.partial(
        mean_query,
        mechanism=mechanism,
        classes=classes,
        center=query.pixel_center,
        class_size=expected_size / classes,
        clip_norm=query.clip_norm,
        count_weight=COUNT_WEIGHT * _image_bound(config) if noisy_counts else None,
    )


def mean_query(
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    mechanism: GaussianMechanism,
    classes: int,
    center: float,
    class_size: float,
    clip_norm: float | None = None,
    count_weight: float | None = None,
) -> jax.Array:
    """Noisy mean image of every class.

    Args:
        images: (n, H, W, C) uint8, the sample, padded.
        labels: (n,) int32 in [0, classes).
        mask: (n,) bool, False for padding.
        key: of the noise; secret.
        mechanism: its sensitivity must be the norm that the module's docstring derives.
        classes: number of classes.
        center: subtracted from pixels before the sum and added back at the end.
        class_size: n_c, the public constant that stands for a class's size in the sample.
        clip_norm: the L2 norm to which centred images are scaled down; None = as they are.
        count_weight: w > 0, with which an image counts in its class's size, which then takes the
            place of `class_size`; None = sizes are not asked.

    Returns:
        (classes, H, W, C) float32; in [0, 1] but for the noise.
    """
    rows = jnp.where(mask, labels, classes)
    centred = images / jnp.float32(255) - center
    if clip_norm is not None:
        weights, _ = clip_weights(centred, mask, clip_norm)
        centred = weights[:, None, None, None] * centred
    total = _class_sums(centred, rows, classes)
    if count_weight is None:
        return mechanism.privatise(total, key) / class_size + center
    counts = jax.ops.segment_sum(mask.astype(jnp.int32), rows, classes + 1)[:-1]
    weighted = count_weight * counts.astype(jnp.float32)
    total, weighted = mechanism.privatise((total, weighted), key)
    # Fewer than one image in a class of the sample: whatever is divided by is as good as any.
    sizes = jnp.maximum(weighted / count_weight, 1.0)
    return total / sizes[:, None, None, None] + center


def _class_sums(values: jax.Array, rows: jax.Array, classes: int) -> jax.Array:
    """Sums of values in [-1, 1] per class, as if they were added without error and rounded once.

    The values are cut, towards zero, so that no norm grows, to whole multiples of the smallest power of two
    with which an int32 holds the sum of all. Sums of integers are exact in any order; float32 takes
    the result with a relative error of 2^-24.
    """
    scale = 2.0 ** math.floor(math.log2((2**31 - 1) / len(values)))
    whole = (values * scale).astype(jnp.int32)
    return jax.ops.segment_sum(whole, rows, classes + 1)[:-1].astype(jnp.float32) / scale


def mode_query(
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    mechanism: GaussianMechanism,
    classes: int,
    bins: int,
) -> jax.Array:
    """Noisy most frequent grey value of every pixel and class, in `bins` equal bins.

    Arguments as for `mean_query`; the mechanism's sensitivity must be sqrt(H W C).

    Returns:
        (classes, H, W, C) float32: bin / (bins - 1), so the first bin is black, the last white.
    """
    rows = jnp.where(mask, labels, classes)
    values = (images.astype(jnp.int32) * bins) // 256
    histograms = jnp.stack(
        [jax.ops.segment_sum((values == b).astype(jnp.int32), rows, classes + 1)[:-1] for b in range(bins)],
        axis=-1,
    )
    noisy = mechanism.privatise(histograms.astype(jnp.float32), key)
    return jnp.argmax(noisy, axis=-1).astype(jnp.float32) / (bins - 1)


def nearest(images: np.ndarray, factor: int) -> np.ndarray:
    """(n, H, W, C) → every `factor`-th pixel, starting with the first."""
    return images[:, ::factor, ::factor]


def to_images(central: np.ndarray, size: tuple[int, int], *, post_process: bool) -> np.ndarray:
    """Noisy (n, h, w, C) float32 → uint8 images (n, H, W, C): the method's deterministic chain."""
    resized = bilinear(np.clip(central, 0, 1).astype(np.float32), size)
    images = (resized * np.float32(255)).astype(np.uint8)
    return np.stack([filter_image(image) for image in images]) if post_process else images


def bilinear(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, h, w, C) float32 → (n, H, W, C), half-pixel centres, no antialiasing.

    The four products are summed with fused multiply-adds in the order in which PyTorch's CPU kernel
    does, so that its results are met bit for bit; float64 holds a product of float32 exactly.
    """
    if images.shape[1:3] == tuple(size):
        return images
    y0, y1, down0, down1 = _neighbours(images.shape[1], size[0])
    x0, x1, right0, right1 = _neighbours(images.shape[2], size[1])

    def product(rows, columns, row_weight, column_weight):
        weight = row_weight[:, None, None] * column_weight[:, None]
        return images[:, rows][:, :, columns].astype(np.float64) * weight

    total = product(y0, x1, down0, right1).astype(np.float32)
    for term in (
        product(y0, x0, down0, right0),
        product(y1, x0, down1, right0),
        product(y1, x1, down1, right1),
    ):
        total = (term + total).astype(np.float32)
    return total


def _neighbours(old: int, new: int) -> tuple[np.ndarray, ...]:
    """Per new position: the two old positions around it, and their float32 weights."""
    scale = np.float32(old) / np.float32(new)
    source = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    source = np.maximum(source, np.float32(0))
    low = np.minimum(source.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    weight = source - low.astype(np.float32)
    return low, high, np.float32(1) - weight, weight


def filter_image(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 → 3x3 median per channel; for grey images then a 3x3 sharpening."""
    median = ndimage.median_filter(image, size=(3, 3, 1), mode='nearest')
    if image.shape[-1] != 1:
        return median
    kernel = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.int32)
    sharp = ndimage.convolve(median[..., 0].astype(np.int32), kernel, mode='mirror')
    return np.clip(sharp, 0, 255).astype(np.uint8)[..., None]
