"""Training metrics and pictures for TensorBoard, through clu."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
from pathlib import Path
import struct
from typing import Any

import numpy as np

from dpp_jax import files

_EVERY = 60.0  # seconds between two copies to an object store, which takes whole files


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield a function (step, values) → None that writes event files to `folder`.

    Losses and gradient norms of private images carry no noise: `folder` must lie in private/.
    """
    with _summaries(folder) as (summaries, follow):

        def write(step: int, values: dict[str, float]) -> None:
            summaries.write_scalars(step, values)
            follow(summaries.flush)

        yield write


def write_pictures(folder: Path, pictures: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    """Write pictures beside the scalars in `folder`.

    Args:
        folder: made if it is not there.
        pictures: name → step of a training → uint8 (H, W, C), C = 1 or 3.
    """
    with _summaries(folder) as (summaries, _):
        for name, of_steps in pictures.items():
            for step, picture in of_steps.items():
                summaries.write_images(step, {name: picture[None]})


@contextlib.contextmanager
def _summaries(folder: Path) -> Iterator[tuple[Any, Callable]]:
    """Yield clu's writer to a new file in `folder`, and what `files.following` yields."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # silences its notice
    # TensorFlow takes seconds to import and would claim the accelerators' memory.
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    from clu import metric_writers

    with files.following(folder, _EVERY) as (local, follow):
        summaries = metric_writers.SummaryWriter(str(local))
        note = files.note_of(folder)
        if note:
            summaries.write_texts(0, {'note': note})
        try:
            yield summaries, follow
        finally:
            summaries.close()


def scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read the scalars of all event files in `folder`; of a step that was taken again, the last one.

    Without TensorFlow, which takes seconds to import.

    Returns:
        name → (steps, ascending; values). Empty if nothing is there; what a killed process left torn is
        left out.
    """
    from tensorboard.compat.proto import event_pb2
    from tensorboard.util import tensor_util

    found: dict[str, dict[int, float]] = {}
    for name in files.names(folder):
        if '.tfevents.' not in name:
            continue
        for record in _records((folder / name).read_bytes()):
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == 'scalars':
                    number = float(tensor_util.make_ndarray(value.tensor))
                    found.setdefault(value.tag, {})[event.step] = number
    return {tag: tuple(map(list, zip(*sorted(values.items())))) for tag, values in found.items()}


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a TFRecord file: length, its checksum, data, their checksum."""
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from('<Q', content, place)
        if place + 16 + length > len(content):
            return
        yield content[place + 12 : place + 12 + length]
        place += 16 + length
