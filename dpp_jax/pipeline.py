"""The stages in order, and the only place where names in a config become objects."""

from collections.abc import Callable
import functools
from pathlib import Path
import shutil
import sys
import time

from clu import parameter_overview
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dpp_jax.data import augment, sources
from dpp_jax.diffusion import denoiser, sampler, unet
from dpp_jax.diffusion.model import Model
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.run import folder as workdir_lib
from dpp_jax.run import sizes, statement
from dpp_jax.stages import central, evaluate, finetune, generate, plan, pretrain, report
from dpp_jax.training import checkpoint

STAGES = ('central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report')
CHOICES = ('plan', *STAGES, 'all', 'clean')


def run(config: ConfigDict, root: str | Path, stage: str) -> None:
    """Run one stage, or all that are not done yet.

    Args:
        config: a resolved config, see configs/default.py.
        root: the work directory.
        stage: one of CHOICES.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a setting, the data or the work directory
            is not as it must be; raised before any privacy is spent.
    """
    plan.check(config)
    if jax.process_count() > 1:
        raise ValueError(
            f'{jax.process_count()} processes run together; the files of a run, its ledger among '
            'them, are written by one process: use one, with all devices of its host'
        )
    model = make_model(config)
    # Settings of later stages are checked before anything starts.
    make_augmentation(config)
    for settings in (config.generate.sampler, config.generate.classifier_sampler):
        make_sampler(settings, config.data.classes)
    workdir = workdir_lib.WorkDir(root)
    workdir.check(config)
    if stage in ('plan', 'generate', 'evaluate', 'report', 'all'):
        generate.check(config, workdir)
    if stage == 'plan':
        show_plan(config, workdir, model)
        return
    with workdir.opened():
        run = Run(config, workdir, model)
        if stage == 'clean':
            run.clean()
        else:
            run.run(STAGES if stage == 'all' else (stage,))


def show_plan(config: ConfigDict, workdir: workdir_lib.WorkDir, model: Model) -> None:
    """Print what would be run and spent, and draw what another budget for the query would do."""
    planned, finished = plan.load(config, model, workdir), done(config, workdir)
    check_ledger(config, workdir, planned, finished)
    foreseen = statement.make(plan.entries(planned, config), **statement_settings(config))
    print(plan.text(planned, config, finished))
    print('\nThe statement of such a run:\n\n' + statement.markdown(foreseen))
    if config.pretrain.enabled:
        from dpp_jax.run import plan_curve  # imports matplotlib, which nothing else needs

        path = workdir.root / 'plan.png'
        picture = plan_curve.draw(config, planned)
        try:
            workdir_lib.write_bytes(path, picture)
            print(f"Fine-tuning's noise against the query's share of ε: {path}")
        except OSError as error:  # all that matters was printed
            print(f'dpp-jax: {path} was not drawn ({error}); --workdir cannot be written', file=sys.stderr)


def done(config: ConfigDict, workdir: workdir_lib.WorkDir) -> dict[str, bool]:
    """Which stages have nothing left to do."""
    needs_query = config.pretrain.enabled
    return {
        'central': not needs_query or central.is_done(workdir),
        'pretrain': not needs_query or pretrain.is_done(workdir),
        'finetune': finetune.is_done(workdir),
        'generate': generate.is_done(config, workdir),
        'evaluate': evaluate.is_done(config, workdir),
        'report': report.is_done(config, workdir),
    }


def check_ledger(
    config: ConfigDict,
    workdir: workdir_lib.WorkDir,
    planned: plan.Plan,
    finished: dict[str, bool],
) -> None:
    """Raise a ValueError if the ledger does not fit the plan or what is known to have been released."""
    resumed = checkpoint.latest_training(workdir.private / 'resume' / 'finetune')
    steps = resumed[0] if resumed else 0
    made = {
        'central_query': planned.query_count if finished['central'] else 0,
        'dp_sgd': planned.steps if finished['finetune'] else steps,
    }
    ledger = ledger_lib.Ledger(workdir.release / 'ledger.jsonl', read_only=True)
    plan.check_ledger(planned, config, ledger, made)
    for stage, mechanism, count in (
        ('central', 'central_query', planned.query_count),
        ('finetune', 'dp_sgd', planned.steps),
    ):
        is_stated = count > 0 and statement.stated(workdir, mechanism) == count
        if not finished[stage] and is_stated and not workdir.may_repeat(mechanism):
            raise ValueError(
                f'what --stage={stage} writes to {workdir.release} was released, or was about to be, as '
                'the privacy statement says, and is not there. private/keys.json does not tell what it '
                'was: made again, on other devices or with other versions, it could be a second release '
                'under the same noise. Restore it, or use another --workdir'
            )


class Run:
    """A work directory with what its stages share; private images are read when first needed."""

    def __init__(self, config: ConfigDict, workdir: workdir_lib.WorkDir, model: Model):
        self.config = config
        self.workdir = workdir
        self.model = model

    @functools.cached_property
    def ledger(self) -> ledger_lib.Ledger:
        return ledger_lib.Ledger(self.workdir.release / 'ledger.jsonl')

    @functools.cached_property
    def plan(self) -> plan.Plan:
        return plan.load(self.config, self.model, self.workdir)

    @functools.cached_property
    def train_images(self) -> sources.Images:
        images = load_images(self.config, 'train')
        self.workdir.check_fingerprint('train', images.images, images.labels)
        return images

    @functools.cached_property
    def test_images(self) -> sources.Images:
        return load_images(self.config, 'test')

    def run(self, stages: tuple[str, ...]) -> None:
        """Run those of `stages` that are not done, and say what happens."""
        finished = done(self.config, self.workdir)
        todo = [stage for stage in stages if not finished[stage]]
        if todo:
            print(plan.text(self.plan, self.config, {stage: finished[stage] for stage in stages}))
            self._check(todo, finished)
            self.workdir.record(self.config)
            plan.save(self.plan, self.workdir)
            self._write_parameters()
            if {'pretrain', 'finetune', 'generate'} & set(todo):
                self._settle_sizes(finished)
        else:
            self._check_ledger(finished)
        for stage in todo:
            start = time.monotonic()
            statement.record_code(self.workdir, stage)
            getattr(self, stage)()
            print(f'{stage}: done in {time.monotonic() - start:.1f} s', flush=True)
        if not todo:
            print(f'Everything is done in {self.workdir.root}: {", ".join(stages)}.')
        if stages[-1] == 'report':
            print('\n' + (self.workdir.private / 'report.txt').read_text())

    def _settle_sizes(self, finished: dict[str, bool]) -> None:
        """For all that is to come, also where stages are run one by one."""
        noised_images = {
            'pretrain': self.plan.pretrain_noised_images,
            'finetune': self.plan.finetune_noised_images,
        }
        left = sum(number for stage, number in noised_images.items() if not finished[stage])
        self.config = sizes.settle(self.config, self.model, self.workdir, left)

    def clean(self) -> None:
        """Delete private/; what is in release/ can be sampled from and published."""
        if not finetune.is_done(self.workdir):
            raise ValueError(
                f'--stage=clean would delete what {self.workdir.root} needs to go on: its keys and '
                'checkpoints. Finish with --stage=finetune first, or delete the whole folder'
            )
        try:
            generate.load_weights(self.workdir, self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f'--stage=clean deleted nothing, because {self.workdir.private} holds what a whole model '
                f'can be made from, and {error}'
            ) from error
        self._check_ledger(done(self.config, self.workdir))
        statement.write(self.workdir, self._statement())
        shutil.rmtree(self.workdir.private)
        print(
            f'{self.workdir.private} is deleted: keys, checkpoints, scores, reports. The released model can '
            f'still be sampled from: move {self.workdir.release / "synthetic"} away, and --stage=generate '
            'makes other images, with any --config.generate settings.'
        )

    def _check(self, todo: list[str], finished: dict[str, bool]) -> None:
        """Everything that can be wrong, before any privacy is spent or anything is written."""
        self._check_order(todo[0], finished)
        folders = []
        for part in ('pretrain', 'finetune'):
            folders.append(self.workdir.release / 'model' / part)
            resumed = checkpoint.latest_training(self.workdir.private / 'resume' / part)
            folders += [resumed[1]] if resumed else []
        shapes = self.model.shapes()
        for folder in folders:
            if folder.exists():
                checkpoint.check_params(folder, shapes)
        self._check_ledger(finished)
        if {'central', 'finetune', 'evaluate'} & set(todo):
            images = self.train_images
            if 'evaluate' in todo and self.config.evaluate.fid:
                fewest = np.bincount(images.labels, minlength=self.config.data.classes).min()
                if fewest < 2:
                    raise ValueError(
                        f'config.evaluate.fid is True; a class of {self.config.data.source} has '
                        f'{fewest} image, and the features of FID are trained on at least 2 of each. '
                        'Set config.evaluate.fid=False'
                    )
        if 'evaluate' in todo:
            self.test_images

    def _check_ledger(self, finished: dict[str, bool]) -> None:
        check_ledger(self.config, self.workdir, self.plan, finished)

    def _statement(self) -> dict:
        return statement.make(
            self.ledger.entries,
            code_of_stages=statement.codes(self.workdir),
            **statement_settings(self.config),
        )

    def _write_statement(self) -> None:
        """Before what it covers: whatever is in release/, its statement is there too."""
        statement.write(self.workdir, self._statement())

    def central(self) -> None:
        images = self.train_images
        central.run(
            self.config,
            self.workdir,
            self.ledger,
            self.plan.query_noise_multiplier,
            images.images,
            images.labels,
            before_release=self._write_statement,
        )

    def pretrain(self) -> None:
        augmentation = make_augmentation(self.config)
        pretrain.run(self.config, self.workdir, self.model, augmentation, self.plan.pretrain_steps)

    def finetune(self) -> None:
        images = self.train_images
        finetune.run(
            self.config,
            self.workdir,
            self.ledger,
            self.plan,
            self.model,
            images.images,
            images.labels,
            before_release=self._write_statement,
        )

    def generate(self) -> None:
        settings, classes = self.config.generate, self.config.data.classes
        samplers = {
            'images': make_sampler(settings.sampler, classes),
            'classifier_images': make_sampler(settings.classifier_sampler, classes),
        }
        generate.run(self.config, self.workdir, self.model, samplers)

    def evaluate(self) -> None:
        evaluate.run(self.config, self.workdir, self.train_images, self.test_images)

    def report(self) -> None:
        privacy = self._statement()
        statement.write(self.workdir, privacy)
        report.run(self.config, self.workdir, privacy)

    def _write_parameters(self) -> None:
        """clu's overview of the network, for people."""
        overview = parameter_overview.get_parameter_overview(self.model.shapes(), include_stats=False)
        path = self.workdir.release / 'parameters.txt'
        workdir_lib.write_text(path, overview + '\n')
        print(f'parameters     overview in {path}\n', flush=True)

    def _check_order(self, stage: str, finished: dict[str, bool]) -> None:
        """A stage reads what earlier ones wrote."""
        missing = [name for name in STAGES[: STAGES.index(stage)] if not finished[name]]
        # The report shows what is there; evaluation is not a condition.
        missing = [name for name in missing if not (stage == 'report' and name == 'evaluate')]
        if missing:
            raise ValueError(
                f'--stage={stage} needs what --stage={missing[0]} writes to '
                f'{self.workdir.root}; run that first, or --stage=all'
            )


def statement_settings(config: ConfigDict) -> dict:
    """What of a config the privacy statement needs."""
    return {
        'delta': config.dp.delta,
        'accountant': config.dp.accountant,
        'budget': config.dp.epsilon,
    }


def load_images(config: ConfigDict, split: str) -> sources.Images:
    """The real images of one split ('train' is the private set), checked against the config."""
    data = config.data
    images = sources.load(
        data.source,
        split,
        data_dir=data.dir,
        average_down=data.average_down,
        classes=data.classes,
    )
    wanted = (data.image_size, data.image_size, data.channels)
    if images.images.shape[1:] != wanted:
        raise ValueError(
            f'config.data.image_size and data.channels say {wanted}; the images of '
            f'{data.source} are {images.images.shape[1:]} after average_down={data.average_down}'
        )
    if split == 'train' and len(images.images) != data.train_images:
        raise ValueError(
            f'config.data.train_images is {data.train_images}; {data.source} has '
            f'{len(images.images)}. The privacy of the run is computed from this number: set it '
            'to the number of private images'
        )
    return images


def make_model(config: ConfigDict) -> Model:
    """Network, denoiser and loss by their names."""
    data, settings = config.data, config.model
    network = unet.UNet(
        image_channels=data.channels,
        classes=data.classes,
        width=settings.width,
        multipliers=tuple(settings.multipliers),
        blocks=settings.blocks,
        attention_resolutions=tuple(settings.attention_resolutions),
        dtype=jnp.dtype(settings.dtype),
    )
    return Model(
        network=network,
        image_shape=(data.image_size, data.image_size, data.channels),
        classes=data.classes,
        kind=denoiser.make_kind(settings.denoiser),
    )


def make_augmentation(config: ConfigDict) -> Callable:
    """(key, image) → image for pre-training."""
    settings = config.pretrain
    return augment.make_augmentation(
        settings.augmentation, **settings.get(settings.augmentation, ConfigDict())
    )


def make_sampler(settings: ConfigDict, classes: int) -> Callable:
    """(denoise, z (n, H, W, C) unit normal, label (n,), noise=) → images in [-1, 1]."""
    return sampler.make_sampler(no_class=classes, **settings)
