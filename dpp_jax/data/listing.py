"""Which files of a tree are private and which are test images, of which class, and whose: no pixel is read.

| layout | classes |
|---|---|
| `<class>/….png` | folders, in the order of their names |
| `train/<class>/….png`, `test/<class>/….png` | likewise; the parts as given |
| `….png` | one |
| any, and `dataset.json` as StyleGAN archives have it | its numbers |
| any, and a CSV with the columns file,label[,group] | its labels, in their order; numbers as numbers |

Without a test part, `dpp_jax.data.split` draws one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import csv
import dataclasses
import io
import json
from pathlib import Path, PurePosixPath

import numpy as np

from dpp_jax.data import preparation as preparation_lib
from dpp_jax.data import split
from dpp_jax.data.decode import ENDINGS, FOREIGN, FOREIGN_FORMAT
from dpp_jax.data.preparation import Preparation
from dpp_jax.data.tree import File, Tree

TRAIN, TEST, VALIDATION = 'train', 'test', 'validation'
# How folders of parts are called.
PARTS = {TRAIN: TRAIN, 'training': TRAIN, TEST: TEST, 'testing': TEST}
PARTS |= dict.fromkeys(('val', 'valid', VALIDATION), VALIDATION)
_NAMED = 10  # paths that a message names
_COLUMNS = ('file', 'label')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a source.

    Attributes:
        tree: where they are.
        names: paths of the images that are used, sorted.
        files: path → file.
        labels: integers (N,).
        classes: labels are 0..classes - 1.
        class_names: of the classes; (): numbers.
        is_test: which are test images, bool (N,).
        groups: column → the name of each image's group, (N,).
        refused: (path, reason) of files that cannot be used.
        notes: for people.
    """

    tree: Tree
    names: list[str]
    files: Mapping[str, File]
    labels: np.ndarray
    classes: int
    class_names: tuple[str, ...]
    is_test: np.ndarray
    groups: Mapping[str, Sequence[str]]
    refused: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self, part: str) -> np.ndarray:
        """Return which images are of 'train' or 'test', integers (n,)."""
        return np.flatnonzero(self.is_test == (part == TEST))

    def group_names(self, name: str, source: str) -> Sequence[str]:
        """Return the name of each image's group, (N,); a ValueError says which columns there are."""
        if name not in self.groups:
            raise ValueError(
                f'config.data.groups is {name!r}; it must be a column of config.data.labels that says whose '
                f'an image is. {source} has {", ".join(self.groups) or "none: a CSV file,label,group does"}'
            )
        groups = self.groups[name]
        if empty := [image for image, group in zip(self.names, groups) if not group]:
            raise ValueError(
                f'config.data.groups is {name!r}, a column that is empty for {len(empty):,} images: '
                f'{_few(empty)}. Each must have a group'
            )
        return groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Labels:
    """What a file of labels says: path → label, and column → path → group."""

    of: dict[str, int]
    classes: int
    names: tuple[str, ...]
    groups: dict[str, dict[str, str]]


def read(tree: Tree, preparation: Preparation, source: str) -> Listing:
    """List the images of a tree.

    Args:
        tree: of files.
        preparation: `labels`, `groups`, `validation` and what decides the split.
        source: name of the source, for messages.

    Raises:
        ValueError, FileNotFoundError: there are no images, or labels do not fit the files.
    """
    files = tree.files(frozenset(PARTS))
    images = [name for name in files if _ending(name) in ENDINGS]
    foreign = [name for name in files if _ending(name) in FOREIGN]
    notes = []
    if not images:
        raise ValueError(
            f'{source} has no image files; it has {_endings(files) or "no files"}. Endings that are read: '
            + ' '.join(sorted(ENDINGS))
        )
    part_of, has_parts = _parts(images, foreign)
    part_of, note = _used(part_of, preparation.validation)
    notes += note
    used = [name for name in images if name in part_of]
    labels, note = _labels(tree, files, used, preparation, source, has_parts)
    notes += note
    names = [name for name in used if name in labels.of]
    if left := len(used) - len(names):
        notes.append(f'{left:,} images have no label: not used')
    if not names:
        raise ValueError(f'{source}: no image has a label; config.data.labels is {preparation.labels!r}')
    rest = [name for name in files if name not in part_of and name not in images]
    if rest:
        notes.append(f'{len(rest):,} other files are not used: {_endings(rest)}')
    listing = Listing(
        tree=tree,
        names=names,
        files=files,
        labels=np.array([labels.of[name] for name in names]),
        classes=labels.classes,
        class_names=labels.names,
        is_test=np.zeros(len(names), bool),
        groups={column: [of[name] for name in names] for column, of in labels.groups.items()},
        refused=tuple((name, FOREIGN_FORMAT) for name in foreign if name in part_of),
    )
    if TEST in part_of.values():
        is_test = np.array([part_of[name] == TEST for name in names])
    else:
        is_test = draw(listing, preparation, source)
        notes.append(how_drawn(preparation))
    return dataclasses.replace(listing, is_test=is_test, notes=tuple(notes))


def draw(listing: Listing, preparation: Preparation, source: str) -> np.ndarray:
    """Draw the test part of a set that has none, see `dpp_jax.data.split`; bool (N,)."""
    groups = listing.group_names(preparation.groups, source) if preparation.groups else None
    names = listing.names if groups is None else groups
    return split.is_test(names, share=preparation.test_share, seed=preparation.split_seed)


def how_drawn(preparation: Preparation) -> str:
    """Say how the test part was drawn."""
    unit = 'groups' if preparation.groups else 'images'
    return (
        f'no test part: about {preparation.test_share:.0%} of the {unit} are test images, each by a hash of '
        f'data.split_seed = {preparation.split_seed} and its name'
    )


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _endings(names: Iterable[str]) -> str:
    """Count files by their endings."""
    counted = Counter(_ending(name) or 'without ending' for name in names).most_common(_NAMED)
    return ', '.join(f'{count:,} {ending}' for ending, count in counted)


def _few(names: Sequence[str]) -> str:
    return ', '.join(names[:_NAMED]) + (', …' if len(names) > _NAMED else '')


def _parts(images: Sequence[str], foreign: Sequence[str]) -> tuple[dict[str, str], bool]:
    """Return path → part, by the first folder, and whether folders are parts; else all are of 'train'."""
    top_of = {name: name.partition('/')[0].lower() if '/' in name else '' for name in (*images, *foreign)}
    found = {PARTS.get(top_of[name]) for name in images}
    if None in found or TRAIN not in found:  # a class may be called train, beside others
        return dict.fromkeys(top_of, TRAIN), False
    return {name: PARTS[top] for name, top in top_of.items() if top in PARTS}, True


def _used(part_of: dict[str, str], validation: str) -> tuple[dict[str, str], list[str]]:
    """Decide what a validation part is; return path → part of what is used, and notes."""
    count = sum(part == VALIDATION for part in part_of.values())
    if not count:
        return part_of, []
    if validation == TRAIN:
        into, note = TRAIN, 'private images, because data.validation is train'
    elif TEST not in part_of.values():
        into, note = TEST, 'the test images, because there is no test part'
    else:
        into, note = None, 'not used. To make them private images, set data.validation to train'
    used = {name: into if part == VALIDATION else part for name, part in part_of.items()}
    return (
        {name: part for name, part in used.items() if part},
        [f'{count:,} files of the validation part are {note}'],
    )


# ---- labels -------------------------------------------------------------------------------------


def _labels(
    tree: Tree,
    files: Mapping[str, File],
    images: list[str],
    preparation: Preparation,
    source: str,
    has_parts: bool,
) -> tuple[_Labels, list[str]]:
    """Find the label of each image as `preparation.labels` says; return them and notes."""
    wanted = preparation.labels
    json_name = preparation_lib.DATASET_JSON
    if wanted == preparation_lib.UNLABELED:
        return _one_class(images), ['one class: labels are not used']
    if wanted == json_name and json_name not in files:
        raise FileNotFoundError(f'config.data.labels is {wanted!r}, which is not in {source}')
    if wanted in ('', json_name) and json_name in files:
        found = _of_json(tree.read(files[json_name].own), images, f'{source}, {json_name}', wanted)
        if found is not None:
            return found, [f'labels are those of {json_name}']
    if wanted in ('', preparation_lib.FOLDERS):
        return _of_folders(images, source, has_parts, preparation.class_names), []
    text = _csv_text(tree, files, wanted, source)
    return _of_csv(text, files, images, wanted, preparation.class_names), []


def _one_class(images: list[str]) -> _Labels:
    return _Labels(of=dict.fromkeys(images, 0), classes=1, names=(), groups={})


def _of_folders(images: list[str], source: str, has_parts: bool, known: tuple[str, ...]) -> _Labels:
    """Name classes by folders, below the part if there are parts."""
    below = {name: name.partition('/')[2] if has_parts else name for name in images}
    beside = [name for name, path in below.items() if '/' not in path]
    if len(beside) == len(images):
        return _one_class(images)
    if beside:
        raise ValueError(
            f'{source}: {len(beside):,} images lie beside class folders: {_few(beside)}. Move each into the '
            "folder of its class, or set config.data.labels ('none': all are one class)"
        )
    folders = {name: path.partition('/')[0] for name, path in below.items()}
    names = _numbered(tuple(sorted(set(folders.values()))), known, source)
    number = {name: i for i, name in enumerate(names)}
    of = {name: number[folder] for name, folder in folders.items()}
    return _Labels(of=of, classes=len(names), names=_if_words(names), groups={})


def _numbered(found: tuple[str, ...], known: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Return the names of classes in the order of labels.

    Where they are known beforehand, they alone number the classes: one that no image has keeps its number.

    Raises:
        ValueError: images have other classes.
    """
    if others := [name for name in found if known and name not in known]:
        raise ValueError(
            f'config.data.class_names is {", ".join(known)}; it must also have {_few(others)}, of which '
            f'{source} has images'
        )
    return known or found


def _if_words(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of classes; () if they are the classes' numbers."""
    return () if names == tuple(map(str, range(len(names)))) else names


def _of_json(content: bytes, images: list[str], where: str, wanted: str) -> _Labels | None:
    """Read the labels of a StyleGAN archive; None: the file holds something else, and was not asked for."""
    try:
        found = json.loads(content)
        labels = found['labels']
        pairs = {} if labels is None else dict(labels)
        are_numbers = all(type(label) is int and label >= 0 for label in pairs.values())
    except (ValueError, TypeError, KeyError) as error:
        if not wanted:
            return None
        raise ValueError(
            f'{where} cannot be read ({error!r}); it must be {{"labels": [["00000/img.png", 3], …]}}, or '
            '{"labels": null}'
        ) from error
    if not are_numbers:
        raise ValueError(f'{where}: labels must be whole numbers, at least 0, one for each image')
    if not pairs:
        return _one_class(images)
    missing = sorted(set(pairs) - set(images))
    if missing and not set(pairs) & set(images):
        raise ValueError(
            f'{where} has labels of {len(missing):,} files, none of which is there: {_few(missing)}'
        )
    of = {name: pairs[name] for name in images if name in pairs}
    return _Labels(of=of, classes=max(pairs.values()) + 1, names=(), groups={})


def _csv_text(tree: Tree, files: Mapping[str, File], wanted: str, source: str) -> str:
    """Read the file of labels, of the source or any other."""
    path = Path(wanted).expanduser()
    if wanted in files:
        content = tree.read(files[wanted].own)
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise FileNotFoundError(
            f'config.data.labels is {wanted!r}; it must be a CSV file, there or in {source}, or '
            + ', '.join(map(repr, ('', *preparation_lib.LABELS)))
        )
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(
            f'config.data.labels: {wanted} cannot be read ({error}); it must be UTF-8'
        ) from error


def rows_of_csv(text: str, columns: Sequence[str], where: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file; the delimiter is that of the header.

    Raises:
        ValueError: a column is missing, or a row has too few or too many fields.
    """
    header = text.partition('\n')[0]
    delimiter = max(',;\t', key=header.count)
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(reader, [])]
    if not set(columns) <= set(names):
        raise ValueError(f'{where} has the columns {", ".join(names)}; it must have {", ".join(columns)}')
    rows, bad = [], []
    for fields in reader:
        if len(fields) == len(names):
            rows.append(dict(zip(names, map(str.strip, fields))))
        elif fields:
            bad.append(str(reader.line_num))
    if bad:
        raise ValueError(f'{where}: {len(bad):,} lines have not {len(names)} fields: {_few(bad)}')
    return rows


def _of_csv(
    text: str, files: Mapping[str, File], images: list[str], wanted: str, known: tuple[str, ...]
) -> _Labels:
    """Read labels and groups from a CSV file."""
    where = f'config.data.labels: {wanted}'
    rows = rows_of_csv(text, _COLUMNS, where)
    own = {file.own: name for name, file in files.items()}  # with the folder that wraps all
    names = [row['file'].replace('\\', '/').removeprefix('./').lstrip('/') for row in rows]
    names = [name if name in files else own.get(name, name) for name in names]
    columns = [column for column in (rows[0] if rows else ()) if column and column not in _COLUMNS]
    counted = Counter(names)
    problems = {
        'files are not there': [name for name in counted if name not in files],
        'files stand in it twice': [name for name, count in counted.items() if count > 1],
        'files have no label': [name for name, row in zip(names, rows) if not row['label']],
    }
    found = [f'{len(of):,} {what}: {_few(of)}' for what, of in problems.items() if of]
    if found:
        raise ValueError('\n'.join(f'{where}: {problem}' for problem in found))
    there = set(images)
    used = [(name, row) for name, row in zip(names, rows) if name in there]
    texts = {row['label'] for _, row in used}
    are_numbers = all(text.isdecimal() for text in texts)
    classes = tuple(sorted(texts, key=(lambda text: (int(text), text)) if are_numbers else None))
    classes = _numbered(classes, known, where)
    number = {text: i for i, text in enumerate(classes)}
    return _Labels(
        of={name: number[row['label']] for name, row in used},
        classes=len(classes),
        names=_if_words(classes),
        groups={column: {name: row[column] for name, row in used} for column in columns},
    )
