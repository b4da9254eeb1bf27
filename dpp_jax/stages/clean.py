"""Stage `clean`: delete private/ when nothing needs it any more."""

from collections.abc import Callable

from dpp_jax import files
from dpp_jax.diffusion.model import Model
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir


def run(
    workdir: WorkDir,
    model: Model,
    *,
    is_finished: bool,
    more: Callable[[], object],
    last: Callable[[], object],
) -> None:
    """Delete private/; what is in release/ can be sampled from and published.

    Args:
        workdir: to clean.
        model: whose weights must be readable in release/.
        is_finished: whether the model is released.
        more: reads what sampling needs beside the weights.
        last: called before anything is deleted.

    Raises:
        ValueError: private/ is still needed; nothing was deleted.
    """
    if not is_finished:
        raise ValueError(
            f'--stage=clean would delete keys and checkpoints that {workdir.root} still needs. Finish with '
            '--stage=finetune first, or delete the whole folder'
        )
    try:
        artefacts.weights(workdir, 'finetune', model.shapes())
        more()
    except (OSError, ValueError) as error:
        raise ValueError(
            '--stage=clean deleted nothing: the released model, or class moments that it needs, cannot be '
            f'read, and {workdir.private} can restore it. {error}'
        ) from error
    last()
    workdir.delete_private()
    print(
        f'Deleted {workdir.private}: keys, checkpoints, scores, reports. You can still draw images from the '
        f'released model: move {workdir.synthetic} away, then run --stage=generate with any '
        '--config.generate settings.'
    )
    if files.is_in_store(workdir.private):
        print(
            'The store may keep deleted objects and old versions for days: its settings for the bucket say.'
        )
