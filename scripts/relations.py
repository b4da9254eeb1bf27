"""Print the ε of every neighboring relation for every config: the table in docs/privacy.md.

    python -m scripts.relations

By privacy loss distributions, at the noise that the config's own accountant gives for its own relation.
"""

import importlib
import pkgutil

from dpp_jax import build, configs
from dpp_jax.privacy import accounting, calibration
from dpp_jax.privacy.budget import DP_SGD, total_event

_BUDGETS = ('1', '10')


def main() -> None:
    relations = list(accounting.RELATIONS)
    print(f'| config, ε, δ | σ of fine-tuning | {" | ".join(f"`{name}`" for name in relations)} |')
    print(f'|---|---|{"---|" * len(relations)}')
    for module in pkgutil.iter_modules(configs.__path__):
        if module.name in ('default', 'folder'):  # neither is a whole config
            continue
        for epsilon in _BUDGETS:
            print(_row(module.name, epsilon, relations), flush=True)


def _row(name: str, epsilon: str, relations: list[str]) -> str:
    """Write one line; a budget that the config's query exceeds alone says so."""
    config = importlib.import_module(f'dpp_jax.configs.{name}').get_config(epsilon)
    delta = accounting.format_exact(config.dp.delta)
    try:
        budget = build.plan(config, build.model(config)).budget
    except calibration.BudgetTooSmall:
        return f'| `{name}:{epsilon}`, {delta} | the query alone spends more |{" – |" * len(relations)}'
    event = total_event(budget.releases)
    figures = [accounting.epsilon(event, budget.delta, 'pld', relation) for relation in relations]
    noise = accounting.format_noise(budget.of(DP_SGD).mechanism.noise_multiplier)
    return (
        f'| `{name}:{epsilon}`, {delta} | {noise} | {" | ".join(map(accounting.format_epsilon, figures))} |'
    )


if __name__ == '__main__':
    main()
