"""The comparison with PyTorch: numbers agree, it notices where they do not, and its pages say all of it."""

import dataclasses
import json
import math
from pathlib import Path
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from dpp_jax import build
from dpp_jax.training import devices
from scripts import compare_pytorch
from scripts.compare import numbers, pages, plots, speed, training, workers

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    'network': 5,
    'losses': 8,
    'trajectories': 3,
    'gradients': 7,
    'updates': 5,
    'privacy': 2,
}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def config(tiny_config):
    return tiny_config(model__blocks=1, evaluate__classifiers=('logistic',), generate__sampler__steps=2)


@pytest.fixture(scope='module')
def twins(config):
    model = build.model(config)
    images = np.random.default_rng(0).uniform(-1, 1, (4,) + model.image_shape).astype(np.float32)
    labels = np.arange(4, dtype=np.int32)
    return numbers.Twins(model, numbers.random_params(model), images, labels, draws=2)


@pytest.fixture(scope='module')
def results(config, twins):
    budget = build.plan(config, twins.model).budget
    return numbers.check(twins, steps=4, releases=budget.releases, epsilon=budget.epsilon, delta=budget.delta)


def test_all_numbers_agree(results):
    assert {part: sum(each.part == part for each in results) for part in PARTS} == PARTS
    assert not [each for each in results if not each.is_within]
    # Both sides truly compute: some rounding differs.
    assert sum(each.error > 0 for each in results) > len(results) - 3


def test_another_weight_is_noticed(twins):
    """One weight of 11 thousand, a little larger on one side."""
    other = jax.tree.map(np.array, twins.params)
    other['conv_in']['kernel'][1, 1, 0, 0] *= 1.05
    changed = dataclasses.replace(twins)
    changed.network.load_state_dict(numbers.Twins(twins.model, other, *[None] * 2, 1).network.state_dict())
    assert not any(each.is_within for each in numbers.network(changed))


def test_a_report_that_is_not_finite_is_not_within_its_tolerance():
    assert not numbers.compare('part', 'name', np.array([np.nan]), np.ones(1), 1.0).is_within


@pytest.fixture(scope='module')
def outcomes(config, twins):
    task = dataclasses.replace(training.make_task(config, params=twins.params), steps=2)
    with devices.limited_to(1):
        return training.run(task, seeds=2, images=40, tell=print)


def test_trainings_of_both_sides_begin_with_the_same_loss(outcomes):
    assert [each.side for each in outcomes] == ['dpp_jax', 'PyTorch'] * 2
    for ours, theirs in zip(outcomes[::2], outcomes[1::2]):
        # The same 60 images and weights; noise levels are each side's own.
        assert theirs.losses[0] == pytest.approx(ours.losses[0], rel=0.5)
        assert 0 < theirs.fid < math.inf and 0 <= theirs.accuracy['logistic'] <= 1
    assert outcomes[0].losses != outcomes[2].losses


def test_verdict_of_equal_and_of_other_means():
    row = training.Row(name='FID', ours=(5.0, 5.2, 5.1), theirs=(5.1, 5.0, 5.3))
    assert row.verdict == 'equal within the spread' and row.difference == pytest.approx(-1 / 30)
    assert dataclasses.replace(row, theirs=(9.0, 9.2, 9.1)).verdict.startswith('differs')
    assert dataclasses.replace(row, ours=(5.0,), theirs=(9.0,)).verdict.startswith('no spread')


@pytest.fixture(scope='module')
def figures(config, twins):
    task = speed.Task(config, jax.tree.map(np.asarray, twins.params), 2)
    limits = speed.Limits(turns=1, build_seconds=200, call_seconds=60)
    chosen = [
        speed.Form(speed.OURS, '4 at once', 4),
        speed.Form(speed.THEIRS, 'loop over images', 1, of='loop over images'),
    ]
    found = speed.turns(task, speed.PRIVATE, chosen, 2, limits)
    none = dataclasses.replace(limits, memory_bytes=1.0)
    return found, speed.turns(task, speed.PLAIN, [speed.Form(speed.THEIRS, 'eager')], 2, none)


def test_speed_and_memory_of_both_sides(figures):
    found, out_of_memory = figures
    assert not any(each.failure for each in found)
    assert all(each.rate > 0 and each.memory > 0 for each in found)
    ((form, batch, ratio),) = speed.ratios(found)
    assert (form, batch) == ('loop over images', 2)
    assert ratio == pytest.approx(found[0].rate / found[1].rate)
    assert out_of_memory[0].rate is None and 'out of memory' in out_of_memory[0].failure


def test_an_error_in_a_process_is_told(twins):
    with pytest.raises(workers.Failed, match="KeyError: 'none'"):
        workers.Worker(
            dict.__getitem__,
            ({}, 'none'),
            environment={},
            build_seconds=60,
            call_seconds=1,
            memory_bytes=1e12,
        )


def test_forms_are_named_once_and_the_quick_ones_are_few():
    for work in (speed.PLAIN, speed.PRIVATE, speed.SAMPLING):
        full, quick = (speed.forms(work, 16, 32, is_quick) for is_quick in (False, True))
        assert len({(form.side, form.name) for form in full}) == len(full)
        assert len(quick) <= 3 and set(quick) < set(full)
        assert any(form.is_compiled for form in full) and not any(form.is_compiled for form in quick)


def report(results, figures, outcomes):
    sweep = [dataclasses.asdict(each) for each in figures[0] + figures[1]]
    return {
        'config': 'tiny', 'parameters': 11_000, 'weights': 'random', 'draws': 2, 'date': 'today',
        'machine': 'this', 'cores': 2, 'versions': {'jax': '1'}, 'is_quick': True, 'load': 9.0,
        'numbers': [dataclasses.asdict(each) | {'is_within': each.is_within} for each in results],
        'speed': [
            {
                'work': speed.PRIVATE, 'unit': speed.UNITS[speed.PRIVATE], 'trials': sweep, 'sweep': sweep,
                'ratios': [dict(zip(('form', 'batch', 'ratio'), each)) for each in speed.ratios(figures[0])],
            }
        ],
        'training': {
            'config': 'tiny', 'steps': 2, 'seeds': 2, 'images': 40, 'noise_multiplier': 1.0,
            'sampling_probability': 0.1, 'clip_norm': 1.0,
            'outcomes': [dataclasses.asdict(each) for each in outcomes],
            'rows': [row.figures() for row in training.rows(outcomes)],
        },
    }  # fmt: skip


def test_the_three_files_say_all_of_it(results, figures, outcomes, tmp_path):
    compare_pytorch.write(report(results, figures, outcomes), tmp_path)
    found = json.loads((tmp_path / 'comparison.json').read_text())
    assert len(found['numbers']) == len(results)
    page, text = ((tmp_path / f'comparison.{ending}').read_text() for ending in ('html', 'md'))
    for each in results:
        assert each.name in text and each.name.replace('&', '&amp;') in page
    for said in ('Other programs ran on this machine', 'out of memory', 'loop over images', 'FID'):
        assert said in text and said in page
    assert not re.search(r'(src|href)=|url\(|@import', page)  # nothing from elsewhere
    assert page.count('<svg') >= 6 and 'nan' not in page
    assert all(float(place) == float(place) for place in re.findall(r'c[xy]="([^"]*)"', page))


def test_a_failed_check_is_said_first(results, figures, outcomes):
    bad = report(results, figures, outcomes)
    bad['numbers'][3]['is_within'] = False
    title, value, _, style = next(pages.cards(bad))
    assert (title, value, style) == ('Same numbers', f'{len(results) - 1} of {len(results)}', 'bad')
    assert 'NOT within' in pages.markdown(bad)


def test_a_plot_leaves_out_what_its_axis_cannot_show():
    points = [(1, 0.0), (2, math.nan), (3, 1e-3), (4, 10.0)]
    drawn = plots.plot(
        [plots.Series(name='a & b', style='ours', points=points)], title='t', x='x', y='y', log_y=True
    )
    assert drawn.count('<circle') == 2 and 'a &amp; b' in drawn


@pytest.mark.parametrize('low, high', [(58.9, 67.6), (234, 224), (3, 4e6), (0.1, 0.1001)])
def test_an_axis_has_numbers_however_narrow_it_is(low, high):
    drawn = plots.plot(
        [plots.Series(name='a', style='ours', points=[(1, low), (2, high)])],
        title='t',
        x='x',
        y='y',
        log_y=True,
    )
    assert drawn.count('text-anchor="end"') >= 2


@pytest.mark.parametrize(
    'arguments, said',
    [
        ([], '--config is missing'),
        (['--config=digits_8'], 'ε must stand after a colon'),
        (['--config=digits_8:10', '--sections=speeds'], "--sections has ['speeds']"),
        (['--config=digits_8:10', '--sections=numbers', '--checkpoint=none.pth'], 'none.pth'),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert compare_pytorch.main(['compare_pytorch.py', *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed and len(printed.splitlines()) == 1


def test_without_opacus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'opacus', None)
    with pytest.raises(compare_pytorch.Mistake, match=r"pip install -e '.\[pytorch\]'"):
        compare_pytorch.check_installed()


def test_it_starts_as_a_script_and_as_a_module():
    for start in (['scripts/compare_pytorch.py'], ['-m', 'scripts.compare_pytorch']):
        done = subprocess.run([sys.executable, *start, '--help'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and '--quick' in done.stdout.replace('--[no]', '--'), done.stderr
