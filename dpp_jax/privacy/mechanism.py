"""The Gaussian mechanism: noise, added once, together with its ledger entry.

Formal guarantee. Neighbors by zero-out: in one of two sets of the same, public size N one image's
contribution counts as nothing; or by add or remove one: one set has one image more. A sum of vectors of norm
at most Δ changes by at most Δ between either kind of neighbors, and by at most 2 Δ if one image is replaced
(which `accounting` counts for that relation). Adding normal noise of
standard deviation σ·Δ to every coordinate, once, is the Gaussian mechanism with noise multiplier σ. Whatever
is done with the noisy sum afterwards (division by a public constant, Adam, averaging of weights) is
post-processing.

Two assumptions stand behind this. Normal draws are float32: they have its granularity and end (see
`normal`; docs/privacy.md, "Floating point"). Sums are exact; who makes one pays for its rounding to float32
by a smaller bound (`clipping.Grid`). And an example's own random draws (noise levels of its loss) do not
depend on who else is in the batch: they come from secret keys and the example's own number.

How a release goes: `GaussianMechanism.noisy` joins a function that sums and a secret key into a `NoisySum`.
Its call number n draws the noise from the key and n, and returns the result with the ledger entry for n and
that key. The caller writes the entry to the ledger before it uses the result. Nothing else in this package
takes a noise key.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from dpp_jax.privacy import checks, groups, ledger

PyTree = Any
NOISE_KEYS = 4  # and draws, of which a noise value is made


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """The secret that all noise of one mechanism is drawn from.

    Attributes:
        identifier: public, random name of the key, for the ledger; it is not computed from the key.
        key: JAX key (threefry takes 64 bits).

    Raises:
        ValueError: the identifier is empty or no text.
    """

    identifier: str
    keys: jax.Array = dataclasses.field(repr=False)

    def __post_init__(self):
        checks.require('identifier', self.identifier, checks.is_text(self.identifier), 'a text, not empty')


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianMechanism:
    """A Poisson-sampled Gaussian mechanism.

    Attributes:
        name: as the ledger records it.
        noise_multiplier: σ = noise std / sensitivity, finite and > 0.
        sampling_probability: q in (0, 1] of the Poisson sample that the sum is taken over.
        sensitivity: Δ, finite and > 0, the bound on the L2 norm of one example's contribution.
        unit: what an example is: 'image' or 'group', see `groups`.

    Raises:
        ValueError: a field is out of range.
    """

    name: str
    noise_multiplier: float
    sampling_probability: float
    sensitivity: float
    unit: str = groups.IMAGE

    def __post_init__(self):
        checks.require('name', self.name, checks.is_text(self.name), 'a text, not empty')
        self.entry(0, 'none')  # checks every other field

    def entry(self, index: int, identifier: str) -> ledger.Entry:
        """Return what the ledger must hold before release number `index` is used.

        Args:
            index: which release, from 0.
            identifier: public name of the noise key.
        """
        return ledger.Entry(
            mechanism=self.name,
            index=index,
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            sensitivity=self.sensitivity,
            randomness=identifier,
            unit=self.unit,
        )

    def noisy(
        self,
        sum_function: Callable[..., tuple[PyTree, PyTree]],
        noise_key: NoiseKey,
        *,
        then: Callable[..., PyTree],
        compiled: Callable[[Callable], Callable] = jax.jit,
        is_random: bool = False,
    ) -> 'NoisySum':
        """Join a sum with its noise and its ledger entry.

        Args:
            sum_function: (*arguments) → (sum, aside). The sum (float arrays) runs over one fresh Poisson
                sample; each example adds at most `sensitivity` to it in L2 norm. Whatever stands
                aside gets no noise: it belongs to private/.
            noise_key: secret.
            then: (noisy sum, aside, *arguments) → result: post-processing.
            compiled: makes a program of a function (*arguments, keys, index).
            is_random: the sum draws random numbers of its own: `sum_function` takes a key before the
                other arguments, fresh in every release and independent of the noise.
        """

        def release(*arguments_keys_index):
            # In this order: another order of a program's parameters rounds otherwise, and runs go on.
            *arguments, keys, index = arguments_keys_index
            keys = _of_each(lambda key: jax.random.fold_in(key, index), keys)
            if is_random:
                keys, draw_keys = jnp.moveaxis(_of_each(jax.random.split, keys), -1, 0)
                total, aside = sum_function(draw_keys.ravel()[0], *arguments)
            else:
                total, aside = sum_function(*arguments)
            return then(self._add_noise(total, keys), aside, *arguments)

        return NoisySum(mechanism=self, noise_key=noise_key, program=compiled(release))

    def _add_noise(self, total: PyTree, keys: jax.Array) -> PyTree:
        """Add independent normal noise of std σ·Δ to every coordinate of `total` (float arrays)."""
        flat, unflatten = jax.flatten_util.ravel_pytree(total)
        # One long draw: a draw per leaf takes several times as long to compile.
        noise = normal(keys, flat.shape)
        return unflatten(flat + self.noise_multiplier * self.sensitivity * noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisySum:
    """The releases of one mechanism with one key, made by `GaussianMechanism.noisy`.

    Attributes:
        mechanism: adds the noise.
        noise_key: that the noise is drawn from.
        program: (*arguments, keys, index () int32) → result, as it runs on the devices.
    """

    mechanism: GaussianMechanism
    noise_key: NoiseKey
    program: Callable

    def __call__(self, index: int, *arguments: PyTree) -> tuple[PyTree, ledger.Entry]:
        """Return the result of release number `index` and its ledger entry.

        The entry must be in the ledger before the result is used. The same index draws the same noise:
        repeat it with the same sum only.
        """
        entry = self.mechanism.entry(index, self.noise_key.identifier)
        return self.program(*arguments, self.noise_key.keys, np.int32(index)), entry


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw unit normal noise, float32: half the sum of four draws of `jax.random.normal`.

    One draw has 2^23 values, of which 17 lie above 4.6, and none above 5.22 or below -5.42. In the course of
    a training a value beyond the ends, which only a neighbor's contribution explains, would be more likely
    than the δ of the paper's settings. Half the sum of four ends beyond 10 standard deviations, and its
    values lie as close as float32 has them (Holohan & Braghin 2021, "Secure random sampling in differential
    privacy").

    A threefry key has 64 bits, which a search finds. Each draw has a key of its own, 256 bits together: who
    splits the sum into two pairs and looks for two keys that meet still has 2^128 to try.

    Args:
        keys: (4,) JAX keys, or () as in runs of earlier versions: all four draws from one key.
        shape: of the noise.
    """
    if keys.ndim == 0:
        return jax.random.normal(keys, (NOISE_KEYS, *shape)).sum(0) / math.sqrt(NOISE_KEYS)
    # All at once: one after the other took three times as long on a CPU.
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys).sum(0) / math.sqrt(NOISE_KEYS)


def _of_each(function: Callable, keys: jax.Array) -> jax.Array:
    """Apply a function of one key to a key, or to each of several."""
    return jax.vmap(function)(keys) if keys.ndim else function(keys)
