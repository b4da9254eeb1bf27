"""Every format of image files is read, or refused by name."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, features
import pytest

from dpp_jax.data import decode
from dpp_jax.data.preparation import Preparation

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 6), np.uint8)
COLOR = RNG.integers(0, 256, (6, 6, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (6, 6), np.uint16)


def saved(image, kind='PNG', **settings):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def read(content, channels=3, size=6, **settings):
    return decode.decode(content, Preparation(image_size=size, channels=channels, **settings))


def looked_at(content):
    return decode.header(io.BytesIO(content), len(content))


def on_white(color, alpha):
    alpha = alpha[..., None] / 255
    return color * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'PPM', 'TGA', 'GIF', 'PCX'])
def test_formats_without_loss_are_read_as_they_are(kind):
    np.testing.assert_array_equal(read(saved(GRAY, kind), channels=1)[..., 0], GRAY)
    assert not looked_at(saved(GRAY, kind)).is_color
    if kind != 'GIF':
        np.testing.assert_array_equal(read(saved(COLOR, kind)), COLOR)
        assert looked_at(saved(COLOR, kind)).is_color


@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'AVIF', 'JPEG2000', 'MPO'])
def test_formats_with_loss_are_read_nearly_as_they_are(kind):
    if kind in ('WEBP', 'AVIF') and not features.check(kind.lower()):
        pytest.skip(f'this Pillow was built without {kind}')
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    content = saved(smooth, kind)
    assert np.abs(read(content, size=16).astype(int) - smooth).max() < 8
    assert looked_at(content).size == (16, 16)


def rounded(deep):
    return np.floor(deep * (255 / 65535) + 0.5).astype(np.uint8)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
def test_of_16_bits_the_whole_range_is_kept(kind):
    content = saved(Image.fromarray(DEEP), kind)
    found = read(content, channels=1)[..., 0]
    np.testing.assert_array_equal(found, rounded(DEEP))
    assert '16 bits' in looked_at(content).format and not looked_at(content).is_color


def test_of_16_bits_the_other_order_of_bytes_is_known():
    raw = struct.pack('>4sI', b'MM\0*', 8) + tiff_directory(DEEP.astype('>u2').tobytes())
    np.testing.assert_array_equal(read(raw, channels=1)[..., 0], rounded(DEEP))


def tiff_directory(pixels):
    """The rest of a TIFF file of 6x6 gray pixels of 16 bits, big-endian."""
    entries = [(256, 3, 6), (257, 3, 6), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1)]
    entries += [(278, 3, 6), (279, 4, len(pixels))]
    start = 8 + 2 + 12 * len(entries) + 4
    packed = struct.pack('>H', len(entries))
    for tag, kind, value in entries:
        value = start if tag == 273 else value
        packed += struct.pack('>HHI', tag, kind, 1) + struct.pack('>HH' if kind == 3 else '>I', value, *(
            (0,) if kind == 3 else ()
        ))  # fmt: skip
    return packed + bytes(4) + pixels


def test_palettes_are_looked_up():
    image = Image.fromarray(COLOR).quantize(16)
    expected = np.asarray(image.convert('RGB'))
    for kind in ('PNG', 'GIF', 'BMP', 'TIFF'):
        np.testing.assert_array_equal(read(saved(image, kind), channels=3), expected)
        assert looked_at(saved(image, kind)).is_color
    gray = Image.fromarray(GRAY).convert('P', palette=Image.Palette.ADAPTIVE)
    for kind in ('PNG', 'BMP', 'TIFF'):
        assert not looked_at(saved(gray, kind)).is_color
        np.testing.assert_array_equal(read(saved(gray, kind), channels=1)[..., 0], GRAY)


def test_one_bit_is_black_and_white():
    bits = GRAY > 127
    np.testing.assert_array_equal(read(saved(bits), channels=1)[..., 0], np.where(bits, 255, 0))


def test_what_is_transparent_becomes_white():
    alpha = RNG.integers(0, 256, (6, 6), np.uint8)
    color = read(saved(np.dstack([COLOR, alpha])))
    assert np.abs(color - on_white(COLOR, alpha)).max() <= 1
    gray = read(saved(Image.fromarray(np.dstack([GRAY, alpha]), 'LA')), channels=1)
    assert np.abs(gray - on_white(GRAY[..., None], alpha)).max() <= 1
    image = Image.fromarray(COLOR).quantize(4)
    some = np.asarray(image) == 2
    found = read(saved(image, transparency=2))
    assert some.any() and (found[some] == 255).all()
    np.testing.assert_array_equal(found[~some], np.asarray(image.convert('RGB'))[~some])
    keyed = read(saved(GRAY, transparency=int(GRAY[0, 0])), channels=1)
    assert (
        keyed[0, 0, 0] == 255
        and keyed[GRAY != GRAY[0, 0]].ravel().tolist() == GRAY[GRAY != GRAY[0, 0]].tolist()
    )


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_upright(kind, orientation):
    upright = RNG.integers(0, 256, (4, 6), np.uint8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(np.ascontiguousarray(stored), kind, exif=exif)
    assert looked_at(content).size == (4, 6)
    padded = read(content, channels=1, fit='pad')[..., 0]
    np.testing.assert_array_equal(padded[1:5], upright)


def test_four_inks_are_turned_to_rgb():
    inks = Image.new('CMYK', (8, 8), (0, 255, 255, 0))
    for kind in ('JPEG', 'TIFF'):
        content = saved(inks, kind)
        assert np.abs(read(content, size=8).astype(int) - (255, 0, 0)).max() < 8
        assert looked_at(content).is_color and 'CMYK' in looked_at(content).format


def test_the_content_and_not_the_name_decides_the_format():
    np.testing.assert_array_equal(read(saved(COLOR, 'BMP')), COLOR)  # bytes have no name at all


def animated(kind):
    frames = [Image.fromarray(RNG.integers(0, 256, (6, 6), np.uint8)) for _ in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def bomb(side):
    """A PNG of a few bytes that claims many pixels."""

    def chunk(name, content):
        return (
            struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
        )

    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', packed) + chunk(b'IEND', b'')


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


BAD = {
    'empty': (b'', decode.EMPTY),
    'text': (b'no image at all, but text', decode.UNKNOWN),
    'html': (b'<html><body>404</body></html>' * 50, decode.UNKNOWN),
    'gif': (animated('GIF'), decode.ANIMATED),
    'apng': (animated('PNG'), decode.ANIMATED),
    'webp': (animated('WEBP') if features.check('webp') else animated('GIF'), decode.ANIMATED),
    'pages': (animated('TIFF'), decode.ANIMATED),
    'float': (saved(Image.fromarray(RNG.random((6, 6), np.float32)), 'TIFF'), decode.DEPTH),
    '32 bits': (saved(Image.fromarray(DEEP.astype(np.int32)), 'TIFF'), decode.DEPTH),
    'bomb': (bomb(10_000), decode.TOO_LARGE),
    'large bomb': (bomb(60_000), decode.TOO_LARGE),
}
NOISE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
BAD_PIXELS = {
    'cut png': (saved(NOISE)[:-3000], decode.CUT_OFF),
    'png without end': (saved(NOISE)[:-12], decode.CUT_OFF),
    'cut jpeg': (saved(NOISE, 'JPEG')[:-1500], decode.CUT_OFF),
    'cut bmp': (saved(NOISE, 'BMP')[:-1500], decode.CUT_OFF),
    'flipped bit': (flipped(saved(NOISE), 5000), decode.DAMAGED),
}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', BAD)
def test_what_is_no_single_image_is_refused_from_its_header(name):
    content, reason = BAD[name]
    for look in (looked_at, read):
        with pytest.raises(decode.Refused) as refused:
            look(content)
        assert refused.value.kind == reason


@pytest.mark.parametrize('name', BAD_PIXELS)
def test_damaged_pixels_are_refused(name):
    content, reason = BAD_PIXELS[name]
    with pytest.raises(decode.Refused) as refused:
        read(content, size=64)
    assert refused.value.kind == reason


@pytest.mark.filterwarnings('ignore::UserWarning')  # of Pillow: "Corrupt EXIF data"
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP'])
def test_whatever_bytes_are_damaged_nothing_but_a_refusal_is_raised(kind):
    content = saved(NOISE if kind != 'GIF' else NOISE[..., 0], kind)
    for _ in range(60):
        damaged = bytearray(content[: RNG.integers(1, len(content))])
        damaged[RNG.integers(len(damaged))] = RNG.integers(256)
        for look in (looked_at, lambda content: read(content, size=64)):
            try:
                assert look(bytes(damaged)) is not None
            except decode.Refused as refused:
                assert refused.kind


def test_images_that_must_fit_already_are_refused_by_what_does_not():
    for content, channels, size, reason in (
        (saved(COLOR), 3, 8, decode.OTHER_SIZE),
        (saved(COLOR), 1, 6, decode.IN_COLOR),
    ):
        with pytest.raises(decode.Refused) as refused:
            read(content, channels=channels, size=size)
        assert refused.value.kind == reason
    np.testing.assert_array_equal(read(saved(GRAY), channels=3), np.dstack([GRAY] * 3))  # nothing is lost


def test_refusals_name_the_first_ten_of_each_reason():
    found = [(f'{number:02}.png', decode.EMPTY) for number in range(12)] + [('x.gif', decode.ANIMATED)]
    text = decode.refusals(found, 40, 'folder:scans')
    assert text.startswith('13 of 40 image files of folder:scans cannot be used:\n  12 empty: 00.png, ')
    assert '09.png, …\n' in text and '10.png' not in text and text.endswith('of each: x.gif')
