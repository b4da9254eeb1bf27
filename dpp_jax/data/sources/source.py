"""What a kind of source must offer."""

import abc
import dataclasses
from typing import ClassVar

import numpy as np

SPLITS = ('train', 'test')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Facts about a source that need no pixel.

    Attributes:
        name: as the user wrote it.
        train_images, test_images: how many images each split has.
        image_shape: (H, W, C), before any average pooling.
        classes: labels are 0..classes - 1.
    """

    name: str
    train_images: int
    test_images: int
    image_shape: tuple[int, int, int]
    classes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A set of labeled images in two splits.

    Attributes:
        form: how a user writes names of this kind; with a colon if `where` is needed.
        name: as the user wrote it, for messages.
        where: the part of the name after the colon; '' without colon.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default.
        has_groups: whether a set of this kind may say whose an image is, see `groups`.
    """

    form: ClassVar[str]
    has_groups: ClassVar[bool] = False
    name: str
    where: str
    data_dir: str

    @abc.abstractmethod
    def describe(self) -> SourceInfo:
        """Return facts about the set without reading a pixel.

        Raises:
            FileNotFoundError: the set is not there.
            ValueError: its files are damaged.
        """

    @abc.abstractmethod
    def shape(self, split: str) -> tuple[int | None, ...]:
        """Return (N, H, W, C) of the images of one of `SPLITS`, from headers alone; None: not known.

        Raises:
            FileNotFoundError: the set is not there.
            ValueError: its files are damaged, or hold no such images.
        """

    @abc.abstractmethod
    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return all images and labels of one of `SPLITS`; the caller checks them.

        Returns:
            images: uint8 (N, H, W, C) or (N, H, W).
            labels: integers (N,).

        Raises:
            FileNotFoundError: the set is not there.
            ValueError: its files are damaged.
        """

    def groups(self, split: str, name: str) -> np.ndarray:
        """Return whose each image of a split is, integers (N,); kinds with `has_groups` can.

        Args:
            split: one of `SPLITS`.
            name: of the array in the set.

        Raises:
            ValueError: there is no such array, or its file is damaged.
        """
        raise ValueError(f'config.data.groups is {name!r}; it must be empty: {self.name} has no groups')

    def near_groups(self, name: str) -> np.ndarray | None:
        """Return `groups` of the training images where they can be read without these; None: not so."""
        return None
