"""The statement says no less than what the ledger holds."""

from decimal import Decimal
import json

from dpp_jax.privacy.ledger import Entry
from dpp_jax.run import folder as workdir_lib
from dpp_jax.run import statement


def entries(count=3, sigma=2.0, randomness='abc'):
    return [Entry('dp_sgd', index, sigma, 1.0, 1.0, randomness) for index in range(count)]


def make(releases, **changes):
    settings = dict(delta=1e-5, accountant='rdp', budget=50.0)
    return statement.make(releases, **{**settings, **changes})


def test_keys_from_a_seed_make_a_run_not_private_whatever_the_config_says():
    assert make(entries())['private'] is True
    mixed = make([*entries(), *entries(1, randomness=workdir_lib.seeded(3))])
    assert mixed['private'] is False
    assert 'NOT PRIVATE' in statement.markdown(mixed)
    assert 'NOT PRIVATE' not in statement.markdown(make(entries()))


def test_figures_are_rounded_to_the_safe_side():
    made = make(entries(sigma=2.00009), budget=1.0000004, delta=1.23456789e-5)
    assert Decimal(made['epsilon_rounded_up']) >= Decimal(made['epsilon'])
    text = statement.markdown(made)
    assert '| 2.0000 |' in text and 'ε = 1.0000004' in text and '1.23456789e-05' in text


def test_a_statement_by_pld_is_made_also_where_rdp_is_very_large(monkeypatch):
    monkeypatch.setattr(statement, '_MOST_FOR_PLD', 1.0)  # the real bound takes long to exceed
    assert make(entries())['epsilon_by_accountant']['pld'] is None
    made = make(entries(), accountant='pld')
    assert made['epsilon_by_accountant']['rdp'] > 1
    assert 0 < made['epsilon'] == made['epsilon_by_accountant']['pld']
    assert 'differentially private' in statement.markdown(made)


def test_every_version_of_the_code_is_named(tmp_path, monkeypatch):
    workdir = workdir_lib.WorkDir(tmp_path)
    statement.record_code(workdir, 'central')
    statement.record_code(workdir, 'central')
    monkeypatch.setattr(statement, 'code_version', lambda: {'dpp_jax': '99'})
    statement.record_code(workdir, 'central')
    statement.record_code(workdir, 'finetune')
    codes = statement.codes(workdir)
    assert [len(codes[stage]) for stage in ('central', 'finetune')] == [2, 1]
    text = statement.markdown(make(entries(), code_of_stages=codes))
    assert '`finetune` was run by dpp_jax 99.' in text and '; then dpp_jax 99.' in text


def test_the_written_statement_says_how_often_a_mechanism_ran(tmp_path):
    workdir = workdir_lib.WorkDir(tmp_path)
    assert statement.stated(workdir, 'dp_sgd') == 0
    statement.write(workdir, make([*entries(3), *entries(5, sigma=3.0, randomness='other')]))
    assert statement.stated(workdir, 'dp_sgd') == 8 and statement.stated(workdir, 'query') == 0
    assert json.loads((workdir.release / 'privacy_statement.json').read_text())['private']
