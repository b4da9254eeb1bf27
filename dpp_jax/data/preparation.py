"""From private images of any size, gray or in color, to those that the network takes."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

FITS = ('none', 'crop', 'pad')
RESIZES = {'area': Image.Resampling.BOX, 'lanczos': Image.Resampling.LANCZOS}
VALIDATIONS = ('unused', 'train')
# What `labels` may say besides a path.
LABELS = FOLDERS, UNLABELED, DATASET_JSON = 'folders', 'none', 'dataset.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done with the images of a source, whatever its kind, and how a set of files is read.

    Attributes:
        image_size: pixels per side after it, before any average pooling; None: not decided yet.
        channels: 1 (gray) or 3 (RGB); None: not decided yet.
        fit: 'none': images must have this size and these channels. 'crop': the largest square in the
            center. 'pad': the smallest square around it, black. Both are then resized, and turned to gray
            or to RGB.
        resize: 'area' (the mean of the pixels below; enlarged: the nearest pixel) or 'lanczos'.
        test_share: of the images of a set without a test part, in (0, 1), that are test images.
        split_seed: public number; which images these are follows from it and from their names.
        labels: of files: 'folders' (names of their folders), 'dataset.json' (as StyleGAN archives), path of a
            CSV with the columns file,label[,group], 'none' (one class); '' = dataset.json if it is there,
            else 'folders'.
        image_key, label_key: features of a tfds set; parts separated by '/'. label_key '' = one class.
        groups: what says whose an image is, as `data.groups`; '' = images are the unit.
        validation: what becomes of a validation part beside train and test: 'unused', or 'train' (it belongs
            to the private images).
        is_listing_public: whether neighbors have as many images, see `dpp_jax.data.split`.
        class_names: of the classes, in the order of labels, where they are known; () = as the files say.
        cache: folder in private/ for decoded images; None: they are decoded at every start.
    """

    image_size: int | None = None
    channels: int | None = None
    fit: str = 'none'
    resize: str = 'area'
    test_share: float = 0.1
    split_seed: int = 0
    labels: str = ''
    image_key: str = 'image'
    label_key: str = 'label'
    groups: str = ''
    validation: str = 'unused'
    is_listing_public: bool = True
    class_names: tuple[str, ...] = ()
    cache: Path | None = None

    def __post_init__(self):
        """Raise a ValueError that names the setting, its value and what is allowed."""
        for name, allowed in (('fit', FITS), ('resize', tuple(RESIZES)), ('validation', VALIDATIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f'config.data.{name} is {value!r}; it must be {" or ".join(map(repr, allowed))}'
                )

    @property
    def pixels(self) -> tuple:
        """Return what decides the pixels of a prepared image."""
        return self.image_size, self.channels, self.fit, self.resize

    @property
    def changes_images(self) -> bool:
        """Whether images of any size are made to fit."""
        return self.fit != 'none'

    def shape(self, found: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the shape (H, W, C) that images of the shape `found` have afterwards; None: not known."""
        if not self.changes_images:
            return tuple(found)
        return (self.image_size, self.image_size, self.channels or found[2])

    def target(self) -> tuple[int, int, int]:
        """Return (side, side, channels) of prepared images.

        Raises:
            ValueError: one of them is not decided.
        """
        for name in ('image_size', 'channels'):
            if getattr(self, name) is None:
                raise ValueError(
                    f'config.data.{name} is not set; it must be a number, because config.data.fit is '
                    f'{self.fit!r}'
                )
        return self.image_size, self.image_size, self.channels


AS_THEY_ARE = Preparation()


def prepare(image: Image.Image, preparation: Preparation) -> np.ndarray:
    """Make one image fit, uint8 (side, side, channels).

    Args:
        image: of mode L or RGB, and of any size.
        preparation: whose `fit` is 'crop' or 'pad', and whose size and channels are set.
    """
    side, _, channels = preparation.target()
    mode = 'L' if channels == 1 else 'RGB'
    image = image if image.mode == mode else image.convert(mode)
    box = None
    if image.width != image.height:
        least, most = sorted(image.size)
        if preparation.fit == 'crop':
            left, top = (image.width - least) // 2, (image.height - least) // 2
            box = (left, top, left + least, top + least)
        else:
            square = Image.new(mode, (most, most))
            square.paste(image, ((most - image.width) // 2, (most - image.height) // 2))
            image = square
    if box is not None or image.size != (side, side):
        image = image.resize((side, side), RESIZES[preparation.resize], box=box)
    return np.asarray(image).reshape(side, side, channels)


def prepare_array(image: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Make one image of an array fit: uint8 (H, W), (H, W, 1) or (H, W, 3) → (side, side, channels)."""
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            f'an image is {image.dtype} of shape {image.shape}; with config.data.fit {preparation.fit!r} it '
            'must be uint8 of shape (height, width, 1 or 3)'
        )
    if image.shape == preparation.target():
        return image
    return prepare(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), preparation)


def prepare_arrays(images: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Make images of one array fit: uint8 (n, H, W[, C]) → (n, side, side, channels)."""
    target = preparation.target()
    if images.dtype == np.uint8 and images.shape[1:] == target:
        return images
    prepared = np.empty((len(images), *target), np.uint8)
    for place, image in zip(prepared, images):
        place[...] = prepare_array(image, preparation)
    return prepared
