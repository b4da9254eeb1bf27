"""Attack the query and DP-SGD as they are, and with planted faults; compare with the ε that is claimed.

    python -m scripts.audit --json=runs/audit.json      (three minutes on two cores; --quick: one)

Every row releases from two neighboring sets of private images, thousands of times, and turns the success of
the best guess, whether the canary was there, into lower bounds on ε that hold with 95 % confidence. The code
must stay within its claim, and the faults must be caught: otherwise the audit could not see them. The exit
status is 1 if either fails.

What is attacked is the real code: the query with its noise as stage `central` asks it, and the step that
`steps.make_dp_step` makes, where a vmap over one device takes the place of the only pmap, so that thousands
of trainings run at once.

The claim is that of the accountant 'pld', the lowest that the program would ever make; 'rdp' claims more.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import math
from pathlib import Path
import sys
import time
from unittest import mock

from dp_accounting import DpEvent
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpp_jax import build
from dpp_jax.auditing import bounds as bounds_lib
from dpp_jax.configs import digits_8
from dpp_jax.privacy import accounting, clipping
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.privacy.poisson import PoissonSampler
from dpp_jax.privacy.queries import frequency as frequency_lib
from dpp_jax.privacy.queries import mean
from dpp_jax.privacy.queries import moments as moments_lib
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib

DELTA = 1e-5
CONFIDENCE = 0.95
RUNS, QUICK_RUNS = 400_000, 50_000  # releases with the canary, and as many without
_CHUNK = 1_000  # runs in memory at once


# --- The code under attack: as it is, or with one thing replaced


@dataclasses.dataclass(frozen=True)
class Code:
    """What may be replaced. The defaults are the real code.

    Attributes:
        mechanism: the class that adds the noise.
        clip: takes the place of `clipping.clip_weights`.
        divisor: (number of images in the sum, public constant) → what the noisy sum is divided by.
        sampler: the class that tosses the coins.
        is_gaussian: given who was sampled, outcomes are normal and the canary only moves their mean.
        off_diagonal: weight of what is above the diagonal of a second moment, over that of the diagonal.
    """

    mechanism: type[GaussianMechanism] = GaussianMechanism
    clip: Callable = clipping.clip_weights
    divisor: Callable = lambda count, constant: constant
    sampler: type[PoissonSampler] = PoissonSampler
    is_gaussian: bool = True
    off_diagonal: float = math.sqrt(2)


class HalvedNoise(GaussianMechanism):
    """Fault: half the noise that the ledger records."""

    def _add_noise(self, total, key):
        noisy = super()._add_noise(total, key)
        return jax.tree.map(lambda exact, value: (exact + value) / 2, total, noisy)


class NoNoiseOnEmptyBatch(GaussianMechanism):
    """Fault: an empty batch, whose sum is 0, is released as it is."""

    def _add_noise(self, total, key):
        is_empty = jnp.all(jnp.array([jnp.all(leaf == 0) for leaf in jax.tree.leaves(total)]))
        noisy = super()._add_noise(total, key)
        return jax.tree.map(lambda exact, value: jnp.where(is_empty, exact, value), total, noisy)


class SampledTwice(PoissonSampler):
    """Fault: every image has a second coin, and joins the batch if one of the two says so."""

    def indices(self, batch):
        return np.union1d(super().indices(2 * batch), super().indices(2 * batch + 1))


def no_clipping(gradients, mask, clip_norm, team=None):
    """Fault: every gradient has weight 1."""
    _, norms = REAL.clip(gradients, mask, clip_norm, team)
    return mask.astype(jnp.float32), norms


REAL = Code()
FAULTS = {
    'noise halved': Code(mechanism=HalvedNoise),
    'clipping removed': Code(clip=no_clipping),
    'division by the realized count': Code(divisor=lambda count, _: jnp.maximum(count, 1), is_gaussian=False),
    'no noise on an empty batch': Code(mechanism=NoNoiseOnEmptyBatch, is_gaussian=False),
    'sampled twice': Code(sampler=SampledTwice),
    # Both triangles are added up, as if they were one.
    'off-diagonal weight 2': Code(off_diagonal=2.0),
}


# --- What both attacks share


@dataclasses.dataclass(frozen=True)
class Attack:
    """One row of the table: two neighboring sets, the code that sees them, and what it claims.

    Attributes:
        name: of what is attacked.
        fault: name in FAULTS, or None for the real code.
        event: what the accountant is told.
        bounds: by name, those of `audit` that apply: (scores, scores, δ, confidence) → Bound.
        scores: (runs, seed) → scores with the canary, scores without, both (runs,).
    """

    name: str
    fault: str | None
    event: DpEvent
    bounds: dict[str, Callable]
    scores: Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def make_attack(
    name: str, fault: str | None, mechanism: GaussianMechanism, count: int, scores: Callable
) -> Attack:
    """The attack on `count` releases of `mechanism`, with its claim and the bounds that apply."""
    code, q = FAULTS.get(fault, REAL), mechanism.sampling_probability
    sigma = mechanism.noise_multiplier
    event = functools.partial(accounting.subsampled_gaussian, sampling_probability=q, count=count)
    bounds = {'plain': bounds_lib.plain_bound}
    if code.is_gaussian and q == 1:
        bounds['gaussian'] = bounds_lib.gaussian_bound
    elif code.is_gaussian:
        bounds['family'] = functools.partial(
            bounds_lib.family_bound, make_event=event, noise_multipliers=(sigma / 3, sigma * 3)
        )
    return Attack(name, fault, event(sigma), bounds, scores)


def play(
    run: Callable, code: Code, others: np.ndarray, q: float, steps_count: int, runs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `run` gives with the canary and without, each many times with fresh batches and noise.

    Args:
        run: (masks (steps, rows) bool, key) → an array. The canary is the last row.
        code: its sampler tosses the coins.
        others: (rows - 1,) bool, which of the other rows are in both sets.
        q: sampling probability.
    """
    together = jax.jit(lambda masks, keys: jax.lax.map(lambda x: run(*x), (masks, keys), batch_size=_CHUNK))
    results = []
    for there in (True, False):
        members = np.append(others, there)
        own_seed = 2 * seed + there
        # One sampler over the rows of all runs: its coins are independent, so each run has its own.
        shape = (runs, steps_count, len(members))
        sampler = code.sampler(size=int(np.prod(shape)), probability=q, key=own_seed)
        coins = np.zeros(sampler.size, bool)
        coins[sampler.indices(0)] = True
        keys = jax.random.split(jax.random.key(own_seed), runs)
        results.append(np.asarray(together(coins.reshape(shape) & members, keys)))
    return tuple(results)


# --- Attack on the query


def query_attack(
    name: str,
    fault: str | None = None,
    *,
    q: float = 1.0,
    noise_multiplier: float = 2.0,
    settings: dict | None = None,
) -> Attack:
    """The canary is a white image, the longest vector there is; its class has one other, a black one.

    With q < 1 the set without the canary is empty. The score is the mean of the released image of the
    canary's class: its projection on the white image. `settings` are those of config.query.
    """
    code = FAULTS.get(fault, REAL)
    config = digits_8.get_config('1')
    config.query.noise_multiplier = noise_multiplier
    config.data.classes = 2
    config.query.update(kind='mean', pixel_center=0.0, clip_norm=None, class_counts='public')
    config.query.update(settings or {}, sampling_probability=q)
    query = build.query(config)
    planned = build.plan(config, build.model(config), noise={DP_SGD: 1.0}).budget.of(CENTRAL_QUERY)
    mechanism = code.mechanism(**dataclasses.asdict(planned.mechanism))
    images = np.zeros((4, 8, 8, 1), np.uint8)
    images[1:3], images[3] = 128, 255
    labels = np.array([0, 1, 1, 0], np.int32)

    def run(masks, key):
        counts = jnp.zeros(2).at[labels].add(masks[0])
        class_size = code.divisor(counts[:, None, None, None], 2.0)
        ask = query.noisy(
            mechanism,
            NoiseKey(identifier='audit', keys=jax.random.split(key, 4)),
            2 * class_size,
            len(images),
        )
        answer, _ = ask(0, {'images': images, 'labels': labels}, masks[0])
        return jnp.mean(answer[0])

    def scores(runs, seed):
        with mock.patch.object(mean, 'clip_weights', code.clip):
            return play(run, code, np.full(3, q == 1), q, 1, runs, seed)

    return make_attack(name, fault, mechanism, 1, scores)


# --- Attack on the query for class moments

VECTOR = 8  # numbers of an image
CLIPPED_TO = 1.0


def moments_attack(name: str, fault: str | None = None, *, counts: str = 'public') -> Attack:
    """The canary is a vector of equal numbers, longer than the bound; its class has one other, the center.

    A vector of equal numbers has most of its second moment off the diagonal. The score is the projection of
    the released moments, and count, on what the canary adds to them.
    """
    code = FAULTS.get(fault, REAL)
    config = digits_8.get_config('1')
    config.data.classes = 2
    config.moments.update(enabled=True, noise_multiplier=2.0, frequencies=VECTOR)
    config.moments.update(clip_norm=CLIPPED_TO, class_counts=counts)
    query = build.moments_query(config)
    planned = build.plan(config, build.model(config), noise={DP_SGD: 1.0}).budget.of(MOMENTS)
    mechanism = code.mechanism(**dataclasses.asdict(planned.mechanism))
    vectors = np.zeros((4, VECTOR), np.float32)
    vectors[1:3, 0], vectors[3] = 0.5, 2.0
    labels = np.array([0, 1, 1, 0], np.int32)
    direction = np.full(VECTOR, 1 / math.sqrt(VECTOR), np.float32)

    def run(masks, key):
        class_size = code.divisor(jnp.zeros(2).at[labels].add(masks[0])[:, None], 2.0)
        noise_key = NoiseKey(identifier='audit', keys=jax.random.split(key, 4))
        ask = query.noisy(mechanism, noise_key, 2 * class_size, len(vectors), with_counts=True)
        ((means, seconds), sizes), _ = ask(0, {'images': vectors, 'labels': labels}, masks[0])
        of_mean, of_second, of_count = query._weights
        # As they were before they were divided.
        scale = 1.0 if sizes is None else jnp.maximum(sizes[0], 1)
        diagonal = jnp.diag(seconds[0]) @ jnp.square(direction)
        others = direction @ seconds[0] @ direction - diagonal
        score = scale * of_mean**2 * (means[0] @ direction)
        score += scale * of_second**2 * (diagonal + code.off_diagonal**2 / 2 * others)
        return score if sizes is None else score + of_count**2 * sizes[0]

    def scores(runs, seed):
        with (
            mock.patch.object(moments_lib, 'clip_weights', code.clip),
            mock.patch.object(moments_lib, 'OFF_DIAGONAL', code.off_diagonal),
        ):
            return play(run, code, np.ones(3, bool), 1.0, 1, runs, seed)

    return make_attack(name, fault, mechanism, 1, scores)


# --- Attack on the frequency query

FEATURES, GROUP = 16, 3


def frequency_attack(
    name: str, fault: str | None = None, *, counts: str = 'public', group: int | None = None
) -> Attack:
    """The canary is a white image, or a group of them; its class has one other unit, of black images.

    The score is the projection of the released features, and count, on what the canary adds to them.
    """
    code = FAULTS.get(fault, REAL)
    config = digits_8.get_config('1')
    config.data.classes = 2
    config.frequency.update(enabled=True, noise_multiplier=2.0, features=FEATURES, class_counts=counts)
    if group:
        config.dp.update(unit='group', images_per_group=group)
        config.data.train_groups = 480
    query = build.frequency_query(config)
    planned = build.plan(config, build.model(config), noise={DP_SGD: 1.0}).budget.of(FREQUENCY)
    mechanism = code.mechanism(**dataclasses.asdict(planned.mechanism))
    images = np.zeros((4, *([group] if group else []), 8, 8, 1), np.uint8)
    images[1:3], images[3] = 128, 255
    labels = np.broadcast_to(np.array([0, 1, 1, 0], np.int32)[:, None], (4, group or 1))
    labels = labels if group else labels[:, 0]
    direction = query.embed(np.ones(64, np.float32))

    def run(masks, key):
        there = jnp.broadcast_to(masks[0][:, None], labels.shape) if group else masks[0]
        counted = jnp.zeros(2).at[labels.ravel()].add(there.ravel())
        class_size = code.divisor(counted[:, None], 2.0)
        noise_key = NoiseKey(identifier='audit', keys=jax.random.split(key, 4))
        ask = query.noisy(mechanism, noise_key, 2 * class_size, len(images), with_counts=True)
        (means, sizes), _ = ask(0, {'images': images, 'labels': labels}, there)
        of_features, of_count = query._weights
        # As they were before they were divided.
        scale = 1.0 if sizes is None else jnp.maximum(sizes[0], 1)
        score = scale * of_features**2 * (means[0] @ direction)
        return score if sizes is None else score + of_count**2 * sizes[0]

    def scores(runs, seed):
        with mock.patch.object(frequency_lib, 'clip_weights', code.clip):
            return play(run, code, np.ones(3, bool), 1.0, 1, runs, seed)

    return make_attack(name, fault, mechanism, 1, scores)


# --- Attack on DP-SGD

CLIP_NORM = 0.5
EXPECTED_BATCH, LEARNING_RATE = 4.0, 0.2
# Of the outputs, by label. The canary alone has label 1: its loss is far away, and its gradient, a
# thousand times longer than CLIP_NORM and more, has the direction of one bias.
TARGETS = np.array([[1, -1, 0], [1000, 0, 0]], np.float32)


def init_params() -> dict[str, np.ndarray]:
    """Weights of a dense network 4 → 5 → 3 with an output bias per label: 41 parameters."""
    rng = np.random.default_rng(0)
    return {
        'hidden': (rng.standard_normal((4, 5)) / 2).astype(np.float32),
        'output': (rng.standard_normal((5, 3)) / 2).astype(np.float32),
        'bias': np.zeros((2, 3), np.float32),
    }


def loss(params, image, label, key):
    """Squared distance to the label's target. A black image, the canary, moves its bias alone."""
    del key
    pixels = (image.ravel() + 1) / 2
    outputs = jnp.tanh(pixels @ params['hidden']) @ params['output'] + params['bias'][label]
    return jnp.sum(jnp.square(outputs - jnp.asarray(TARGETS)[label]))


def over_one_device(function: Callable, *, in_axes, donate=()) -> Callable:
    """`devices.parallel` without a pmap: the same named axis, in a program that can be mapped."""
    del donate
    return jax.vmap(function, in_axes=in_axes, axis_name=devices.AXIS, axis_size=1)


def make_training(mechanism: GaussianMechanism, code: Code) -> Callable:
    """(masks (steps, 2), key) → the canary's bias before the first and after every step, (steps + 1,)."""
    batch = {
        'image': np.array([200, 0], np.uint8).repeat(4).reshape(2, 2, 2, 1),
        'label': np.arange(2, dtype=np.int32),
        'index': np.arange(2, dtype=np.int32),
    }
    optimizer = optax.sgd(LEARNING_RATE)

    def run(masks, key):
        def one_step(state, number_and_mask):
            number, mask = number_and_mask
            step = steps.make_dp_step(
                loss,
                optimizer,
                mechanism,
                NoiseKey(identifier='audit', keys=jax.random.split(key, 4)),
                expected_batch_size=code.divisor(jnp.sum(mask), EXPECTED_BATCH),
                rows=2,
                microbatch=2,
                ema_decay=0.9,
            )
            rows = jax.tree.map(lambda leaf: leaf[None], {**batch, 'mask': mask})
            # A number that is traced has no entry.
            state, _ = step.program(state, rows, 1, step.noise_key.keys, number)
            return state, state.params.tree()['bias'][0, 1, 0]

        start = state_lib.create(jax.tree.map(jnp.asarray, init_params()), optimizer)
        start = jax.tree.map(lambda leaf: leaf[None], start)
        numbers = jnp.arange(len(masks), dtype=jnp.int32)
        _, biases = jax.lax.scan(one_step, start, (numbers, masks))
        return jnp.append(start.params.tree()['bias'][0, 1, 0], biases)

    return run


def likelihood_ratio(biases: np.ndarray, noise_multiplier: float, q: float) -> np.ndarray:
    """Log-likelihood ratio of whole runs (runs, steps + 1), canary there : not there; the best score.

    A step moves the bias by (noise + C if the canary is in the batch) · learning rate / batch size.
    """
    moves = np.diff(biases.astype(np.float64)) * EXPECTED_BATCH / (LEARNING_RATE * CLIP_NORM)
    shifted = (2 * moves - 1) / (2 * noise_multiplier**2)
    if q < 1:
        shifted = np.logaddexp(np.log1p(-q), np.log(q) + shifted)
    return np.sum(shifted, axis=1)


def sgd_attack(
    name: str, fault: str | None = None, *, q: float = 1.0, noise_multiplier: float = 6.0
) -> Attack:
    """Whole trainings, of which the attacker sees the weights after every step.

    The set has one image beside the canary; with q < 1 none.
    """
    code, steps_count = FAULTS.get(fault, REAL), 10
    mechanism = code.mechanism(
        name=DP_SGD, noise_multiplier=noise_multiplier, sampling_probability=q, sensitivity=CLIP_NORM
    )
    run = make_training(mechanism, code)

    def scores(runs, seed):
        with (
            mock.patch.object(clipping, 'clip_weights', code.clip),
            mock.patch.object(devices, 'parallel', over_one_device),
        ):
            biases = play(run, code, np.array([q == 1]), q, steps_count, runs, seed)
        return tuple(likelihood_ratio(b, noise_multiplier, q) for b in biases)

    return make_attack(name, fault, mechanism, steps_count, scores)


# --- The table


def attacks() -> list[Attack]:
    """All rows: the real code first, then every fault in the query and in DP-SGD."""
    clipped = dict(settings=dict(clip_norm=0.35 * 8, pixel_center=0.3))
    sampled_query, sampled_sgd = dict(q=0.5, noise_multiplier=1.0), dict(q=0.5, noise_multiplier=3.0)
    halved, unclipped, realized, no_noise, twice, doubled = FAULTS
    grouped = dict(counts='noisy', group=GROUP)
    return [
        query_attack('query'),
        query_attack('query, clipped', **clipped),
        query_attack('query, noisy counts', settings=dict(class_counts='noisy')),
        query_attack('query, mode', settings=dict(kind='mode', bins=2)),
        query_attack('query, sampled', **sampled_query),
        moments_attack('moments'),
        moments_attack('moments, noisy counts', counts='noisy'),
        frequency_attack('frequency'),
        frequency_attack('frequency, groups', **grouped),
        sgd_attack('DP-SGD'),
        sgd_attack('DP-SGD, sampled', **sampled_sgd),
        query_attack('query', halved),
        query_attack('query, clipped', unclipped, **clipped),
        query_attack('query', realized),
        query_attack('query, sampled', no_noise, **sampled_query),
        query_attack('query, sampled', twice, **sampled_query),
        moments_attack('moments', halved),
        moments_attack('moments', unclipped),
        moments_attack('moments', realized),
        moments_attack('moments', doubled),
        frequency_attack('frequency', halved),
        frequency_attack('frequency', realized),
        frequency_attack('frequency, groups', unclipped, **grouped),
        sgd_attack('DP-SGD', halved),
        sgd_attack('DP-SGD', unclipped),
        sgd_attack('DP-SGD', realized),
        sgd_attack('DP-SGD, sampled', no_noise, **sampled_sgd),
        sgd_attack('DP-SGD, sampled', twice, **sampled_sgd),
    ]


def examine(attack: Attack, runs: int, seed: int) -> dict:
    """One row of the table, as JSON takes it. All its bounds together hold with CONFIDENCE."""
    start = time.monotonic()
    scores = attack.scores(runs, seed)
    each = 1 - (1 - CONFIDENCE) / len(attack.bounds)  # the more, the less often each may be wrong
    bounds = {kind: bound(*scores, delta=DELTA, confidence=each) for kind, bound in attack.bounds.items()}
    claim = accounting.epsilon(attack.event, DELTA, 'pld')
    best = max(bounds, key=lambda kind: bounds[kind].epsilon)
    exceeds = bounds[best].epsilon > claim
    words = ('MISSED', 'caught') if attack.fault else ('within the claim', 'CLAIM BROKEN')
    return {
        'attack': attack.name,
        'fault': attack.fault,
        'claimed_epsilon': claim,
        'delta': DELTA,
        'lower_bound': bounds[best].epsilon,
        'kind': best,
        'bounds': {kind: dataclasses.asdict(bound) for kind, bound in bounds.items()},
        'verdict': words[exceeds],
        'as_expected': exceeds == (attack.fault is not None),
        'runs': runs,
        'seconds': round(time.monotonic() - start, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write it, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help=f'{QUICK_RUNS} runs, not {RUNS}')
    parser.add_argument('--seed', type=int, default=0, help='of all batches and noise (default 0)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the rows there')
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f'--seed is {options.seed}; it must be at least 0')
    line = '{:<20} {:<31} {:>9} {:>7} {:>12} {:<9} {:<16} {:>6}'
    print(line.format('attack', 'fault', 'claimed ε', 'δ', 'lower bound', 'kind', 'verdict', 's'))
    rows, runs = [], QUICK_RUNS if options.quick else RUNS
    for number, attack in enumerate(attacks()):
        row = examine(attack, runs, 1000 * options.seed + number)
        rows.append(row)
        claim = accounting.format_epsilon(row['claimed_epsilon'], 3)
        bound = accounting.format_noise(row['lower_bound'], 3)  # rounded down
        ends = row['attack'], row['fault'] or '-', row['kind'], row['verdict'], row['seconds']
        print(line.format(*ends[:2], claim, f'{DELTA:g}', bound, *ends[2:]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {'confidence': CONFIDENCE, 'accountant': 'pld', 'seed': options.seed, 'rows': rows}
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return 0 if all(row['as_expected'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
