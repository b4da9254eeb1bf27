"""The secret keys of a run, in private/keys.json: the only door to them.

Every part of a run has keys of its own, made on first use from the operating system's entropy, or from a seed
in tests. A mechanism that touches private images gets its keys from `of_mechanism` alone, which refuses keys
other than those that the ledger names: with its old keys a mechanism repeats what it released; with new ones
it would release, and spend, a second time. What is random without private images (initial weights, the order
of central images, synthetic images) takes `of_part`.
"""

from collections.abc import Collection, Iterable
import dataclasses
import hashlib
from pathlib import Path
import re
import secrets
from typing import Any

import jax
import numpy as np

from dpp_jax import files
from dpp_jax.privacy import groups, poisson
from dpp_jax.privacy.budget import MECHANISMS
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import NOISE_KEYS, NoiseKey
from dpp_jax.training import hosts

NOTE = (
    'Do not publish anything in this folder. It holds the secret keys of the run, and results that were '
    'computed from the private images without a privacy guarantee.'
)

# What the file holds: part of the run → its secrets, in hexadecimal.
_FORM = {
    '*': {
        'identifier': str,
        # An earlier version of the program refuses a text that says how to draw: it would draw other batches.
        'sampling': re.compile(f'({poisson.COUNT}:)?[0-9a-f]{{32}}'),
        'noise': re.compile('([0-9a-f]{16})+'),
        'released?': str,
    }
}
_RANDOM_BITS = '_random_bits'  # in the file, beside the keys
_BIT_FLAGS = ('jax_threefry_partitionable', 'jax_default_prng_impl')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismKeys:
    """Keys of a mechanism on private images. Who learns one of them loses the guarantee.

    Attributes:
        sampling: 128 bits, for Poisson sampling (Philox).
        noise: for the noise.
        drawing: how batches are drawn, see `poisson`: as by the version of the program that made the keys.
    """

    sampling: int = dataclasses.field(repr=False)
    noise: NoiseKey
    drawing: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartKeys:
    """Keys of a part of the run that is no mechanism on private images.

    Attributes:
        order: 128 bits, for the order or the choice of examples (Philox).
        random: JAX key, for everything else.
    """

    order: int = dataclasses.field(repr=False)
    random: jax.Array = dataclasses.field(repr=False)


class Keys:
    """The keys of one run."""

    def __init__(self, path: Path, seed: int | None):
        """Keys in the file `path`, from the operating system's entropy; from `seed` where it is set."""
        self._path = path
        self._seed = seed

    def of_mechanism(self, name: str, ledger: Ledger | None) -> MechanismKeys:
        """Return the keys of a mechanism, made on first use; in all processes those of process 0.

        Args:
            name: of the mechanism.
            ledger: names what was released before; None but in process 0.

        Raises:
            ValueError: the ledger names releases with other keys, or the file's keys were not made from
                this seed.
        """

        def get():
            found = self._get(name, keys=NOISE_KEYS)
            others = {entry.randomness for entry in ledger.entries if entry.mechanism == name}
            if others - {found['identifier']}:
                raise ValueError(
                    f'{ledger.path} has releases of {name} with keys that {self._path} does not have. To '
                    'continue would spend its budget a second time. Restore private/, or use another '
                    '--workdir'
                )
            return found

        found = hosts.from_first(get)
        hosts.agree('random bits', _random_bits())  # else each would add noise of its own
        noise = NoiseKey(identifier=found['identifier'], keys=_jax_keys(found['noise']))
        drawing, _, sampling = found['sampling'].rpartition(':')
        return MechanismKeys(sampling=int(sampling, 16), noise=noise, drawing=drawing or poisson.COINS)

    def of_part(self, name: str) -> PartKeys:
        """Return the keys of a part of the run ('pretrain', 'generate/images', ...), made on first use.

        Raises:
            ValueError: it is a mechanism, or the file's keys were not made from this seed.
        """
        if name in MECHANISMS:
            raise ValueError(f'name is {name!r}; keys of a mechanism are given by `of_mechanism` alone')
        found = hosts.from_first(lambda: self._get(name, keys=1))
        return PartKeys(order=int(found['sampling'], 16), random=_jax_keys(found['noise']))

    def members(self, group_of: np.ndarray | None, images_per_group: int | None) -> np.ndarray | None:
        """Return the images of every group that are used, see `groups.choose`: the same for the whole run.

        Args:
            group_of: (N,) integers, whose each private image is; None: the unit is one image.
            images_per_group: the most of a group.
        """
        if group_of is None:
            return None
        return groups.choose(group_of, images_per_group, self.of_part('groups').order)

    def bind_release(self, name: str, arrays: Iterable[np.ndarray]) -> None:
        """Note beside the keys of a mechanism what is about to be released with them.

        A release that was lost may be made again if it is the same, bit for bit. The same noise on
        something else, as another device rounds it, would be a second release.

        Raises:
            ValueError: something else was released with these keys, or was about to be.
        """
        known, digest = self._read(), files.digest(arrays)
        before = known[name].setdefault('released', digest)
        if before != digest:
            raise ValueError(
                f'the new output of {name} differs from the one that used the same noise (SHA-256 '
                f'{digest[:12]} now, {before[:12]} in {self._path}). It was not released: it would be a '
                'second release. Restore the old output, or repeat the stage with the devices and versions '
                'in release/code.json, or use another --workdir'
            )
        files.write_json(self._path, known, mode=0o600)

    def released(self, name: str) -> str | None:
        """Return the digest of what a mechanism released with its keys, if it is noted."""
        return self._read().get(name, {}).get('released')

    def may_repeat(self, name: str) -> bool:
        """Whether `bind_release` can tell if what the mechanism makes is what was released with its keys."""
        known = self._read()
        return name not in known or 'released' in known[name]

    def check_planned(self, mechanisms: Collection[str]) -> None:
        """Refuse a plan without a mechanism whose output was released, or was about to be, with these keys.

        What it spent would not be counted, whatever became of its output.

        Raises:
            ValueError: the plan does not have such a mechanism.
        """
        for name, found in self._read().items():
            if not name.startswith('_') and 'released' in found and name not in mechanisms:
                raise ValueError(
                    f'{self._path} has keys of {name}, whose output was released. This config does not run '
                    f'{name}, and would forget its ε. Use the settings of that run, or another --workdir '
                    'with config.dp.already_spent'
                )

    def _get(self, name: str, keys: int) -> dict[str, str]:
        """Return the secrets of one part, in hexadecimal; with so many JAX keys, if they are made now."""
        known = self._read()
        is_noted = _check_random_bits(self._path, known)
        if name not in known or not is_noted:
            known[_RANDOM_BITS] = _random_bits()
            known.setdefault(name, _fresh_secrets(name, self._seed, keys))
            files.write_json(self._path, known, mode=0o600)
        identifier = known[name]['identifier']
        expected = None if self._seed is None else seeded_identifier(self._seed)
        if is_seeded(identifier) != (expected is not None) or expected not in (None, identifier):
            raise ValueError(
                f'config.seed is {self._seed}; {self._path} holds keys of {name} from another source '
                f'({identifier}). Use the seed of this folder, or another --workdir'
            )
        return known[name]

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {'_note': NOTE}
        return files.read_json(
            self._path,
            'Restore the file: a query or a training step needs these keys. If release/model/finetune '
            'exists, you may delete it: generation then draws images with new keys',
            _FORM,
        )


def _random_bits() -> dict[str, Any]:
    """Describe what decides the random bits that JAX makes of a key: another description, other noise."""
    key = jax.random.wrap_key_data(np.arange(2, dtype=np.uint32), impl='threefry2x32')
    keys = jax.random.split(jax.random.fold_in(key, 1))
    draws = [jax.random.bits(keys[0], (5, 3), 'uint32'), jax.random.key_data(keys)]
    return {name: getattr(jax.config, name) for name in _BIT_FLAGS} | {'test_draw': files.digest(draws)}


def _check_random_bits(path: Path, known: dict[str, Any]) -> bool:
    """Check that JAX still makes the same random bits of the keys in `known`.

    With others, a step that is repeated after a crash would draw other noise under the same ledger entry.

    Returns:
        Whether `known` says which bits it stands for; files of earlier versions do not.

    Raises:
        ValueError: the bits are others.
    """
    if _RANDOM_BITS not in known:
        return False
    then, now = known[_RANDOM_BITS], _random_bits()
    if not isinstance(then, dict):
        raise ValueError(f'{path}: {_RANDOM_BITS} is {then!r}; it must be an object. Restore the file')
    for name in (name for name in now if then.get(name) != now[name]):
        flag, advice = name.upper(), f'JAX {jax.__version__} makes other bits; use the version of this folder'
        if name in _BIT_FLAGS:
            advice = f'{flag} is {now[name]}; set {flag}={then.get(name)}'
        raise ValueError(
            f'the random bits differ from those for which {path} was made: {advice}. With others, a repeated '
            'step would be a second release'
        )
    return True


def _fresh_secrets(name: str, seed: int | None, keys: int) -> dict[str, str]:
    """Make 128 bits for sampling and 64 for each JAX key, in hexadecimal, and a name for all of them.

    The former of a mechanism also say how batches are drawn.
    """
    drawing = f'{poisson.COUNT}:' if name in MECHANISMS else ''
    if seed is None:
        return {
            'identifier': secrets.token_hex(8),
            'sampling': drawing + secrets.token_hex(16),
            'noise': secrets.token_hex(8 * keys),
        }
    text = f'{seed}/{name}'.encode()
    first = hashlib.sha256(text).hexdigest()
    noise = first[32:48] if keys == 1 else hashlib.sha512(text).hexdigest()[: 16 * keys]
    return {'identifier': seeded_identifier(seed), 'sampling': drawing + first[:32], 'noise': noise}


def _jax_keys(noise: str) -> jax.Array:
    """Return the JAX keys of 64 bits each in a hexadecimal text: one, (), or several, (n,)."""
    words = np.frombuffer(bytes.fromhex(noise), '>u4').astype(np.uint32).reshape(-1, 2)
    return jax.random.wrap_key_data(words if len(words) > 1 else words[0], impl='threefry2x32')


def why_not_private(seed: int | None) -> str | None:
    """Say why a run with this seed is not private; None without a seed."""
    if seed is None:
        return None
    return (
        f'the keys of this run come from config.seed = {seed}; who guesses the seed can remove the noise. '
        'Such a run is for tests'
    )


def seeded_identifier(seed: int) -> str:
    """Return the public name of keys that were made from a seed."""
    return f'seed-{seed}-not-private'


def is_seeded(identifier: str) -> bool:
    """Whether the keys of this name were made from a seed."""
    return identifier.startswith('seed-')
