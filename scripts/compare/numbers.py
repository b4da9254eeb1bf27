"""The same weights and the same random numbers in both frameworks: how far results are apart.

Every check gives one or several `Result`s. The relative error is |ours - theirs| / |theirs|, norms of whole
arrays; the verdict compares it with the tolerance. Where it says so, theirs is an arbiter in float64.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from opacus.accountants import RDPAccountant
import optax
import torch

from dpp_jax.diffusion import denoiser, sampler
from dpp_jax.diffusion import loss as loss_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import accounting, clipping
from dpp_jax.privacy.budget import Releases
from dpp_jax.training import state as state_lib
from scripts.compare import pytorch_port as port
from scripts.compare import pytorch_private as private

PyTree = Any
# Of the float32 rounding of hundreds of layers, with room for other processors.
NETWORK_TOLERANCE = 1e-4
TRAJECTORY_TOLERANCE = 1e-3  # rounding grows over the steps
GRADIENT_TOLERANCE = 1e-4
UPDATE_TOLERANCE = 1e-5
# Adam divides by the gradient's size, so that a rounding error of a gradient near 0 is a whole step.
TRAINING_TOLERANCE = 1e-2
LOSS_TOLERANCE = 1e-3
EPSILON_TOLERANCE = 5e-3
QUANTILE_TOLERANCE = 1e-2
UPDATES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table.

    Attributes:
        part: heading that the row stands under.
        name: what was computed.
        error: largest absolute error.
        relative: error of the whole, relative.
        tolerance: what `relative` may be.
        steps: relative error at every step, where there are steps.
        note: for people.
    """

    part: str
    name: str
    error: float
    relative: float
    tolerance: float
    steps: tuple[float, ...] = ()
    note: str = ''

    @property
    def is_within(self) -> bool:
        return bool(self.relative <= self.tolerance)


def compare(part: str, name: str, ours, theirs, tolerance: float, note: str = '') -> Result:
    """Compare two arrays of one shape."""
    error, relative = _errors(ours, theirs)
    return Result(part=part, name=name, error=error, relative=relative, tolerance=tolerance, note=note)


def compare_steps(part: str, name: str, ours: Sequence, theirs: Sequence, tolerance: float) -> Result:
    """Compare arrays step by step; the row's errors are the largest of all steps."""
    found = [_errors(a, b) for a, b in zip(ours, theirs, strict=True)]
    return Result(
        part=part,
        name=name,
        error=max(error for error, _ in found),
        relative=max(relative for _, relative in found),
        tolerance=tolerance,
        steps=tuple(relative for _, relative in found),
        note=f'{len(found)} steps; the largest error of any',
    )


def _errors(ours, theirs) -> tuple[float, float]:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f'arrays have shapes {ours.shape} and {theirs.shape}; they must agree')
    difference = ours - theirs
    return float(np.abs(difference).max()), float(np.linalg.norm(difference) / np.linalg.norm(theirs))


@dataclasses.dataclass(frozen=True)
class Twins:
    """Our model and the port with the same weights, and inputs for both.

    Attributes:
        model: ours.
        params: of both.
        images: private images to compute with, float32 (n, H, W, C) in [-1, 1].
        labels: theirs, int32 (n,).
        draws: noise draws of an image where losses and gradients are compared.
    """

    model: Model
    params: PyTree
    images: np.ndarray
    labels: np.ndarray
    draws: int

    @functools.cached_property
    def network(self) -> port.UNet:
        return port.make_network(self.model, self.params)

    @functools.cached_property
    def forward(self):
        """(params, x, c_noise, label) → F, compiled once for each number of rows."""
        return jax.jit(lambda params, *inputs: self.model.network.apply({'params': params}, *inputs))

    def apply(self, x, c_noise, label):
        with jax.disable_jit(False):  # also where a sampler's loops run in Python
            return self.forward(self.params, x, c_noise, jnp.asarray(label, jnp.int32))

    def drawn(self, kind: str, seed: int) -> tuple[np.ndarray, ...]:
        """Labels, noise levels and noise of every image's draws, leaves (n, draws, ...)."""
        model = dataclasses.replace(self.model, kind=denoiser.make_kind(kind))
        draw = model.drawing(draws=self.draws, label_dropout=0.1)
        keys = jax.random.split(jax.random.key(seed), len(self.labels))
        return tuple(np.asarray(leaf) for leaf in jax.jit(jax.vmap(draw))(self.labels, keys))

    def rows(self, drawn: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
        """The same as arguments of `pytorch_port.losses`."""
        labels, sigma, noise = (array.reshape((-1,) + array.shape[2:]) for array in drawn)
        images = np.repeat(self.images, self.draws, axis=0)
        return (
            port.to_torch(images).contiguous(memory_format=torch.channels_last),
            torch.tensor(labels).long(),
            torch.tensor(sigma),
            port.to_torch(noise),
        )

    def noised(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Noised images, noise levels and labels to denoise, the last label "no class"."""
        rng = np.random.default_rng(seed)
        sigma = np.geomspace(0.01, 50, len(self.images)).astype(np.float32)
        noise = rng.standard_normal(self.images.shape, np.float32)
        labels = self.labels.copy()
        labels[-1] = self.model.classes
        return self.images + sigma[:, None, None, None] * noise, sigma, labels


def _nhwc(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def network(twins: Twins) -> Iterator[Result]:
    """Check the bare network and the four denoisers around it."""
    noisy, sigma, labels = twins.noised()
    inputs = port.to_torch(noisy), torch.tensor(sigma), torch.tensor(labels).long()
    with torch.no_grad():
        theirs = twins.network(inputs[0], inputs[1].log(), inputs[2])
        ours = twins.apply(noisy, np.log(sigma), labels)
        yield compare('network', 'F(x; c_noise, label)', ours, _nhwc(theirs), NETWORK_TOLERANCE)
        for kind in denoiser.DENOISERS:
            denoise = denoiser.make_kind(kind).denoiser(twins.apply)
            theirs = port.denoiser(twins.network, kind)(*inputs)
            title = f'denoiser {kind}: D(x; σ, label)'
            yield compare('network', title, denoise(noisy, sigma, labels), _nhwc(theirs), NETWORK_TOLERANCE)


def losses(twins: Twins) -> Iterator[Result]:
    """Check the four losses for the same noise, and from which levels the noise is drawn."""
    for kind in denoiser.DENOISERS:
        drawn, of = twins.drawn(kind, seed=1), denoiser.make_kind(kind)
        flat = [array.reshape((-1,) + array.shape[2:]) for array in drawn]
        images = np.repeat(twins.images, twins.draws, axis=0)
        ours = loss_lib.errors(of, of.denoiser(twins.apply), images, flat)
        with torch.no_grad():
            theirs = port.losses(twins.network, *twins.rows(drawn), kind=kind)
        yield compare('losses', f'loss {kind}, same noise', ours, theirs.numpy(), NETWORK_TOLERANCE)
    for kind in denoiser.DENOISERS:
        yield _noise_levels(kind)


def _noise_levels(kind: str, number: int = 100_000) -> Result:
    """Compare our random noise levels with the port's quantiles: how far distributions are apart."""
    ours = np.sort(denoiser.make_kind(kind).sample_sigma(jax.random.key(2), number))
    quantiles = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    theirs = port.KINDS[kind].sigma(quantiles).numpy()
    distance = np.abs(np.searchsorted(ours, theirs) / number - quantiles.numpy()).max()
    return Result(
        part='losses',
        name=f'noise levels of {kind}',
        error=float(distance),
        relative=float(distance),
        tolerance=QUANTILE_TOLERANCE,
        note=f'largest difference of the distribution functions, {number:,} random levels',
    )


def trajectories(twins: Twins, steps: int) -> Iterator[Result]:
    """Follow the samplers: the input of the denoiser at each of its calls, from the same noise."""
    rng = np.random.default_rng(3)
    z = rng.standard_normal(twins.images.shape, np.float32)
    noise = rng.standard_normal((steps,) + z.shape, np.float32)
    churn = {'s_churn': steps / 4, 's_min': 0.05, 's_max': 50.0}
    for title, name, settings in (
        ('DDIM', 'ddim', {}),
        ('Heun', 'heun', {}),
        ('Heun with churn, same noise', 'heun', churn),
    ):
        ours = _our_trajectory(twins, name, z, noise, steps, settings)
        theirs = _their_trajectory(twins, name, z, noise, steps, settings)
        yield compare_steps('trajectories', f'{title}, {steps} steps', ours, theirs, TRAJECTORY_TOLERANCE)


def _our_trajectory(twins: Twins, name: str, z, noise, steps: int, settings: dict) -> list[np.ndarray]:
    """x at every call of the denoiser, and the images."""
    found = []
    denoise = denoiser.make_kind('edm').denoiser(twins.apply)

    def recorded(x, sigma, label):
        found.append(np.asarray(x))
        return denoise(x, sigma, label)

    with jax.disable_jit():  # the sampler's loops run in Python
        images = sampler.SAMPLERS[name](
            recorded,
            jnp.asarray(z),
            jnp.asarray(twins.labels),
            sigmas=sampler.sigma_steps(steps),
            noise=lambda i: noise[int(i)],
            churn=sampler.Churn(**settings),
        )
    return [*found, np.asarray(images)]


def _their_trajectory(twins: Twins, name: str, z, noise, steps: int, settings: dict) -> list[np.ndarray]:
    found = []
    denoise = port.denoiser(twins.network, 'edm')

    def recorded(x, sigma, label):
        found.append(_nhwc(x))
        return denoise(x, sigma, label)

    with torch.no_grad():
        images = port.SAMPLERS[name](
            recorded,
            port.to_torch(z),
            torch.tensor(twins.labels).long(),
            port.sigma_steps(steps),
            noise=lambda i: port.to_torch(noise[i]),
            **settings,
        )
    return [*found, _nhwc(images)]


def gradients(twins: Twins) -> Iterator[Result]:
    """Check norms of per-example gradients and their clipped sum, by a loop over examples in float64."""
    drawn, n = twins.drawn('edm', seed=4), len(twins.images)
    rows = twins.rows(drawn)
    arbiter = _float64_gradients(twins, rows)
    exact = np.linalg.norm(arbiter, axis=1)
    clip_norm = float(np.median(exact))  # half of the examples are clipped
    factors = np.minimum(1, clip_norm / exact)
    total = factors @ arbiter

    def loss(params, example):
        image, *rest = example
        return twins.model.errors(params.tree(), image, rest).mean()

    grid = clipping.Grid(clip_norm=clip_norm, rows=n)

    @jax.jit
    def our_sum(params, examples):
        found = jax.vmap(jax.grad(loss), (None, 0))(params, examples)
        units, norms = clipping.clipped_sum(found, jnp.ones(n, bool), grid)
        return jax.tree.map(grid.decode, units), norms

    ours, norms = our_sum(state_lib.FlatParams.of(twins.params), (twins.images, *drawn))
    title = 'norms of per-example gradients'
    yield compare('gradients', f'{title}: ours, float64', norms, exact, GRADIENT_TOLERANCE)
    summed = f'sum of gradients clipped to {clip_norm:.3g}'
    yield compare(
        'gradients', f'{summed}: ours, float64', _in_their_order(twins, ours.tree()), total,
        GRADIENT_TOLERANCE,
    )  # fmt: skip
    for name in ('Opacus, hooks as they come', 'Opacus, hooks that sum draws', 'Opacus, ghost clipping'):
        step = private.FORMS[name](
            port.make_network(twins.model, twins.params), draws=twins.draws, clip_norm=clip_norm,
            noise_multiplier=1.0, expected_batch_size=n, learning_rate=1e-3,
        )  # fmt: skip
        if name == 'Opacus, hooks that sum draws':
            found = torch.cat([gradient.flatten(1) for gradient in step.gradients(rows)], 1)
            theirs = found.double().norm(dim=1).numpy()
            yield compare('gradients', f'{title}: Opacus, float64', theirs, exact, GRADIENT_TOLERANCE)
            yield compare('gradients', f'{title}: ours, Opacus', norms, theirs, GRADIENT_TOLERANCE)
        step.step(rows, images_at_once=n, finish=False)
        theirs = np.concatenate([array.ravel() for array in step.clipped_sum().values()])
        yield compare('gradients', f'{summed}: {name}, float64', theirs, total, GRADIENT_TOLERANCE)


def _in_their_order(twins: Twins, tree: PyTree) -> np.ndarray:
    """Our gradients as one vector, in the order and layout of the port's."""
    by_name = dict(port.named(tree, twins.network))
    return np.concatenate([by_name[name].ravel() for name, _ in twins.network.named_parameters()])


def _float64_gradients(twins: Twins, rows: tuple) -> np.ndarray:
    """(n, P): one example after the other, ordinary gradients, in float64."""
    exact = port.make_network(twins.model, twins.params).double()
    found = []
    for example in zip(*(array.split(twins.draws) for array in rows)):
        example = [array.double() if array.is_floating_point() else array for array in example]
        exact.zero_grad()
        port.losses(exact, *example).mean().backward()
        found.append(np.concatenate([p.grad.numpy().ravel() for p in exact.parameters()]))
    return np.stack(found)


def updates(twins: Twins) -> Iterator[Result]:
    """Check Adam and averages over 20 updates: with given gradients, then a whole training."""
    rng = np.random.default_rng(5)
    flat = state_lib.FlatParams.of(twins.params)
    given = [
        jax.tree.unflatten(
            jax.tree.structure(flat), [rng.standard_normal(flat.vector.shape).astype(np.float32)]
        )
        for _ in range(UPDATES)
    ]
    ours = list(_our_updates(twins, lambda number, params: (None, given[number])))
    theirs = list(_their_updates(twins, lambda number, network: _set_gradient(twins, network, given[number])))
    for place, what in ((1, 'weights'), (2, 'averaged weights')):
        title = f'Adam, same gradients: {what}' if place == 1 else f'Adam and average, same gradients: {what}'
        pair = ([update[place] for update in side] for side in (ours, theirs))
        yield compare_steps('updates', title, *pair, UPDATE_TOLERANCE)

    drawn = [twins.drawn('edm', seed=100 + number) for number in range(UPDATES)]

    def loss(params, number_drawn):
        each = jax.vmap(twins.model.errors, (None, 0, 0))
        return each(params.tree(), twins.images, number_drawn).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    ours = list(_our_updates(twins, lambda number, params: value_and_grad(params, drawn[number])))

    def their_gradient(number, network):
        rows = twins.rows(drawn[number])
        return port.plain_gradient(network, rows, rows_at_once=len(rows[0]))

    theirs = list(_their_updates(twins, their_gradient))
    rows = (
        (0, 'losses', LOSS_TOLERANCE),
        (1, 'weights', TRAINING_TOLERANCE),
        (2, 'averaged weights', TRAINING_TOLERANCE),
    )
    for place, what, tolerance in rows:
        pair = ([update[place] for update in side] for side in (ours, theirs))
        yield compare_steps('updates', f'training with own gradients: {what}', *pair, tolerance)


_LEARNING_RATE, _DECAY = 1e-3, 0.999


def _our_updates(twins: Twins, gradient) -> Iterator[tuple]:
    """After each update: the loss before it, weights and averages as vectors in their order."""
    optimizer = optax.adam(_LEARNING_RATE)
    state = state_lib.create(twins.params, optimizer)
    update = jax.jit(lambda state, found: state_lib.apply_gradient(state, found, optimizer, _DECAY))
    for number in range(UPDATES):
        loss, found = gradient(number, state.params)
        state = update(state, found)
        weights = state.weights()
        yield (
            loss,
            _in_their_order(twins, weights['params']),
            _in_their_order(twins, weights['ema_params']),
        )


def _their_updates(twins: Twins, gradient) -> Iterator[tuple]:
    trained = port.make_network(twins.model, twins.params)
    adam = torch.optim.Adam(trained.parameters(), lr=_LEARNING_RATE)
    average = port.Average(trained, _DECAY)
    flat = lambda tensors: np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])
    for number in range(UPDATES):
        loss = gradient(number, trained)
        adam.step()
        average.update(trained)
        yield loss, flat(trained.parameters()), flat(average.values)


def _set_gradient(twins: Twins, network: port.UNet, gradient: state_lib.FlatParams) -> None:
    by_name = dict(port.named(gradient.tree(), network))
    for name, parameter in network.named_parameters():
        parameter.grad = torch.tensor(by_name[name])


def privacy(releases: Sequence[Releases], epsilon: float, delta: float) -> Iterator[Result]:
    """Check ε of the same releases by both accountants, and the noise that each asks for.

    Args:
        releases: all of a run's; the last are DP-SGD's steps, with our noise.
        epsilon, delta: the run's budget.
    """
    history = [
        (part.mechanism.noise_multiplier, part.mechanism.sampling_probability, part.count)
        for part in releases
    ]
    ours = accounting.epsilon(accounting.compose(part.event for part in releases), delta)
    theirs, by_default = (_their_epsilon(history, delta, orders) for orders in (accounting.RDP_ORDERS, None))
    yield compare(
        'privacy', 'ε of the run, same orders', ours, theirs, EPSILON_TOLERANCE,
        f'at δ = {delta:g}: dp-accounting {ours:.4f}, Opacus {theirs:.4f}; with its own orders '
        f'{by_default:.4f}',
    )  # fmt: skip
    *before, (sigma, q, steps) = history
    theirs, by_default = (
        _their_noise(before, q, steps, epsilon, delta, orders) for orders in (accounting.RDP_ORDERS, None)
    )
    yield compare(
        'privacy', 'noise multiplier σ of DP-SGD, same orders', sigma, theirs, EPSILON_TOLERANCE,
        f'for ε = {epsilon:g}: dp-accounting {sigma:.4f}, Opacus {theirs:.4f}; with its own orders '
        f'{by_default:.4f}',
    )  # fmt: skip


def _their_epsilon(history: Sequence[tuple], delta: float, orders: Sequence[float] | None) -> float:
    """By Opacus, with these orders of the Rényi divergence; None: its own, which go down to 1.1."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    return accountant.get_epsilon(delta, alphas=orders)


def _their_noise(
    before: list, q: float, steps: int, epsilon: float, delta: float, orders: Sequence[float] | None
) -> float:
    """By bisection: Opacus's own search knows no releases before."""
    spent = lambda sigma: _their_epsilon([*before, (sigma, q, steps)], delta, orders)
    low, high = 0.3, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
    while high / low > 1 + 1e-5:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


def random_params(model: Model, seed: int = 0) -> PyTree:
    """Random weights, none of them zero: freshly made ones would hide most layers behind 1e-10."""
    rng = np.random.default_rng(seed)
    fresh = model.init(jax.random.key(seed))
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + rng.normal(0, 0.05, leaf.shape).astype(np.float32), fresh
    )


def check(
    twins: Twins, *, steps: int, releases: Sequence[Releases], epsilon: float, delta: float
) -> list[Result]:
    """Run every check; `steps` are those of the samplers."""
    return [
        *network(twins),
        *losses(twins),
        *trajectories(twins, steps),
        *gradients(twins),
        *updates(twins),
        *privacy(releases, epsilon, delta),
    ]
