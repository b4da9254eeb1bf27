"""Class moments, around the central images: one release, and what is known of its noise."""

from collections.abc import Callable, Sequence
import dataclasses

from ml_collections import ConfigDict
import numpy as np

from dpp_jax import files
from dpp_jax.data import class_moments, image_grid, resize
from dpp_jax.data.frequencies import Frequencies
from dpp_jax.data.images import Images
from dpp_jax.privacy.budget import MOMENTS, Releases
from dpp_jax.privacy.groups import Unit
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.queries import MomentsQuery
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run import artefacts, digests
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages.central import asking
from dpp_jax.training import hosts

_SHOWN = 10  # images of each class, in the picture


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    ledger: Ledger | None,
    private: Images,
    before_release: Callable[[], object],
    *,
    query: MomentsQuery,
    frequencies: Frequencies,
    releases: Releases,
    unit: Unit,
    share: Share = WHOLE,
    class_names: Sequence[str] = (),
) -> None:
    """Ask the query and save moments, the noisy answer and a picture in release/.

    Args:
        config: the settings.
        workdir: to write to; the central images are there.
        keys: of the run.
        ledger: gets the query before its answer is used; None but in process 0.
        private: the private images, of this process's share.
        before_release: called when the ledger holds the query and nothing of it is in release/.
        query: what is asked, without its center.
        frequencies: in which it is asked.
        releases: the budget's query.
        unit: of privacy.
        share: the units of this process.
        class_names: for the picture.
    """
    classes = config.data.classes
    centers = hosts.from_first(
        lambda: _centers(artefacts.central_images(workdir)['noisy'], classes, frequencies)
    )
    ((moments, counts),) = asking.answers(
        keys,
        ledger,
        private,
        query=dataclasses.replace(query, center=centers),
        releases=releases,
        unit=unit,
        share=share,
        prepare=frequencies.coefficients,
    )
    shifts, seconds = moments
    mechanism = releases.mechanism
    per_class = mechanism.sampling_probability * unit.used_images / classes
    sizes = np.full(classes, per_class) if counts is None else np.maximum(counts, 1)
    mean_noise, second_noise = query.noise(mechanism.noise_multiplier, sizes)
    fitted = class_moments.fit(centers, shifts, seconds, mean_noise=mean_noise, second_noise=second_noise)
    released = {'means': fitted.means, 'factors': fitted.factors, 'rest': fitted.rest}
    released |= {'centers': centers, 'shifts': shifts, 'seconds': seconds}
    released |= {} if counts is None else {'counts': counts}
    kept = np.any(fitted.factors != 0, axis=1).sum(axis=1)
    print(f'moments        eigenvalues kept per class: {", ".join(map(str, kept))}', flush=True)
    labels = np.repeat(np.arange(classes), _SHOWN)
    images = fitted.draw(frequencies, labels, keys.of_part('moments/picture').order, 0)
    picture = image_grid.rows_by_class(images, labels, classes, _SHOWN, class_names)

    def release():
        keys.bind_release(MOMENTS, artefacts.all_arrays(released))
        before_release()
        digests.note(workdir, 'moments.npz', artefacts.all_arrays(released))
        files.write_npz(workdir.moments, **released)
        files.write_bytes(workdir.moments.with_suffix('.png'), image_grid.png(picture))

    hosts.at_first(release)


def _centers(noisy: np.ndarray, classes: int, frequencies: Frequencies) -> np.ndarray:
    """Return the frequencies of the mean of each class's central images, (classes, k) float32.

    Args:
        noisy: (queries · classes, h, w, C), as released.
        classes: their number.
        frequencies: of images of the full size.
    """
    means = noisy.reshape((-1, classes, *noisy.shape[1:])).mean(axis=0, dtype=np.float32)
    images = resize.bilinear(means, frequencies.image_shape[:2])
    return frequencies.coefficients(255 * np.clip(images, 0, 1))
