"""How long a run takes on this machine: from a measurement that is kept, or from a convolution timed now."""

import json
import time

import jax
import jax.numpy as jnp

from dpp_jax import files
from dpp_jax.diffusion import model as model_lib
from dpp_jax.diffusion.model import Model
from dpp_jax.training import devices, hosts

# Operations of a noised image's gradient per parameter and pixel: 3.46e9 for the 28x28 network.
_OPERATIONS = 3.0
_FORWARD = 1 / 3  # of a gradient: one evaluation of the network, in generation
# What a DP-SGD step reaches of the rate of a plain convolution. Measured on two cores for 28x28 (20.5 noised
# images/s); other networks and machines are within a factor of two or three.
_SHARE = 0.8
_SECONDS = 0.5  # for the convolution
WEEK = 7 * 86_400.0
_UNITS = (
    ('minute', 60.0),
    ('hour', 3600.0),
    ('day', 86_400.0),
    ('week', WEEK),
    ('year', 365 * 86_400.0),
)


def seconds(text: str) -> float:
    """Return the seconds of a time such as '45m', '1.5h' or '90s'.

    Raises:
        ValueError: it is no such time, or none above 0.
    """
    units = {'s': 1.0, 'm': 60.0, 'h': 3600.0, 'd': 86_400.0}
    number = float(text[:-1]) if text[-1:] in units else 0.0
    if not 0 < number < float('inf'):
        raise ValueError(f'{text!r} is no time above 0')
    return number * units[text[-1]]


def rate(model: Model) -> tuple[float, bool]:
    """Return the noised images per second of trainings on all devices, and whether they were measured."""
    known = _read().get(_name(model))
    if known:
        return known, True
    return _SHARE * _operations_per_second(model) / operations(model), False


def is_measured(model: Model) -> bool:
    """Whether `rate` is kept from a measurement."""
    return _name(model) in _read()


def operations(model: Model) -> float:
    """Return the operations of a noised image's gradient."""
    return _OPERATIONS * model_lib.size(model.shapes()) * model.image_shape[0] * model.image_shape[1]


def keep(model: Model, images_per_second: float) -> None:
    """Note a measured rate in the user's cache folder. It must come from random images: rates are kept."""
    try:
        files.write_json(_path(), {**_read(), _name(model): images_per_second})
    except OSError:
        pass  # estimated next time


def evaluations(images: int, *, steps: int, name: str, guidance: float) -> int:
    """Return how often a sampler evaluates the network for all its images."""
    per_step = 2 if name == 'heun' else 1
    return images * (steps * per_step - (per_step - 1)) * (2 if guidance else 1)


def of_trainings(noised_images: int, images_per_second: float) -> float:
    """Return seconds."""
    return noised_images / images_per_second


def of_generation(network_evaluations: int, images_per_second: float) -> float:
    """Return seconds, at the rate of trainings."""
    return network_evaluations * _FORWARD / images_per_second


def words(seconds: float) -> str:
    """Say a time in its largest unit: 'about 3 weeks'."""
    if seconds < 60:
        return 'less than a minute'
    unit, length = next((u, n) for u, n in reversed(_UNITS) if seconds >= n)
    number = seconds / length
    text = f'{number:,.0f}' if number >= 9.5 else f'{number:.1f}'.removesuffix('.0')
    return f'about {text} {unit}{"" if text == "1" else "s"}'


def _path():
    return devices.cache_folder() / 'noised_images_per_second.json'


def _name(model: Model) -> str:
    around = () if model.directions is None else (model.directions,)
    return repr((devices.kind(), model.network, model.image_shape, *around))


def _read() -> dict[str, float]:
    """Read what is kept; nothing if there is none, or none that can be read."""
    try:
        return json.loads(_path().read_bytes())
    except (OSError, ValueError):
        return {}


def _operations_per_second(model: Model) -> float:
    """Time a convolution as the network has them, on all devices of this process at once."""
    height, width, _ = model.image_shape
    channels = model.network.width * model.network.multipliers[0]
    images = max(1, 16_384 // (height * width))
    x = jnp.ones((len(devices.local()), images, height, width, channels), model.network.dtype)
    kernel = jnp.full((3, 3, channels, channels), 1e-3, model.network.dtype)

    def work(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    with devices.limited_to(len(devices.local())):  # of several processes, this one measures alone
        program = devices.parallel(work, in_axes=(0, None))
    jax.block_until_ready(program(x, kernel))
    start, best = time.perf_counter(), float('inf')
    while time.perf_counter() - start < _SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(program(x, kernel))
        best = min(best, time.perf_counter() - begin)
    return hosts.count() * 2 * 9 * channels**2 * x.size / channels / best
