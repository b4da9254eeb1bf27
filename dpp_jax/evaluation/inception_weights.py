"""Where the weights of Inception-v3 come from: the user's file, the cache, or the public file by download."""

import contextlib
import hashlib
import os
from pathlib import Path
import tempfile
import threading
import urllib.request

from dpp_jax import files
from dpp_jax.evaluation import inception
from dpp_jax.interop import torch_file
from dpp_jax.training import devices

URL = (
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
    'pt_inception-2015-12-05-6726825d.pth'
)
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'

_SECONDS = 5.0  # for the server to answer, and for each piece of the file
_PIECE = 2**20  # bytes
_MOST = 2**28  # bytes of a download


class NotAvailable(Exception):
    """There are no weights on this machine, and they cannot be downloaded."""


def load(path: str = '') -> inception.Inception:
    """Return the network with its weights.

    They are converted once, and kept in the user's cache folder. Without a path, the public file is
    downloaded if it is not in the cache, and checked by its SHA-256.

    Args:
        path: of the public PyTorch file, or of one with the same parameters; '' = the public one.

    Raises:
        OSError, ValueError: the file at `path` cannot be read, or holds something else.
        NotAvailable: no path is given, and the file cannot be downloaded.
    """
    path = path and files.path(path)
    digest = _digest(path) if path else SHA256
    network = _cached(digest)
    if network is None and path:
        network = _converted(path, digest)
    elif network is None:
        with tempfile.TemporaryDirectory() as folder:
            network = _converted(_download(Path(folder)), digest)
    return network


def is_missing(path: str = '') -> bool:
    """Whether `load` would have to download the weights."""
    return not path and not _cache(SHA256).exists()


def _cache(digest: str) -> Path:
    return devices.cache_folder() / 'inception' / f'{digest}.npz'


def _cached(digest: str) -> inception.Inception | None:
    """Return the network that a file with this digest was converted to, if the cache has it whole."""
    try:
        return inception.Inception.from_arrays(files.read_npz(_cache(digest), 'It is written again'))
    except (OSError, ValueError):
        return None


def _converted(path: str | Path, digest: str) -> inception.Inception:
    """Convert a PyTorch file, and keep the network in the cache."""
    named = torch_file.read(path)
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise ValueError(f'{path} holds no parameters by name; it must be the state of Inception-v3')
    try:
        params = inception.params_from_pytorch(named)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path}: {error}') from error
    name = inception.NAME
    if digest != SHA256:
        name += f'; NOT its public weights, but those of a file with SHA-256 {digest[:8]}…'
    network = inception.Inception(params=params, name=name)
    with contextlib.suppress(OSError):  # a cache may fail
        _cache(digest).parent.mkdir(parents=True, exist_ok=True)
        files.write_npz(_cache(digest), **network.to_arrays())
    return network


def _digest(path: str | os.PathLike) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _download(folder: Path) -> Path:
    """Download the public file into a folder, and check it.

    The first answer is waited for in a thread: names may take minutes to fail where there is no network.
    """
    answers = []

    def ask():
        try:
            answers.append(urllib.request.urlopen(URL, timeout=_SECONDS))
        except (OSError, ValueError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    answer = answers[0] if answers else TimeoutError(f'no answer within {_SECONDS:g} s')
    if isinstance(answer, Exception):
        raise NotAvailable(f'{URL} cannot be downloaded ({answer})') from answer
    print(f'downloading the weights of Inception-v3 (91 MB, once) from {URL}', flush=True)
    path, size = folder / 'inception.pth', 0
    try:
        with answer, open(path, 'wb') as file:
            while size < _MOST and (piece := answer.read(_PIECE)):
                file.write(piece)
                size += len(piece)
    except OSError as error:
        raise NotAvailable(f'{URL} cannot be downloaded ({error})') from error
    found = _digest(path)
    if found != SHA256:
        raise NotAvailable(f'{URL} has the SHA-256 {found}; it must be {SHA256}')
    return path
