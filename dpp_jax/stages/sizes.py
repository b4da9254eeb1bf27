"""How many noised images pass through the network at once, and what follows from it."""

import dataclasses

import jax
from ml_collections import ConfigDict

from dpp_jax.training import parts

# Activations of one layer at full size that stay in a CPU's cache between two layers: with more, the
# gradient of the 28x28 network was up to 1.8 times slower on two cores; with less, hardly faster.
_CACHE_BYTES = 1.7e6
_ON_ACCELERATORS = 512


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is in work at once on one device. Another choice changes rounding only.

    Attributes:
        images: noised images.
        microbatch: private images of fine-tuning, each with its own gradient.
        draws: noise draws of each of them; divides config.finetune.draws.
    """

    images: int
    microbatch: int
    draws: int


def choose(config: ConfigDict) -> Sizes:
    """The sizes that the config sets, and for others what suits the device."""
    images = config.loop.images_at_once or _images_at_once(config)
    draws = config.finetune.draws
    microbatch = config.finetune.microbatch or max(1, images // draws)
    return Sizes(images, microbatch, draws // parts.count(draws, max(1, images // microbatch)))


def _images_at_once(config: ConfigDict) -> int:
    """A power of two, from 4."""
    if jax.default_backend() != 'cpu':
        return _ON_ACCELERATORS
    channels = config.model.width * config.model.multipliers[0]
    fitting = _CACHE_BYTES / (4 * channels * config.data.image_size**2)
    return 2 ** max(2, int(fitting).bit_length() - 1)
