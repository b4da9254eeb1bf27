"""What the stage tells: the figures of the plan, the memory, and the statement of such a run."""

import re

import pytest

from dpp_jax import build
from dpp_jax.configs import mnist_28
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import plan


@pytest.fixture
def told(tmp_path, capsys):
    """A function (config, stages to do) → what the stage prints."""

    def tell(config, *todo):
        model = build.model(config)
        made, sizes = build.plan(config, model), build.sizes(config, model)
        plan.run(config, WorkDir(tmp_path), plan=made, todo=todo, model=model, sizes=sizes)
        return capsys.readouterr().out

    return tell


def test_mnist_is_described_with_the_figures_of_the_paper():
    config = mnist_28.get_config('1')
    text = plan.text(config, build.plan(config, build.model(config)))
    for part in ('13.08', '1,485,217', '2,250 steps', 'δ = 1e-05', '288,000,000 noised images'):
        assert part in text


def test_the_memory_is_that_of_what_is_at_once():
    config = mnist_28.get_config('1')
    model = build.model(config)

    def memory(**settings):
        config.update_from_flattened_dict({name.replace('__', '.'): n for name, n in settings.items()})
        return plan._memory(config, model, build.sizes(config, model))

    small = memory(loop__images_at_once=4)
    assert 1e7 < small < memory(loop__images_at_once=64) < 4e9
    assert memory(loop__images_at_once=4, finetune__microbatch=4) > small + 6 * 4 * 1_485_217


def test_a_plan_says_whether_the_run_would_be_private(tiny_config, told):
    config = tiny_config(pretrain__enabled=False)
    assert 'THIS RUN IS NOT PRIVATE' in told(config)
    config.seed = None
    text = told(config)
    assert 'NOT PRIVATE' not in text and '-differentially private' in text
    assert 'would run      nothing: everything is done\n' in text


@pytest.mark.parametrize('enabled', [True, False])
def test_only_a_run_with_a_query_has_a_curve_to_draw(tiny_config, told, tmp_path, enabled):
    text = told(tiny_config(pretrain__enabled=enabled), 'finetune', 'generate')
    assert 'would run      finetune, generate\n' in text
    assert WorkDir(tmp_path).curve.exists() == enabled
    assert ('central images (mean query)' in text) == (f'{WorkDir(tmp_path).curve}' in text) == enabled


def test_a_plan_tells_a_step_s_time_and_what_is_left_of_the_run(tiny_config, told, tmp_path, monkeypatch):
    """At one noised image per second."""
    monkeypatch.setattr(plan.hours, 'rate', lambda model: (1.0, True))
    config = tiny_config(pretrain__enabled=False, finetune__devices_per_image=2)
    steps = build.plan(config, build.model(config)).budget.count('dp_sgd')
    line = lambda text, name: next(line for line in text.splitlines() if line.startswith(name))
    whole = told(config, 'finetune')
    assert '2 devices share an image' in line(whole, 'memory')
    step = re.search(
        r'about ([\d.]+) minutes on 8 device.*efficiency \d+ % .*padding.*sending', line(whole, 'step')
    )
    total = re.search(r'about ([\d.]+) (hours|minutes)', line(whole, 'time left'))
    minutes = float(total[1]) * {'hours': 60, 'minutes': 1}[total[2]]
    assert minutes == pytest.approx(steps * float(step[1]), rel=0.06)
    # The images, and some padding.
    assert float(step[1]) > build.batch(config).expected * config.finetune.draws / 60
    WorkDir(tmp_path).checkpoints('finetune').joinpath(str(steps // 2)).mkdir(parents=True)
    rest = re.search(r'about ([\d.]+) (hours|minutes)', line(told(config, 'finetune'), 'time left'))
    left = float(rest[1]) * {'hours': 60, 'minutes': 1}[rest[2]]
    assert left == pytest.approx(minutes * (1 - (steps // 2) / steps), rel=0.06)


@pytest.mark.parametrize('epsilon, epochs', [('10', 1.0), ('1e5', 150.0), ('10', 1e9), ('1e5', 1e12)])
def test_columns_are_aligned_and_never_run_together(epsilon, epochs):
    config = mnist_28.get_config(epsilon)
    config.query.noise_multiplier = 500.0
    config.finetune.epochs = epochs
    lines = plan.text(config, build.plan(config, build.model(config))).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('mechanism'))
    table = lines[first : first + 4]
    assert len({len(line) for line in table}) == 1
    for row in table[1:3]:
        assert len(row.split(')')[-1].split()) == 4
