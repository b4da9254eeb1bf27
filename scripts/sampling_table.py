"""FID of a released model by sampler and steps, against calls of the network: which sampler is enough?

    python -m scripts.sampling_table --workdir=runs/digits_8 --source=digits
    python -m scripts.sampling_table --workdir=runs/mnist_14 --source=idx:MNIST --average_down=2 --images=2000

For PUBLIC sets: it looks at real images without noise. FID is by a small CNN trained here on the real
training images, against all of them; mean and standard deviation over --seeds sets of images of each. The
last column compares with the best mean: a config takes the cheapest sampler within 5 %.
"""

import time

from absl import app, flags
import jax
import numpy as np

from dpp_jax import library
from dpp_jax.data import sources
from dpp_jax.evaluation import features, fid
from dpp_jax.training import devices

_WORKDIR = flags.DEFINE_string('workdir', None, 'A finished work directory, or its release/.', required=True)
_SOURCE = flags.DEFINE_string('source', 'digits', 'As config.data.source.')
_AVERAGE_DOWN = flags.DEFINE_integer('average_down', 1, 'As config.data.average_down.', lower_bound=1)
_IMAGES = flags.DEFINE_integer('images', 5000, 'In each set.', lower_bound=100)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Sets for each sampler.', lower_bound=2)
_EPOCHS = flags.DEFINE_integer('feature_epochs', 10, 'Of the small CNN.', lower_bound=1)
_STEPS = flags.DEFINE_list('steps', ['4', '6', '9', '12', '18', '35'], 'Calls of the network, about.')
_CHURN = 0.4  # s_churn / steps: γ of every step in the range
_SAMPLERS = {
    'ddim': {},
    'heun': {},
    f'heun, γ = {_CHURN}': {'s_min': 0.05},
    'dpmpp_2m': {},
    'dpmpp_2m_sde': {},
}


def settings(title: str, calls: int) -> dict[str, float | str]:
    """Return the sampler's settings with about so many calls of the network."""
    name = title.partition(',')[0]
    steps = (calls + 1) // 2 if name == 'heun' else calls
    churn = {'s_churn': _CHURN * steps} if 's_min' in _SAMPLERS[title] else {}
    return {'name': name, 'steps': steps, **_SAMPLERS[title], **churn}


def calls_of(chosen: dict[str, float | str]) -> int:
    """Return how often the network sees each image, without guidance."""
    return 2 * chosen['steps'] - 1 if chosen['name'] == 'heun' else chosen['steps']


def main(_) -> None:
    devices.one_per_core()
    model = library.load(_WORKDIR.value)
    real = sources.load(_SOURCE.value, 'train', average_down=_AVERAGE_DOWN.value)
    network = features.train_feature_network(
        real.images, real.labels, classes=len(model.classes), key=jax.random.key(0), epochs=_EPOCHS.value
    )
    reference = fid.Gaussian.of_features(network.features(real.images))
    rows = []
    for title in _SAMPLERS:
        for calls in map(int, _STEPS.value):
            chosen = settings(title, calls)
            found, start = [], time.monotonic()
            for seed in range(_SEEDS.value):
                images, _ = model.sample(_IMAGES.value, sampler=chosen, seed=seed)
                found.append(fid.distance(fid.Gaussian.of_features(network.features(images)), reference))
            rows.append((title, calls_of(chosen), np.mean(found), np.std(found, ddof=1)))
            print(
                f'{title}, {calls_of(chosen)}: {rows[-1][2]:.2f} ({time.monotonic() - start:.0f} s)',
                flush=True,
            )
    best = min(mean for *_, mean, _ in rows)
    print('\n| sampler | calls of the network | FID | against the best |\n|---|---|---|---|')
    for title, calls, mean, spread in rows:
        print(f'| {title} | {calls} | {mean:.2f} ± {spread:.2f} | {100 * (mean / best - 1):+.0f} % |')


if __name__ == '__main__':
    app.run(main)
