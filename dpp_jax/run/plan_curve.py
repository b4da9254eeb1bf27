"""What a larger share of ε for the query costs fine-tuning, as a picture."""

import dataclasses
import io

from matplotlib.figure import Figure

from dpp_jax.privacy import accounting
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, Budget
from dpp_jax.run.split import search

# Noise of the query, relative to the plan's: some of it beyond every budget, which is left out.
_FACTORS = (4, 2, 1, 1 / 2, 1 / 4)
_LARGEST_SHARE = 0.9


def points(budget: Budget) -> list[tuple[float, float, float]]:
    """Compute (share of ε that the queries spend alone, their σ, σ of fine-tuning), the least share first.

    The query's noise is what is chosen, so that only fine-tuning's is searched for, from the plan's
    outwards. The plan is one of the points; the others are right to 0.1 % of ε: for the eye.
    """
    query, dp_sgd = budget.of(CENTRAL_QUERY), budget.of(DP_SGD)

    def share(*events) -> float:
        event = accounting.compose(events)
        spent = accounting.epsilon(event, budget.delta, budget.accountant, budget.relation)
        return spent / budget.epsilon

    others = [part for part in budget.releases if part not in (query, dp_sgd)]
    before = [part.event for part in (*budget.before, *others)]

    def event(releases, sigma: float):
        mechanism = dataclasses.replace(releases.mechanism, noise_multiplier=sigma)
        return dataclasses.replace(releases, mechanism=mechanism).event

    def noise_beside(asked, start: float) -> float:
        return search(lambda sigma: share(*before, asked, event(dp_sgd, sigma)), start)

    own = _FACTORS.index(1)
    own_noise = query.mechanism.noise_multiplier
    found = [(share(query.event), own_noise, dp_sgd.mechanism.noise_multiplier)]
    for factors in (reversed(_FACTORS[:own]), _FACTORS[own + 1 :]):
        sigma = dp_sgd.mechanism.noise_multiplier
        for factor in factors:
            asked = event(query, factor * own_noise)
            own_share = share(asked)
            if share(*before, asked) > _LARGEST_SHARE:
                break
            sigma = noise_beside(asked, sigma)
            found.append((own_share, factor * own_noise, sigma))
    return sorted(found)


def draw(budget: Budget, title: str) -> bytes:
    """Draw the noise multiplier of fine-tuning against the query's share of ε, as a PNG file."""
    noise, exact = accounting.format_noise, accounting.format_exact
    curve = points(budget)
    query_noise = budget.of(CENTRAL_QUERY).mechanism.noise_multiplier
    own_noise = budget.of(DP_SGD).mechanism.noise_multiplier
    shares, _, sigmas = zip(*curve)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout='constrained')
    axes = figure.add_subplot()
    axes.plot(shares, sigmas, color='#1f6f8b', marker='o', markersize=4)
    chosen = budget.spent(CENTRAL_QUERY) / budget.epsilon
    axes.plot(chosen, own_noise, 'o', color='#c8553d', markersize=9)
    axes.annotate(
        f'this config: query σ = {noise(query_noise)}, '
        f'{accounting.format_epsilon(100 * chosen, 1)} % of ε\n'
        f'fine-tuning σ = {noise(own_noise)}',
        (chosen, own_noise),
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
    axes.set_ylim(0, 1.3 * max(sigmas))  # from 0: a change of 1 % looks like one
    axes.minorticks_off()
    axes.set_xlabel('share of ε that the query spends alone')
    axes.set_ylabel('noise multiplier σ of fine-tuning')
    axes.set_title(
        f'{title}: ε = {exact(budget.epsilon)}, δ = {exact(budget.delta)} ({budget.accountant.upper()})',
        loc='left',
    )
    axes.xaxis.set_major_formatter(lambda value, _: f'{100 * value:g} %')
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()
