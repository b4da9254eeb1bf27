"""Write the digits as npz files in which pairs of images belong to one person, chosen at random.

    python -m scripts.grouped_digits data/grouped_digits
    dpp-jax --config=digits_8:10 --workdir=runs/grouped --config.data.source=npz:data/grouped_digits \\
        --config.dp.unit=group --config.data.groups=person --config.data.train_groups=719 \\
        --config.dp.images_per_group=2 --config.query.class_counts=noisy

What a group costs beside the same budget for images: docs/privacy.md, "Groups".
"""

from pathlib import Path
import sys

import numpy as np

from dpp_jax.data import sources

_SEED = 0  # of who belongs to whom


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split in ('train', 'test'):
        found = sources.load('digits', split)
        pairs = np.random.default_rng(_SEED).permutation(np.arange(len(found.images)) // 2)
        path = Path(folder) / f'{split}.npz'
        np.savez(path, images=found.images, labels=found.labels, person=pairs)
        print(f'{path}: {len(found.images)} images of {len(np.unique(pairs))} people')


if __name__ == '__main__':
    main(*sys.argv[1:])
