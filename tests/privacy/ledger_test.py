"""The ledger: what ran is counted, once, and nothing that was written is lost."""

import dataclasses
import errno
import hashlib
import json
import os
import stat

import pytest

from dpp_jax.privacy import accounting, budget
from dpp_jax.privacy.ledger import Entry, Ledger

QUERY = Entry('central_query', 0, 4.0, 1.0, 8.0, 'a1')
STEP = Entry('dp_sgd', 0, 1.1, 1 / 6, 1.0, 'b2')


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'run' / 'release' / 'ledger.jsonl'


def steps(count, entry=STEP):
    return [dataclasses.replace(entry, index=index) for index in range(count)]


def filled(path, entries=(QUERY, STEP)):
    ledger = Ledger(path)
    for entry in entries:
        assert ledger.append(entry)
    return ledger


def lines(entries, previous=''):
    """The file that holds `entries`: each line with the hash of itself and of those before."""
    text = ''
    for entry in entries:
        fields = dataclasses.asdict(entry)
        if entry.unit == 'image':
            del fields['unit']  # as earlier versions wrote it
        if not entry.declared:
            del fields['declared']  # likewise
        hashed = f'{previous}\n{json.dumps(fields, sort_keys=True)}'
        previous = hashlib.sha256(hashed.encode()).hexdigest()
        text += json.dumps({**fields, 'hash': previous}) + '\n'
    return text


def epsilon(ledger, delta, accountant='rdp'):
    """What all releases that the ledger names spend together."""
    return accounting.epsilon(budget.total_event(budget.group(ledger.entries)), delta, accountant)


def hash_of(line):
    return json.loads(line)['hash']


QUERY_LINE = lines([QUERY])
STEP_LINE = lines([STEP], hash_of(QUERY_LINE))  # as it stands behind QUERY_LINE


def test_total_is_that_of_what_ran(path):
    queries = [dataclasses.replace(QUERY, index=index) for index in range(2)]
    ledger = filled(path, queries + steps(12))
    expected = [
        accounting.subsampled_gaussian(4.0, 1.0, 2),
        accounting.subsampled_gaussian(1.1, 1 / 6, 12),
    ]
    for book in (ledger, Ledger(path)):
        for accountant in ('rdp', 'pld'):
            total = accounting.epsilon(accounting.compose(expected), 1e-4, accountant)
            assert epsilon(book, 1e-4, accountant) == pytest.approx(total, rel=1e-9)
        assert [book.count(name) for name in ('central_query', 'dp_sgd', 'other')] == [2, 12, 0]


def test_a_release_of_groups_says_so_and_one_of_images_is_the_line_of_earlier_versions(path):
    of_group = dataclasses.replace(STEP, unit='group', randomness='c3')
    filled(path, [QUERY, of_group])
    assert path.read_text(encoding='utf-8') == lines([QUERY, of_group])
    first, second = path.read_text(encoding='utf-8').splitlines()
    assert 'unit' not in json.loads(first) and json.loads(second)['unit'] == 'group'
    assert Ledger(path).entries == [QUERY, of_group]
    assert [part.mechanism.unit for part in budget.group(Ledger(path).entries)] == ['image', 'group']
    path.write_text(first + '\n' + second.replace('"group"', '"image"') + '\n', encoding='utf-8')
    with pytest.raises(ValueError, match='line 2 of .*its hash is wrong'):
        Ledger(path)
    with pytest.raises(ValueError, match="unit is 'person'; it must be 'image' or 'group'"):
        dataclasses.replace(STEP, unit='person')


def test_what_is_declared_says_so_counts_like_any_other_and_is_written_at_once(path):
    declared = steps(5, dataclasses.replace(STEP, declared=True))
    ledger = filled(path, [QUERY])
    assert ledger.extend(declared[:2]) == 2
    before = path.read_bytes()
    assert ledger.extend(declared) == 3 and ledger.extend(declared) == 0
    assert path.read_text(encoding='utf-8') == lines([QUERY, *declared])
    assert Ledger(path).entries == [QUERY, *declared]
    assert [part.declared for part in budget.group(Ledger(path).entries)] == [False, True]
    alike = filled(path.with_name('drawn.jsonl'), [QUERY, *steps(5)])
    assert epsilon(ledger, 1e-5) == epsilon(alike, 1e-5)
    # Cut anywhere by a crash, it goes on.
    whole = path.read_bytes()
    for size in (len(before), len(before) + 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        Ledger(path).extend(declared)
        assert path.read_bytes() == whole
    path.write_text(whole.decode().replace('"declared": true, ', '', 1), encoding='utf-8')
    with pytest.raises(ValueError, match='line 2 of .*its hash is wrong'):
        Ledger(path)
    with pytest.raises(ValueError, match='declared is 1; it must be True or False'):
        dataclasses.replace(STEP, declared=1)


def test_of_several_ledgers_what_is_declared_of_one_checkpoint_counts_once(path):
    shared = dataclasses.replace(QUERY, declared=True, randomness='declared-a')
    other = dataclasses.replace(shared, randomness='declared-b')
    books = [
        filled(
            path.with_name(f'{number}.jsonl'),
            [shared, own, dataclasses.replace(STEP, randomness=f'{number}')],
        )
        for number, own in enumerate([other, dataclasses.replace(shared, noise_multiplier=9.0, index=1)])
    ]
    found = budget.together(books)
    assert sorted(entry.declared for entry in found) == [False, False, True, True, True]
    with pytest.raises(ValueError, match='with the same keys'):
        budget.together([books[0], books[0]])


def test_nothing_ran(path):
    ledger = Ledger(path)
    assert not path.exists()
    assert ledger.entries == [] and epsilon(ledger, 1e-5) == 0


def test_mixed_parameters_are_all_counted(path):
    other = dataclasses.replace(STEP, index=7, noise_multiplier=0.9)
    ledger = filled(path, [*steps(3), other])
    expected = accounting.compose(
        [
            accounting.subsampled_gaussian(1.1, 1 / 6, 3),
            accounting.subsampled_gaussian(0.9, 1 / 6, 1),
        ]
    )
    assert epsilon(ledger, 1e-5) == pytest.approx(accounting.epsilon(expected, 1e-5))


def test_the_same_release_counts_once(path):
    ledger = filled(path)
    content = path.read_bytes()
    for book in (ledger, Ledger(path)):
        assert book.append(dataclasses.replace(STEP)) is False
        assert path.read_bytes() == content
        assert book.entries == [QUERY, STEP]


def test_other_randomness_is_another_release(path):
    ledger = filled(path)
    before = epsilon(ledger, 1e-5)
    assert ledger.append(dataclasses.replace(STEP, randomness='c3')) is True
    assert ledger.count('dp_sgd') == 2
    assert epsilon(ledger, 1e-5) > before


@pytest.mark.parametrize('name', ['noise_multiplier', 'sampling_probability', 'sensitivity'])
def test_the_same_randomness_with_other_parameters_is_refused(path, name):
    ledger = filled(path)
    content = path.read_bytes()
    changed = dataclasses.replace(STEP, **{name: 0.99 * getattr(STEP, name)})
    with pytest.raises(ValueError, match='would release something else from the same randomness'):
        ledger.append(changed)
    assert path.read_bytes() == content
    path.write_text(lines([STEP, changed]))
    with pytest.raises(ValueError, match='line 2 of .*something else'):
        Ledger(path)


def test_numbers_survive_exactly(path):
    entry = Entry('dp_sgd', 3, 0.1 + 0.2, 1 / 3, 2**0.5, 'ü')
    filled(path, [entry])
    (read,) = Ledger(path).entries
    assert read == entry
    assert Ledger(path).append(entry) is False


def test_the_line_is_on_the_disk_before_append_returns(path, monkeypatch):
    """The first entry also waits for the file's name in its folder."""
    ledger, seen = Ledger(path), []

    def fsync(descriptor):
        kind = 'folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'file'
        seen.append((kind, path.read_text()))

    monkeypatch.setattr(os, 'fsync', fsync)
    ledger.append(QUERY)
    assert seen == [('folder', ''), ('file', QUERY_LINE)]
    seen.clear()
    ledger.append(STEP)
    assert seen == [('file', QUERY_LINE + STEP_LINE)]
    assert path.read_text() == QUERY_LINE + STEP_LINE


@pytest.mark.parametrize('kept', range(0, len(STEP_LINE)))
def test_a_crash_at_any_byte_of_a_write_leaves_a_ledger_that_goes_on(path, kept):
    """Only the entry in the making is lost, and only if it is not whole."""
    filled(path, [QUERY])
    whole = QUERY_LINE
    torn = STEP_LINE[:kept]
    path.write_text(whole + torn)
    ledger = Ledger(path)
    if kept == len(STEP_LINE) - 1:  # all but the line end
        assert ledger.entries == [QUERY, STEP]
        assert path.read_text() == whole + torn + '\n'
    else:
        assert ledger.entries == [QUERY]
        assert path.read_text() == whole
    ledger.append(STEP)
    assert path.read_text() == whole + STEP_LINE
    assert Ledger(path).entries == [QUERY, STEP]


def test_a_tail_of_zeros_is_removed(path, caplog):
    """What some file systems leave after a power failure."""
    path.parent.mkdir(parents=True)
    path.write_bytes(lines([QUERY]).encode() + bytes(50))
    assert Ledger(path).entries == [QUERY]
    assert path.read_text() == lines([QUERY])
    assert '(50 bytes)' in caplog.text


GOOD = json.loads(STEP_LINE)


@pytest.mark.parametrize(
    ('bad', 'text'),
    [
        ('{"mechanism": "dp_s', 'not a ledger entry'),
        ('', 'not a ledger entry'),
        ('[1]', 'not a ledger entry'),
        ('\0\0', 'not a ledger entry'),
        (json.dumps({k: v for k, v in GOOD.items() if k != 'index'}), 'index'),
        (json.dumps(GOOD | {'shape': 3}), 'shape'),
        (json.dumps(GOOD | {'noise_multiplier': 0}), 'noise_multiplier is 0'),
        (json.dumps(GOOD | {'noise_multiplier': float('nan')}), 'noise_multiplier is nan'),
        (json.dumps(GOOD | {'sampling_probability': '0.1'}), 'sampling_probability is'),
    ],
)
def test_any_other_unreadable_line_is_an_error_with_its_number(path, bad, text):
    path.parent.mkdir(parents=True)
    content = QUERY_LINE + bad + '\n' + STEP_LINE
    path.write_text(content)
    with pytest.raises(ValueError, match='line 2 of .*ledger.jsonl') as error:
        Ledger(path)
    assert text in str(error.value)
    assert path.read_text() == content


@pytest.mark.parametrize(
    'edit',
    [
        lambda text: text.replace('"noise_multiplier": 1.1', '"noise_multiplier": 1.2', 1),
        lambda text: text.replace('"index": 1', '"index": 2', 1),
        lambda text: text.replace('"sensitivity": 8.0', '"sensitivity": 9.0'),
        lambda text: ''.join(text.splitlines(True)[1:]),
        lambda text: ''.join(text.splitlines(True)[:2] + text.splitlines(True)[3:]),
        lambda text: ''.join(text.splitlines(True)[i] for i in (0, 2, 1, 3)),
        lambda text: text + text.splitlines(True)[-1],
        lambda text: text.replace(', "hash": "' + hash_of(text.splitlines()[1]) + '"', ''),
    ],
    ids=['noise', 'index', 'sensitivity', 'first', 'middle', 'order', 'twice', 'no hash'],
)
def test_an_edited_file_is_an_error_and_is_left_alone(path, edit):
    filled(path, [QUERY, *steps(3)])
    text = edit(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match='line . of .* is not a ledger entry'):
        Ledger(path)
    assert path.read_text() == text


def test_a_release_written_a_second_time_is_an_error(path):
    path.parent.mkdir(parents=True)
    path.write_text(lines([QUERY, STEP, STEP]))
    with pytest.raises(ValueError, match='line 3 of .* a second time'):
        Ledger(path)


def test_a_last_line_that_is_whole_but_wrong_is_not_removed(path):
    path.parent.mkdir(parents=True)
    content = lines([QUERY]) + json.dumps(GOOD | {'new': 1})
    path.write_text(content)
    with pytest.raises(ValueError, match='line 2'):
        Ledger(path)
    assert path.read_text() == content


def test_a_full_disk_records_nothing_and_can_be_continued(path, monkeypatch):
    ledger = filled(path, [QUERY])

    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left'):
            ledger.append(STEP)
    assert ledger.entries == [QUERY]
    assert path.read_text() == lines([QUERY])
    assert ledger.append(STEP) is True
    assert Ledger(path).entries == [QUERY, STEP]


def test_two_writers_are_noticed(path):
    first, second = Ledger(path), Ledger(path)
    first.append(QUERY)
    with pytest.raises(OSError, match='another process changed it'):
        second.append(STEP)
    assert Ledger(path).entries == [QUERY]


def test_ten_thousand_entries_are_composed_as_one_event(path):
    """Otherwise ε of a long run would take minutes."""
    path.parent.mkdir(parents=True)
    path.write_text(lines(steps(10_000)))
    ledger = Ledger(path)
    assert len(budget.total_event(budget.group(ledger.entries)).events) == 1
    assert epsilon(ledger, 1e-5) == pytest.approx(
        accounting.epsilon(accounting.subsampled_gaussian(1.1, 1 / 6, 10_000), 1e-5)
    )


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('mechanism', ''),
        ('mechanism', 3),
        ('index', -1),
        ('index', 1.5),
        ('index', True),
        ('noise_multiplier', 0.0),
        ('noise_multiplier', 'x'),
        ('sampling_probability', 1.01),
        ('sensitivity', 0.0),
        ('sensitivity', float('inf')),
        ('randomness', ''),
    ],
)
def test_bad_entries_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name} is {value!r}; it must be'):
        dataclasses.replace(STEP, **{name: value})


def test_reading_changes_and_creates_nothing(path):
    assert Ledger(path, read_only=True).entries == [] and not path.exists()
    filled(path, steps(3))
    with open(path, 'ab') as file:
        file.write(b'{"mechanism": "dp_sgd", "ind')  # as another process has it half written
    before = path.read_bytes()
    book = Ledger(path, read_only=True)
    assert book.entries == steps(3) and path.read_bytes() == before
    with pytest.raises(ValueError, match='for reading only'):
        book.append(steps(4)[3])
