"""Training metrics for TensorBoard, through clu."""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path

from dpp_jax import files

_EVERY = 60.0  # seconds between two copies to an object store, which takes whole files


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield a function (step, values) → None that writes event files to `folder`.

    Losses and gradient norms of private images carry no noise: `folder` must lie in private/.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # silences its notice
    # TensorFlow takes seconds to import and would claim the accelerators' memory.
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    from clu import metric_writers

    with files.following(folder, _EVERY) as (local, follow):
        summaries = metric_writers.SummaryWriter(str(local))

        def write(step: int, values: dict[str, float]) -> None:
            summaries.write_scalars(step, values)
            follow(summaries.flush)

        note = files.note_of(folder)
        if note:
            summaries.write_texts(0, {'note': note})
        try:
            yield write
        finally:
            summaries.close()
