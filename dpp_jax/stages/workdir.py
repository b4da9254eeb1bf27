"""The work directory: what may be published in release/, the rest in private/.

Every file appears under its name only when it is complete, so a crash leaves the old file or none.
"""

from collections.abc import Iterator
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
    sampling: int
    noise: jax.Array


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
            for name in (f'{_UNFINISHED}*', '*.orbax-checkpoint-tmp*'):  # of a process that was killed
                for litter in list(self.root.glob(f'*/**/{name}')):
                    if litter.is_dir():
                        shutil.rmtree(litter)
                    else:
                        litter.unlink(missing_ok=True)
            yield

    def check(self, config: ConfigDict) -> None:
        """Raise a ValueError that lists the differences if another config was recorded here."""
        path = self.release / 'config.json'
        if not path.exists():
            return
        differences = _differences(json.loads(path.read_text()), flatten(config))
        if differences:
            raise ValueError(
                f'--workdir={self.root} was made with another config:\n  '
                + '\n  '.join(differences)
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
        digest = hashlib.sha256()
        for array in (images, labels):
            digest.update(f'{array.dtype} {array.shape} '.encode())
            digest.update(np.ascontiguousarray(array))
        found = {'count': len(images), 'sha256': digest.hexdigest()}
        path = self.private / 'data.json'
        known = json.loads(path.read_text()) if path.exists() else {'_note': _PRIVATE_NOTE.strip()}
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
        path = self.private / 'keys.json'
        known = json.loads(path.read_text()) if path.exists() else {'_note': _PRIVATE_NOTE.strip()}
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


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per setting that differs and matters."""
    return [
        f'config.{name}: {old.get(name, "not set")} there, {new.get(name, "not set")} now'
        for name in sorted(set(old) | set(new))
        if old.get(name, '') != new.get(name, '') and name not in FREE_SETTINGS
    ]


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


def unfinished(path: Path) -> Path:
    """Where a folder is made before it gets the name `path`; cleared when a run starts again."""
    return path.with_name(_UNFINISHED + path.name)
