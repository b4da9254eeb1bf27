"""The lowest frequencies of images: an orthonormal cosine transform, known to everybody."""

import dataclasses
import functools

import numpy as np

from dpp_jax.data import resize

_UNITS = 2.0**30  # of the transform: with whole numbers, float64 has exact sums in any order
_AT_ONCE = 4096  # images in memory as float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frequencies:
    """The `count` lowest frequencies of the three-dimensional DCT-II over rows, columns and colors.

    Of three colors the transform is gray, red minus blue, and green minus their mean. Frequency (i, j) of
    gray has the place i + j in the order; of the others 2 (i + j) + 1, as eyes see less of them.

    Attributes:
        image_shape: (H, W, C).
        average_down: k: blocks of k x k pixels are replaced by their mean; it divides H and W.
        count: in [1, H W C / k²].

    Raises:
        ValueError: a field is out of range.
    """

    image_shape: tuple[int, int, int]
    average_down: int
    count: int

    def __post_init__(self):
        height, width, _ = self.image_shape
        if height % self.average_down or width % self.average_down:
            raise ValueError(
                f'average_down is {self.average_down}; it must divide the size of images, {height} x {width}'
            )
        if self.count > (most := int(np.prod(self._shape))):
            raise ValueError(
                f'frequencies is {self.count}; it must be at most {most}, the values of an image of shape '
                f'{self._shape}'
            )

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(h, w, C), after averaging."""
        height, width, channels = self.image_shape
        return height // self.average_down, width // self.average_down, channels

    @functools.cached_property
    def basis(self) -> np.ndarray:
        """The lowest frequencies, (h w C, count) float64: orthonormal columns, whole multiples of 2^-30."""
        height, width, channels = self._shape
        i, j, c = np.meshgrid(*map(np.arange, self._shape), indexing='ij')
        order = np.where(c == 0, i + j, 2 * (i + j) + 1)
        chosen = np.lexsort((c.ravel(), i.ravel(), order.ravel()))[: self.count]
        rows, columns, colors = (_cosines(n)[axis.ravel()[chosen]] for n, axis in zip(self._shape, (i, j, c)))
        basis = np.einsum('kh,kw,kc->hwck', rows, columns, colors)
        return np.round(basis.reshape(-1, self.count) * _UNITS) / _UNITS

    def coefficients(self, images: np.ndarray) -> np.ndarray:
        """Return the frequencies of images, (..., count) float32, each by itself.

        Args:
            images: (..., H, W, C), 0..255. Of uint8 the result is the same bit for bit on any machine.
        """
        flat = images.reshape((-1, *self.image_shape))
        parts = [self._of_part(flat[at : at + _AT_ONCE]) for at in range(0, len(flat), _AT_ONCE)]
        return np.concatenate([np.zeros((0, self.count), np.float32), *parts]).reshape(
            (*images.shape[:-3], self.count)
        )

    def _of_part(self, images: np.ndarray) -> np.ndarray:
        """Return the frequencies of images (n, H, W, C)."""
        height, width, channels = self._shape
        k = self.average_down
        blocks = images.reshape((-1, height, k, width, k, channels)).sum((2, 4), dtype=np.float64)
        found = blocks.reshape((-1, height * width * channels)) @ self.basis
        return (found / (255 * k * k)).astype(np.float32)

    @functools.cached_property
    def synthesis(self) -> np.ndarray:
        """What makes an image of frequencies, (H W C, count) float64: pixels in [0, 1] before the cut."""
        small = self.basis.T.reshape((-1, *self._shape)).astype(np.float32)
        return self._enlarged(small).reshape(self.count, -1).T.astype(np.float64)

    def _enlarged(self, small: np.ndarray) -> np.ndarray:
        """Return averaged images (n, h, w, C) in their whole size."""
        return resize.bilinear(small, self.image_shape[:2]) if self.average_down > 1 else small

    def images(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the images (n, H, W, C) uint8 of frequencies (n, count): what leaves [0, 1] is cut off."""
        small = (coefficients @ self.basis.T).astype(np.float32).reshape((-1, *self._shape))
        return np.round(255 * np.clip(self._enlarged(small), 0, 1)).astype(np.uint8)


def _cosines(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II (frequencies, positions) of so many values."""
    frequency, position = np.arange(size)[:, None], np.arange(size)
    waves = np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    return waves * np.where(frequency == 0, np.sqrt(1 / size), np.sqrt(2 / size))
