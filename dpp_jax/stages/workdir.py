"""The work directory: what may be published in release/, the rest in private/.

Every file appears under its name only when it is complete, so a crash leaves the old file or none.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
import secrets
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.privacy.ledger import Ledger

# Settings that change no result: a run may be continued with other values.
FREE_SETTINGS = (
    'loop.log_every_steps',
    'loop.checkpoint_every_seconds',
    'finetune.microbatch',
    'generate.batch_size',
    'generate.png_tree',
)
_PRIVATE_NOTE = (
    'Computed from the private images WITHOUT a privacy guarantee, or secret keys on which the '
    'guarantee rests. Nothing in this folder may be published.\n'
)
_RELEASE_NOTE = (
    'Everything in this folder is covered by the (ε, δ) that follows from ledger.jsonl at the δ of '
    'plan.json, unless config.json has a seed: then nothing here is private.\n'
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

    def open(self, config: ConfigDict) -> None:
        """Create the folders, or check that they were made with the same settings.

        Raises:
            PermissionError: the folder cannot be written.
            ValueError: it was made with other settings; the message lists the differences.
        """
        try:
            self.release.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            os.chmod(self.private, 0o700)
            with tempfile.TemporaryFile(dir=self.release):
                pass
            with tempfile.TemporaryFile(dir=self.private):
                pass
        except OSError as error:
            raise PermissionError(
                f'--workdir={self.root} cannot be written ({error}); it must be a folder that this '
                'user may create and write'
            ) from error
        path = self.release / 'config.json'
        settings = flatten(config)
        if path.exists():
            differences = _differences(json.loads(path.read_text()), settings)
            if differences:
                raise ValueError(
                    f'--workdir={self.root} was made with another config:\n  '
                    + '\n  '.join(differences)
                    + '\nUse those settings, or another --workdir.'
                )
            return
        write_text(self.release / 'README.txt', _RELEASE_NOTE)
        write_text(self.private / 'README.txt', _PRIVATE_NOTE)
        write_json(path, settings)

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
        if part not in known:
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
        'identifier': f'seed-{seed}-not-private',
        'sampling': digest[:32],
        'noise': digest[32:48],
    }


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


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix='.new_', delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """`write_bytes` for JSON, readable."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n', mode)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """A compressed .npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.new_{path.name}')
    with open(temporary, 'wb') as file:
        np.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
