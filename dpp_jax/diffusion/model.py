"""The diffusion model as the trainings and the sampler see it: functions of its parameters.

How it goes:
1. `init` makes parameters θ, `shapes` says how large they are.
2. `denoiser(θ)` is D(x; σ, y): the network F(·; θ) inside the scalings of its kind. Samplers need no more.
3. `drawing` makes what is random of an image x with label y: K times a label, a noise level σ and noise n.
4. `errors(θ, x, drawn)` are the K losses w(σ) |D(x + n; σ, y) - x|², or some of them.
5. `example_loss` is their mean, a few at a time: the loss whose gradient DP-SGD clips.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpp_jax.diffusion import around as around_lib
from dpp_jax.diffusion import loss as loss_lib
from dpp_jax.diffusion import microbatch, unet
from dpp_jax.diffusion.around import Around
from dpp_jax.diffusion.denoiser import Denoise, Kind

PyTree = Any

NETWORKS: dict[str, type[nn.Module]] = {'unet': unet.UNet}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network with the rules that turn its output into a denoised image and a loss.

    Attributes:
        network: F, a Flax module, (x (n, H, W, C), c_noise (n,), label (n,)) → (n, H, W, C).
        image_shape: (H, W, C).
        classes: number of classes; label `classes` means "no class".
        kind: of denoiser, see `diffusion.denoiser`.
        around: r of the class moments that the denoiser is around, see `diffusion.around`; None: of none.
            They are told in every call (`told`): programs are the same for all.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    kind: Kind
    around: int | None = None

    def init(self, key: jax.Array) -> PyTree:
        """Return fresh parameters (float32)."""
        return _init(self.network, self._input_shape, key)

    def shapes(self) -> PyTree:
        """Return the parameters' shapes and dtypes without making them."""
        return jax.tree.map(lambda leaf: leaf, _shapes(self.network, self._input_shape))

    @property
    def _input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.image_shape
        return height, width, channels * (1 if self.around is None else 2)

    def stand_in(self) -> Around | None:
        """Return what is told, in its shapes alone: for measuring speed and memory."""
        if self.around is None:
            return None
        pixels = math.prod(self.image_shape)
        return around_lib.stand_in(classes=self.classes, pixels=pixels, size=self.around)

    def denoiser(self, params: PyTree, told: Around | None = None) -> Denoise:
        """Return D(x (n, H, W, C), sigma (n,), label (n,)) with these parameters.

        Raises:
            ValueError: the denoiser is around class moments, and they are not told; or the other way round.
        """
        if (told is None) != (self.around is None):
            raise ValueError(f'around is {self.around}, and class moments are {"not " * (told is None)}told')
        network = lambda x, c_noise, label: self.network.apply({'params': params}, x, c_noise, label)
        return self.kind.denoiser(network) if told is None else told.denoiser(self.kind, network)

    def drawing(self, *, draws: int, label_dropout: float) -> Callable:
        """Return (label (), key) → everything random of `draws` noised images, leaves (draws, ...)."""
        return lambda label, key: loss_lib.draw(
            self.kind,
            key,
            self.image_shape,
            label,
            draws=draws,
            label_dropout=label_dropout,
            no_class=self.classes,
        )

    def errors(
        self, params: PyTree, image: jax.Array, drawn: loss_lib.Drawn, told: Around | None = None
    ) -> jax.Array:
        """Return (n,) losses of n noised images: of one image (H, W, C), or of as many (n, H, W, C)."""
        return loss_lib.errors(self.kind, self.denoiser(params, told), image, drawn)

    def example_loss(
        self, *, draws: int, label_dropout: float, draws_at_once: int | None = None, shares: int = 1
    ) -> Callable:
        """Return (params, image (H, W, C) in [-1, 1], label (), key) → the mean loss of `draws` draws.

        At most `draws_at_once` (None: all) pass through the network together, value and gradient, in
        equal parts. It changes rounding only.

        A denoiser around class moments takes them as the keyword `told`.

        With `shares` > 1, a divisor of `draws`, the function takes one argument more, the number of a share:
        it returns the mean loss of these draws / shares draws. The mean over all shares is the loss above:
        an image's draws follow from the key, whatever the shares.

        Raises:
            ValueError: the draws cannot be shared so.
        """
        if draws % shares:
            raise ValueError(f'shares is {shares}; it must divide the draws, {draws}')
        own = draws // shares
        parts = microbatch.count(own, draws_at_once or own)
        draw = self.drawing(draws=draws, label_dropout=label_dropout)
        error = lambda params, shared, drawn: self.errors(params, shared[0], drawn, shared[1]).mean()
        mean_error = microbatch.mean(error, parts)
        if shares == 1:
            return lambda params, image, label, key, told=None: mean_error(
                params, (image, told), draw(label, key)
            )

        def of_share(params, image, label, key, share, told=None):
            # All are drawn, which takes next to no time beside the network's pass over them.
            cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, share * own, own)
            return mean_error(params, (image, told), jax.tree.map(cut, draw(label, key)))

        return of_share


def _init(network: nn.Module, image_shape: tuple[int, int, int], key: jax.Array) -> PyTree:
    image, label = jnp.zeros((1,) + image_shape), jnp.zeros((1,), jnp.int32)
    return jax.jit(network.init)(key, image, jnp.zeros((1,)), label)['params']


@functools.lru_cache
def _shapes(network: nn.Module, image_shape: tuple[int, int, int]) -> PyTree:
    """A run asks some thirty times, and each time the whole network would be traced."""
    return jax.eval_shape(functools.partial(_init, network, image_shape), jax.random.key(0))


def size(params: PyTree) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
