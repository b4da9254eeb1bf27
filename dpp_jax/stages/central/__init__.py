"""Stage `central`: what is asked of the private images before any training, one query after the other.

What is asked, its sensitivity and its noise stand in `privacy/queries` and `privacy/mechanism.py`. This
stage samples and records the answers (`asking`). Here: a few noisy central images (DP-FETA, section 4.1), and
images made of them by the method's deterministic chain. In `moments`: class moments around them. In
`frequency`: mean random features.
"""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict
import numpy as np
from scipy import ndimage

from dpp_jax import files
from dpp_jax.data import image_grid, resize
from dpp_jax.data.images import Images
from dpp_jax.privacy.budget import CENTRAL_QUERY, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.queries import Query
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages.central import asking
from dpp_jax.training import hosts, tensorboard


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
    settings, classes = config.query, config.data.classes
    answers = asking.answers(
        keys,
        ledger,
        private,
        query=query,
        releases=releases,
        unit=unit,
        share=share,
        prepare=lambda images: resize.nearest(images, settings.downsample),
    )
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
