"""What a kind of source must offer."""

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from dpp_jax.data.rows import Rows
from dpp_jax.data.stored import StoredImages

SPLITS = ('train', 'test')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Facts about a source that need no pixel.

    Attributes:
        name: as the user wrote it.
        train_images, test_images: how many images each split has.
        image_shape: (H, W, C), before any average pooling.
        classes: labels are 0..classes - 1.
        class_names: of the classes, in the order of labels; (): the set does not tell.
        class_counts: training images of each class; (): not known from headers.
        sides: least, median and largest short side of the images, in pixels; None: all have `image_shape`.
        groups: how many groups the training images belong to; None: not known.
        notes: lines for `--stage=plan`.
    """

    name: str
    train_images: int
    test_images: int
    image_shape: tuple[int, int, int]
    classes: int
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    sides: tuple[int, int, int] | None = None
    groups: int | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A set of labeled images in two splits.

    Attributes:
        form: how a user writes names of this kind; with a colon if `where` is needed.
        name: as the user wrote it, for messages.
        where: the part of the name after the colon; '' without colon.
        data_dir: where tensorflow-datasets keeps its data; '' = its own default.
        kept: which rows of a split are read and must fit in memory, as of `Rows`.
        has_groups: whether a set of this kind may say whose an image is, see `groups`.
    """

    form: ClassVar[str]
    has_groups: ClassVar[bool] = False
    name: str
    where: str
    data_dir: str
    kept: slice | np.ndarray | None = None

    def rows(self, total: int) -> Rows:
        """Return the kept rows of a split of so many."""
        return Rows(total, self.kept)

    @abc.abstractmethod
    def describe(self) -> SourceInfo:
        """Return facts about the set without reading a pixel.

        Raises:
            FileNotFoundError: the set is not there.
            ValueError: its files are damaged.
        """

    @abc.abstractmethod
    def shape(self, split: str) -> tuple[int | None, ...]:
        """Return (N, H, W, C) of all images of one of `SPLITS`, from headers alone; None: not known.

        N is always known.

        Raises:
            FileNotFoundError: the set is not there.
            ValueError: its files are damaged, or hold no such images.
        """

    @abc.abstractmethod
    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the kept images and labels of one of `SPLITS`; the caller checks them.

        Other rows are never in memory, or only a few at a time.

        Returns:
            images: uint8 (n, H, W, C) or (n, H, W).
            labels: integers (n,).

        Raises:
            FileNotFoundError: the set is not there.
            ValueError: its files are damaged.
        """

    def identity(self, split: str) -> list[str]:
        """Tell which files a split has, by names, sizes and checksums: as far as that is soon read.

        Hosts of a run compare it: each has rows of its own, which are shares of one set only if the files are
        the same.
        """
        return [self.name, str(self.shape(split))]

    def groups(self, split: str, name: str) -> np.ndarray:
        """Return whose each image of a split is, kept or not, integers (N,); kinds with `has_groups` can.

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


class StoredSource(Source):
    """A set whose rows can be read when they are needed."""

    @abc.abstractmethod
    def stored(self, split: str) -> StoredImages:
        """Return the kept images of one of `SPLITS`, to be read when needed."""

    @abc.abstractmethod
    def labels(self, split: str) -> np.ndarray:
        """Return the kept labels alone, integers (n,), beside `stored`."""

    @abc.abstractmethod
    def stamp(self, split: str) -> str:
        """Return what decides the pixels of `stored`, but for the files' content: a SHA-256 in hexadecimal.

        These are names, sizes and times of its files, and what decodes them.
        """
