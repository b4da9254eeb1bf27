"""Stage `clean`: delete private/ when nothing needs it any more."""

from collections.abc import Callable
import shutil

from dpp_jax.diffusion.model import Model
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir


def run(workdir: WorkDir, model: Model, *, is_finished: bool, last: Callable[[], object]) -> None:
    """Delete private/; what is in release/ can be sampled from and published.

    Args:
        workdir: to clean.
        model: whose weights must be readable in release/.
        is_finished: whether the model is released.
        last: called before anything is deleted.

    Raises:
        ValueError: private/ is still needed; nothing was deleted.
    """
    if not is_finished:
        raise ValueError(
            f'--stage=clean would delete what {workdir.root} needs to go on: its keys and '
            'checkpoints. Finish with --stage=finetune first, or delete the whole folder'
        )
    try:
        artefacts.weights(workdir, 'finetune', model.shapes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f'--stage=clean deleted nothing, because {workdir.private} holds what a whole model '
            f'can be made from, and {error}'
        ) from error
    last()
    shutil.rmtree(workdir.private)
    print(
        f'{workdir.private} is deleted: keys, checkpoints, scores, reports. The released model can '
        f'still be sampled from: move {workdir.synthetic} away, and --stage=generate '
        'makes other images, with any --config.generate settings.'
    )
