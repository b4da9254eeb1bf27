"""Tissue patches of Camelyon17 in the folder that the WILDS benchmark made (Koh et al. 2021, 2012.07421)."""

import dataclasses

import numpy as np

from dpp_jax.data import listing
from dpp_jax.data.listing import Listing
from dpp_jax.data.sources.image_files import Folder

_METADATA = 'metadata.csv'
_COLUMNS = ('patient', 'node', 'x_coord', 'y_coord', 'tumor', 'slide', 'center', 'split')
# Hospitals whose patches the benchmark keeps out of training, whatever `split` says.
_VALIDATION_CENTER, _TEST_CENTER = '1', '2'
_TRAIN = '0'  # in `split`; '1' is a validation part of the training hospitals
_GROUPS = ('patient', 'slide')
_LOOKED_AT = 256  # headers: all patches are of one size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Camelyon(Folder):
    """The benchmark's official parts: 302,436 private patches, 85,054 test patches of another hospital.

    Private images are those with split 0 outside of hospitals 1 and 2; test images are those of hospital 2.
    The two validation parts are not used. Groups are 'patient' or 'slide'.
    """

    form = 'wilds-camelyon:<path>'
    joins_validation = False

    def listed(self) -> Listing:
        tree = self.tree()
        files = tree.files(frozenset({'patches'}))
        if _METADATA not in files:
            raise FileNotFoundError(f'{self.name} needs {_METADATA} and patches/; they are not there')
        where = f'{self.name}, {_METADATA}'
        text = tree.read(files[_METADATA].own).decode('utf-8-sig')
        rows = {_path(row): row for row in listing.rows_of_csv(text, _COLUMNS, where)}
        used = sorted(name for name, row in rows.items() if _is_private(row) or _is_test(row))
        missing = [name for name in used if name not in files]
        if missing or not used:
            raise ValueError(
                f'{where} names {len(used):,} private and test images, of which {len(missing):,} are not '
                f'there: {", ".join(missing[:10])}'
            )
        return Listing(
            tree=tree,
            names=used,
            files=files,
            labels=np.array([int(rows[name]['tumor']) for name in used]),
            classes=2,
            class_names=('normal', 'tumor'),
            is_test=np.array([_is_test(rows[name]) for name in used]),
            groups={group: [rows[name][group] for name in used] for group in _GROUPS},
            notes=(f'{len(rows) - len(used):,} patches of the validation parts are not used',),
        )

    def to_look_at(self) -> np.ndarray:
        count = len(self.listing.names)
        return np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int))


def _path(row: dict[str, str]) -> str:
    """Return where a patch lies."""
    of = f'patient_{row["patient"]}_node_{row["node"]}'
    return f'patches/{of}/patch_{of}_x_{row["x_coord"]}_y_{row["y_coord"]}.png'


def _is_test(row: dict[str, str]) -> bool:
    return row['center'] == _TEST_CENTER


def _is_private(row: dict[str, str]) -> bool:
    return row['split'] == _TRAIN and row['center'] not in (_VALIDATION_CENTER, _TEST_CENTER)
