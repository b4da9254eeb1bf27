"""Stage `central`: a few noisy central images of the private images (DP-FETA, section 4.1).

What is asked, its sensitivity and its noise stand in `privacy/queries.py` and `privacy/mechanism.py`. This
stage samples, records the answers, and makes images of them by the method's deterministic chain.
"""

from collections.abc import Callable, Sequence
import functools

from ml_collections import ConfigDict
import numpy as np
from scipy import ndimage

from dpp_jax import files
from dpp_jax.data import image_grid, resize
from dpp_jax.data.images import Images
from dpp_jax.privacy import groups, poisson
from dpp_jax.privacy.budget import CENTRAL_QUERY, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.queries import Query, Spread
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run import artefacts, digests
from dpp_jax.run import batches as batches_lib
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.training import devices, hosts, progress, tensorboard


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger | None,
    private: Images,
    before_release: Callable[[], object],
    *,
    query: Query,
    releases: Releases,
    unit: Unit,
    share: Share = WHOLE,
    class_names: Sequence[str] = (),
) -> None:
    """Ask all queries and save images, labels, the noisy answers and a picture in release/.

    Args:
        config: the settings.
        workdir: to write to.
        keys: of the run.
        ledger: gets every query before its answer is used; None but in process 0.
        private: the private images, of this process's share.
        before_release: called when the ledger holds all queries and nothing of them is in release/.
        query: what is asked.
        releases: the budget's queries.
        unit: of privacy.
        share: the units of this process.
        class_names: for the picture.
    """
    settings, classes, mechanism = config.query, config.data.classes, releases.mechanism
    own_keys = keys.of_mechanism(CENTRAL_QUERY, ledger)
    batches = batches_lib.of_mechanism(private, unit, share, keys, own_keys, mechanism.sampling_probability)
    sampler, arrays = batches.sampler, {'images': private.images, 'labels': private.labels}
    rows = sampler.capacity(1)
    capacity = sampler.capacity(len(devices.local()), share.count)
    ask = query.noisy(
        mechanism,
        own_keys.noise,
        mechanism.sampling_probability * unit.used_images,
        rows,
        spread=Spread(rows=capacity // len(devices.local()), axis=devices.AXIS),
        compiled=lambda release: devices.parallel(release, in_axes=(0, 0, None, None)),
        with_counts=True,
    )
    fetch = poisson.fetch
    if batches.members is not None:
        fetch = functools.partial(groups.fetch, members=batches.members, own=batches.own)
    answers = []
    with progress.bar(releases.count, 'central', 'query') as bar:
        for number in range(releases.count):
            batch, mask = fetch(
                arrays, indices=sampler.indices(number), capacity=capacity, share=share, rows=rows
            )
            batch['images'] = resize.nearest(batch['images'], settings.downsample)
            answer, entry = ask(number, *devices.deal_own((batch, mask)))
            hosts.at_first(lambda entry=entry: ledger.append(entry))
            answers.append(devices.first(answer))
            bar.update()
    size = private.images.shape[1:3]
    noisy, counts = zip(*answers)
    released = {
        'images': to_images(np.concatenate(noisy), size, post_process=settings.post_process),
        'labels': np.tile(np.arange(classes, dtype=np.int32), releases.count),
    }
    more = {'noisy': np.concatenate(noisy)} | ({} if counts[0] is None else {'counts': np.stack(counts)})
    picture = image_grid.rows_by_class(
        released['images'], released['labels'], classes, releases.count, class_names
    )

    def release():
        is_of_earlier_version = keys.released(CENTRAL_QUERY) == files.digest(released.values())
        # An earlier version released no more: more would be a second release under the same noise.
        chosen = released if is_of_earlier_version else released | more
        arrays = artefacts.central_arrays(chosen)
        keys.bind_release(CENTRAL_QUERY, arrays)
        before_release()
        # First what counts as the release: without it the picture would be one that no command knows of.
        digests.note(workdir, 'central_images.npz', arrays)
        files.write_npz(workdir.central_images, **chosen)
        files.write_bytes(workdir.central_images.with_suffix('.png'), image_grid.png(picture))
        tensorboard.write_pictures(workdir.metrics('central'), {'central images': {0: picture}})

    hosts.at_first(release)


def to_images(central: np.ndarray, size: tuple[int, int], *, post_process: bool) -> np.ndarray:
    """Make images of noisy answers: the method's deterministic chain.

    Args:
        central: (n, h, w, C) float32, in [0, 1] but for the noise.
        size: (H, W) of the images.
        post_process: whether to filter them, see `filter_image`.

    Returns:
        (n, H, W, C) uint8.
    """
    resized = resize.bilinear(np.clip(central, 0, 1).astype(np.float32), size)
    images = (resized * np.float32(255)).astype(np.uint8)
    return np.stack([filter_image(image) for image in images]) if post_process else images


def filter_image(image: np.ndarray) -> np.ndarray:
    """Filter an image (H, W, C) uint8 with a 3x3 median per channel; gray ones then with a 3x3 sharpening."""
    median = ndimage.median_filter(image, size=(3, 3, 1), mode='nearest')
    if image.shape[-1] != 1:
        return median
    kernel = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.int32)
    sharp = ndimage.convolve(median[..., 0].astype(np.int32), kernel, mode='mirror')
    return np.clip(sharp, 0, 255).astype(np.uint8)[..., None]
