"""How far central images are from the noiseless ones, by the form of the mean query, at equal privacy.

    python scripts/query_error.py --config=configs/digits_8.py:10
    python scripts/query_error.py --config=configs/mnist_14.py:10 --config.data.dir=DATASETS
    python scripts/query_error.py --config=configs/digits_8.py:10 --sweep    (every centre with every norm)

Mean squared error x 1000, pixels in [0, 1], of one query's central images (cut to [0, 1], as the method
does, before any other step) to the classes' true means, over six sets of keys. σ, q and the number of
queries are the config's; so is ε, which depends on them alone. The true means are private: look at them
only for public sets.
"""

import math

from absl import app, flags
import jax
from ml_collections import config_flags
import numpy as np

from dpp_jax import pipeline
from dpp_jax.privacy import accounting, poisson
from dpp_jax.stages import central

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits_8.py:10', 'As for dpp_jax.main.')
_SWEEP = flags.DEFINE_bool('sweep', False, 'Every centre with every norm, not the three forms alone.')
KEYS = 6
# pixel_center, and clip_norm / sqrt(d)
FORMS = {
    "the paper's form": (0.0, None),
    'centred at 1/2': (0.5, None),
    'centred at 0.3, norm cut': (0.3, 0.35),
}
CENTERS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, None)


def errors(config, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared error of a query's central images, (KEYS,)."""
    query, classes = config.query, config.data.classes
    truth = np.stack([images[labels == c].mean(0) / 255 for c in range(classes)])
    mechanism = central.make_mechanism(config, central.noise_multiplier(config), 'measurement')
    ask = jax.jit(central._make_query(config, mechanism, len(images) * query.sampling_probability))
    results = []
    for key in range(KEYS):
        sampler = poisson.PoissonSampler(size=len(images), probability=query.sampling_probability, key=key)
        indices, mask = poisson.pad(sampler.indices(0), sampler.capacity(1))
        noisy = ask(images[indices], labels[indices], mask, jax.random.key(key))
        results.append(np.mean((np.clip(noisy, 0, 1) - truth) ** 2))
    return np.array(results)


def sweep(config, images: np.ndarray, labels: np.ndarray, norm: float) -> None:
    """Print the mean error of every centre (rows) with every norm / sqrt(d) (columns)."""
    cells = '{:<14}' + '{:>9}' * len(SHARES)
    print(cells.format('pixel_center', *('not cut' if s is None else f'{s:g} √d' for s in SHARES)))
    for center in CENTERS:
        found = []
        for share in SHARES:
            clip_norm = None if share is None else share * norm
            config.query.update(pixel_center=center, clip_norm=clip_norm)
            found.append(f'{1000 * errors(config, images, labels).mean():.2f}')
        print(cells.format(f'{center:g}', *found), flush=True)


def main(argv):
    del argv
    config = _CONFIG.value.copy_and_resolve_references()
    config.query.update(kind='mean', class_counts='public')
    query = config.query
    data = pipeline.load_images(config, 'train')
    images = central.nearest(data.images, query.downsample)
    norm = math.sqrt(images[0].size)
    sigma = central.noise_multiplier(config)
    query.update(noise_multiplier=sigma, epsilon_share=None)  # calibrated once
    event = accounting.subsampled_gaussian(sigma, query.sampling_probability, query.queries)
    epsilon = accounting.epsilon(event, config.dp.delta, config.dp.accountant)
    print(
        f'{config.name}: {query.queries} queries, σ = {accounting.format_noise(sigma)}, '
        f'q = {query.sampling_probability:g}, ε = {accounting.format_epsilon(epsilon, 3)} '
        f'at δ = {accounting.format_exact(config.dp.delta)}'
    )
    if _SWEEP.value:
        sweep(config, images, data.labels, norm)
        return
    line = '{:<26} {:>12} {:>12} {:>16} {:>14}'
    print(line.format('form', 'pixel_center', 'clip_norm', 'sensitivity Δ', 'error x 1000'))
    for name, (center, share) in FORMS.items():
        clip_norm = None if share is None else share * norm
        query.update(pixel_center=center, clip_norm=clip_norm)
        found = 1000 * errors(config, images, data.labels)
        sensitivity = central.make_mechanism(config, sigma, 'measurement').sensitivity
        error = f'{found.mean():.2f} ± {found.std(ddof=1):.2f}'
        cut = '-' if clip_norm is None else f'{clip_norm:.2f}'
        print(line.format(name, f'{center:g}', cut, f'{sensitivity:.2f}', error), flush=True)


if __name__ == '__main__':
    app.run(main)
