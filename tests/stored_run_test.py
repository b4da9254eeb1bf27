"""A whole run in an object store releases what it releases on a disk, whatever interrupts it."""

import numpy as np
import pytest

from dpp_jax import files, lease, object_store, pipeline
from dpp_jax.library import load
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run.folder import WorkDir

STAGES = ('central', 'pretrain', 'finetune', 'generate')


class Broken(BaseException):
    """What ends a run in the middle."""


def break_at(monkeypatch, chosen):
    """Let the program end when it has written, or begun to write, an object that `chosen` picks; once."""
    write, broken = object_store.write, []

    def breaking(where, data):
        if not broken and chosen(str(where), data):
            broken.append(where)
            raise Broken(where)
        write(where, data)

    monkeypatch.setattr(object_store, 'write', breaking)
    return broken


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_run_in_stores_releases_the_same_however_often_it_breaks(
    quick_config, bucket, tmp_path, monkeypatch
):
    """What is released goes to a folder without POSIX; private/, with the ledger, to a bucket by epath."""
    config = quick_config(finetune__snapshots=2, generate__separate_classifier_images=True)
    config.generate.png_tree = True
    reference = WorkDir(tmp_path / 'disk')
    for stage in STAGES:
        pipeline.run(config, reference.root, stage)
    breaks = [  # in the middle of the queries, of a training, of a model, of images
        lambda where, data: where.endswith('ledger.jsonl') and data.count(b'\n') == 2,
        lambda where, data: where.endswith('private/ledger.jsonl') and data.count(b'\n') == 15,
        lambda where, data: '/release/model/finetune/' in where,
        lambda where, data: where.endswith('classifier_images.npz'),
    ]
    monkeypatch.setattr(lease, '_SETTLE', 0.01)
    monkeypatch.setenv(bucket.FOLDER, str(tmp_path))
    with bucket.without_posix(tmp_path / 'mounted') as root:
        private, todo = 'gs://bucket/private', list(STAGES)
        workdir = WorkDir(root, private=private)
        for chosen in [*breaks, None]:
            with monkeypatch.context() as patch:
                broken = break_at(patch, chosen) if chosen else []
                try:
                    while todo:
                        pipeline.run(config, root, todo[0], private)
                        todo.pop(0)
                except Broken:
                    pass
                assert bool(broken) == bool(chosen)
        released, expected = contents(workdir.release), contents(reference.release)
        assert released.keys() == expected.keys()
        assert [name for name in expected if released[name] != expected[name]] == []
        assert files.names(root) == ['private.json', 'release'] and not (root / 'private').exists()
        assert Ledger(workdir.own_ledger).entries == Ledger(reference.own_ledger).entries
        images, _ = load(root).sample(3, seed=1)
        np.testing.assert_array_equal(images, load(reference.root).sample(3, seed=1)[0])
        metrics = workdir.metrics('finetune')
        assert all(object_store.size(metrics / name) for name in files.names(metrics))
        assert len(files.names(metrics)) == 6  # one for each beginning, and one for each of three pictures
        with pytest.raises(ValueError, match='Add --private=gs://bucket/private'):
            pipeline.run(config, root, 'all')
        pipeline.run(config, root, 'clean', private)
        assert not files.names(workdir.private) and files.is_whole(workdir.model('finetune'))
