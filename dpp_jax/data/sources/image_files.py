"""Image files of any format, in a folder or a zip archive."""

import abc
from collections import Counter
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from dpp_jax.data import decode, decoding, listing
from dpp_jax.data.decode import Header
from dpp_jax.data.listing import Listing
from dpp_jax.data.preparation import Preparation
from dpp_jax.data.sources import folder
from dpp_jax.data.sources.source import Source, SourceInfo
from dpp_jax.data.split import group_number
from dpp_jax.data.tree import FolderTree, Tree, ZipTree

_THREADS = 16  # that read headers: they wait for the disk
_CHUNK = 256  # headers that a thread reads at a time
# The headers that were read last, and of which files: who describes a set twice reads them once.
_last_headers: dict[tuple, list[Header]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFiles(Source):
    """What a folder and an archive share; `listing` says which layouts there are."""

    has_groups = True
    prepares = True
    joins_validation = True
    known: dict[str, Listing] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @abc.abstractmethod
    def tree(self) -> Tree:
        """Return the files; a FileNotFoundError says that they are not there."""

    def listed(self) -> Listing:
        """List the images."""
        return listing.read(self.tree(), self.preparation, self.name)

    @property
    def listing(self) -> Listing:
        """The images; listed once, also for copies of this source with other rows."""
        if not self.known:
            self.known[self.name] = self.listed()
        return self.known[self.name]

    def to_look_at(self) -> np.ndarray:
        """Return the numbers of the images whose headers are read to describe the set: all."""
        return np.arange(len(self.listing.names))

    def describe(self) -> SourceInfo:
        found = self.listing
        headers, notes = self._headers()
        sizes = {header.size for header in headers}
        height, width = sizes.pop() if len(sizes) == 1 else (None, None)
        is_color = any(header.is_color for header in headers)
        if self.preparation.channels == 3 and not self.preparation.changes_images:
            is_color = True  # gray files become RGB without a loss
        shorter = sorted(min(header.size) for header in headers)
        private = found.rows('train')
        groups = self.preparation.groups
        return SourceInfo(
            name=self.name,
            train_images=len(private),
            test_images=len(found.names) - len(private),
            image_shape=(height, width, 3 if is_color else 1),
            classes=found.classes,
            class_names=found.class_names,
            class_counts=tuple(np.bincount(found.labels[private], minlength=found.classes).tolist()),
            sides=(shorter[0], shorter[len(shorter) // 2], shorter[-1]),
            groups=len(np.unique(self.groups('train', groups))) if groups else None,
            notes=(*notes, *found.notes),
        )

    def shape(self, split: str) -> tuple[int | None, ...]:
        return (len(self.listing.rows(split)), None, None, None)

    def read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        found, preparation = self.listing, self._decided()
        rows = found.rows(split)
        kept = self.rows(len(rows))
        if preparation.cache is None:
            folder.check_memory(Path(self.where), len(kept) * int(np.prod(preparation.target())))
        images = decoding.images(found, split, kept, preparation, self.name, self.progress)
        return images, found.labels[rows[kept.numbers()]]

    def identity(self, split: str) -> list[str]:
        found = self.listing
        told = hashlib.sha256()
        for row in found.rows(split):
            name = found.names[row]
            # No times: each host may have a copy of its own.
            told.update(f'{name} {found.files[name].size} {found.labels[row]}\n'.encode())
        return [f'{len(found.rows(split))} images {told.hexdigest()}']

    def groups(self, split: str, name: str) -> np.ndarray:
        found = self.listing
        names = found.group_names(name, self.name)
        return np.array([group_number(names[row]) for row in found.rows(split)], np.int64)

    def near_groups(self, name: str) -> np.ndarray:
        return self.groups('train', name)

    def _decided(self) -> Preparation:
        """Return the preparation with size and channels; images that stay as they are decide them."""
        preparation = self.preparation
        if preparation.changes_images or None not in (preparation.image_size, preparation.channels):
            return preparation
        height, width, channels = self.describe().image_shape
        if height is None or height != width:
            raise ValueError(
                f'the images of {self.name} differ in size, or are no squares; config.data.fit is '
                f"'none'; it must be 'crop' or 'pad'"
            )
        return dataclasses.replace(
            preparation,
            image_size=preparation.image_size or height,
            channels=preparation.channels or channels,
        )

    def _headers(self) -> tuple[list[Header], list[str]]:
        """Read headers, and tell in words what they say; a ValueError names all files that cannot be used."""
        found = self.listing
        numbers = self.to_look_at()
        names = [found.names[number] for number in numbers]
        key = (found.tree, tuple((name, found.files[name]) for name in names), found.refused)
        if key not in _last_headers:
            headers = _read_headers(found, names, self.name)
            _last_headers.clear()
            _last_headers[key] = headers
        headers = _last_headers[key]
        formats = Counter(header.format for header in headers).most_common()
        counted = ', '.join(f'{count:,} {name}' for name, count in formats)
        sizes = sorted({header.size for header in headers}, key=lambda size: (size[0] * size[1], size))
        said = 'x'.join(map(str, sizes[0]))
        if len(sizes) > 1:
            said = f'{len(sizes):,} sizes from {said} to {"x".join(map(str, sizes[-1]))}'
        looked = '' if len(names) == len(found.names) else f' (of {len(names):,} that were looked at)'
        return headers, [f'{len(found.names):,} image files{looked}: {counted}', f'height x width: {said}']


def _read_headers(found: Listing, names: Sequence[str], source: str) -> list[Header]:
    def look(start: int) -> list[Header | str]:
        return [_header(found, name) for name in names[start : start + _CHUNK]]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        looked = [each for chunk in pool.map(look, range(0, len(names), _CHUNK)) for each in chunk]
    refused = [(name, each) for name, each in zip(names, looked) if isinstance(each, str)]
    refused += found.refused
    if refused:
        raise ValueError(decode.refusals(refused, len(names) + len(found.refused), source))
    return looked


def _header(found: Listing, name: str) -> Header | str:
    """Read the header of one file; a text says why it cannot be used."""
    file = found.files[name]
    for whole in (False, True):
        try:
            with found.tree.opened(file.own, whole) as opened:
                return decode.header(opened, file.size)
        except decode.Refused as error:
            reason = error.kind
        except OSError as error:
            reason = decode.UNREADABLE if error.errno else decode.DAMAGED
    return reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(ImageFiles):
    """A folder of image files."""

    form = 'folder:<path>'

    def tree(self) -> Tree:
        where = Path(self.where).expanduser()
        if not where.is_dir():
            what = 'a file; zip:<path> reads archives, npz:<path> arrays' if where.exists() else 'not there'
            raise FileNotFoundError(f'{self.name} must be a folder with images; {where} is {what}')
        return FolderTree(str(where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zip(ImageFiles):
    """A zip archive of image files."""

    form = 'zip:<path>'

    def tree(self) -> Tree:
        where = Path(self.where).expanduser()
        if not where.is_file():
            what = 'a folder; folder:<path> reads it' if where.exists() else 'not there'
            raise FileNotFoundError(f'{self.name} must be a zip archive with images; {where} is {what}')
        return ZipTree(str(where))
