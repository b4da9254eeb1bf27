"""Compare two sets of images by the public FID and by KID.

    dpp-jax-fid runs/digits/release/synthetic/images.npz /data/real
    dpp-jax-fid made.zip real.zip --features=pt_inception-2015-12-05-6726825d.pth

A set is a folder of images, with folders in it or without; a zip archive of the same; or an .npz file with an
array `images`, uint8 (N, H, W, C). Images may differ in size: each is resized to 299x299 pixels. FID is
computed with Inception-v3, as everybody's; its weights are downloaded once. The first set is compared with
the second one: the spread is that of the first one's choice. Memory: 8 KB for each image.
"""

import argparse
from collections.abc import Iterator
import os
from pathlib import Path
import sys
import zipfile

from dpp_jax.training import preemption  # imports nothing: a Ctrl-C is answered from the start

_PUBLIC = 'inception'
# 2,048 features need many images: with 10,000 FID is still too large by some units.
_FEW_IMAGES = 10_000


def entry_point() -> None:
    """Run the console script `dpp-jax-fid`."""
    preemption.leave_at_once()  # the imports take seconds
    parser = argparse.ArgumentParser(
        'dpp-jax-fid', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('a', help='folder, .npz or .zip of the images to judge')
    parser.add_argument('b', help='folder, .npz or .zip of the real images')
    parser.add_argument(
        '--features',
        default=_PUBLIC,
        help="'inception' (the public weights, downloaded once), or the path of their PyTorch file",
    )
    arguments = parser.parse_args()
    try:
        print(compare(arguments.a, arguments.b, arguments.features))
    except (OSError, ValueError) as error:
        sys.exit(f'dpp-jax-fid: {" ".join(str(error).split())}')


def compare(first: str, second: str, features: str = _PUBLIC) -> str:
    """Return FID and KID of two sets of images in lines for people.

    Args:
        first, second: paths of the sets.
        features: 'inception', or the path of the PyTorch file of its weights.

    Raises:
        OSError, ValueError: a set or the weights cannot be read.
    """
    counts = [_count(path) for path in (first, second)]  # mistakes are told before anything starts
    import numpy as np

    from dpp_jax.evaluation import fid, inception_weights, scores
    from dpp_jax.training import devices, progress

    devices.one_per_core()
    devices.keep_compiled_programs()
    try:
        network = inception_weights.load('' if features == _PUBLIC else features)
    except inception_weights.NotAvailable as error:
        raise ValueError(f'{error}. Download it elsewhere, and name it by --features=<path>') from error
    with progress.bar(sum(counts), 'features', 'image') as bar:
        made, real = (_features(path, network, bar) for path in (first, second))
    reference = fid.Gaussian.of_features(real)
    value = fid.distance(fid.Gaussian.of_features(made), reference)
    spread = fid.spread(made, reference, np.random.default_rng(0))
    lines = [f'FID       {value:.4f}' + ('' if spread is None else f' ± {spread:.4f}')]
    if min(counts) >= 4:
        kid = scores.kid(made, real, np.random.default_rng(0))
        lines.append(f'KID       {kid.value:.6f} ± {kid.spread:.6f}')
    lines.append(f'images    {counts[0]:,} and {counts[1]:,}')
    lines.append(f'features  {network.name}')
    if min(counts) < _FEW_IMAGES:
        lines.append(
            f'fewer than {_FEW_IMAGES:,} images make FID too large: compare it only with FIDs of as many'
        )
    return '\n'.join(lines)


def _features(path: str, network, bar):
    """Return the features of a set of images, float32 (N, 2048)."""
    import jax
    import numpy as np

    from dpp_jax.evaluation import inception

    def flush():
        found.append(network.features(np.stack(batch)))
        bar.update(len(batch))
        batch.clear()

    found, batch = [], []
    for image in read_images(path):
        resized = inception.resized(image[None].astype(np.float32))[0]
        batch.append(np.broadcast_to(resized, (*resized.shape[:2], 3)))
        if len(batch) == network.images_at_once * jax.local_device_count():
            flush()
    if batch:
        flush()
    return np.concatenate(found)


def read_images(path: str | os.PathLike) -> Iterator:
    """Yield the images of a set one by one: uint8 (H, W, C), C = 1 or 3, of any size.

    Args:
        path: a folder, a zip archive or an .npz file, see above.

    Raises:
        OSError, ValueError: it holds no images, or one that cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix == '.npz':
        yield from _read_npz(path)
    elif path.is_dir():
        for file in _files(path):
            yield _decode(file.read_bytes(), str(file))
    else:
        with zipfile.ZipFile(path) as archive:
            for name in _names(archive):
                yield _decode(archive.read(name), f'{path}/{name}')


def _count(path: str) -> int:
    """Return how many images a set has."""
    where = Path(path).expanduser()
    if where.suffix == '.npz':
        found = len(_read_npz(where))
    elif where.is_dir():
        found = len(_files(where))
    elif zipfile.is_zipfile(where):
        with zipfile.ZipFile(where) as archive:
            found = len(_names(archive))
    else:
        is_there = 'is no folder, .npz or .zip file' if where.exists() else 'is not there'
        raise ValueError(f'{path} {is_there}; it must be a folder, a .zip or an .npz file with images')
    if found < 2:
        raise ValueError(f'{path} has {found} image(s); FID needs at least 2')
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob('*') if file.is_file() and _is_image(file.name))


def _names(archive: zipfile.ZipFile) -> list[str]:
    return sorted(name for name in archive.namelist() if _is_image(name.rpartition('/')[2]))


def _is_image(name: str) -> bool:
    from dpp_jax.data import decode

    return Path(name).suffix.lower() in decode.ENDINGS and not name.startswith('.')  # macOS adds ._name


def _read_npz(path: Path):
    """Return the array `images` of an .npz file."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            if 'images' not in arrays:
                raise ValueError(f'{path} has {", ".join(arrays)}; it must have an array images')
            images = arrays['images']
    except zipfile.BadZipFile as error:
        raise ValueError(f'{path} is no .npz file') from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f'{path} has images of {images.dtype} and shape {images.shape}; they must be uint8 (N, H, W, C), '
            'with C = 1 or 3'
        )
    return images


def _decode(content: bytes, name: str):
    """Return the image in a file, uint8 (H, W, C)."""
    from dpp_jax.data import decode

    try:
        return decode.as_it_is(content)
    except decode.Refused as refused:
        raise ValueError(f'{name} is {refused.kind}') from refused


if __name__ == '__main__':
    entry_point()
