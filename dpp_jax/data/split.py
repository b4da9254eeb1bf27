"""Which images of a set without a test part are test images.

A public number (`split_seed`) and names decide, never a pixel: an image's place is the hash of the number and
its path below the source, or of its group.

- Drawn class by class (stratified): within each class, the images in the order of their places; the first
  round(share x n) are test images, at least one of two. Who is in the test part follows from the listing,
  names and labels. Under zero-out the listing is public: neighbors have the same names and labels, only
  pixels count as nothing. So neighbors have the same split.
- Drawn alone: an image, or a group with all its images, is test if its place is below the share. Under
  add/remove and replace-one neighbors differ in their listings. Here one image (or person) more moves nobody
  else, so that the private images differ in that one, too. Drawn class by class, it could move another one
  across: two would differ.
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


def is_test(
    names: Sequence[str],
    labels: np.ndarray,
    *,
    share: float,
    seed: int,
    is_stratified: bool,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """Return which images are test images, bool (N,).

    Args:
        names: of the images, all different; their order does not matter.
        labels: integers (N,).
        share: in (0, 1).
        seed: the public number.
        is_stratified: drawn class by class; otherwise each is drawn alone.
        groups: the name of each image's group, (N,): whole groups are drawn, each alone; None: images.
    """
    places = np.array([place(name, seed) for name in (names if groups is None else groups)])
    if groups is not None or not is_stratified:
        return places < share
    chosen = np.zeros(len(names), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = int(np.floor(share * len(own) + 0.5))
        count = min(max(count, 1), len(own) - 1) if len(own) > 1 else 0
        order = sorted(own, key=lambda i: (places[i], names[i]))
        chosen[order[:count]] = True
    return chosen
