"""Stage `evaluate`: synthetic images against real ones. No guarantee: results stay in private/.

But for one: where private images select among classifiers, their noisy scores are released (`utility`).
"""

from collections.abc import Callable
import functools

from ml_collections import ConfigDict

from dpp_jax.data.images import Images
from dpp_jax.evaluation import needs, trainer
from dpp_jax.run import artefacts
from dpp_jax.run.artefacts import Evaluation, SyntheticImages
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.keys import Keys
from dpp_jax.run.other_images import OtherImages
from dpp_jax.stages.evaluate import common, distances, utility
from dpp_jax.stages.evaluate.utility import PrivateSelection as PrivateSelection
from dpp_jax.training import hosts


def left_out(config: ConfigDict, test_images: int) -> list[str]:
    """Say, in a line each, what will be left out; public numbers decide it, before anything is spent.

    Raises:
        ValueError: a file that an evaluation needs is not there.
    """
    settings = config.evaluate
    lines = needs.left_out(
        classes=config.data.classes,
        test_images=test_images,
        fid=settings.fid,
        classifiers=len(settings.classifiers),
    )
    return [*distances.check(config), *lines]


def run(
    config: ConfigDict,
    workdir: WorkDir,
    keys: Keys,
    *,
    images: SyntheticImages | OtherImages,
    share: Images,
    private: Callable[[], Images],
    test: Callable[[], Images],
    settings: trainer.Settings,
    selection: PrivateSelection | None = None,
) -> None:
    """Compute distances to the real training images, and each classifier's accuracy on real test images.

    Results are written as they come, and what is there already is not computed again. Of several processes,
    all compute features; process 0 does the rest.

    Args:
        config: the settings.
        workdir: keeps the feature network.
        keys: of the run.
        images: the synthetic images, or others.
        share: the private images that this process has.
        private: gives all private images; called in process 0 alone, and so is `test`.
        test: gives real images that no training saw.
        settings: how classifiers are trained.
        selection: how private images select among them; None: they do not.
    """
    evaluation = Evaluation(workdir, flatten(config.to_dict()), images) if hosts.is_first() else None
    hosts.at_first(lambda: evaluation.begin())
    own = share.images, share.labels
    read = functools.cache(lambda: common.in_memory(private, share))

    def use():
        utility.run(
            config,
            workdir,
            keys,
            evaluation=evaluation,
            images=images,
            private=read,
            test=test,
            settings=settings,
            selection=selection,
        )

    if selection is not None:
        # Before all that looks at private images without noise: a failure there must not decide whether the
        # selection is released.
        hosts.at_first(use)
    hosts.at_first(lambda: artefacts.keep_real_images(workdir, *own, config.data.classes))
    distances.run(
        config, workdir, keys, evaluation=evaluation, images=images, share=share, private=read, test=test
    )
    if selection is None:
        hosts.at_first(use)
