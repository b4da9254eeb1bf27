"""Both frameworks fine-tune the same weights on the same images, with the same noise: what comes out.

How it goes: central images and pre-training run once, in the package. From the weights that they give, each
framework takes the plan's DP-SGD steps, once for each seed. A seed gives both the same Poisson samples;
noise, noise levels and label dropout are each framework's own random numbers. Images are sampled by each
framework from its averaged weights. One feature network and one kind of classifier, with the same keys, judge
both.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from pathlib import Path
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import optax
from scipy import stats
import torch

from dpp_jax import build, pipeline
from dpp_jax.data.images import Images
from dpp_jax.diffusion.model import Model
from dpp_jax.evaluation import classifiers, features, fid, trainer
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import DP_SGD
from dpp_jax.privacy.mechanism import NOISE_KEYS, GaussianMechanism, NoiseKey
from dpp_jax.run import artefacts
from dpp_jax.run import plan as plan_lib
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import generate
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib
from scripts.compare import pytorch_port as port
from scripts.compare import pytorch_private as private

PyTree = Any
OURS, THEIRS = 'dpp_jax', 'PyTorch'
_FORM = 'Opacus, hooks that sum draws'  # for small images; it changes rounding only
_IMAGES_AT_ONCE = 64
# Below this p the means differ: of equal ones, one pair in a hundred seems to.
_P = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training.

    Attributes:
        side: `OURS` or `THEIRS`.
        seed: of the batches.
        losses: mean loss of every step's images.
        fid: to the real test images.
        accuracy: on the real test images, kind of classifier → share.
    """

    side: str
    seed: int
    losses: tuple[float, ...]
    fid: float
    accuracy: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What both train.

    Attributes:
        config: the settings.
        params: the weights that both begin with.
        private, test: real images.
        steps: DP-SGD steps.
    """

    config: ConfigDict
    params: PyTree
    private: Images
    test: Images
    steps: int = 0

    @functools.cached_property
    def model(self) -> Model:
        return build.model(self.config)

    @functools.cached_property
    def plan(self) -> plan_lib.Plan:
        return build.plan(self.config, self.model)

    @property
    def mechanism(self) -> GaussianMechanism:
        return self.plan.budget.of(DP_SGD).mechanism

    def sampler(self, seed: int) -> poisson.PoissonSampler:
        q = self.mechanism.sampling_probability
        return poisson.PoissonSampler(size=len(self.private.images), probability=q, key=seed)


def make_task(config: ConfigDict, params: PyTree | None = None, most_steps: int | None = None) -> Task:
    """Pre-train once, or take the weights given.

    Args:
        config: the settings; its seed is set.
        params: to begin with; None: those that pre-training gives.
        most_steps: of fine-tuning; None: as planned.
    """
    config = config.copy_and_resolve_references()
    config.seed = 1
    if params is None:
        with tempfile.TemporaryDirectory() as folder:
            pipeline.run(config, Path(folder), 'central')
            pipeline.run(config, Path(folder), 'pretrain')
            params = artefacts.weights(WorkDir(folder), 'pretrain', build.model(config).shapes())['params']
            params = jax.tree.map(np.asarray, params)
    task = Task(config, params, build.images(config, 'train'), build.images(config, 'test'))
    planned = task.plan.budget.count(DP_SGD)
    return dataclasses.replace(task, steps=min(planned, most_steps or planned))


def train_ours(task: Task, seed: int) -> tuple[PyTree, list[float]]:
    """Return averaged weights, and the loss of each step."""
    settings, sampler, sizes = task.config.finetune, task.sampler(seed), build.sizes(task.config, task.model)
    optimizer = optax.adam(settings.learning_rate)
    capacity = sampler.capacity(sizes.microbatch * devices.count())
    keys = jax.random.split(jax.random.key(seed), NOISE_KEYS)
    step = steps.make_dp_step(
        task.model.example_loss(
            draws=settings.draws, label_dropout=settings.label_dropout, draws_at_once=sizes.draws
        ),
        optimizer,
        task.mechanism,
        NoiseKey(identifier='comparison', keys=keys),
        expected_batch_size=task.plan.expected_batch_size,
        rows=capacity,
        microbatch=sizes.microbatch,
        ema_decay=settings.ema_decay,
    )
    state = devices.replicate(state_lib.create(task.params, optimizer))
    found = []
    for number in range(task.steps):
        indices = sampler.indices(number)
        batch = steps.make_batch(task.private.images, task.private.labels, indices, capacity)
        used = steps.used_microbatches(len(indices), sizes.microbatch)
        (state, metrics), _ = step(number, state, devices.deal(batch), used)
        # Waits for the step, as the program's loop does: with all of them in flight, one run never ended.
        found.append(float(devices.first(metrics['loss'])))
    return devices.first(state).weights()['ema_params'], found


def train_theirs(task: Task, seed: int) -> tuple[port.UNet, list[float]]:
    """Return a network with the averaged weights, and the loss of each step."""
    torch.manual_seed(seed)
    settings, sampler, device = task.config.finetune, task.sampler(seed), torch_device()
    network = port.make_network(task.model, task.params).to(device)
    step = private.FORMS[_FORM](
        network,
        draws=settings.draws,
        clip_norm=task.mechanism.sensitivity,
        noise_multiplier=task.mechanism.noise_multiplier,
        expected_batch_size=task.plan.expected_batch_size,
        learning_rate=settings.learning_rate,
        kind=task.config.model.denoiser,
    )
    average, found = port.Average(network, settings.ema_decay), []
    for number in range(task.steps):
        indices = sampler.indices(number)
        images = port.to_torch(task.private.images[indices].astype(np.float32) / 127.5 - 1, device)
        labels = torch.tensor(task.private.labels[indices]).long().to(device)
        rows = port.draw(
            images, labels, settings.draws, settings.label_dropout, task.model.classes,
            task.config.model.denoiser,
        )  # fmt: skip
        found.append(step.step(rows, _IMAGES_AT_ONCE))
        average.update(network)
    losses = [float(loss) for loss in found]
    average.copy_to(network)
    return step.module.to_standard_module(), losses


def torch_device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def sample_ours(task: Task, params: PyTree, seed: int, number: int) -> np.ndarray:
    """uint8 (number, H, W, C), labels in turn."""
    at_once = build.sizes(task.config, task.model).images
    sample = generate.sample_function(task.model, build.samplers(task.config)['images'], at_once)
    return generate.sample_images(
        sample,
        (devices.replicate(params), None),
        jax.random.key(1000 + seed),
        np.arange(number),
        batch_size=task.config.generate.batch_size,
        at_once=at_once,
    )


@torch.no_grad()
def sample_theirs(task: Task, network: port.UNet, seed: int, number: int) -> np.ndarray:
    """The same by the port."""
    torch.manual_seed(1000 + seed)
    settings, device, size = task.config.generate.sampler, torch_device(), 256
    network.eval()
    denoise = port.guided(
        port.denoiser(network, task.config.model.denoiser), settings.guidance, task.model.classes
    )
    height, width, channels = task.model.image_shape
    found = []
    for first in range(0, number, size):
        labels = torch.arange(first, min(first + size, number), device=device) % task.model.classes
        z = torch.randn(len(labels), channels, height, width, device=device)
        found.append(
            port.to_pixels(
                port.SAMPLERS[settings.name](
                    denoise,
                    z.contiguous(memory_format=torch.channels_last),
                    labels,
                    port.sigma_steps(settings.steps, settings.t_min, settings.t_max, settings.rho),
                    noise=lambda i, z=z: torch.randn_like(z),
                    s_churn=settings.s_churn,
                    s_min=settings.s_min,
                    s_max=settings.s_max,
                    s_noise=settings.s_noise,
                )
            )
        )
    return np.concatenate(found)


class Judge:
    """Scores synthetic images of both sides with the same feature network and the same training keys."""

    def __init__(self, task: Task):
        self.config, self.test = task.config.evaluate, task.test
        self.classes = task.model.classes
        self.network = features.train_feature_network(
            task.private.images,
            task.private.labels,
            classes=self.classes,
            key=jax.random.key(7),
            epochs=self.config.feature_epochs,
        )
        self.real = fid.moments([self.network.features(task.test.images)])

    def score(self, images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, dict[str, float]]:
        """FID to the real test images, and accuracy on them of each kind of classifier."""
        distance = fid.frechet_distance(*self.real, *fid.moments([self.network.features(images)]))
        settings = trainer.Settings(
            epochs=self.config.epochs,
            batch_size=self.config.batch_size,
            learning_rate=self.config.learning_rate,
            ema_decay=self.config.ema_decay,
            held_out=self.config.held_out,
        )
        accuracy = {}
        for name in self.config.classifiers:
            key = jax.random.key(seed)
            trained = classifiers.train_classifier(
                name, images, labels, classes=self.classes, key=key, settings=settings
            )
            accuracy[name] = classifiers.accuracy(trained, self.test.images, self.test.labels)
        return distance, accuracy


def run(task: Task, seeds: int, images: int, tell: Callable[[str], None]) -> list[Outcome]:
    """Train, sample and judge on both sides for every seed.

    Args:
        task: what is trained.
        seeds: how many; each is one training on either side.
        images: synthetic images of each training.
        tell: is told what comes next.
    """
    judge, found = Judge(task), []
    labels = generate.image_labels(np.arange(images), task.model.classes)
    for seed in range(seeds):
        for side, train, sample in (
            (OURS, train_ours, sample_ours),
            (THEIRS, train_theirs, sample_theirs),
        ):
            tell(f'training, seed {seed + 1} of {seeds}: {side}')
            trained, losses = train(task, seed)
            distance, accuracy = judge.score(sample(task, trained, seed, images), labels, seed)
            found.append(
                Outcome(
                    side=side,
                    seed=seed,
                    losses=tuple(losses),
                    fid=distance,
                    accuracy=accuracy,
                )  # fmt: skip
            )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A score of both sides over the seeds.

    Attributes:
        name: of the score.
        ours, theirs: of every seed.
        difference: of the means, ours - theirs.
        error: standard error of the difference; NaN with one seed.
    """

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def difference(self) -> float:
        return float(np.mean(self.ours) - np.mean(self.theirs))

    @property
    def error(self) -> float:
        if len(self.ours) < 2:
            return math.nan
        return math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in (self.ours, self.theirs)))

    @property
    def p_value(self) -> float | None:
        """Of Welch's t-test, that equal means are so far apart; None with one seed or without a spread."""
        if not self.error > 0:
            return None
        return float(stats.ttest_ind(self.ours, self.theirs, equal_var=False).pvalue)

    @property
    def verdict(self) -> str:
        """Equal as far as the seeds can tell, or not."""
        if self.p_value is None:
            return 'no spread: no verdict'
        return 'equal within the spread' if self.p_value >= _P else 'differs by more than the spread'

    def figures(self) -> dict[str, Any]:
        """Return all of it as JSON takes it."""
        error = self.error if math.isfinite(self.error) else None
        own = {'difference': self.difference, 'error': error, 'p_value': self.p_value}
        return dataclasses.asdict(self) | own | {'verdict': self.verdict}


def rows(outcomes: list[Outcome]) -> list[Row]:
    """Return last losses, FID and accuracies, each over all seeds."""

    def row(name, value):
        of = lambda side: tuple(value(each) for each in outcomes if each.side == side)
        return Row(name=name, ours=of(OURS), theirs=of(THEIRS))

    found = [
        row(
            'loss, mean of the last fifth', lambda each: float(np.mean(each.losses[-len(each.losses) // 5 :]))
        ),
        row('FID (small CNN)', lambda each: each.fid),
    ]
    for name in outcomes[0].accuracy:
        title = f'accuracy %, {classifiers.CLASSIFIERS[name].title}'
        found.append(row(title, lambda each, name=name: 100 * each.accuracy[name]))
    return found
