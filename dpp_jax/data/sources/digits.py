"""The handwritten digits that come with scikit-learn."""

import dataclasses

import numpy as np

from dpp_jax.data.sources.source import SPLITS, Source, SourceInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """1,797 images of 8x8 pixels, 80 % for training: stratified, and always the same split."""

    form = 'digits'

    def describe(self) -> SourceInfo:
        return SourceInfo(
            name=self.name,
            train_images=1437,
            test_images=360,
            image_shape=(8, 8, 1),
            classes=10,
            class_counts=(142, 146, 142, 146, 145, 145, 145, 143, 139, 144),
            sides=(8, 8, 8),
        )

    def shape(self, split: str) -> tuple[int, ...]:
        return (1437 if split == 'train' else 360, 8, 8, 1)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        indices = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
        )[SPLITS.index(split)]
        indices = indices[self.rows(len(indices)).numbers()]
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # from 0..16
        return images[indices], digits.target[indices]
