"""The record of every mechanism that ran on the private images: what ε is computed from.

A text file, one JSON object per line, to which lines are only ever added (an object store gets the
whole file with each). `Ledger.append` returns after the line is on the disk; only then may the
noisy value be used. So after a crash the ledger may name a
release that nobody saw, and never misses one that somebody saw.

What is counted once. A release is named by (mechanism, index, randomness). `randomness` names the
secret keys that batch and noise are drawn from: a step repeated after a crash draws the same batch
and the same noise. Computed from the same state it gives the same value again (its last bits may
differ on other devices, so no step's value may be shown to anybody twice), which releases nothing new, and
its entry is already here. A caller may reuse `randomness` only under that
condition: the same noise on two different sums would cancel in their difference. Another
`randomness` is another release and is counted.

A release may be declared: it was made elsewhere, before the run, and the owner of the private images says
what it was. Its `randomness` names what came of it. It counts like any other.

Every line carries the SHA-256 hash of itself and of all lines before it. So a line that was edited,
removed from the middle or put in by hand is found when the file is read. Lines missing at the end are
found by who knows how many there must be: a checkpoint after n steps needs n entries. The hashes find
accidents and clumsiness; a forger can compute them too.
"""

from collections.abc import Iterable
import dataclasses
import hashlib
import json
import logging
import numbers
from os import PathLike

from dpp_jax import files
from dpp_jax.privacy import accounting, groups

_logger = logging.getLogger(__name__)
# What the fields of an entry may be given as, by the type they are stored as.
_KINDS = {
    str: (str, 'a text, not empty'),
    int: (numbers.Integral, 'a whole number'),
    float: (numbers.Real, 'a number'),
    bool: (bool, 'True or False'),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One release of a Poisson-sampled Gaussian mechanism.

    Attributes:
        mechanism: which part of the run: 'central_query' or 'dp_sgd'.
        index: which query or step, from 0.
        noise_multiplier: σ = noise standard deviation / sensitivity, > 0.
        sampling_probability: q of the Poisson sample, in (0, 1].
        sensitivity: Δ > 0, the L2 bound on what one unit adds to the sum that is released, before
            any division. ε depends on σ alone; Δ says what the noise was measured against.
        randomness: public, random name of the secret keys of sampling and noise; if it is declared, of what
            came of it.
        unit: 'image' or 'group': whose contribution Δ bounds, and of what the sample consists. Lines
            without it are of images.
        declared: whether nobody here saw it run, and the owner's word is all there is. Lines without it are
            of what this program ran.
    """

    mechanism: str
    index: int
    noise_multiplier: float
    sampling_probability: float
    sensitivity: float
    randomness: str
    unit: str = groups.IMAGE
    declared: bool = False

    def __post_init__(self):
        """Check every field, and make numbers plain ones, so that equal entries are equal lines."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, allowed = _KINDS[field.type]
            is_kind = isinstance(value, kind) and isinstance(value, bool) == (field.type is bool)
            if not is_kind or value == '':
                raise ValueError(f'{field.name} is {value!r}; it must be {allowed}')
            object.__setattr__(self, field.name, field.type(value))
        if self.index < 0:
            raise ValueError(f'index is {self.index}; it must be at least 0')
        if not 0 < self.sensitivity < float('inf'):
            raise ValueError(f'sensitivity is {self.sensitivity}; it must be finite and > 0')
        if self.unit not in groups.UNITS:
            raise ValueError(f'unit is {self.unit!r}; it must be {" or ".join(map(repr, groups.UNITS))}')
        # Its own checks of σ and q.
        accounting.subsampled_gaussian(self.noise_multiplier, self.sampling_probability, 1)

    @property
    def key(self) -> tuple[str, int, str]:
        """Entries with the same key are the same release."""
        return self.mechanism, self.index, self.randomness


class Ledger:
    """The ledger in one file: read once when opened, then kept in memory and on the disk alike."""

    def __init__(self, path: str | PathLike, *, read_only: bool = False):
        """Open the ledger; the first entry makes the file and its folder.

        A last line that a crash cut short is removed: its `append` never returned, so its release
        was never used. A last entry that lacks only its line end is kept.

        Args:
            path: of the file.
            read_only: change nothing; `append` is refused. An unfinished last line is not looked at:
                another process may be writing it.

        Raises:
            ValueError: any other line cannot be read, or was changed since it was written; the
                message names file and line number.
            OSError: the file cannot be read.
        """
        self.path = files.path(path)
        self._entries: dict[tuple[str, int, str], Entry] = {}
        self._hash = ''
        self._read_only = read_only
        self._log = files.Log(self.path)
        *lines, tail = self._log.content.split(b'\n')
        for number, line in enumerate(lines, start=1):
            self._read(line, number)
        if tail and not read_only:
            self._repair(tail, len(lines) + 1)

    def append(self, entry: Entry) -> bool:
        """Record `entry` before its release is used. It is on the disk when this returns.

        Returns:
            True if the entry was written, False if the identical one was there: the same release
            once more.

        Raises:
            ValueError: the same release is there with other parameters.
            OSError: the line could not be written (it is not recorded then, and the release must
                not be used), or the file was changed by somebody else.
        """
        return self.extend([entry]) == 1

    def extend(self, entries: Iterable[Entry]) -> int:
        """Record several releases, all different, as `append` does one; a crash may leave only the first.

        Returns:
            how many of them were not there.
        """
        if self._read_only:
            raise ValueError(f'{self.path} is open for reading only')
        new = [entry for entry in entries if self._is_new(entry)]
        lines, digest = [], self._hash
        for entry in new:
            digest = _hash(digest, entry)
            lines.append(json.dumps({**_fields(entry), 'hash': digest}, ensure_ascii=False) + '\n')
        if new:
            self._log.append(''.join(lines).encode())
        self._entries |= {entry.key: entry for entry in new}
        self._hash = digest
        return len(new)

    @property
    def entries(self) -> list[Entry]:
        """All releases, in the order in which they were recorded."""
        return list(self._entries.values())

    def count(self, mechanism: str) -> int:
        """Return how many releases of `mechanism` there were."""
        return sum(entry.mechanism == mechanism for entry in self._entries.values())

    def _is_new(self, entry: Entry) -> bool:
        """Whether the release is not recorded yet; raises if it is, with other parameters."""
        known = self._entries.get(entry.key)
        if known is not None and known != entry:
            raise ValueError(
                f'{self.path} holds {known}; {entry} would release something else from the same '
                'randomness. Continue with the recorded parameters, or use new keys'
            )
        return known is None

    def _read(self, line: bytes, number: int) -> None:
        """Take one line of the file into memory."""
        try:
            fields = json.loads(line)
            digest = fields.pop('hash', None)
            # A field that this version does not know might change what was released, and then the ε
            # computed without it would be wrong. A version that adds a field gives it a default.
            entry = Entry(**fields)
            if digest != _hash(self._hash, entry):
                raise ValueError(
                    'its hash is wrong: this line or an earlier one was changed, removed or added'
                )
            if not self._is_new(entry):
                raise ValueError('it names a release a second time')
        except (ValueError, TypeError, AttributeError) as error:
            names = ', '.join(field.name for field in dataclasses.fields(Entry))
            raise ValueError(
                f'line {number} of {self.path} is not a ledger entry ({error}); it must be a JSON '
                f'object with {names}, hash. Restore the file: ε cannot be computed without it'
            ) from error
        self._entries[entry.key], self._hash = entry, digest

    def _repair(self, tail: bytes, number: int) -> None:
        """Complete or remove a last line without its end."""
        try:
            # Only whole objects end in a brace and parse; anything shorter does not.
            self._read(tail, number)
        except ValueError:
            if _is_object(tail):
                raise
            _logger.warning('Removed an incomplete entry (%d bytes) from the end of %s', len(tail), self.path)
            self._log.truncate(self._log.size - len(tail))
        else:
            self._log.append(b'\n')


def _hash(previous: str, entry: Entry) -> str:
    """SHA-256 of the previous line's hash and this entry's fields, in hexadecimal."""
    fields = json.dumps(_fields(entry), sort_keys=True, allow_nan=False)
    return hashlib.sha256(f'{previous}\n{fields}'.encode()).hexdigest()


def _fields(entry: Entry) -> dict:
    """Name what a line says of an entry; of images that this program used, as earlier versions did."""
    fields = dataclasses.asdict(entry)
    if entry.unit == groups.IMAGE:
        del fields['unit']
    if not entry.declared:
        del fields['declared']
    return fields


def _is_object(text: bytes) -> bool:
    """Whether `text` is a whole JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
