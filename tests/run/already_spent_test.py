"""What earlier runs spent is part of a new run's budget, whatever file names it."""

import json

import pytest

from dpp_jax import build
from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import DP_SGD, Releases, total_event
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.mechanism import GaussianMechanism
from dpp_jax.run import already_spent, statement, statement_text
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import plan as plan_stage

COUNT = 7


class NoModel:
    """Takes no time to be looked at."""

    def shapes(self):
        return {}


def releases(count=COUNT):
    mechanism = GaussianMechanism(
        name=DP_SGD, noise_multiplier=3.0, sampling_probability=0.25, sensitivity=1.0
    )
    return Releases(mechanism=mechanism, count=count)


def make_run(root, randomness='abc', count=COUNT):
    """The ledger and the statement of a run."""
    workdir = WorkDir(root)
    ledger = Ledger(workdir.ledger)
    for index in range(count):
        ledger.append(releases().mechanism.entry(index, randomness))
    written = statement.make([releases(count)], is_private=True, delta=1e-5, accountant='rdp', budget=9.0)
    statement.write(workdir, written)
    return workdir


@pytest.mark.parametrize('name', ['root', 'ledger', 'statement'])
def test_a_folder_a_ledger_and_a_statement_name_the_same_releases(tmp_path, name):
    workdir = make_run(tmp_path / 'run')
    assert already_spent.releases(f'{getattr(workdir, name)}', is_private=True) == (releases(),)


def test_several_are_added_up_and_none_is_nothing(tmp_path):
    a, b = make_run(tmp_path / 'a'), make_run(tmp_path / 'b', 'def')
    assert already_spent.releases(f'{a.root}, {b.ledger}', is_private=True) == (releases(2 * COUNT),)
    assert already_spent.releases(f'{a.root},{b.statement}', is_private=True) == (releases(), releases())
    assert already_spent.releases(' , ', is_private=True) == ()


def test_a_statement_also_names_what_was_spent_before_its_run(tmp_path):
    workdir = make_run(tmp_path)
    told = json.loads(workdir.statement.read_text())
    told['spent_before'] = already_spent.rows((releases(2),))
    workdir.statement.write_text(json.dumps(told))
    assert already_spent.releases(str(workdir.statement), is_private=True) == (releases(2), releases())


def test_a_work_directory_brings_what_was_spent_before_it(tmp_path):
    """A run that counted an earlier one: naming its folder counts both."""
    workdir = make_run(tmp_path)
    workdir.plan.write_text(json.dumps({'spent_before': already_spent.rows((releases(2),))}))
    found = already_spent.releases(str(workdir.root), is_private=True)
    assert sorted(part.count for part in found) == sorted([2, COUNT])


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda w: w.ledger.unlink(), 'which is no file; allowed are work directories'),
        (lambda w: w.ledger.write_text(''), 'which holds no release'),
        (lambda w: w.ledger.write_text('{"a": 1}\n'), 'line 1 of .*is not a ledger entry'),
    ],
    ids=['missing', 'empty', 'another'],
)
def test_a_file_that_names_nothing_is_refused(tmp_path, change, text):
    workdir = make_run(tmp_path)
    change(workdir)
    with pytest.raises((ValueError, FileNotFoundError), match=text) as refused:
        already_spent.releases(str(tmp_path), is_private=True)
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('content', ['{}', '[]', 'x', '{"mechanisms": [{}], "private": true}'])
def test_a_file_that_is_no_statement_is_refused_by_name(tmp_path, content):
    path = tmp_path / 'privacy_statement.json'
    path.write_text(content)
    with pytest.raises(ValueError, match='privacy_statement.json') as refused:
        already_spent.releases(str(path), is_private=True)
    assert '\n' not in str(refused.value)


def test_the_same_run_twice_and_a_run_from_a_seed_are_refused(tmp_path):
    a, copy = make_run(tmp_path / 'a'), make_run(tmp_path / 'copy')
    with pytest.raises(ValueError, match='the same keys'):
        already_spent.releases(f'{a.root},{copy.root}', is_private=True)
    seeded = make_run(tmp_path / 'seeded', 'seed-1-not-private')
    with pytest.raises(ValueError, match='not private: no ε covers'):
        already_spent.releases(str(seeded.root), is_private=True)
    assert already_spent.releases(str(seeded.root), is_private=False) == (releases(),)


@pytest.mark.parametrize('accountant, relation', [('rdp', 'zero_out'), ('pld', 'replace_one')])
def test_a_new_run_keeps_both_within_its_budget_and_says_so(tiny_config, tmp_path, accountant, relation):
    config = tiny_config(dp__accountant=accountant, dp__relation=relation, seed=None)
    alone = build.plan(config, NoModel())
    config.dp.already_spent = str(make_run(tmp_path).root)
    beside = build.plan(config, NoModel())
    noise = [plan.budget.of(DP_SGD).mechanism.noise_multiplier for plan in (alone, beside)]
    assert noise[1] > 1.001 * noise[0]
    both = total_event([releases(), *beside.budget.releases])
    spent = accounting.epsilon(both, config.dp.delta, accountant, relation)
    assert beside.budget.spent() == spent <= config.dp.epsilon
    assert spent == pytest.approx(config.dp.epsilon, rel=1e-3)
    assert 'spent before: dp_sgd' in plan_stage.text(config, beside)
    told = plan_stage._statement(config, beside)
    assert told['epsilon'] == spent and told['spent_before'][0]['count'] == COUNT
    assert '| spent before: fine-tuning (DP-SGD) | 3.0000 |' in statement_text.markdown(told)


def test_a_budget_that_is_spent_already_is_refused(tiny_config, tmp_path):
    config = tiny_config(dp__epsilon=2.0, dp__already_spent=str(make_run(tmp_path, count=2000).root))
    with pytest.raises(ValueError, match='config.dp.epsilon is 2; it must be above .*already_spent names'):
        build.plan(config, NoModel())


def test_a_plan_that_forgot_what_was_spent_before_is_refused(tiny_config, tmp_path):
    config = tiny_config(dp__already_spent=str(make_run(tmp_path).root))
    with pytest.raises(ValueError, match='plan.json has 0 releases that were spent before'):
        build.plan(config, NoModel(), {'dp_sgd': 1.0}, ())
