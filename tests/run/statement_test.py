"""The statement says no less than what the ledger holds."""

from decimal import Decimal
import json

import pytest

from dpp_jax.privacy.budget import (
    CENTRAL_QUERY,
    DP_SGD,
    FREQUENCY,
    MECHANISMS,
    MOMENTS,
    SELECTION,
    Budget,
    Releases,
)
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import statement, statement_text
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys, seeded_identifier

BUDGET = Budget(epsilon=50.0, delta=1e-5, accountant='rdp', releases=())


def releases(count=3, sigma=2.0, name=DP_SGD):
    mechanism = GaussianMechanism(
        name=name, noise_multiplier=sigma, sampling_probability=1.0, sensitivity=1.0
    )
    return Releases(mechanism=mechanism, count=count)


def make(*parts, **changes):
    settings = dict(delta=1e-5, accountant='rdp', budget=50.0, is_private=True)
    return statement.make(parts or [releases()], **{**settings, **changes})


def written(workdir, *identifiers):
    """The statement of a ledger that names three releases with each of these keys."""
    ledger = Ledger(workdir.ledger)
    for identifier in identifiers:
        for index in range(3):
            ledger.append(releases().mechanism.entry(index, identifier))
    return statement.of_ledger(workdir, ledger, BUDGET)


def test_keys_from_a_seed_make_a_run_not_private_whatever_the_config_says(tmp_path):
    private = written(WorkDir(tmp_path / 'private'), 'abc')
    mixed = written(WorkDir(tmp_path / 'mixed'), 'abc', seeded_identifier(3))
    assert private['private'] is True and mixed['private'] is False
    assert 'NOT PRIVATE' in statement_text.markdown(mixed)
    assert 'NOT PRIVATE' not in statement_text.markdown(private)


def test_releases_with_other_keys_are_other_releases(tmp_path):
    """The same step with two keys is spent twice."""
    twice = written(WorkDir(tmp_path), 'abc', 'def')
    assert [row['count'] for row in twice['mechanisms']] == [6]
    assert twice['epsilon'] == make(releases(6))['epsilon'] > make(releases(3))['epsilon']


def test_figures_are_rounded_to_the_safe_side():
    made = make(releases(sigma=2.00009), budget=1.0000004, delta=1.23456789e-5)
    assert Decimal(made['epsilon_rounded_up']) >= Decimal(made['epsilon'])
    text = statement_text.markdown(made)
    assert '| 2.0000 |' in text and 'ε = 1.0000004' in text and '1.23456789e-05' in text


@pytest.mark.parametrize('sigma', [0.5, 0.2, 0.07])
def test_a_statement_by_pld_is_made_also_where_rdp_is_very_large(sigma):
    made = make(releases(3, sigma=sigma), accountant='pld')
    assert made['epsilon_by_accountant']['rdp'] > 20
    assert 0 < made['epsilon'] == made['epsilon_by_accountant']['pld']
    assert 'differentially private' in statement_text.markdown(made)


@pytest.mark.parametrize('delta', [1e-14, 1e-15, 1e-30])
def test_what_pld_cannot_state_is_said_and_is_no_infinite_figure(delta):
    made = make(delta=delta)
    assert made['epsilon_by_accountant']['pld'] is made['epsilon_of_replace_one'] is None
    text = statement_text.markdown(made)
    assert 'By privacy loss distributions: not available at this δ.' in text and 'inf' not in text


@pytest.mark.parametrize('fields', [{'sigma': 0.01}, {'count': 10**9, 'sigma': 1e4}], ids=str)
def test_a_statement_of_too_much_for_pld_says_so(fields):
    made = make(releases(fields.pop('count', 3), **fields))
    assert made['epsilon_by_accountant']['pld'] is None
    assert 'By privacy loss distributions: not computed: ε is too large, or' in statement_text.markdown(made)


def test_every_version_of_the_code_is_named(tmp_path, monkeypatch):
    workdir = WorkDir(tmp_path)
    statement.record_code(workdir, 'central')
    statement.record_code(workdir, 'central')
    monkeypatch.setattr(statement, 'code_version', lambda: {'dpp_jax': '99'})
    statement.record_code(workdir, 'central')
    statement.record_code(workdir, 'finetune')
    codes = statement.codes(workdir)
    assert [len(codes[stage]) for stage in ('central', 'finetune')] == [2, 1]
    text = statement_text.markdown(make(code_of_stages=codes))
    assert '`finetune`: ran with dpp_jax 99.' in text and '; then dpp_jax 99.' in text
    text = statement_text.markdown(
        make(code_of_stages={stage: [{'dpp_jax': '99'}] for stage in ('a', 'b', 'c')})
    )
    assert '- `a`, `b`, `c`: ran with dpp_jax 99.' in text


def test_the_written_statement_says_how_often_a_mechanism_ran(tmp_path):
    workdir = WorkDir(tmp_path)
    assert statement.stated(workdir, 'dp_sgd') == 0
    statement.write(workdir, make(releases(3), releases(5, sigma=3.0)))
    assert statement.stated(workdir, 'dp_sgd') == 8 and statement.stated(workdir, 'query') == 0
    assert json.loads(workdir.statement.read_text())['private']
    assert not statement.exists(workdir)  # nobody could compute it again
    workdir.released_ledger.touch()
    assert statement.exists(workdir)


def check_lost(workdir, *others):
    stated = {name: statement.stated(workdir, name) for name in MECHANISMS}
    statement.check_lost(workdir, *others, stated)


@pytest.mark.parametrize(
    'name, stage',
    [
        (CENTRAL_QUERY, 'central'),
        (MOMENTS, 'central'),
        (FREQUENCY, 'central'),
        (DP_SGD, 'finetune'),
        (SELECTION, 'evaluate'),
    ],
)
def test_a_lost_release_is_repeated_only_if_the_keys_tell_what_it_was(tmp_path, name, stage):
    workdir = WorkDir(tmp_path)
    keys, part = Keys(workdir.keys, None), releases(3, name=name)
    ledger = Ledger(workdir.ledger)
    identifier = keys.of_mechanism(name, ledger).noise.identifier
    for number in range(3):
        ledger.append(part.mechanism.entry(number, identifier))
    budget = Budget(epsilon=50.0, delta=1e-5, accountant='rdp', releases=(part,))
    lost, done = (dict.fromkeys(MECHANISMS, is_there) for is_there in (False, True))
    check_lost(workdir, keys, ledger, budget, lost)  # nothing was stated
    statement.write(workdir, make(releases(2, name=name)))
    check_lost(workdir, keys, ledger, budget, lost)  # nor all of it made
    statement.write(workdir, make(part))
    check_lost(workdir, keys, ledger, budget, done)
    with pytest.raises(ValueError, match=f'the output of --stage={stage} is missing in'):
        check_lost(workdir, keys, ledger, budget, lost)
    keys.bind_release(name, [])
    check_lost(workdir, keys, ledger, budget, lost)


def test_releases_that_the_statement_counts_and_the_ledger_lacks_are_not_made_again(tmp_path):
    """Keys, ledger and what was released are lost: new keys would release a second time."""
    workdir, part = WorkDir(tmp_path), releases(3)
    budget = Budget(epsilon=50.0, delta=1e-5, accountant='rdp', releases=(part,))
    statement.write(workdir, make(part))
    lost = dict.fromkeys(MECHANISMS, False)
    with pytest.raises(ValueError, match='0 entries of dp_sgd, but the privacy statement counts 3'):
        check_lost(workdir, Keys(workdir.keys, None), Ledger(workdir.ledger), budget, lost)
