"""Stage `central`: a few noisy "central images" of the private set (DP-FETA, section 4.1).

Formal guarantee. A query takes a Poisson sample of the private images and releases, for every class,
the sum of its sampled images (mean query) or its sum of one-hot histograms (mode query), with Gaussian
noise of standard deviation σ·Δ. One image belongs to one class, so adding or removing it changes all
classes' sums together by at most one image's norm: Δ = sqrt(d) max(center, 1 - center) for d pixels
in [-center, 1 - center]; Δ = sqrt(d) for d one-hot histograms. Division by n_c = q N / classes, a public
constant, and everything after it is post-processing. (The PyTorch code divides by the sampled count of
the class, which the noise does not cover.)
"""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from scipy import ndimage

from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.privacy import poisson
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.stages import pictures, workdir as workdir_lib
from dpp_jax.training import progress


def is_done(workdir: workdir_lib.WorkDir) -> bool:
    return (workdir.release / 'central_images.npz').exists()


def run(
    config: ConfigDict,
    workdir: workdir_lib.WorkDir,
    ledger: ledger_lib.Ledger,
    images: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Ask all queries and save images, labels and a picture in release/."""
    query = config.query
    keys = workdir.secret_keys(ledger, 'central_query', config.seed)
    small = nearest(images, query.downsample)
    mechanism = make_mechanism(config, keys.identifier)
    sampler = poisson.PoissonSampler(len(images), query.sampling_probability, keys.sampling)
    release = jax.jit(
        functools.partial(
            mean_query if query.kind == 'mean' else mode_query,
            mechanism=mechanism,
            classes=config.data.classes,
            **(
                {'center': query.pixel_center, 'class_size': sampler.expected_size / config.data.classes}
                if query.kind == 'mean'
                else {'bins': query.bins}
            ),
        )
    )
    results = []
    with progress.bar(query.queries, 'central', 'query') as bar:
        for number in range(query.queries):
            indices, mask = poisson.pad(sampler.indices(number), sampler.capacity(1))
            noisy = release(
                small[indices], labels[indices], mask, jax.random.fold_in(keys.noise, number)
            )
            ledger.append(mechanism.entry(number))
            results.append(np.asarray(noisy))
            bar.update()
    size = config.data.image_size
    central = to_images(np.concatenate(results), (size, size), post_process=query.post_process)
    central_labels = np.tile(np.arange(config.data.classes, dtype=np.int32), query.queries)
    picture = pictures.rows_by_class(central, central_labels, config.data.classes, query.queries)
    workdir_lib.write_bytes(workdir.release / 'central_images.png', pictures.png(picture))
    workdir_lib.write_npz(
        workdir.release / 'central_images.npz', images=central, labels=central_labels
    )


def make_mechanism(config: ConfigDict, randomness: str) -> GaussianMechanism:
    """The mechanism of one query, with the sensitivity that the module's docstring derives."""
    query, data = config.query, config.data
    side = -(-data.image_size // query.downsample)
    bound = 1.0 if query.kind == 'mode' else max(query.pixel_center, 1 - query.pixel_center)
    return GaussianMechanism(
        name='central_query',
        noise_multiplier=query.noise_multiplier,
        sampling_probability=query.sampling_probability,
        sensitivity=float(np.sqrt(data.channels * side * side)) * bound,
        randomness=randomness,
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
) -> jax.Array:
    """Noisy mean image of every class.

    Args:
        images: (n, H, W, C) uint8, the sample, padded.
        labels: (n,) int32 in [0, classes).
        mask: (n,) bool, False for padding.
        key: of the noise; secret.
        mechanism: its sensitivity must be sqrt(H W C) max(center, 1 - center).
        classes: number of classes.
        center: subtracted from pixels before the sum and added back at the end.
        class_size: n_c, the public constant that stands for a class's size in the sample.

    Returns:
        (classes, H, W, C) float32; in [0, 1] but for the noise.
    """
    rows = jnp.where(mask, labels, classes)
    counts = jax.ops.segment_sum(mask.astype(jnp.int32), rows, classes + 1)[:-1]
    # Sums of integers are exact, in any order.
    sums = jax.ops.segment_sum(images.astype(jnp.int32), rows, classes + 1)[:-1]
    total = sums / 255.0 - center * counts[:, None, None, None]
    return mechanism.privatise(total.astype(jnp.float32), key) / class_size + center


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
        [
            jax.ops.segment_sum((values == b).astype(jnp.int32), rows, classes + 1)[:-1]
            for b in range(bins)
        ],
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
