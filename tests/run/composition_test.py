"""Several work directories on the same private images: what they spent together."""

import json

import pytest

from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import DP_SGD, Releases, total_event
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import composition
from dpp_jax.run.folder import WorkDir


def part(count, sigma):
    mechanism = GaussianMechanism(
        name=DP_SGD, noise_multiplier=sigma, sampling_probability=0.25, sensitivity=1.0
    )
    return Releases(mechanism=mechanism, count=count)


def make_run(root, randomness, count=5, sigma=3.0, **plan):
    workdir = WorkDir(root)
    ledger = Ledger(workdir.ledger)
    for index in range(count):
        ledger.append(part(1, sigma).mechanism.entry(index, randomness))
    workdir.plan.write_text(json.dumps({'delta': 1e-5, **plan}))
    return workdir


def files_of(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob('*') if path.is_file()
    }


def test_they_spend_what_all_their_releases_spend_and_nothing_is_written(tmp_path):
    a, b = make_run(tmp_path / 'a', 'x'), make_run(tmp_path / 'b', 'y', count=9, sigma=4.0)
    before = files_of(tmp_path)
    told = composition.text(f'{a.root},{b.root}')
    assert files_of(tmp_path) == before
    event = total_event([part(5, 3.0), part(9, 4.0)])
    (line,) = [line for line in told.splitlines() if line.strip().startswith('together')]
    for accountant, relation in (('rdp', 'zero_out'), ('pld', 'zero_out'), ('pld', 'replace_one')):
        figure = accounting.format_epsilon(accounting.epsilon(event, 1e-5, accountant, relation))
        assert figure in line
    assert 'δ = 1e-05' in line and 'different δ' not in told and 'NOT PRIVATE' not in told


def test_of_different_deltas_the_largest_is_taken_and_said(tmp_path):
    a, b = make_run(tmp_path / 'a', 'x'), make_run(tmp_path / 'b', 'y', delta=1e-4)
    told = composition.text(f'{a.root},{b.root}')
    assert 'different δ (1e-05, 0.0001); the largest' in told
    event = total_event([part(10, 3.0)])
    assert accounting.format_epsilon(accounting.epsilon(event, 1e-4)) in told


def test_what_must_be_known_is_said(tmp_path):
    a = make_run(tmp_path / 'a', 'seed-1-not-private')
    b = make_run(tmp_path / 'b', 'y', relation='add_remove', spent_before=[{}])
    for workdir, digest in ((a, '0'), (b, '1')):
        workdir.private.mkdir()
        workdir.fingerprints.write_text(json.dumps({'train': {'count': 3, 'sha256': digest}}))
    told = composition.text(f'{a.root},{b.root}')
    assert 'NOT PRIVATE' in told and 'together they are for zero_out' in told
    assert 'different private images' in told and 'beside earlier runs' in told


@pytest.mark.parametrize(
    'names, text',
    [
        ('', '--with is empty; it must name work directories'),
        ('nowhere', 'which has no release/ledger.jsonl'),
        ('a,copy', 'with the same keys'),
        ('a,no_plan', 'which has no release/plan.json'),
        ('a,bad', "relation = 'swap'; it must be 'zero_out'"),
    ],
)
def test_what_cannot_be_added_up_is_refused_in_a_line(tmp_path, monkeypatch, names, text):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'a', 'x')
    make_run(tmp_path / 'copy', 'x')
    make_run(tmp_path / 'no_plan', 'z').plan.unlink()
    make_run(tmp_path / 'bad', 'w', relation='swap')
    with pytest.raises((ValueError, FileNotFoundError), match=text) as refused:
        composition.text(names)
    assert '\n' not in str(refused.value)
