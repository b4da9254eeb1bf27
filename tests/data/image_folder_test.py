"""Folders and archives of image files: layouts, the split, decoding, and what is kept for the next start."""

import dataclasses
import io
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
from PIL import Image
import pytest

from dpp_jax.data import decode, decoding, sources, split
from dpp_jax.data.preparation import Preparation
from dpp_jax.privacy.shares import Share

P = Preparation(image_size=4, channels=1)


def picture(name, size=4, channels=1):
    """An image that its name decides; its suffix, the format."""
    rng = np.random.default_rng(list(name.encode()))
    pixels = rng.integers(0, 256, (size, size, channels), np.uint8)
    file = io.BytesIO()
    kind = {'.bmp': 'BMP', '.tiff': 'TIFF'}.get(Path(name).suffix, 'PNG')
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, kind)
    return file.getvalue()


def write(root, names, **settings):
    """Write pictures, and what else has its content given."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = names[name] if isinstance(names, dict) else None
        path.write_bytes(content if isinstance(content, bytes) else picture(name, **settings))
    return f'folder:{root}'


def pixels(name):
    return np.asarray(Image.open(io.BytesIO(picture(name))))[..., None]


def loaded(source, preparation=P, **settings):
    """Return {'train': {image bytes: label}, 'test': …}."""
    parts = {}
    for part in sources.SPLITS:
        found = sources.load(source, part, preparation=preparation, classes=100, **settings)
        parts[part] = {image.tobytes(): int(label) for image, label in zip(found.images, found.labels)}
    return parts


def labels_of(names):
    return {pixels(name).tobytes(): label for name, label in names.items()}


CATS = {f'cats/{i}.png': 0 for i in range(5)} | {f'dogs/{i}.bmp': 1 for i in range(7)}


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    source = write(tmp_path, CATS.keys() | {'dogs/deeper/8.png'})
    found = loaded(source)
    assert found['train'] | found['test'] == labels_of(CATS | {'dogs/deeper/8.png': 1})
    info = sources.describe(source)
    assert info.class_names == ('cats', 'dogs') and info.classes == 2
    assert (info.train_images, info.test_images) == (11, 2) == tuple(map(len, found.values()))
    assert info.class_counts == (4, 7) and info.image_shape == (4, 4, 1) and info.sides == (4, 4, 4)
    assert any('13 image files: 7 BMP, 6 PNG' in note or '6 PNG' in note for note in info.notes)


def test_given_parts_are_kept_and_a_validation_part_is_what_is_asked_for(tmp_path):
    names = {
        f'{part}/{label}/{i}.png': int(label)
        for part in ('train', 'Test', 'val')
        for label in '01'
        for i in '23'
    }
    source = write(tmp_path, names)

    def of(*parts):
        return labels_of({name: label for name, label in names.items() if name.startswith(parts)})

    assert loaded(source) == {'train': of('train'), 'test': of('Test')}
    assert any(
        '4 files of the validation part are not used' in note for note in sources.describe(source).notes
    )
    joined = Preparation(image_size=4, channels=1, validation='train')
    assert loaded(source, joined) == {'train': of('train', 'val'), 'test': of('Test')}
    for path in (tmp_path / 'Test').rglob('*.png'):
        path.unlink()
    assert loaded(source) == {'train': of('train'), 'test': of('val')}
    assert sum(map(len, loaded(source, joined).values())) == 8
    assert sources.describe(source).class_names == ()  # their names are their numbers


def test_a_class_may_be_called_train(tmp_path):
    source = write(tmp_path, ['train/1.png', 'train/2.png', 'car/1.png', 'car/2.png'])
    assert sources.describe(source).class_names == ('car', 'train')


def test_a_flat_folder_is_one_class(tmp_path):
    source = write(tmp_path, [f'{i}.png' for i in range(10)])
    info = sources.describe(source)
    assert (info.classes, info.class_names) == (1, ()) and info.class_counts == (info.train_images,)
    assert info.train_images + info.test_images == 10
    parts = {f'{part}/{i}.png': 0 for part in ('train', 'test') for i in range(3)}
    found = loaded(write(tmp_path / 'parts', parts))
    assert found['test'] == labels_of({f'test/{i}.png': 0 for i in range(3)})


def test_labels_of_stylegan_archives(tmp_path):
    names = {f'0000{i % 2}/img{i}.png': i % 3 for i in range(9)}
    source = write(tmp_path, names)
    (tmp_path / 'dataset.json').write_text(json.dumps({'labels': [[name, names[name]] for name in names]}))
    found = loaded(source)
    assert found['train'] | found['test'] == labels_of(names)
    assert sources.describe(source).classes == 3
    folders = Preparation(image_size=4, channels=1, labels='folders')
    assert sources.describe(source, preparation=folders).class_names == ('00000', '00001')
    for labels in ('none', ''):
        if not labels:
            (tmp_path / 'dataset.json').write_text('{"labels": null}')
        one = Preparation(image_size=4, channels=1, labels=labels)
        assert sources.describe(source, preparation=one).classes == 1
    for content in ('{"labels": [["00000/img0.png", "x"]]}', '{"labels": [["y.png", 1]]}'):
        (tmp_path / 'dataset.json').write_text(content)
        with pytest.raises(ValueError, match='dataset.json'):
            sources.describe(source)


def test_labels_and_groups_of_a_table(tmp_path):
    names = [f'a/{i}.png' for i in range(12)]
    source = write(tmp_path, [*names, 'a/unlabeled.png'])
    rows = [f'{name};{["seven", "éight"][i % 2]};p{i // 3}' for i, name in enumerate(names)]
    table = tmp_path / 'labels.csv'
    table.write_text('file;label;group\n' + '\n'.join(rows) + '\n', encoding='utf-8-sig')
    wanted = Preparation(image_size=4, channels=1, labels='labels.csv', groups='group',
                         test_share=0.4)  # fmt: skip
    info = sources.describe(source, preparation=wanted)
    assert info.class_names == ('seven', 'éight') and any('1 images have no label' in n for n in info.notes)
    parts = {part: sources.load(source, part, preparation=wanted, groups='group') for part in sources.SPLITS}
    persons = {name: split.group_number(f'p{i // 3}') for i, name in enumerate(names)}
    train = {image.tobytes(): group for image, group in zip(parts['train'].images, parts['train'].groups)}
    assert info.groups == len(set(train.values())) and train
    np.testing.assert_array_equal(
        sources.near_groups(source, 'group', preparation=wanted), parts['train'].groups
    )
    for name in names:  # no person is in both parts
        if pixels(name).tobytes() in train:
            assert train[pixels(name).tobytes()] == persons[name]
            same = [other for other in names if persons[other] == persons[name]]
            assert all(pixels(other).tobytes() in train for other in same)
    share = sources.load(source, 'train', preparation=wanted, groups='group', rows=Share(0, 2).images)
    assert len(share.groups) == len(train)
    with pytest.raises(ValueError, match="groups is 'person'.* has group"):
        sources.near_groups(source, 'person', preparation=Preparation(labels='labels.csv'))


@pytest.mark.parametrize(
    'table, text',
    [
        ('name,label\n', 'has the columns name, label; it must have file, label'),
        ('file,label\na/0.png,1\nnowhere.png,1\n', '1 files are not there: nowhere.png'),
        ('file,label\na/0.png,1\na/0.png,2\n', '1 files stand in it twice: a/0.png'),
        ('file,label\na/0.png,\n', '1 files have no label: a/0.png'),
        ('file,label\na/0.png,1,2,3\n', '1 lines have not 2 fields: 2'),
        ('file,label,group\na/0.png,1,\n', 'empty for 1 images: a/0.png'),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, table, text):
    source = write(tmp_path, ['a/0.png'])
    (tmp_path / 'labels.csv').write_text(table)
    with pytest.raises(ValueError, match=text):
        sources.describe(source, preparation=Preparation(labels='labels.csv', groups='group'))


def test_numbers_in_a_table_are_sorted_as_numbers(tmp_path):
    source = write(tmp_path, [f'{i}.png' for i in (2, 10, 1)])
    (tmp_path / 'l.csv').write_text('file,label\n2.png,2\n10.png,10\n1.png,1\n')
    info = sources.describe(source, preparation=Preparation(labels=str(tmp_path / 'l.csv')))
    assert info.class_names == ('1', '2', '10')


def test_what_is_no_image_is_counted_and_what_is_hidden_is_not(tmp_path):
    names = dict.fromkeys(CATS) | {'cats/notes.txt': b'x', 'cats/.hidden.png': b'x', '.git/1.png': b'x',
                                   '__MACOSX/cats/1.png': b'x', 'README.md': b'x'}  # fmt: skip
    source = write(tmp_path, names)
    info = sources.describe(source)
    assert info.train_images + info.test_images == 12
    assert any('2 other files are not used: ' in note for note in info.notes)


def test_images_beside_class_folders_are_refused(tmp_path):
    source = write(tmp_path, [*CATS, 'beside.png'])
    with pytest.raises(ValueError, match='1 images lie beside class folders: beside.png'):
        sources.describe(source)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is not there'):
        sources.describe(f'folder:{tmp_path}/nowhere')
    with pytest.raises(ValueError, match='has no image files; it has 2 .npy'):
        sources.describe(write(tmp_path, {'a.npy': b'', 'b.npy': b''}))
    with pytest.raises(FileNotFoundError, match='folder:<path> reads it'):
        sources.describe(f'zip:{tmp_path}')
    (tmp_path / 'x.zip').write_bytes(b'no archive')
    with pytest.raises(ValueError, match='must be a whole zip archive'):
        sources.describe(f'zip:{tmp_path}/x.zip')


BAD = {'a/1.png': b'', 'a/2.png': b'text', 'b/3.png': b'', 'b/4.heic': b'x', 'b/5.png': picture('x')[:50]}


def test_everything_that_cannot_be_used_is_told_at_once(tmp_path):
    source = write(tmp_path, dict.fromkeys(CATS) | BAD)
    for call in (lambda: sources.describe(source), lambda: sources.load(source, 'train', preparation=P)):
        with pytest.raises(ValueError) as refused:
            call()
        text = str(refused.value)
        assert '2 empty: a/1.png, b/3.png' in text and 'no known image format: a/2.png' in text
        assert '1 of a format that is not read; convert them to PNG: b/4.heic' in text
    assert text.startswith('5 of 17 image files of folder:') and 'cut off before the end: b/5.png' in text


@pytest.mark.parametrize('wrap', ['', 'scans/'])
def test_an_archive_is_the_folder_bit_for_bit(tmp_path, wrap):
    source = write(tmp_path / 'images', CATS)
    path = tmp_path / 'images.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(CATS):
            archive.writestr(wrap + name, picture(name))
        archive.writestr('__MACOSX/cats/._0.png', b'x')
    for part in sources.SPLITS:
        one, other = (sources.load(each, part, preparation=P) for each in (source, f'zip:{path}'))
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert sources.describe(f'zip:{path}').class_names == ('cats', 'dogs')


def test_a_damaged_file_in_an_archive_is_named(tmp_path):
    path = tmp_path / 'images.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        for name in CATS:
            archive.writestr(name, picture(name))
    content = path.read_bytes()
    place = content.index(picture('cats/3.png'))
    path.write_bytes(content[: place + 40] + bytes([content[place + 40] ^ 1]) + content[place + 41 :])
    with pytest.raises(ValueError, match='1 damaged: cats/3.png'):
        sources.load(f'zip:{path}', 'train', preparation=P)


def test_sizes_and_colors_are_made_to_fit(tmp_path):
    for part in ('train', 'test'):
        write(tmp_path / part, ['a/1.png'], size=9)
        write(tmp_path / part, ['b/1.png'], size=5, channels=3)
    source = f'folder:{tmp_path}'
    info = sources.describe(source)
    assert info.image_shape == (None, None, 3) and info.sides == (5, 9, 9)
    wanted = Preparation(image_size=4, channels=3, fit='crop')
    assert sources.load(source, 'train', preparation=wanted).images.shape == (2, 4, 4, 3)
    assert sources.shape(source, 'train', preparation=wanted) == (2, 4, 4, 3)
    with pytest.raises(ValueError, match="config.data.fit is 'none'; it must be 'crop' or 'pad'"):
        sources.load(source, 'train')
    with pytest.raises(ValueError, match='4 of another size than config.data.image_size'):
        sources.load(source, 'train', preparation=Preparation(image_size=4, channels=3))


# ---- the split ----------------------------------------------------------------------------------


def drawn(names, share=0.2, seed=0):
    return {name for name, test in zip(names, split.is_test(names, share=share, seed=seed)) if test}


NAMES = [f'{i}.png' for i in range(500)]


def test_the_split_depends_on_names_and_number_and_not_on_order():
    test = drawn(NAMES)
    assert test == drawn(NAMES[::-1]) and test != drawn(NAMES, seed=1)
    assert 60 < len(test) < 140


def test_nobody_moves_another():
    alone = drawn(NAMES)
    for gone in (0, 17, 499):
        left = NAMES[:gone] + NAMES[gone + 1 :]
        assert drawn(left) == alone - {NAMES[gone]}


def test_another_label_moves_no_other_image(tmp_path):
    """Labels are protected: that of one image must not decide whether others are private."""
    names = [f'{label}/{i}.png' for label in 'ab' for i in range(30)]
    parts = []
    for number, own in enumerate(('a', 'b')):
        source = write(tmp_path / str(number), [*names, f'{own}/x.png'])
        listing = sources._find(source, '', preparation=P).listing
        parts.append({listing.names[row] for row in listing.rows('train')} - {f'{own}/x.png'})
    assert parts[0] == parts[1]


def test_persons_stay_together():
    persons = [f'p{i // 5}' for i in range(500)]
    test = split.is_test(persons, share=0.2, seed=0)
    assert all(len(set(test[i : i + 5])) == 1 for i in range(0, 500, 5)) and 50 < test.sum() < 150


def test_records_without_names_have_their_share():
    assert split.numbers_of_test(97, share=0.2, seed=0).sum() == 19
    assert split.numbers_of_test(2, share=0.001, seed=0).sum() == 1
    assert (
        split.numbers_of_test(97, share=0.2, seed=0) != split.numbers_of_test(97, share=0.2, seed=1)
    ).any()


def test_names_that_are_known_number_the_classes(tmp_path):
    """A class without images keeps its number: else one image more would change the labels of all."""
    source = write(tmp_path, [f'{label}/{i}.png' for label in 'bc' for i in range(20)])
    wanted = dataclasses.replace(P, class_names=('a', 'b', 'c'))
    info = sources.describe(source, preparation=wanted)
    assert info.classes == 3 and info.class_names == ('a', 'b', 'c')
    assert set(sources.load(source, 'train', preparation=wanted).labels.tolist()) == {1, 2}
    with pytest.raises(ValueError, match=r'config.data.class_names is a, b; it must also have c, of which'):
        sources.describe(source, preparation=dataclasses.replace(P, class_names=('a', 'b')))


# ---- processes and the cache --------------------------------------------------------------------


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    root = tmp_path_factory.mktemp('many')
    return write(root, [f'{i % 2}/{i}.png' for i in range(260)])


def test_processes_decode_what_one_decodes(many, monkeypatch):
    told = []
    one = sources.load(many, 'train', preparation=P, progress=lambda *count: told.append(count))
    kept = len(one.images)
    assert (
        220 < kept < 250
        and told[-1] == (kept, kept)
        and [done for done, _ in told] == sorted({done for done, _ in told})
    )
    monkeypatch.setattr(decoding, '_FEW', 1000)
    monkeypatch.setattr(decoding, '_of_pool', None)
    np.testing.assert_array_equal(sources.load(many, 'train', preparation=P).images, one.images)


def test_where_processes_do_not_start_this_one_decodes(many, monkeypatch):
    def broken(*_):
        yield from ()
        raise decoding.BrokenProcessPool('no semaphores here')

    monkeypatch.setattr(decoding, '_of_pool', broken)
    assert sources.load(many, 'train', preparation=P).images.any(axis=(1, 2, 3)).all()


def test_shares_of_processes_are_together_the_whole(many):
    whole = sources.load(many, 'train', preparation=P)
    shares = [sources.load(many, 'train', preparation=P, rows=Share(p, 3).images) for p in range(3)]
    for share in shares:
        np.testing.assert_array_equal(share.images, whole.images[share.kept.numbers()])
        np.testing.assert_array_equal(share.labels, whole.labels[share.kept.numbers()])
    assert sum(len(share.images) for share in shares) == whole.total == shares[0].total
    assert sources.identity(many, 'train') != sources.identity(many, 'test')


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A set with a cache, and a function that loads it and says how many files were decoded."""
    source = write(tmp_path / 'images', CATS)
    preparation = Preparation(image_size=4, channels=1, cache=tmp_path / 'private' / 'images')

    def load(**settings):
        counted = []
        true = decode.decode
        monkeypatch.setattr(decode, 'decode', lambda *arguments: counted.append(1) or true(*arguments))
        found = sources.load(source, 'train', preparation=preparation, **settings)
        monkeypatch.setattr(decode, 'decode', true)
        return found.images, len(counted)

    return tmp_path / 'images', preparation.cache, load


def test_a_second_start_decodes_nothing(kept):
    _, cache, load = kept
    first, count = load()
    assert count == 10
    again, count = load()
    assert count == 0 and isinstance(again, np.ndarray)
    np.testing.assert_array_equal(first, again)
    share, count = load(rows=slice(1, None, 2))
    assert count == 0
    np.testing.assert_array_equal(share, first[1::2])
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in cache.iterdir())
    assert sorted(path.suffix for path in cache.iterdir()) == ['.json', '.npy']


def test_a_share_alone_is_not_kept(kept):
    _, cache, load = kept
    assert load(rows=slice(0, None, 2))[1] == 5 and not cache.exists()


@pytest.mark.parametrize('change', ['added', 'removed', 'changed'])
def test_changed_files_are_noticed_and_named(kept, capsys, change):
    root, cache, load = kept
    load()
    name = next(name for name in json.loads((cache / 'train.json').read_text())['files'] if 'dogs' in name)
    if change == 'added':
        name = next(f'cats/new{i}.png' for i in range(100) if split.place(f'cats/new{i}.png', 0) > 0.5)
        write(root, [name])
    elif change == 'removed':
        (root / name).unlink()
    else:
        time.sleep(0.01)
        (root / name).write_bytes(picture('other'))
    images, count = load()
    assert count == len(images) and f'{change} ({name})' in capsys.readouterr().out
    assert len(list(cache.glob('*.npy'))) == 1 and load()[1] == 0


def test_damaged_caches_are_made_again(kept):
    _, cache, load = kept
    first, _ = load()
    first = np.array(first)
    (path,) = cache.glob('*.npy')
    for content in (path.read_bytes()[:-20], b'', path.read_bytes()[:-1] + b'x'):
        path.write_bytes(content)
        again, count = load()
        assert count == 10
        np.testing.assert_array_equal(first, again)
    (cache / 'train.json').write_text('{')
    assert load()[1] == 10


def test_what_decoding_stops_at_leaves_nothing(kept):
    _, cache, load = kept

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(progress=stop)
    assert not list(cache.iterdir())
    assert load()[1] == 10


def test_a_killed_process_leaves_no_processes_and_no_broken_cache(many, tmp_path):
    program = (
        'import sys\n'
        'from dpp_jax.data import sources\n'
        'from dpp_jax.data.preparation import Preparation\n'
        'import multiprocessing, pathlib, time\n'
        'def tell(done, total):\n'
        '    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n'
        '    time.sleep(60)\n'
        f"sources.load({many!r}, 'train', progress=tell, preparation=Preparation(\n"
        f'    image_size=4, channels=1, cache=pathlib.Path({str(tmp_path / "images")!r})))\n'
    )
    root = Path(sources.__file__).parents[3]
    script = tmp_path / 'unguarded.py'  # without a guard for the main module: it must not run again
    script.write_text(program)
    environment = os.environ | {'PYTHONPATH': str(root)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        workers = [int(each) for each in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
    assert workers or os.cpu_count() == 1
    end = time.monotonic() + 20
    while any(is_alive(worker) for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_alive(worker) for worker in workers)
    assert not (tmp_path / 'images' / 'train.json').exists()
    again = Preparation(image_size=4, channels=1, cache=tmp_path / 'images')
    found = sources.load(many, 'train', preparation=again).images
    np.testing.assert_array_equal(found, sources.load(many, 'train', preparation=P).images)


def is_alive(process):
    try:
        return Path(f'/proc/{process}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError:
        return False


def test_a_cache_in_an_object_store_is_a_file_of_this_machine(kept, monkeypatch):
    _, cache, load = kept
    monkeypatch.setattr(decoding.files, 'is_in_store', lambda path: True)
    images, _ = load()
    assert not cache.exists()
    monkeypatch.undo()
    np.testing.assert_array_equal(images, load()[0])


# ---- the folder of the WILDS benchmark ----------------------------------------------------------


def test_camelyon_of_wilds_has_the_official_parts(tmp_path):
    rows = [  # patient, node, x, y, tumor, slide, center, split
        ('004', 4, 10, 20, 1, 0, 0, 0), ('004', 4, 11, 20, 0, 0, 0, 0), ('004', 4, 12, 20, 0, 0, 0, 1),
        ('020', 1, 10, 20, 1, 5, 1, 0), ('040', 2, 10, 20, 0, 7, 2, 0), ('040', 2, 11, 20, 1, 7, 2, 1),
        ('061', 3, 10, 20, 0, 9, 3, 0),
    ]  # fmt: skip
    columns = ',patient,node,x_coord,y_coord,tumor,slide,center,split'
    lines = [columns, *(f'{i},' + ','.join(map(str, row)) for i, row in enumerate(rows))]

    def path(patient, node, x, y, *_):
        of = f'patient_{patient}_node_{node}'
        return f'patches/{of}/patch_{of}_x_{x}_y_{y}.png'

    for row in rows:
        write(tmp_path, [path(*row)], size=96, channels=4)
    (tmp_path / 'metadata.csv').write_text('\n'.join(lines) + '\n')
    source = f'wilds-camelyon:{tmp_path}'
    wanted = Preparation(image_size=32, channels=3, fit='crop', groups='patient')
    info = sources.describe(source, preparation=wanted)
    assert (info.train_images, info.test_images, info.groups) == (3, 2, 2)
    assert info.class_names == ('normal', 'tumor') and info.class_counts == (2, 1)
    assert info.image_shape == (96, 96, 3)
    train = sources.load(source, 'train', preparation=wanted, groups='patient')
    assert train.images.shape == (3, 32, 32, 3) and sorted(train.labels) == [0, 0, 1]
    assert sorted(np.unique(train.groups, return_counts=True)[1]) == [1, 2]
    assert sources.load(source, 'test', preparation=wanted).labels.tolist() == [0, 1]
    (tmp_path / path(*rows[0])).unlink()
    with pytest.raises(ValueError, match='of which 1 are not there: patches/patient_004'):
        sources.describe(source)
