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

from dpp_jax.diffusion import class_gaussians, microbatch, unet
from dpp_jax.diffusion import loss as loss_lib
from dpp_jax.diffusion.class_gaussians import ClassGaussians
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
        directions: r of the class moments that the denoiser is around, see `diffusion.class_gaussians`; None:
            it is around none. They are an argument (`gaussians`): programs are the same for all.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    classes: int
    kind: Kind
    directions: int | None = None

    def init(self, key: jax.Array) -> PyTree:
        """Return fresh parameters (float32)."""
        return _init(self.network, self._input_shape, key)

    def shapes(self) -> PyTree:
        """Return the parameters' shapes and dtypes without making them."""
        return jax.tree.map(lambda leaf: leaf, _shapes(self.network, self._input_shape))

    @property
    def _input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.image_shape
        return height, width, channels * (1 if self.directions is None else 2)

    def stand_in(self) -> ClassGaussians | None:
        """Return class moments in their shapes alone: for measuring speed and memory."""
        if self.directions is None:
            return None
        pixels = math.prod(self.image_shape)
        return class_gaussians.stand_in(classes=self.classes, pixels=pixels, size=self.directions)

    def denoiser(self, params: PyTree, gaussians: ClassGaussians | None = None) -> Denoise:
        """Return D(x (n, H, W, C), sigma (n,), label (n,)) with these parameters.

        Raises:
            ValueError: the denoiser is around class moments, and they are not given; or the other way round.
        """
        if (gaussians is None) != (self.directions is None):
            wanted = 'None' if self.directions is None else 'those of the class moments'
            raise ValueError(f'gaussians must be {wanted}: directions is {self.directions}')
        network = lambda x, c_noise, label: self.network.apply({'params': params}, x, c_noise, label)
        return self.kind.denoiser(network) if gaussians is None else gaussians.denoiser(self.kind, network)

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
        self, params: PyTree, image: jax.Array, drawn: loss_lib.Drawn, gaussians: ClassGaussians | None = None
    ) -> jax.Array:
        """Return (n,) losses of n noised images: of one image (H, W, C), or of as many (n, H, W, C)."""
        return loss_lib.errors(self.kind, self.denoiser(params, gaussians), image, drawn)

    def example_loss(
        self, *, draws: int, label_dropout: float, draws_at_once: int | None = None, shares: int = 1
    ) -> Callable:
        """Return (params, image (H, W, C) in [-1, 1], label (), key) → the mean loss of `draws` draws.

        At most `draws_at_once` (None: all) pass through the network together, value and gradient, in
        equal parts. It changes rounding only.

        A denoiser around class moments takes them as the keyword `gaussians`.

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
            return lambda params, image, label, key, gaussians=None: mean_error(
                params, (image, gaussians), draw(label, key)
            )

        def of_share(params, image, label, key, share, gaussians=None):
            # All are drawn, which takes next to no time beside the network's pass over them.
            cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, share * own, own)
            return mean_error(params, (image, gaussians), jax.tree.map(cut, draw(label, key)))

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
