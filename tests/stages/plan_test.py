"""What the stage tells: the figures of the plan, the memory, and the statement of such a run."""

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
