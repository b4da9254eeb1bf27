"""A small generator of images, fitted to the mean features of every class (as DP-MERF, Harder et al. 2021).

Its images are sums of low frequencies, so that noise in the features has little room to become texture.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpp_jax.data.frequencies import Frequencies

PyTree = Any
_MOST_COEFFICIENTS = 256


class _Network(nn.Module):
    """(inputs (n, k)) → (n, outputs) float32."""

    outputs: int
    width: int

    @nn.compact
    def __call__(self, inputs):
        for _ in range(2):
            inputs = nn.silu(nn.Dense(self.width)(inputs))
        return nn.Dense(self.outputs)(inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Images G(z, label), z normal: two hidden layers, the lowest frequencies, a logistic function.

    Attributes:
        image_shape: (H, W, C).
        classes: their number.
        inputs: normal numbers of an image.
        width: of the hidden layers.
    """

    image_shape: tuple[int, int, int]
    classes: int
    inputs: int = 16
    width: int = 256

    @functools.cached_property
    def _basis(self) -> np.ndarray:
        """(k, H W C) float32."""
        count = min(_MOST_COEFFICIENTS, int(np.prod(self.image_shape)))
        lowest = Frequencies(image_shape=self.image_shape, average_down=1, count=count)
        return lowest.basis.T.astype(np.float32)

    @functools.cached_property
    def _network(self) -> _Network:
        return _Network(outputs=len(self._basis), width=self.width)

    def init(self, key: jax.Array) -> PyTree:
        """Return fresh weights (float32)."""
        return self._network.init(key, jnp.zeros((1, self.inputs + self.classes)))['params']

    def pixels(self, weights: PyTree, normal: jax.Array, labels: jax.Array) -> jax.Array:
        """Compute images, (n, H W C) float32 in [0, 1], of normal numbers (n, inputs) and labels (n,)."""
        inputs = jnp.concatenate([normal, jax.nn.one_hot(labels, self.classes)], axis=1)
        coefficients = self._network.apply({'params': weights}, inputs)
        return jax.nn.sigmoid(coefficients @ jnp.asarray(self._basis))

    def draw(self, weights: PyTree, labels: np.ndarray, key: int, number: int) -> np.ndarray:
        """Draw one image for each label, (n, H, W, C) uint8.

        Args:
            weights: of the generator.
            labels: (n,).
            key: 128 bits.
            number: of the batch: with another one, the images are independent of these.
        """
        # Philox is counter-based: every batch has random numbers of its own.
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
        normal = generator.standard_normal((len(labels), self.inputs), np.float32)
        images = np.asarray(self._draw(weights, normal, labels))
        return np.round(255 * images).astype(np.uint8).reshape((-1, *self.image_shape))

    @functools.cached_property
    def _draw(self) -> Callable:
        return jax.jit(self.pixels)

    def fitting(
        self, embed: Callable, *, steps: int, learning_rate: float, images: int
    ) -> tuple[Callable, Callable]:
        """Return how weights are fitted to released mean features: (start, step).

        The loss is the squared distance of mean features, summed over classes (MMD²), less what does not
        depend on the weights. With n images of a class and features of norm 1, n / (n - 1) |mean|² is
        |expected mean|² in the mean, but for a constant: few images in a step do not draw them together.

        Args:
            embed: pixels (n, H W C) → features (n, F) of norm 1.
            steps: of Adam, whose learning rate falls to 0 as a cosine does.
            learning_rate: of the first step.
            images: of all classes together in a step, at least; each class has at least 8.

        Returns:
            start: key → state; step: (state, key, embedding) → state, whose first element is the weights.
            embedding: (classes, F) float32, the mean features of every class, with noise. It is an argument:
            a program, which is kept, holds no data.
        """
        each = max(8, -(-images // self.classes))
        labels = np.repeat(np.arange(self.classes), each)
        optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

        def loss(weights, normal, embedding):
            found = embed(self.pixels(weights, normal, labels))
            means = found.reshape((self.classes, each, -1)).mean(axis=1)
            products = jnp.sum(means * embedding)
            return jnp.sum(jnp.square(means)) * each / (each - 1) - 2 * products

        def start(key):
            weights = self.init(key)
            return weights, optimizer.init(weights)

        @jax.jit
        def step(state, key, embedding):
            weights, moments = state
            normal = jax.random.normal(key, (len(labels), self.inputs))
            gradient = jax.grad(loss)(weights, normal, embedding)
            updates, moments = optimizer.update(gradient, moments)
            return optax.apply_updates(weights, updates), moments

        return start, step
