"""From the bytes of one image file to a prepared image, or to the reason why not.

| file | what happens |
|---|---|
| 8 bits, gray or RGB; palette; 1 bit; CMYK, YCbCr, LAB | read as gray or RGB |
| 16 bits (PNG, TIFF, PGM, JPEG 2000) | 65535 becomes 255, rounded |
| alpha, or a transparent color | laid on white |
| turned by EXIF | turned upright |
| MPO (of phones) | its first picture |
| empty, cut off, damaged, no image, animated, several pages, 32 bits, too many pixels | refused by name |

This module is imported by the processes that decode: it needs Pillow and NumPy only.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import io
from typing import BinaryIO
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dpp_jax.data.preparation import Preparation, prepare

# Endings of files that are read. Content decides the format: a wrong one of these does no harm.
ENDINGS = frozenset(
    '.png .apng .jpg .jpeg .jpe .jfif .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .pfm .tga .jp2 '
    '.j2k .jpx .avif .mpo .pcx'.split()
)
# Endings of images that are not read: left out in silence, they would be missed.
FOREIGN = frozenset(
    '.heic .heif .dcm .dicom .nii .svg .psd .raw .dng .nef .cr2 .arw .mp4 .avi .mov .mkv .webm .svs .ndpi '
    '.mha .mhd .nrrd .exr .hdr .jxl .eps .ico .icns'.split()
)
MOST_PIXELS = 89_478_485  # of one image: a quarter of a gibibyte in RGB; Pillow's own limit

EMPTY = 'empty'
UNKNOWN = 'of no known image format'
FOREIGN_FORMAT = 'of a format that is not read; convert them to PNG'
ANIMATED = 'animated, or of several pages; save one picture of each'
CUT_OFF = 'cut off before the end'
DAMAGED = 'damaged'
TOO_LARGE = f'of more than {MOST_PIXELS:,} pixels'
DEPTH = 'of 32-bit or floating-point pixels, which have no fixed range; convert them to 8 or 16 bits'
UNREADABLE = 'not readable by this user'
OTHER_SIZE = "of another size than config.data.image_size; set config.data.fit to 'crop' or 'pad'"
IN_COLOR = (
    "in color, while config.data.channels is 1; set config.data.fit to 'crop' or 'pad' to make them gray"
)
_NAMED = 10  # paths that a message names


class Refused(Exception):
    """A file that cannot be used; `kind` is one of the reasons above."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What is known of an image before its pixels are read.

    Attributes:
        size: (height, width), upright.
        is_color: whether its pixels may be other than gray.
        format: Pillow's name of it, and what is special.
    """

    size: tuple[int, int]
    is_color: bool
    format: str


def header(file: BinaryIO, size: int) -> Header:
    """Read what comes before the pixels.

    Args:
        file: of `size` bytes, at its beginning; or its first bytes only.
        size: of the whole file.

    Raises:
        Refused: it cannot be used, as far as its header tells.
    """
    with _opened(file, size) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        width, height = image.size
        special = [image.format or 'unknown']
        if _is_16_bits(image):
            special.append('16 bits')
        elif image.mode == 'P':
            special.append('palette')
        elif image.mode in ('1', 'CMYK'):
            special.append('1 bit' if image.mode == '1' else 'CMYK')
        if image.has_transparency_data:
            special.append('alpha')
        return Header(
            size=(width, height) if turned else (height, width),
            is_color=_is_color(image),
            format=' '.join(special),
        )


def decode(content: bytes, preparation: Preparation) -> np.ndarray:
    """Return one image, uint8 (H, W, C) as prepared.

    Args:
        content: of the file.
        preparation: whose size and channels are set.

    Raises:
        Refused: it cannot be used.
    """
    image = _read(content)
    if preparation.changes_images:
        return prepare(image, preparation)
    target = preparation.target()
    if (image.height, image.width) != target[:2]:
        raise Refused(OTHER_SIZE)
    if target[2] == 1 and image.mode != 'L':  # as its header says: whether all pixels are gray, none tells
        raise Refused(IN_COLOR)
    return np.asarray(image if target[2] == 1 else image.convert('RGB')).reshape(target)


def as_it_is(content: bytes) -> np.ndarray:
    """Return one image of its own size, uint8 (H, W, C), C = 1 or 3; raises `Refused` as `decode`."""
    image = _read(content)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _read(content: bytes) -> Image.Image:
    """Return the image of a file, upright, of mode L or RGB."""
    if content[:8] == b'\x89PNG\r\n\x1a\n':
        _check_png(content)
    with _opened(io.BytesIO(content), len(content)) as opened:
        return _upright(opened)


def _opened(file: BinaryIO, size: int) -> Image.Image:
    """Open an image, of which the header alone is looked at.

    Here and below, any exception is the file's: Pillow's decoders raise a dozen kinds for damaged bytes.
    """
    if size == 0:
        raise Refused(EMPTY)
    try:
        image = Image.open(file)
        # The first picture of an MPO file is the whole photo.
        is_animated = image.format != 'MPO' and getattr(image, 'is_animated', False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise Refused(UNKNOWN) from error
    except Exception as error:
        raise Refused(_kind_of(error)) from error
    if image.width * image.height > MOST_PIXELS:
        raise Refused(TOO_LARGE)
    if is_animated:
        raise Refused(ANIMATED)
    if image.mode in ('I', 'F') and not _is_16_bits(image):
        raise Refused(DEPTH)
    return image


def _kind_of(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return UNREADABLE
    words = str(error).lower()
    return CUT_OFF if 'truncated' in words or isinstance(error, EOFError) else DAMAGED


def _check_png(content: bytes) -> None:
    """Compare the checksum of every part of a PNG file: Pillow reads pixels without them.

    Raises:
        Refused: a part is damaged, or the last one is not there.
    """
    start = 8
    while start < len(content):
        length = int.from_bytes(content[start : start + 4])
        end = start + 12 + length
        if end > len(content):
            raise Refused(CUT_OFF)
        if zlib.crc32(content[start + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
            raise Refused(DAMAGED)
        if content[start + 4 : start + 8] == b'IEND':
            return
        start = end
    raise Refused(CUT_OFF)


def _is_16_bits(image: Image.Image) -> bool:
    """Whether gray pixels have the range 0..65535."""
    return image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM'))


def _orientation(image: Image.Image) -> int:
    """Return how EXIF says that an image is turned, 1..8; 1 where only its pixels' end would tell.

    Also 1 for TIFF: Pillow turns these itself.
    """
    if image.format == 'TIFF' or (image.format == 'PNG' and 'exif' not in image.info):
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def _is_color(image: Image.Image) -> bool:
    """Whether pixels may be other than gray, before any is read; a palette is, if one of its colors is."""
    if image.mode not in ('P', 'PA') or image.palette is None:
        return image.mode not in ('1', 'L', 'LA', 'La') and not _is_16_bits(image)
    order = image.palette.rawmode or image.palette.mode
    colors = np.frombuffer(bytes(image.palette.palette), np.uint8)
    if order == 'RGB;L':  # of TIFF: all reds first
        colors = colors.reshape(3, -1).T
    elif order in ('RGB', 'BGR', 'RGBX', 'BGRX', 'RGBA', 'BGRA'):
        colors = colors[: len(colors) // len(order) * len(order)].reshape(-1, len(order))[:, :3]
    else:
        return True
    return bool((colors[:, :1] != colors).any())


def _upright(image: Image.Image) -> Image.Image:
    """Read the pixels; return them as mode L or RGB, turned upright and without alpha.

    Raises:
        Refused: they cannot be read.
    """
    is_color = _is_color(image)
    try:
        image.load()
        is_16_bits = _is_16_bits(image)
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if is_16_bits:
            pixels = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            white = Image.new('RGBA', image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert('RGB' if is_color else 'L')
    except MemoryError as error:
        raise Refused(TOO_LARGE) from error
    except Exception as error:
        raise Refused(_kind_of(error)) from error


def refusals(found: Iterable[tuple[str, str]], total: int, where: str) -> str:
    """Say which files cannot be used: for each reason their number and the first ten.

    Args:
        found: (path, reason).
        total: number of files that were looked at.
        where: name of the source.
    """
    of_kind: dict[str, list[str]] = {}
    for path, kind in found:
        of_kind.setdefault(kind, []).append(path)
    lines = [
        f'  {len(paths):,} {kind}: {_first(paths)}'
        for kind, paths in sorted(of_kind.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    count = sum(map(len, of_kind.values()))
    return f'{count:,} of {total:,} image files of {where} cannot be used:\n' + '\n'.join(lines)


def _first(paths: Sequence[str]) -> str:
    named = sorted(paths)[:_NAMED]
    return ', '.join(named) + (', …' if len(paths) > len(named) else '')
