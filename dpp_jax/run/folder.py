"""The work directory: what may be published in release/, the rest in private/.

Every file appears under its name only when it is complete, so a crash leaves the old file or none.
"""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from pathlib import Path
import secrets
import shutil
import tempfile
from typing import Any, BinaryIO
import zipfile
import zlib

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.privacy.ledger import Ledger, sync_folder

# Settings that change no result: a run may be continued with other values.
FREE_SETTINGS = (
    'loop.log_every_steps',
    'loop.checkpoint_every_seconds',
    'loop.images_at_once',
    'finetune.microbatch',
    'generate.batch_size',
    'generate.png_tree',
)
# Settings of what is made from the released model. They bind the images and the scores that they made
# (`generate.check`, `evaluate.load`), not the folder.
_LATER_SETTINGS = ('generate.', 'evaluate.')
# What NumPy and zipfile raise for files that lost their end, or have zeros where data was.
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_UNFINISHED = '.new_'  # how names of what is not complete begin
_PRIVATE_NOTE = (
    'Computed from the private images WITHOUT a privacy guarantee, or secret keys on which the '
    'guarantee rests. Nothing in this folder may be published.\n'
)
_RELEASE_NOTE = (
    'Everything in this folder is covered by the (ε, δ) of privacy_statement.md, which follows from '
    'ledger.jsonl; unless config.json has a seed: then nothing here is private.\n'
)


@dataclasses.dataclass(frozen=True)
class Keys:
    """Randomness of one part of a run.

    Attributes:
        identifier: public name of this randomness, for the ledger; independent of the keys.
        sampling: 128 bits, for Poisson sampling (Philox).
        noise: JAX key (threefry takes 64 bits).
    """

    identifier: str
    sampling: int = dataclasses.field(repr=False)
    noise: jax.Array = dataclasses.field(repr=False)


class WorkDir:
    """Paths and files of one run."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.release = self.root / 'release'
        self.private = self.root / 'private'

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The folders, made if they are not there, for this process alone.

        Raises:
            PermissionError: they cannot be written, or another process works in them.
        """
        try:
            self.release.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            os.chmod(self.private, 0o700)
            for folder in (self.release, self.private):
                with tempfile.TemporaryFile(dir=folder):
                    pass
            lock = open(self.root / '.lock', 'a')
        except OSError as error:
            raise PermissionError(
                f'--workdir={self.root} cannot be written ({error}); it must be a folder that this '
                'user may create and write'
            ) from error
        with lock:
            try:
                # The system lets go of it however this process ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise PermissionError(
                    f'--workdir={self.root} is in use by another process; wait for it, stop it, or '
                    'use another --workdir'
                ) from error
            self._remove_litter()
            yield

    def _remove_litter(self) -> None:
        """What a killed process left unfinished; folders that are not the run's are not looked into."""
        found = [path for path in self.root.glob(f'{_UNFINISHED}*') if not path.is_dir()]
        for folder in (self.release, self.private):
            for name in (f'{_UNFINISHED}*', '*.orbax-checkpoint-tmp*'):
                found += folder.rglob(name)
        for litter in found:
            if litter.is_dir() and not litter.is_symlink():
                shutil.rmtree(litter)
            else:
                litter.unlink(missing_ok=True)

    def check(self, config: ConfigDict) -> None:
        """Raise a ValueError that lists the differences if another config was recorded here."""
        path = self.release / 'config.json'
        if not path.exists():
            return
        recorded = read_json(
            path, 'Restore it; or delete it, and give the settings of this run: they are written again'
        )
        found = differences(recorded, flatten(config), FREE_SETTINGS + _LATER_SETTINGS)
        if found:
            raise ValueError(
                f'--workdir={self.root} was made with another config:\n  '
                + '\n  '.join(found)
                + '\nUse those settings, or another --workdir.'
            )

    def record(self, config: ConfigDict) -> None:
        """Bind the folder to `config`, and put a note in each half of what may be done with it."""
        for path, text in (
            (self.release / 'README.txt', _RELEASE_NOTE),
            (self.private / 'README.txt', _PRIVATE_NOTE),
        ):
            if not path.exists():
                write_text(path, text)
        if not (self.release / 'config.json').exists():
            write_json(self.release / 'config.json', flatten(config))

    def check_fingerprint(self, name: str, images: np.ndarray, labels: np.ndarray) -> None:
        """Raise if `name` names other images than when it was first seen in this folder.

        Half a run on one set and half on another would not be the mechanism that was accounted for.
        """
        found = {'count': len(images), 'sha256': _digest([images, labels])}
        path = self.private / 'data.json'
        known = {'_note': _PRIVATE_NOTE.strip()}
        if path.exists():
            known = read_json(
                path, 'Restore it; or delete it if the private images are those of before: it is made again'
            )
        if name not in known:
            write_json(path, {**known, name: found}, mode=0o600)
        elif known[name] != found:
            raise ValueError(
                f'config.data.source gives {len(images)} images that are not those '
                f'({known[name]["count"]}) with which {self.root} was made: their fingerprint differs '
                'from private/data.json. Restore the data, or use another --workdir'
            )

    def secret_keys(self, ledger: Ledger, mechanism: str, seed: int | None) -> Keys:
        """`keys` of a mechanism; refused if the ledger names releases made with other keys.

        With its old keys a mechanism repeats what it released; with new ones it would release,
        and spend, a second time.
        """
        keys = self.keys(mechanism, seed)
        others = {entry.randomness for entry in ledger.entries if entry.mechanism == mechanism}
        if others - {keys.identifier}:
            raise ValueError(
                f'{ledger.path} names releases of {mechanism} with keys that '
                f'{self.private / "keys.json"} does not hold; going on would spend its budget a '
                'second time. Restore private/, or use another --workdir'
            )
        return keys

    def keys(self, part: str, seed: int | None) -> Keys:
        """The keys of one part ('central_query', 'dp_sgd', 'generate', ...), made on first use.

        They come from the operating system's entropy, or from `seed` in tests.
        """
        path, known = self._keys_file, self._known_keys()
        if part in known:
            found = known[part]['identifier']
            if is_seeded(found) != (seed is not None) or seed is not None and found != seeded(seed):
                raise ValueError(
                    f'config.seed is {seed}; {path} holds keys of {part} that were made otherwise '
                    f'({found}). Use the seed that the folder was made with, or another --workdir'
                )
        else:
            known[part] = _fresh_secrets(part, seed)
            write_json(path, known, mode=0o600)
        identifier, sampling, noise = (known[part][k] for k in ('identifier', 'sampling', 'noise'))
        words = np.array([int(noise[:8], 16), int(noise[8:], 16)], np.uint32)
        return Keys(identifier, int(sampling, 16), jax.random.wrap_key_data(words, impl='threefry2x32'))

    def bind_release(self, part: str, arrays: Iterable[np.ndarray]) -> None:
        """Note beside the keys of `part` what is about to be released with them.

        A release that was lost may be made again if it is the same, bit for bit. The same noise on
        something else, as another device rounds it, would be a second release.

        Raises:
            ValueError: something else was released with these keys, or was about to be.
        """
        known, digest = self._known_keys(), _digest(arrays)
        before = known[part].setdefault('released', digest)
        if before != digest:
            raise ValueError(
                f'{part}, made again, is not what was released, or was about to be, from {self.root} with the same noise '
                f'(SHA-256 {digest[:12]} now, {before[:12]} in {self._keys_file}), and is not '
                'released. Restore what was released; or make it again with the devices and versions '
                'of release/code.json; or use another --workdir'
            )
        write_json(self._keys_file, known, mode=0o600)

    def may_repeat(self, part: str) -> bool:
        """Whether `bind_release` can tell if what `part` makes is what was released with its keys."""
        known = self._known_keys()
        return part not in known or 'released' in known[part]

    @property
    def _keys_file(self) -> Path:
        return self.private / 'keys.json'

    def _known_keys(self) -> dict[str, Any]:
        if not self._keys_file.exists():
            return {'_note': _PRIVATE_NOTE.strip()}
        return read_json(
            self._keys_file,
            'Restore it: without these keys no private image can be asked again. If release/model/finetune '
            'is there, nothing else needs them: delete it, and images are drawn with new keys',
        )


def _fresh_secrets(part: str, seed: int | None) -> dict[str, str]:
    """128 bits for sampling and 64 for noise, in hexadecimal, and a name for the pair."""
    if seed is None:
        return {
            'identifier': secrets.token_hex(8),
            'sampling': secrets.token_hex(16),
            'noise': secrets.token_hex(8),
        }
    digest = hashlib.sha256(f'{seed}/{part}'.encode()).hexdigest()
    return {
        'identifier': seeded(seed),
        'sampling': digest[:32],
        'noise': digest[32:48],
    }


def seeded(seed: int) -> str:
    """The public name of keys that were made from a seed."""
    return f'seed-{seed}-not-private'


def is_seeded(identifier: str) -> bool:
    """Whether the keys of this name were made from a seed."""
    return identifier.startswith('seed-')


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Settings by their full names, in JSON's types."""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, (dict, ConfigDict)):
            for key in value.keys():
                visit(f'{prefix}.{key}' if prefix else key, value[key])
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    visit('', config)
    return flat


def differences(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """One line per setting that differs and whose name does not begin with one in `free`."""
    return [
        f'config.{name}: {old.get(name, "not set")} there, {new.get(name, "not set")} now'
        for name in sorted(set(old) | set(new))
        if old.get(name, '') != new.get(name, '') and not name.startswith(free)
    ]


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of types, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f'{array.dtype} {array.shape} '.encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write to, that appears under its name when it is complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_UNFINISHED, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)  # the new name, too, survives a power failure


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that the file is there whole or not at all."""
    with whole_file(path, mode) as file:
        file.write(data)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """`write_bytes` for JSON, readable."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n', mode)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """A compressed .npz, whole or not at all."""
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in `path`, which must be there.

    Raises:
        ValueError: there is something else, as a power failure or an editor may leave it. The message
            names the file and ends with `advice`: what to do then.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError('it holds no JSON object')
    except (OSError, ValueError) as error:  # ValueError: of UTF-8 and of JSON alike
        raise ValueError(f'{path} cannot be read ({error}). {advice}') from error
    return value


def load_npz(path: Path, advice: str) -> dict[str, np.ndarray]:
    """All arrays in `path`, which must be there; raises a ValueError as `read_json` does."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ValueError(f'{path} cannot be read ({error}). {advice}') from error


def unfinished(path: Path) -> Path:
    """Where a folder is made before it gets the name `path`; cleared when a run starts again."""
    return path.with_name(_UNFINISHED + path.name)
