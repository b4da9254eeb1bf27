"""What a larger share of ε for the query costs fine-tuning, as a picture."""

from collections.abc import Callable
import io
import math

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from dpp_jax.privacy import accounting
from dpp_jax.stages.plan import Plan

# Noise of the query, relative to the plan's: some of it beyond every budget, which is left out.
_FACTORS = (4, 2, 1, 1 / 2, 1 / 4)
_LARGEST_SHARE = 0.9
_TOLERANCE = 1e-3  # relative, of ε: less than the width of a line


def points(config: ConfigDict, plan: Plan) -> list[tuple[float, float, float]]:
    """(share of ε that the queries spend alone, their σ, σ of fine-tuning), the least share first.

    The query's noise is what is chosen, so that only fine-tuning's is searched for, from the plan's
    outwards. The plan is one of the points; the others are right to 0.1 % of ε: for the eye.
    """
    dp, query = config.dp, config.query

    def spent(*events) -> float:
        return accounting.epsilon(accounting.compose(events), dp.delta, dp.accountant)

    def queries(sigma: float):
        return accounting.subsampled_gaussian(sigma, query.sampling_probability, query.queries)

    def steps(sigma: float):
        return accounting.subsampled_gaussian(sigma, plan.sampling_probability, plan.steps)

    own = _FACTORS.index(1)
    found = [(plan.epsilon_query / dp.epsilon, plan.query_noise_multiplier, plan.noise_multiplier)]
    for factors in (reversed(_FACTORS[:own]), _FACTORS[own + 1 :]):
        start = plan.noise_multiplier
        for factor in factors:
            query_sigma = factor * plan.query_noise_multiplier
            asked = queries(query_sigma)
            share = spent(asked) / dp.epsilon
            if share > _LARGEST_SHARE:
                break
            start = _search(lambda sigma: spent(asked, steps(sigma)) / dp.epsilon, start)
            found.append((share, query_sigma, start))
    return sorted(found)


def _search(relative: Callable[[float], float], sigma: float) -> float:
    """σ at which `relative` (ε / budget, falling in σ) is 1, found by secants from a σ near it.

    Between logarithms of σ and of ε the curve is nearly a line. A step is at most a factor of two:
    distributions of privacy losses take memory in proportion to ε.
    """
    x, slope, before = math.log(sigma), -1.0, None
    for _ in range(20):
        y = math.log(relative(math.exp(x)))
        if abs(y) < _TOLERANCE:
            break
        if before is not None:
            slope = min((y - before[1]) / (x - before[0]), -0.05)
        before = x, y
        x -= max(-math.log(2), min(math.log(2), y / slope))
    return math.exp(x)


def draw(config: ConfigDict, plan: Plan) -> bytes:
    """PNG: the noise multiplier of fine-tuning against the share of ε that the query may spend."""
    noise, exact = accounting.format_noise, accounting.format_exact
    curve = points(config, plan)
    shares, _, sigmas = zip(*curve)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout='constrained')
    axes = figure.add_subplot()
    axes.plot(shares, sigmas, color='#1f6f8b', marker='o', markersize=4)
    chosen = plan.epsilon_query / plan.epsilon_budget
    axes.plot(chosen, plan.noise_multiplier, 'o', color='#c8553d', markersize=9)
    axes.annotate(
        f'this config: query σ = {noise(plan.query_noise_multiplier)}, '
        f'{accounting.format_epsilon(100 * chosen, 1)} % of ε\n'
        f'fine-tuning σ = {noise(plan.noise_multiplier)}',
        (chosen, plan.noise_multiplier),
        xytext=(0.04, 0.82),
        textcoords='axes fraction',
        color='#c8553d',
        arrowprops={'arrowstyle': '-', 'color': '#c8553d'},
    )
    for share, query_sigma, sigma in curve:
        axes.annotate(
            f'query σ {noise(query_sigma, 2)}',
            (share, sigma),
            xytext=(0, -16),
            textcoords='offset points',
            fontsize=8,
            color='#56636f',
            ha='center',
        )
    axes.set_xscale('log')
    axes.set_xlim(min(shares) / 1.6, max(1.0, 1.6 * max(shares)))
    axes.margins(y=0.25)
    axes.minorticks_off()
    axes.set_xlabel("share of ε that the query's releases spend alone")
    axes.set_ylabel('noise multiplier σ of fine-tuning')
    axes.set_title(
        f'{config.name}: ε = {exact(plan.epsilon_budget)}, δ = {exact(plan.delta)} '
        f'({plan.accountant.upper()})',
        loc='left',
    )
    axes.xaxis.set_major_formatter(lambda value, _: f'{100 * value:g} %')
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()
