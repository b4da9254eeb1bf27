"""The picture of the budget: every point of its curve is a plan within it, and there is always a picture."""

import io

from PIL import Image
import pytest

from dpp_jax import build
from dpp_jax.configs import mnist_28
from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.run import plan_curve


class NoModel:
    """Takes no time to be looked at."""

    def shapes(self):
        return {}


# The smallest budgets leave the query less than any noise gives: not every share can be met.
@pytest.mark.parametrize('epsilon, share', [('1', None), ('0.1', 0.2), ('0.1', 0.9)])
def test_every_point_spends_the_budget(epsilon, share):
    config = mnist_28.get_config(epsilon)
    config.query.epsilon_share = share
    budget = build.plan(config, NoModel()).budget
    points = plan_curve.points(budget)
    own = [budget.of(name).mechanism.noise_multiplier for name in (CENTRAL_QUERY, DP_SGD)]
    assert own in [list(point[1:]) for point in points]
    assert len(points) > 2
    for share, query_sigma, sigma in points:
        asked = accounting.subsampled_gaussian(query_sigma, 0.1, 5)
        steps = accounting.subsampled_gaussian(sigma, 1 / 15, 2250)
        total = accounting.epsilon(accounting.compose([asked, steps]), 1e-5)
        assert total == pytest.approx(float(epsilon), rel=2e-3)
        assert accounting.epsilon(asked, 1e-5) / total == pytest.approx(share, rel=2e-3)
    assert [p[2] for p in points] == sorted(p[2] for p in points)  # what the query takes, fine-tuning lacks
    with Image.open(io.BytesIO(plan_curve.draw(budget, config.name))) as picture:
        assert picture.size[0] > 500


def test_the_axis_of_the_noise_begins_at_zero(monkeypatch):
    """A change of 1 % must not look like a cliff."""
    limits, savefig = [], plan_curve.Figure.savefig

    def look(figure, *arguments, **named):
        limits.append(figure.axes[0].get_ylim())
        savefig(figure, *arguments, **named)

    monkeypatch.setattr(plan_curve.Figure, 'savefig', look)
    budget = build.plan(mnist_28.get_config('10'), NoModel()).budget
    plan_curve.draw(budget, 'mnist')
    ((least, most),) = limits
    assert least == 0 and most > max(sigma for _, _, sigma in plan_curve.points(budget))
