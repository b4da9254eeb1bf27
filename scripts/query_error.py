"""How far central images are from the noiseless ones, by the form of the mean query, at equal privacy.

    python -m scripts.query_error --config=configs/digits_8.py:10
    python -m scripts.query_error --config=configs/mnist_14.py:10 --config.data.dir=DATASETS
    python -m scripts.query_error --config=configs/digits_8.py:10 --sweep    (every center with every norm)

Mean squared error x 1000, pixels in [0, 1], of one query's central images (cut to [0, 1], as the method
does, before any other step) to the classes' true means, over six releases. σ, q and the number of
queries are the config's; so is ε, which depends on them alone. The true means are private: look at them
only for public sets.
"""

import math

from absl import app, flags
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np

from dpp_jax import build
from dpp_jax.data import resize
from dpp_jax.data.images import Images
from dpp_jax.privacy import accounting, poisson
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, Budget, Releases
from dpp_jax.privacy.mechanism import NoiseKey

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits_8.py:10', 'As for dpp_jax.main.')
_SWEEP = flags.DEFINE_bool('sweep', False, 'Every center with every norm, not the three forms alone.')
RELEASES = 6
# pixel_center, and clip_norm / sqrt(d)
FORMS = {
    "the paper's form": (0.0, None),
    'centered at 1/2': (0.5, None),
    'centered at 0.3, norm cut': (0.3, 0.35),
}
CENTERS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, None)


def budget(config: ConfigDict) -> Budget:
    """Return the run's budget; DP-SGD's noise, which nobody asks for here, is not calibrated."""
    return build.plan(config, build.model(config), noise={DP_SGD: 1.0}).budget


def errors(config: ConfigDict, releases: Releases, data: Images) -> np.ndarray:
    """Return the mean squared error of a query's central images, (RELEASES,)."""
    images, labels, mechanism = data.images, data.labels, releases.mechanism
    truth = np.stack([images[labels == c].mean(0) / 255 for c in range(config.data.classes)])
    sampler = poisson.PoissonSampler(size=len(images), probability=mechanism.sampling_probability, key=0)
    noise_key = NoiseKey(identifier='measurement', keys=jax.random.split(jax.random.key(0), 4))
    ask = build.query(config).noisy(mechanism, noise_key, sampler.expected_size)
    results = []
    for number in range(RELEASES):
        arrays = {'images': images, 'labels': labels}
        batch, mask = poisson.fetch(arrays, sampler.indices(number), sampler.capacity(1))
        noisy, _ = ask(number, batch, mask)
        results.append(np.mean((np.clip(noisy, 0, 1) - truth) ** 2))
    return np.array(results)


def with_form(config: ConfigDict, center: float, clip_norm: float | None) -> Releases:
    """Set the form of the query, and return its releases."""
    config.query.update(pixel_center=center, clip_norm=clip_norm)
    return budget(config).of(CENTRAL_QUERY)


def sweep(config: ConfigDict, data: Images, norm: float) -> None:
    """Print the mean error of every center (rows) with every norm / sqrt(d) (columns)."""
    cells = '{:<14}' + '{:>9}' * len(SHARES)
    print(cells.format('pixel_center', *('not cut' if s is None else f'{s:g} √d' for s in SHARES)))
    for center in CENTERS:
        found = []
        for share in SHARES:
            releases = with_form(config, center, None if share is None else share * norm)
            found.append(f'{1000 * errors(config, releases, data).mean():.2f}')
        print(cells.format(f'{center:g}', *found), flush=True)


def main(argv):
    del argv
    config = _CONFIG.value.copy_and_resolve_references()
    config.query.update(kind='mean', class_counts='public')
    config.pretrain.enabled = True  # without it nothing is asked
    private = build.images(config, 'train')
    data = Images(images=resize.nearest(private.images, config.query.downsample), labels=private.labels)
    norm = math.sqrt(data.images[0].size)
    planned = budget(config)
    mechanism = planned.of(CENTRAL_QUERY).mechanism
    sigma = mechanism.noise_multiplier
    config.query.update(noise_multiplier=sigma, epsilon_share=None)  # calibrated once
    print(
        f'{config.name}: {planned.count(CENTRAL_QUERY)} queries, σ = {accounting.format_noise(sigma)}, '
        f'q = {mechanism.sampling_probability:g}, '
        f'ε = {accounting.format_epsilon(planned.spent(CENTRAL_QUERY), 3)} '
        f'at δ = {accounting.format_exact(planned.delta)}'
    )
    if _SWEEP.value:
        sweep(config, data, norm)
        return
    line = '{:<26} {:>12} {:>12} {:>16} {:>14}'
    print(line.format('form', 'pixel_center', 'clip_norm', 'sensitivity Δ', 'error x 1000'))
    for name, (center, share) in FORMS.items():
        clip_norm = None if share is None else share * norm
        releases = with_form(config, center, clip_norm)
        found = 1000 * errors(config, releases, data)
        error = f'{found.mean():.2f} ± {found.std(ddof=1):.2f}'
        cut = '-' if clip_norm is None else f'{clip_norm:.2f}'
        sensitivity = releases.mechanism.sensitivity
        print(line.format(name, f'{center:g}', cut, f'{sensitivity:.2f}', error), flush=True)


if __name__ == '__main__':
    app.run(main)
