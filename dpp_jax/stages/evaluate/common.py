"""What both halves of an evaluation share."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from typing import Any

from dpp_jax.data.images import Images
from dpp_jax.data.stored import StoredImages
from dpp_jax.evaluation import trainer
from dpp_jax.run.artefacts import Evaluation
from dpp_jax.training import progress

InMemory = tuple[Images, str | None]  # private images, and why they could not be read into memory


def in_memory(private: Callable[[], Images], share: Images) -> InMemory:
    """Read all private images, to train networks on them; or say why that cannot be, with the share."""
    try:
        train = private()
    except ValueError as error:  # a host holds its share, but not all
        return share, str(error)
    images = train.images
    if not isinstance(images, StoredImages):
        return train, None
    if images.are_too_many:
        return train, (
            f'the private images take {images.nbytes / 2**30:.1f} GiB, more than half of the memory of this '
            'machine; a network that is trained on real images needs them in memory'
        )
    return dataclasses.replace(train, images=images[:]), None


def save(evaluation: Evaluation, found: Mapping[str, Any]) -> None:
    evaluation.results.update(found)
    evaluation.save()


@contextlib.contextmanager
def steps_bar(name: str) -> Iterator[trainer.Progress]:
    """Yield a callback (done, total, note) that shows a progress bar from its first call on.

    Not before: only the training knows how many steps it takes.
    """
    with contextlib.ExitStack() as stack:
        bars = []

        def advance(done: int, total: int, note: str) -> None:
            if not bars:
                bars.append(stack.enter_context(progress.bar(total, name, 'step')))
            if done:
                bars[0].set_postfix_str(note, refresh=False)
            bars[0].update(done - bars[0].n)

        yield advance
