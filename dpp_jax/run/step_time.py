"""How long a step of fine-tuning takes on any number of devices: a model with three terms.

    T(D) = s · r · K / g      noised images: r rows on a device, padding included; K / g noise draws of each
         + u                  what every device does once: noise, optimizer, average of the weights
         + bytes / b + a      for the sum over all devices, and for those of teams that share an image

Rows are dealt evenly. r is m E[ceil(n / (T m))], for a batch of n rows, T = D / g teams and a microbatch of
m: what Poisson sampling costs is the last microbatch, which all devices compute and few fill. The sum of all
P int32 takes 2 (D - 1) / D · 4 P bytes of each device (a ring); a team's takes (g - 1) / g · 4 P for a row.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
from scipy import stats

_BYTES = 4  # of a float32 or an int32
_SURE = 8.0  # standard deviations within which all batches lie
_WORTH = 0.95  # a larger team must compute so much less, at least
# Assumptions: bytes per second that a device sends in a ring, within a host and between hosts; and seconds of
# a collective, however little it sends. Those of a CPU within a host are fitted (docs/scaling.md).
_WITHIN_HOST = {'cpu': 1e8, 'tpu': 5e10, 'gpu': 2e11}
_BETWEEN_HOSTS = {'cpu': 1e8, 'tpu': 5e10, 'gpu': 1e10}
_COLLECTIVE = {'cpu': 1e-4, 'tpu': 5e-5, 'gpu': 5e-5}
COLLECTIVES_OF_TEAM = 3  # for a microbatch: losses, gradients, norms
# Seconds of a device for each parameter: noise, optimizer, average.
_UPDATE = {'cpu': 1.5e-7, 'tpu': 3e-10, 'gpu': 3e-10}
_OPERATIONS_PER_SECOND = {'cpu': 3.5e10, 'tpu': 2e13, 'gpu': 2e13}  # of a device, in gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A Poisson batch of rows.

    Attributes:
        units: N, images or groups.
        probability: q of each.
    """

    units: int
    probability: float

    @property
    def expected(self) -> float:
        """Rows in the mean."""
        return self.units * self.probability

    @property
    def deviation(self) -> float:
        """Standard deviation of the rows."""
        return math.sqrt(self.expected * (1 - self.probability))

    def microbatches(self, rows: int) -> float:
        """Compute E[ceil(n / rows)] of a batch of n rows; `rows` go at a time on all devices together."""
        if self.deviation > rows:  # so many that the last is filled evenly: right to 1e-8
            return (self.expected + (rows - 1) / 2) / rows
        width = _SURE * self.deviation
        sure = max(0, math.floor((self.expected - width) / rows))
        others = np.arange(sure, math.ceil((self.expected + width) / rows) + 1)
        return sure + float(stats.binom.sf(others * rows, self.units, self.probability).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The work of a step of fine-tuning.

    Attributes:
        batch: of rows.
        draws: K, noise draws of an image.
        images_per_row: 1, or those of a group.
        parameters: P of the network.
    """

    batch: Batch
    draws: int
    parameters: int
    images_per_row: int = 1

    @property
    def noised_images(self) -> float:
        """Noised images of a row."""
        return self.draws * self.images_per_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What one of its devices can do.

    Attributes:
        image_seconds: s, for a noised image.
        update_seconds: u.
        bytes_per_second: b, that a device sends to the next in the sum over all devices.
        team_bytes_per_second: the same within a team.
        collective_seconds: a, of a collective.
    """

    image_seconds: float
    update_seconds: float
    bytes_per_second: float
    team_bytes_per_second: float
    collective_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step is spread.

    Attributes:
        devices: D.
        microbatch: m, rows of a device whose gradients exist at once.
        devices_per_image: g, devices of a team.
    """

    devices: int
    microbatch: int
    devices_per_image: int = 1

    @property
    def rows_at_once(self) -> int:
        """Rows that all devices together take at once."""
        return self.devices // self.devices_per_image * self.microbatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a step, and the share of the devices' speed that is left.

    Attributes:
        images: the noised images of the batch.
        padding: rows that hold nobody.
        update: what every device does once.
        sending: between devices.
        efficiency: the speed over D times that of one device alone.
    """

    images: float
    padding: float
    update: float
    sending: float
    efficiency: float

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.images + self.padding + self.update + self.sending


def predict(step: Step, machine: Machine, layout: Layout) -> Prediction:
    """Predict the time of a step."""
    alone = Layout(devices=1, microbatch=1)
    images, padding, sending = _parts(step, machine, layout)
    total = images + padding + machine.update_seconds + sending
    of_one = sum(_parts(step, machine, alone)) + machine.update_seconds
    return Prediction(
        images=images,
        padding=padding,
        update=machine.update_seconds,
        sending=sending,
        efficiency=of_one / (layout.devices * total),
    )


def _parts(step: Step, machine: Machine, layout: Layout) -> tuple[float, float, float]:
    """Return seconds for images, for padding, and for sending."""
    d, g = layout.devices, layout.devices_per_image
    rows = step.batch.microbatches(layout.rows_at_once) * layout.microbatch
    row_seconds = machine.image_seconds * step.noised_images / g
    images = row_seconds * step.batch.expected * g / d
    gradient = _BYTES * step.parameters
    sending = 2 * (d - 1) / d * gradient / machine.bytes_per_second
    sending += rows * (g - 1) / g * gradient / machine.team_bytes_per_second
    collectives = (d > 1) + (g > 1) * COLLECTIVES_OF_TEAM * rows / layout.microbatch
    return images, row_seconds * rows - images, sending + collectives * machine.collective_seconds


def machine(
    backend: str,
    *,
    parameters: int,
    devices: int,
    devices_of_host: int,
    image_seconds: float | None = None,
    operations: float = 0.0,
) -> Machine:
    """Return what is assumed of a device where nothing else is measured.

    Args:
        backend: 'cpu', 'gpu' or 'tpu'; another counts as 'gpu'.
        parameters: P.
        devices: D, of all hosts.
        devices_of_host: of each host.
        image_seconds: of a device for a noised image, where it was measured.
        operations: for a noised image, from which its time follows otherwise.
    """
    known = backend if backend in _COLLECTIVE else 'gpu'
    link = _WITHIN_HOST if devices <= devices_of_host else _BETWEEN_HOSTS
    return Machine(
        image_seconds=image_seconds or operations / _OPERATIONS_PER_SECOND[known],
        update_seconds=_UPDATE[known] * parameters,
        bytes_per_second=link[known],
        team_bytes_per_second=_WITHIN_HOST[known],
        collective_seconds=_COLLECTIVE[known],
    )


def choose(
    step: Step, assumed: Machine, layout: Layout, *, sizes: Sequence[int], is_microbatch_set: bool = False
) -> Layout:
    """Choose how many devices share an image, and the microbatch then.

    As long as every device has a microbatch of its own in the mean, the layout stays. Otherwise the predicted
    time decides; a smaller team is preferred to one that is a little faster. All of it follows from public
    numbers and from the kind of device, so that a run that goes on takes the same choice.

    Args:
        step: the work.
        assumed: of a device, not measured: a measurement is another one each time.
        layout: with the most rows that a device may have at once, and the smallest team.
        sizes: of teams, in rising order.
        is_microbatch_set: whether the microbatch stays.
    """
    if step.batch.expected >= layout.rows_at_once:
        return layout
    layouts = [dataclasses.replace(layout, devices_per_image=size) for size in sizes]
    if not is_microbatch_set:
        layouts = [layout, *(even(step.batch, each) for each in layouts)]
    seconds = [predict(step, assumed, each).seconds for each in layouts]
    return next(each for each, own in zip(layouts, seconds) if _WORTH * own <= min(seconds))


def even(batch: Batch, layout: Layout) -> Layout:
    """Lower the microbatch so that those of nearly every batch are full: 17 rows are 2 of 9, not 16 and 1."""
    most = math.ceil((batch.expected + 2 * batch.deviation) * layout.devices_per_image / layout.devices)
    number = math.ceil(most / layout.microbatch)
    return dataclasses.replace(layout, microbatch=max(1, math.ceil(most / max(1, number))))


def teams(draws: int, devices_of_host: int) -> Sequence[int]:
    """Return the sizes that a team can have: divisors of both numbers."""
    return [size for size in range(1, devices_of_host + 1) if draws % size == devices_of_host % size == 0]
