"""Which images of a set without a test part are test images.

A public number (`split_seed`) and names decide, never a pixel: an image's place is the hash of the number and
its path below the source, or of its group. It is a test image if its place is below the share.

So each image (or person) is drawn alone. One more, one less, or one with another label moves nobody else:
private images of neighbors differ in that one, too. Class by class, with exact shares, the label of one image
would decide whether others are private, and no ε would cover that. Shares of classes are as drawn.
"""

from collections.abc import Sequence
import hashlib

import numpy as np


def place(name: str, seed: int) -> float:
    """Return where a name stands, in [0, 1): uniform over names, and the same on every machine."""
    digest = hashlib.sha256(f'{seed}:{name}'.encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48  # whole numbers below 2^53 are exact


def group_number(name: str) -> int:
    """Return a number for a group's name, int64: from the name alone, so that no group moves another."""
    return int.from_bytes(hashlib.sha256(f'group:{name}'.encode()).digest()[:8], signed=True)


def is_test(names: Sequence[str], *, share: float, seed: int) -> np.ndarray:
    """Return which images are test images, bool (N,).

    Args:
        names: of the images, or of their groups: images of one name stay together.
        share: in (0, 1).
        seed: the public number.
    """
    return np.array([place(name, seed) for name in names], float) < share


def numbers_of_test(count: int, *, share: float, seed: int) -> np.ndarray:
    """Return which records of a set are test images, bool (N,): round(share x N), at least one of two.

    For records without names, whose number is public: where an image of neighbors counts as nothing, all have
    the same numbers.
    """
    places = np.array([place(str(number), seed) for number in range(count)])
    chosen = np.zeros(count, bool)
    wanted = min(max(int(np.floor(share * count + 0.5)), 1), count - 1) if count > 1 else 0
    chosen[np.argsort(places, kind='stable')[:wanted]] = True
    return chosen
