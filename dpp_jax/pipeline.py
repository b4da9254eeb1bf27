"""The stages in order, what of them is done, and one gate before anything is spent.

How a command goes:
  1. Settings that are unset get values (derive.py). All are checked, and compared with those that the work
     directory was made with.
  2. The gate (gate.py) reads plan and ledger, and compares them with each other and with what was released.
  3. The stages that are not done run one after the other, each from what earlier ones left in the folder.
A command that was killed is given again: it goes on where the folder says.

Of several processes each runs all of this. Process 0 alone has the work directory; see `training/hosts.py`.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
from pathlib import Path
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from dpp_jax import build, derive, files, gate, planning, settings
from dpp_jax.data import sources
from dpp_jax.data.images import Images
from dpp_jax.diffusion.class_gaussians import ClassGaussians
from dpp_jax.gate import IMPORT, STAGES
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, SELECTION
from dpp_jax.privacy.shares import Share
from dpp_jax.run import artefacts, imported, statement, statement_text
from dpp_jax.run import plan as plan_lib
from dpp_jax.run.folder import WorkDir, flatten
from dpp_jax.run.keys import Keys, why_not_private
from dpp_jax.run.other_images import OtherImages
from dpp_jax.run.sizes import Sizes
from dpp_jax.stages import (
    central,
    clean,
    evaluate,
    export_checkpoint,
    finetune,
    generate,
    import_checkpoint,
    plan,
    pretrain,
    report,
)
from dpp_jax.stages.central import frequency, moments
from dpp_jax.stages.pretrain import generator
from dpp_jax.training import devices, hosts, preemption, progress

# What the others make stays in private/, but for a selection by private images.
_RELEASING = (IMPORT, 'central', 'pretrain', 'finetune', 'generate')


def run(config: ConfigDict, root: str | Path, stage: str, private: str | Path | None = None) -> None:
    """Run one stage, or all that are not done yet.

    Args:
        config: a resolved config, see configs/default.py.
        root: the work directory.
        stage: one of STAGES, 'import', 'plan', 'all', 'export' or 'clean'.
        private: where private/ is, if not in the work directory.

    Raises:
        ValueError, OSError: settings, data or work directory are not as they must be; nothing is spent.
    """
    if config.evaluate.images and stage != 'evaluate':
        raise ValueError(
            f"config.evaluate.images is {config.evaluate.images!r}; it must be '', because --stage is "
            f'{stage}: --stage=evaluate alone takes images of a file'
        )
    told = {'--stage': stage} | flatten(config.to_dict()) | statement.code_version()
    hosts.agree('commands and versions', told)
    workdir = WorkDir(root, private=private)
    why = why_not_private(config.seed)
    with files.noted(workdir.root, why) as note, files.noted(workdir.private, why):
        if note:
            print(f'{note}.\n')
        if stage == 'plan':
            hosts.at_first(lambda: planning.run(config, root, private))
        else:
            _run(config, workdir, stage)


def _run(config: ConfigDict, workdir: WorkDir, stage: str) -> None:
    """Check everything, open the work directory and run."""
    config = derive.settled(config, workdir, settings.check)
    settings.check(config)
    devices.check()
    if config.evaluate.images:
        _score_file(config, workdir)
        return
    all_settings = flatten(config.to_dict())
    model = build.model(config)
    images = artefacts.SyntheticImages(workdir, all_settings)
    in_order = gate.stages_of(config.imported.kind)
    stages = in_order if stage == 'all' else (stage,)
    _check_stage(stage, in_order)
    if not hosts.is_first():
        Run(config, workdir, model, images, None, []).run(stages)
        return
    gate.check_folder(config, workdir, images, stage)
    checkpoint = functools.cache(lambda: import_checkpoint.read(config, model))
    if IMPORT in stages and not gate.has_imported(config, workdir):
        checkpoint()  # its refusals, before anything is made
    with workdir.opened():
        # Again: another process may have worked here.
        changed = gate.check_folder(config, workdir, images, stage)
        found = gate.read(config, workdir, model, images, changed=changed)
        with progress.noted(workdir.progress):
            Run(config, workdir, model, images, found, changed, checkpoint).run(stages)


def _check_stage(stage: str, in_order: tuple[str, ...]) -> None:
    """Refuse a stage that this run does not have."""
    if stage in in_order or stage not in (IMPORT, *STAGES):
        return
    if stage == IMPORT:
        raise ValueError("config.imported.path is ''; it must name a checkpoint for --stage=import")
    raise ValueError(
        f'--stage={stage} is no stage of this run: config.imported.path takes its place. The stages are '
        f'{", ".join(in_order)}. Without it, use another --workdir'
    )


def _score_file(config: ConfigDict, workdir: WorkDir) -> None:
    """Score the images of a file as the run's own would be, beside them: no plan, no ledger, no release.

    Settings of the private images must be those of the folder, if it has any.
    """
    images, data = OtherImages(config.evaluate.images), config.data
    needs_classes = config.evaluate.classifiers and data.classes > 1
    shape = data.image_size, data.image_size, data.channels
    wanted = {'image_shape': shape, 'classes': data.classes, 'least': 2 if needs_classes else 0}
    name = hosts.from_first(lambda: images.read(**wanted))
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            workdir.check(flatten(config.to_dict()))
            stack.enter_context(workdir.opened())
            workdir.check(flatten(config.to_dict()))  # again: another process may have worked here
            stack.enter_context(progress.noted(workdir.progress))
        real, beside = RealImages(config, workdir), workdir.beside(name)
        real.check_images(has_evaluation=True)
        hosts.at_first(lambda: files.make_folder(beside.evaluation.parent, mode=0o700))
        evaluate.run(config, beside, real.keys, images=images, **real.for_scores)
        class_names = build.class_names(config)
        hosts.at_first(lambda: report.run_beside(config, beside, images=images, class_names=class_names))


class RealImages:
    """The private and the test images of a command, and the keys of its run; they are read when needed."""

    def __init__(self, config: ConfigDict, workdir: WorkDir):
        """`workdir`: whose images are not changed."""
        self.config, self.workdir = config, workdir
        self.keys = Keys(workdir.keys, config.seed)

    @functools.cached_property
    def train(self) -> Images:
        """The private images that this process has."""
        if hosts.count() > 1:
            self._check_files()
        found = self._images('train', rows=self.share.images if hosts.count() > 1 else None)
        gather = functools.partial(hosts.meet, 'the fingerprint', limit=hosts.PATIENT_SECONDS)
        self.workdir.check_fingerprint('train', found, gather=gather, at_first=hosts.from_first)
        if hosts.count() > 1:
            groups = '' if found.groups is None else files.digest([found.groups])
            hosts.agree('private images', {'number': found.total, 'groups': groups})
        return found

    def _check_files(self) -> None:
        """Check that all processes see the same files: their shares must be of one set."""
        data = self.config.data
        prepared = build.preparation(self.config)
        names = functools.partial(
            sources.identity, data.source, 'train', data_dir=data.dir, preparation=prepared
        )
        # Process 0 first: tensorflow-datasets may have to prepare the set.
        known = hosts.from_first(names)
        own = {f'file {number}': name for number, name in enumerate(known if hosts.is_first() else names())}
        hosts.meet('the look at the private images', limit=hosts.PATIENT_SECONDS)
        hosts.agree('files of the private images', own)

    @property
    def share(self) -> Share:
        """Whose gradients this process computes."""
        return Share(hosts.index(), hosts.count())

    @functools.cached_property
    def whole_train(self) -> Images:
        """All private images, also of other processes: what process 0 needs to train on them for scores."""
        if hosts.count() == 1:
            return self.train
        found = self._images('train')
        self.workdir.check_fingerprint('train', found)
        return found

    @functools.cached_property
    def test(self) -> Images:
        return self._images('test')

    def _images(self, split: str, rows: sources.AnyRows = None) -> Images:
        """Load images, which may have to be decoded; process 0 keeps them for the next start."""
        cache = self.workdir.decoded if hosts.is_first() else None
        with progress.counting(f'decoding {split}', 'file') as count:
            return build.images(self.config, split, rows=rows, cache=cache, progress=count)

    def check_images(self, has_evaluation: bool) -> None:
        """Find what is wrong with them, before anything is computed; say what an evaluation leaves out."""
        needs_test = has_evaluation and hosts.is_first()
        build.check_headers(self.config, ('train', 'test') if needs_test else ('train',))
        _ = self.train  # its checks
        if needs_test:
            for line in evaluate.left_out(self.config, len(self.test.images)):
                print(line)

    @property
    def for_scores(self) -> dict[str, Any]:
        """What an evaluation is given of them, with how classifiers are trained."""
        return {
            'share': self.train,
            'private': lambda: self.whole_train,
            'test': lambda: self.test,
            'settings': build.classifier_settings(self.config),
        }


class Run(RealImages):
    """The stages of one command and what they share."""

    def __init__(
        self,
        config,
        workdir,
        model,
        images,
        found: gate.Gate | None,
        changed: list[str],
        checkpoint: Callable[[], dict] | None = None,
    ):
        """`found` and `checkpoint` (what is imported) are of process 0; None in the others."""
        super().__init__(config, workdir)
        self.changed = changed  # settings of pre-training, which begins again
        self._checkpoint = checkpoint
        self._stages = gate.stages_of(config.imported.kind)
        self.model, self.images = model, images
        self.plan, self.ledger, self.done, self.released = gate.tell(config, model, found)
        self._stage = config, workdir, self.keys  # what every stage is given first

    def run(self, stages: tuple[str, ...]) -> None:
        """Run those of `stages` that are not done, and say what happens."""
        if stages in (('clean',), ('export',)):
            hosts.at_first(getattr(self, stages[0]))
            return
        todo = [stage for stage in stages if not self.done[stage]]
        if todo:
            print(f'{plan.text(self.config, self.plan)}\nruns           {", ".join(todo)}')
            self._check(todo)
            for warning in plan.warnings_of(self.config, self.plan):
                print(f'WARNING: {warning}.')
            hosts.at_first(lambda: self._record(todo))
            if {'pretrain', 'finetune', 'generate'} & set(todo):
                sizes = self._sizes  # settled before anything is spent
                if 'finetune' in todo:
                    sizes.check_devices()
                hosts.agree('sizes', dataclasses.asdict(sizes))  # processes run the same programs
            hosts.agree('plans', self.plan.figures())
        preemption.wait_for_steps()
        for stage in todo:
            hosts.check(f'the beginning of {stage}', hosts.PATIENT_SECONDS)
            start = time.monotonic()
            if stage in _RELEASING or (stage == 'evaluate' and self.plan.budget.of(SELECTION)):
                hosts.at_first(lambda stage=stage: statement.record_code(self.workdir, stage))
            self.import_() if stage == IMPORT else getattr(self, stage)()
            seconds = time.monotonic() - start
            hosts.at_first(lambda found=(stage, seconds): artefacts.add_seconds(self.workdir, *found))
            print(f'{stage}: done in {seconds:.1f} s', flush=True)
        if not todo:
            print(f'Everything is done in {self.workdir.root}: {", ".join(stages)}.')
        if stages[-1] == 'report' and hosts.is_first():
            print('\n' + self.workdir.report_text.read_text(encoding='utf-8'))

    def _record(self, todo: list[str]) -> None:
        """Bind the folder to settings and plan, and look at what the stages will read."""
        if self.changed:
            self.workdir.pretrain_again(flatten(self.config.to_dict()), self.changed)
        self.workdir.record(flatten(self.config.to_dict()))
        plan_lib.save(self.workdir.plan, self.plan)
        reading = ('generate',) if self.config.generate.moments_share else ()
        reading = reading if self.model.directions is None else ('finetune', 'generate')
        artefacts.check_inputs(self.workdir, self.model.shapes(), todo, more_read_moments=reading)
        artefacts.write_parameters(self.workdir, self.model)

    def _check(self, todo: list[str]) -> None:
        """Find everything that can be wrong, before any privacy is spent or anything is written."""
        earlier = self._stages[: self._stages.index(todo[0])]
        missing = [stage for stage in earlier if not self.done[stage]]
        # The report shows what is there; evaluation is not a condition.
        missing = [stage for stage in missing if (todo[0], stage) != ('report', 'evaluate')]
        if missing:
            raise ValueError(
                f'--stage={todo[0]} needs the output of --stage={missing[0]}, which is missing in '
                f'{self.workdir.root}. Run that stage first, or --stage=all'
            )
        if {'central', 'finetune', 'evaluate'} & set(todo):
            self.check_images(has_evaluation='evaluate' in todo)

    def import_(self) -> None:
        def take():
            import_checkpoint.run(
                self.config,
                self.workdir,
                self.ledger,
                self._write_statement,
                found=self._checkpoint(),
                declared=[part for part in self.plan.budget.releases if part.declared],
            )

        hosts.at_first(take)

    def central(self) -> None:
        budget = self.plan.budget
        shared = {'unit': self.plan.unit, 'share': self.share}
        with_names = {**shared, 'class_names': build.class_names(self.config)}
        if not self.released[CENTRAL_QUERY]:
            query, releases = build.query(self.config), budget.of(CENTRAL_QUERY)
            central.run(*self._private_stage, query=query, releases=releases, **with_names)
        if budget.of(MOMENTS) and not self.released[MOMENTS]:
            moments.run(
                *self._private_stage,
                query=build.moments_query(self.config),
                frequencies=build.frequencies(self.config),
                releases=budget.of(MOMENTS),
                **with_names,
            )
        if budget.of(FREQUENCY) and not self.released[FREQUENCY]:
            frequency.run(
                *self._private_stage,
                query=build.frequency_query(self.config),
                releases=budget.of(FREQUENCY),
                **shared,
            )

    def pretrain(self) -> None:
        if self.config.pretrain.frequency_steps:
            generator.run(
                *self._stage,
                generator=build.generator(self.config),
                embed=build.frequency_query(self.config).embed,
                class_names=build.class_names(self.config),
            )
        pretrain.run(
            *self._stage,
            model=self.model,
            augment=build.augmentation(self.config),
            sizes=self._sizes,
            total_steps=self.plan.pretrain_steps,
            drawings=build.drawings(self.config),
            gaussians=self._gaussians,
        )

    def finetune(self) -> None:
        releases = self.plan.budget.of(DP_SGD)
        unit, sizes = self.plan.unit, self._sizes
        finetune.run(
            *self._private_stage,
            releases=releases,
            unit=unit,
            model=self.model,
            sizes=sizes,
            share=self.share,
            gaussians=self._gaussians,
        )

    def generate(self) -> None:
        # The statement names the code of this stage.
        privacy = hosts.from_first(self._write_statement)
        generate.run(
            *self._stage,
            images=self.images,
            model=self.model,
            gaussians=self._gaussians,
            samplers=build.samplers(self.config),
            sizes=self._sizes,
            class_names=build.class_names(self.config),
            last_step=self.plan.budget.count(DP_SGD),
            privacy=privacy,
            drawing=build.drawings(self.config).get(MOMENTS),
        )

    def evaluate(self) -> None:
        releases, selection = self.plan.budget.of(SELECTION), None
        if releases is not None:
            selection = evaluate.PrivateSelection(
                query=build.selection(self.config),
                mechanism=releases.mechanism,
                images_per_group=self.plan.unit.images_per_group,
                ledger=self.ledger,
                before_release=self._write_statement_and_pages,
            )
        evaluate.run(*self._stage, images=self.images, **self.for_scores, selection=selection)
        hosts.at_first(self._say_scored)

    def _say_scored(self) -> None:
        scored = artefacts.Evaluation(self.workdir, flatten(self.config.to_dict())).scored
        print(
            f'Settings scored on real images in this folder so far: {len(scored)}. Not covered by ε: '
            f'{statement_text.CHOICE}.'
        )

    def report(self) -> None:
        class_names = build.class_names(self.config)

        def write():
            privacy = self._write_statement()
            report.run(
                self.config, self.workdir, images=self.images, class_names=class_names, privacy=privacy
            )

        hosts.at_first(write)

    def clean(self) -> None:
        def more():
            if self.model.directions is not None or self.config.generate.moments_share:
                artefacts.moments(self.workdir)

        clean.run(
            self.workdir,
            self.model,
            is_finished=self.done['finetune'],
            more=more,
            last=self._write_statement,
        )

    def export(self) -> None:
        steps = {'pretrain': self.plan.pretrain_steps, 'finetune': self.plan.budget.count(DP_SGD)}
        if self.config.imported.path and self.done[IMPORT]:
            steps[imported.KINDS[self.config.imported.kind]] = artefacts.imported_step(self.workdir)
        export_checkpoint.run(self.config, self.workdir, model=self.model, steps=steps)

    def _gaussians(self) -> ClassGaussians | None:
        """What the denoiser is around; the same bits in all processes."""
        if self.model.directions is None:
            return None
        return ClassGaussians(
            **hosts.from_first(lambda: build.gaussians(self.config, self.workdir)._asdict())
        )

    @property
    def _private_stage(self) -> tuple:
        """What a stage with a mechanism on the private images is given first."""
        return *self._stage, self.ledger, self.train, self._write_statement

    def _write_statement(self) -> dict:
        """Before what it covers: whatever is in release/, its statement is there too."""
        budget, derived = self.plan.budget, self.config.data.derived
        written = statement.of_ledger(
            self.workdir,
            self.ledger,
            budget,
            derived,
            kind=self.config.imported.kind,
            is_private=self.config.seed is None,
        )
        statement.write(self.workdir, written)
        return written

    def _write_statement_and_pages(self) -> None:
        names = build.class_names(self.config)
        generate.write_pages(self.workdir, self.images, names, self._write_statement())

    @functools.cached_property
    def _sizes(self) -> Sizes:
        """What is in work at once, settled for all trainings that are to come."""
        left = self.plan.noised_images(stage for stage in STAGES if not self.done[stage])
        settle = functools.partial(build.settled_images, self.config, self.model, self.workdir.sizes)

        def settle_here():
            with devices.limited_to(jax.local_device_count()):
                return settle(left // hosts.count())

        images = settle(left) if hosts.count() == 1 else hosts.from_first(settle_here)
        return build.sizes(self.config, self.model, images)
