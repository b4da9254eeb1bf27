"""What a larger share of ε for the query costs fine-tuning, as a picture."""

import io

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from dpp_jax.privacy import accounting
from dpp_jax.stages import central
from dpp_jax.stages.plan import Plan


def draw(config: ConfigDict, plan: Plan) -> bytes:
    """PNG: the noise multiplier of fine-tuning against the share of ε that the query may spend."""
    dp, query = config.dp, config.query
    shares = [0.01, 0.03, 0.08, 0.2, 0.4, 0.6, 0.8]
    sigmas, query_sigmas = [], []
    for share in shares:
        shared = config.copy_and_resolve_references()
        shared.query.epsilon_share = share
        query_sigmas.append(central.noise_multiplier(shared))
        queries = accounting.subsampled_gaussian(
            query_sigmas[-1], query.sampling_probability, query.queries
        )

        def everything(sigma):
            steps = accounting.subsampled_gaussian(sigma, plan.sampling_probability, plan.steps)
            return accounting.compose([queries, steps])

        sigmas.append(accounting.calibrate(everything, dp.epsilon, dp.delta, dp.accountant))
    figure = Figure(figsize=(7, 4.2), dpi=120, layout='constrained')
    axes = figure.add_subplot()
    axes.plot(shares, sigmas, color='#1f6f8b', marker='o', markersize=4)
    chosen = plan.epsilon_query / dp.epsilon
    axes.plot(chosen, plan.noise_multiplier, 'o', color='#c8553d', markersize=9)
    axes.annotate(
        f'this config: query σ = {plan.query_noise_multiplier:.3g}, {chosen:.1%} of ε\n'
        f'fine-tuning σ = {plan.noise_multiplier:.4g}',
        (chosen, plan.noise_multiplier), xytext=(0.04, 0.82), textcoords='axes fraction',
        color='#c8553d', arrowprops={'arrowstyle': '-', 'color': '#c8553d'},
    )
    for share, sigma, query_sigma in list(zip(shares, sigmas, query_sigmas))[::2]:
        axes.annotate(
            f'query σ {query_sigma:.2g}', (share, sigma), xytext=(0, -16),
            textcoords='offset points', fontsize=8, color='#56636f', ha='center',
        )
    axes.set_xscale('log')
    axes.set_xlim(0.006, 1.3)
    axes.margins(y=0.25)
    axes.minorticks_off()
    axes.set_xlabel("share of ε that the query's releases spend alone")
    axes.set_ylabel('noise multiplier σ of fine-tuning')
    axes.set_title(f'{config.name}: ε = {dp.epsilon:g}, δ = {dp.delta:g}', loc='left')
    axes.xaxis.set_major_formatter(lambda value, _: f'{100 * value:g} %')
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()
