"""How long a step of fine-tuning takes on any number of devices: a model with three terms.

    T(D) = s · r · K / g      noised images: r rows on a device, padding included; K / g noise draws of each
         + u                  what every device does once: noise, optimizer, average of the weights
         + bytes / b + a      for the sum over all devices, and for those of teams that share an image

A host deals its rows evenly. r is m E[ceil(H n / (T m))], for H hosts, T = D / g teams, a microbatch of m,
and n, the rows of the host that has most: each host has those of its own images. What Poisson sampling costs
is the last microbatch, which all devices compute and few fill, and what that host has more than others. The
sum of all P int32 takes 2 (D - 1) / D · 4 P bytes of each device (a ring); that of a team takes
(g - 1) / g · 4 P for a row.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np
from scipy import stats

from dpp_jax.training import devices as devices_lib

_BYTES = 4  # of a float32 or an int32
_SURE = 8.0  # standard deviations within which all batches lie
_MORE = (0, 1, 2, 4, 8)  # microbatches that are tried
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

    def of_host(self, hosts: int) -> 'Batch':
        """Return the part of one of several hosts."""
        return dataclasses.replace(self, units=-(-self.units // hosts))

    def microbatches(self, rows: int, hosts: int = 1) -> float:
        """Compute E[ceil(n / own rows)] of the host that has most: n of the batch's rows.

        Args:
            rows: that go at a time on all devices together; each host's own rows are as many for each.
            hosts: each has the rows of its own units.
        """
        own, part = rows // hosts, self.of_host(hosts)
        if hosts == 1 and self.deviation > rows:  # so many that the last is filled evenly: right to 1e-8
            return (self.expected + (rows - 1) / 2) / rows
        width = _SURE * part.deviation
        sure = max(0, math.floor((part.expected - width) / own))
        others = np.arange(sure, math.ceil((part.expected + width) / own) + 1)
        no_more = stats.binom.cdf(others * own, part.units, self.probability)
        return sure + float((1 - no_more**hosts).sum())


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
        hosts: H, processes; each has the images of its share.
    """

    devices: int
    microbatch: int
    devices_per_image: int = 1
    hosts: int = 1

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
    rows = step.batch.microbatches(layout.rows_at_once, layout.hosts) * layout.microbatch
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


def predict_here(step: Step, *, microbatch: int, devices_per_image: int, rate: float) -> Prediction:
    """Predict the time of a step on the devices in use.

    Args:
        step: the work.
        microbatch, devices_per_image: as of `Layout`.
        rate: noised images per second of the devices of this process together.
    """
    devices, own = devices_lib.count(), len(devices_lib.local())
    return predict(
        step,
        machine(
            jax.default_backend(),
            parameters=step.parameters,
            devices=devices,
            devices_of_host=own,
            image_seconds=own / rate,
        ),
        Layout(
            devices=devices,
            microbatch=microbatch,
            devices_per_image=devices_per_image,
            hosts=devices // own,
        ),
    )


def choose(
    step: Step, assumed: Machine, layout: Layout, *, sizes: Sequence[int], is_microbatch_set: bool = False
) -> Layout:
    """Choose how many devices share an image, and the microbatch then.

    On one host the layout stays as long as every device has a microbatch of its own in the mean. Otherwise
    the predicted time decides; a smaller team and a larger microbatch are preferred to what is a little
    faster. All of it follows from public numbers and from the kind of device, so that a run that goes on
    takes the same choice.

    Args:
        step: the work.
        assumed: of a device, not measured: a measurement is another one each time.
        layout: with the most rows that a device may have at once, and the smallest team.
        sizes: of teams, in rising order.
        is_microbatch_set: whether the microbatch stays.
    """
    if layout.hosts == 1 and step.batch.expected >= layout.rows_at_once:
        return layout
    layouts = [dataclasses.replace(layout, devices_per_image=size) for size in sizes]
    if not is_microbatch_set:
        layouts = [layout, *(even(step.batch, each, more) for each in layouts for more in _MORE)]
    seconds = [predict(step, assumed, each).seconds for each in layouts]
    return next(each for each, own in zip(layouts, seconds) if _WORTH * own <= min(seconds))


def even(batch: Batch, layout: Layout, more: int = 0) -> Layout:
    """Lower the microbatch so that those of nearly every batch are full: 17 rows are 2 of 9, not 16 and 1.

    `more` are microbatches above as few as possible: smaller ones follow a batch's size better.
    """
    part = batch.of_host(layout.hosts)
    width = 2 + math.sqrt(2 * math.log(layout.hosts))  # of the host that has most
    teams_of_host = layout.devices / layout.devices_per_image / layout.hosts
    most = math.ceil((part.expected + width * part.deviation) / teams_of_host)
    number = math.ceil(most / layout.microbatch) + more
    return dataclasses.replace(layout, microbatch=max(1, math.ceil(most / max(1, number))))


def teams(draws: int, devices_of_host: int) -> Sequence[int]:
    """Return the sizes that a team can have: divisors of both numbers."""
    return [size for size in range(1, devices_of_host + 1) if draws % size == devices_of_host % size == 0]
