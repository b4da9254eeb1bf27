"""The diffusion model as the trainings and the sampler see it: functions of its parameters."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpp_jax.diffusion import loss as loss_lib
from dpp_jax.diffusion import microbatch as parts_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with the rules that turn its output into a denoised image and a loss.

    Attributes:
        network: Flax module, (x (n, H, W, C), c_noise (n,), label (n,)) → (n, H, W, C).
        image_shape: (H, W, C).
        classes: number of classes; label `classes` means "no class".
        make_denoiser: network function → D(x, sigma, label), see `diffusion.denoiser`.
        loss: of one image, see `diffusion.loss`.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    make_denoiser: Callable
    loss: loss_lib.ImageLoss

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters (float32)."""
        image = jnp.zeros((1,) + self.image_shape)
        label = jnp.zeros((1,), jnp.int32)
        return jax.jit(self.network.init)(key, image, jnp.zeros((1,)), label)['params']

    def shapes(self) -> PyTree:
        """The parameters' shapes and dtypes, computed without making them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def denoiser(self, params: PyTree) -> Callable:
        """D(x (n, H, W, C), sigma (n,), label (n,)) with these parameters."""
        return self.make_denoiser(
            lambda x, c_noise, label: self.network.apply({'params': params}, x, c_noise, label)
        )

    def example_loss(self, *, draws: int, label_dropout: float, draws_at_once: int | None = None) -> Callable:
        """(params, image (H, W, C) in [-1, 1], label (), key) → the mean loss of `draws` draws.

        `draws_at_once` (None: all) pass through the network together, value and gradient; as many
        as divide `draws`. It changes rounding only.
        """
        parts = parts_lib.count(draws, draws_at_once or draws)
        draw = self.drawing(draws=draws, label_dropout=label_dropout)

        def error(params, image, drawn):
            return self.errors(params, image, drawn).mean()

        def loss(params, image, label, key):
            return parts_lib.mean(error, parts)(params, image, draw(label, key))

        return loss

    def drawing(self, *, draws: int, label_dropout: float) -> Callable:
        """(label (), key) → everything random of `draws` noised images: leaves (draws, ...)."""
        return lambda label, key: self.loss.draw(
            key,
            self.image_shape,
            label,
            draws=draws,
            label_dropout=label_dropout,
            no_class=self.classes,
        )

    def errors(self, params: PyTree, image: jax.Array, drawn: PyTree) -> jax.Array:
        """(n,) losses of n noised images: of one image (H, W, C), or of as many (n, H, W, C)."""
        return self.loss.errors(self.denoiser(params), image, drawn)


def size(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
