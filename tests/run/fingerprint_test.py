"""The private images of a folder stay the same, however many processes share them."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from dpp_jax import files
from dpp_jax.data.images import Images
from dpp_jax.data.rows import Rows
from dpp_jax.data.stored import StoredImages
from dpp_jax.privacy.shares import Share
from dpp_jax.run import fingerprint

N = 11
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 4, 2, 1), np.uint8)
LABELS, GROUPS = (np.arange(N) % 3).astype(np.int32), np.arange(N) // 2
WHOLE = Images(images=IMAGES, labels=LABELS, groups=GROUPS)


def share_of(whole, index, count):
    rows = Rows(whole.total, Share(index, count).images(whole.groups))
    numbers = rows.numbers()
    return dataclasses.replace(whole, images=whole.images[numbers], labels=whole.labels[numbers], rows=rows)


def digest_sum(share, **changes):
    arguments = {
        'images': share.images,
        'labels': share.labels,
        'groups': share.own_groups,
        'numbers': share.kept.numbers(),
    }
    return fingerprint.row_digest_sum(**arguments | changes)


@pytest.mark.parametrize('count', [1, 2, 3, 20])
@pytest.mark.parametrize('groups', [GROUPS, None], ids=['groups', 'none'])
def test_the_sums_of_shares_add_up_to_that_of_the_set(count, groups):
    whole = dataclasses.replace(WHOLE, groups=groups)
    shares = [share_of(whole, index, count) for index in range(count)]
    assert sum(map(digest_sum, shares)) % 2**256 == digest_sum(whole)


def test_every_part_of_every_row_counts():
    order = np.r_[1, 0, 2:N]
    pixel, label = IMAGES.copy(), LABELS.copy()
    pixel[10, 3, 1, 0] ^= 1
    label[0] = 2
    sums = [
        digest_sum(WHOLE),
        digest_sum(WHOLE, images=pixel),
        digest_sum(WHOLE, labels=label),
        digest_sum(WHOLE, groups=GROUPS + 1),
        digest_sum(WHOLE, groups=None),
        digest_sum(WHOLE, images=IMAGES[order], labels=LABELS[order], groups=GROUPS[order]),
        digest_sum(WHOLE, images=IMAGES.reshape(N, 2, 4, 1)),
        digest_sum(share_of(WHOLE, 0, 2)),
    ]
    assert len(set(sums)) == len(sums) and all(0 <= total < 2**256 for total in sums)


def test_labels_of_another_type_and_small_blocks_change_nothing(monkeypatch):
    known = digest_sum(WHOLE)
    monkeypatch.setattr(fingerprint, '_BYTES', 3 * 8)
    assert digest_sum(WHOLE) == known == digest_sum(WHOLE, labels=LABELS.astype(np.int64))
    stored = StoredImages(lambda rows: IMAGES[rows], IMAGES.shape)
    assert digest_sum(WHOLE, images=stored) == known


def check_in_processes(path, shares):
    """What so many processes do, here threads: errors of the first one reach all. Returns their errors."""
    barrier = threading.Barrier(len(shares))
    board, errors = [None] * len(shares), [None] * len(shares)

    def process(index):
        def gather(text):
            assert len(text) <= 64
            board[index] = text
            barrier.wait()
            found = list(board)
            barrier.wait()
            return found

        def at_first(function):
            if index == 0:
                try:
                    board[0] = function()
                except ValueError as error:
                    board[0] = error
            barrier.wait()
            found = board[0]
            barrier.wait()
            if isinstance(found, ValueError):
                raise found
            return found

        try:
            fingerprint.check(path, 'train', shares[index], gather=gather, at_first=at_first)
        except ValueError as error:
            errors[index] = str(error)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return errors


def in_shares(whole, count):
    return [share_of(whole, index, count) for index in range(count)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'private' / 'data.json'


def test_a_folder_goes_on_with_any_number_of_processes_and_only_with_its_images(path):
    for count in (2, 1, 4):
        assert check_in_processes(path, in_shares(WHOLE, count)) == [None] * count
    written = path.read_bytes()
    other = IMAGES.copy()
    other[6, 0, 0, 0] ^= 1
    for count in (1, 3):
        errors = check_in_processes(path, in_shares(dataclasses.replace(WHOLE, images=other), count))
        assert all('other images (11) than those' in error for error in errors)
    assert path.read_bytes() == written


@pytest.mark.parametrize('groups', [GROUPS, None], ids=['groups', 'none'])
def test_the_fingerprint_of_an_earlier_version_is_compared_by_one_process_and_replaced(path, groups):
    whole = dataclasses.replace(WHOLE, groups=groups)
    arrays = [IMAGES, LABELS] + ([] if groups is None else [groups])
    old = {'count': N, 'sha256': files.digest(arrays)}
    path.parent.mkdir()
    path.write_text(json.dumps({'_note': 'x', 'train': old}))
    errors = check_in_processes(path, in_shares(whole, 2))
    assert all('Run one stage with one process' in error for error in errors)
    other = dataclasses.replace(whole, labels=np.roll(LABELS, 1))
    (error,) = check_in_processes(path, [other])
    assert 'fingerprint differs' in error
    assert json.loads(path.read_text())['train'] == old
    assert check_in_processes(path, [whole]) == [None]
    now = json.loads(path.read_text())
    assert now['train'].items() > old.items() and now['_note'] == 'x'
    assert check_in_processes(path, in_shares(whole, 3)) == [None] * 3
    assert all(check_in_processes(path, in_shares(other, 3)))


def test_files_that_did_not_change_are_not_read_again(path):
    read = []

    def in_files(whole, stamps):
        """Shares that stay in files with these stamps."""
        for share, stamp in zip(in_shares(whole, len(stamps)), stamps):
            array = share.images

            def rows(numbers, array=array):
                read.extend(numbers.tolist())
                return array[numbers]

            yield dataclasses.replace(share, images=StoredImages(rows, array.shape), stamp=stamp)

    def rows_read(whole, *stamps):
        read.clear()
        errors = check_in_processes(path, list(in_files(whole, stamps)))
        return len(read), any(errors)

    other = dataclasses.replace(WHOLE, images=IMAGES[::-1])
    assert rows_read(WHOLE, 'a', 'b') == (N, False)
    assert rows_read(WHOLE, 'a', 'b') == (0, False)
    assert rows_read(WHOLE, 'a', 'c') == (N, False)  # other files, the same images
    assert rows_read(WHOLE, 'a', 'c') == (0, False)
    # A process alone reads rows of its file that it did not read before.
    assert rows_read(WHOLE, 'a') == (N, False)
    assert rows_read(other, 'd') == (N, True)
    assert rows_read(other, 'd') == (N, True)  # what was refused is not known
    assert check_in_processes(path, [WHOLE]) == [None]  # in memory
    assert check_in_processes(path, [other]) != [None]


def test_folders_are_of_different_images_only_where_it_is_certain():
    old, new = {'count': 1, 'sha256': '0'}, {'count': 1, 'row_sum': '1'}
    assert not fingerprint.are_different(old, new) and not fingerprint.are_different({}, new)
    assert not fingerprint.are_different(old | new, new)
    assert fingerprint.are_different(old | new, {'count': 1, 'row_sum': '2'})
    assert fingerprint.are_different(old, {'count': 1, 'sha256': '1'})
