"""The benchmark's second table: everything of a run that is not the training step alone.

Called by `python -m scripts.benchmark --parts`. All of it runs on random images of the config's shape, in
turns:
- rates: the central query, pre-training and its augmentation, generation, the CNN's epoch;
- shares: of the step's time that augmentation takes, of the forward pass's throughput that generation
  keeps, and of the training loop's time that is not lost to input, logging and checkpoints;
- start: from the start of the process to the end of the first step of fine-tuning.
"""

import dataclasses
import math
from pathlib import Path
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpp_jax import build
from dpp_jax.data import resize
from dpp_jax.evaluation import networks, trainer
from dpp_jax.privacy import ledger as ledger_lib
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.privacy.mechanism import NOISE_KEYS, GaussianMechanism, NoiseKey
from dpp_jax.stages import generate
from dpp_jax.training import checkpoint, devices, loop, steps, tensorboard
from dpp_jax.training import state as state_lib
from scripts.benchmark import start, timing

_QUERY_IMAGES = 10_000
_SAMPLER_STEPS = 6
_CLASSIFIER_IMAGES = 2048
_PRIVATE_IMAGES = 60_000  # at most; a larger set takes memory and shows nothing else
# Steps of the training loop that are timed in a turn, and how long one should take. It takes minutes in a
# real run: what cannot be hidden behind a second cannot be seen there.
_LOOP_STEPS = 10
_STEP_SECONDS = 1.0


@dataclasses.dataclass
class Work:
    """A call and how much it gets done."""

    contender: timing.Contender
    amount: float
    unit: str

    @property
    def rate(self) -> float:
        return self.amount / self.contender.median


def measure(
    config, model, sizes, *, noised_per_second: float, repeats: int, turn_seconds: float, starts: int
) -> dict:
    """All figures, by the names of the module's text; shares with their targets (None: none).

    Args:
        config: with all that the command line changed.
        model: the config's.
        sizes: what is in work at once.
        noised_per_second: of the DP step, from which the length of the loop's steps follows.
        repeats: turns that count.
        turn_seconds: of each part in each turn, at least.
        starts: processes to start with an empty cache, and again with a full one.
    """
    batch = math.ceil(_STEP_SECONDS * noised_per_second / config.finetune.draws)
    batch = min(config.finetune.batch_size, max(4, batch))
    params = model.init(jax.random.key(0))
    works = {
        'query': central_query(config),
        'pretrain': pretraining(config, model, sizes, params),
        'augment': augmentation(config),
        'generate': generation(config, model, sizes, params),
        'forward': forward_pass(config, model, sizes, params),
        'classifier': classifier_epoch(config),
    }
    timing.measure([work.contender for work in works.values()], repeats, turn_seconds)
    in_loop = TrainingLoop(config, model, sizes, params, batch).measure(repeats)
    cost = lambda name: works[name].contender.median / works[name].amount
    per_image = config.pretrain.draws * cost('pretrain')
    report = {
        'rates': [
            {'name': work.contender.title, 'rate': work.rate, 'unit': work.unit,
             'seconds': work.contender.seconds}
            for work in works.values()
        ],
        'shares': [
            share('augmentation, of the pre-training step', cost('augment') / per_image, None),
            share('generation, of the forward pass', cost('forward') / cost('generate'), 0.9),
            share("the loop's work hidden, of its time", in_loop['hidden'], 0.97),
            share('the same, with checkpoints', in_loop['with_checkpoints'], 0.97),
        ],
        'loop': in_loop,
    }  # fmt: skip
    if starts:
        report['start'] = start.measure(config, random_images(config, _private_images(config)), batch, starts)
    return report


def share(name: str, value: float, target: float | None) -> dict:
    return {'name': name, 'share': value, 'target': target}


def text(report: dict) -> str:
    """The figures as tables."""
    lines = [f'{"":42}{"per second":>12}']
    lines += [f'{row["name"]:42}{row["rate"]:12,.1f} {row["unit"]}' for row in report['rates']]
    lines += ['', f'{"":42}{"share":>12}']
    for row in report['shares']:
        target = '' if row['target'] is None else f' (at least {row["target"]:.0%})'
        lines.append(f'{row["name"]:42}{row["share"]:12.1%}{target}')
    if 'start' in report:
        lines += ['', f'{"start to first fine-tuning step":42}{"seconds":>12}']
        lines += [
            f'{name:42}{statistics.median(report["start"][key]):12.1f}'
            for name, key in (('cold', 'cold'), ('with the compile cache', 'cached'))
        ]
    return '\n'.join(lines)


def random_images(config, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images of the config's shape, and their labels, of all classes in turn."""
    data = config.data
    shape = (count, data.image_size, data.image_size, data.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return images, generate.image_labels(np.arange(count), data.classes)


def _private_images(config) -> int:
    return min(_PRIVATE_IMAGES, config.data.train_images)


def central_query(config) -> Work:
    """One query of all images, as the stage asks it; without reading them from the disk."""
    count = min(_QUERY_IMAGES, config.data.train_images)
    images, labels = random_images(config, count)
    small = np.ascontiguousarray(resize.nearest(images, config.query.downsample))
    query = build.query(config)
    mechanism = GaussianMechanism(
        name=CENTRAL_QUERY,
        noise_multiplier=config.query.noise_multiplier,
        sampling_probability=config.query.sampling_probability,
        sensitivity=query.sensitivity,
    )
    keys = jax.random.split(jax.random.key(0), NOISE_KEYS)
    ask = query.noisy(mechanism, NoiseKey(identifier='benchmark', keys=keys), float(count), count)
    batch = {'images': small, 'labels': labels}
    arguments = batch, np.ones(count, bool), keys, np.int32(0)
    contender = timing.compiled('central query', ask.program, *arguments)
    return Work(contender, count, 'images')


def _pretrain_batch(config) -> int:
    """Images per step."""
    return min(config.pretrain.batch_size, config.query.queries * config.data.classes)


def pretraining(config, model, sizes, params) -> Work:
    """The step of the stage, on a batch that is ready."""
    settings, size = config.pretrain, _pretrain_batch(config)
    optimizer = optax.adam(settings.learning_rate)
    step = steps.make_pretrain_step(
        model.drawing(draws=settings.draws, label_dropout=settings.label_dropout),
        model.errors,
        optimizer,
        augment=build.augmentation(config),
        ema_decay=settings.ema_decay,
        images_at_once=sizes.images,
    )
    state = devices.replicate(state_lib.create(params, optimizer))
    capacity = math.ceil(size / devices.count()) * devices.count()
    batch = devices.deal(steps.make_batch(*random_images(config, size), np.arange(size), capacity))
    contender = timing.donating('pre-training step', step, state, batch, jax.random.key(1))
    return Work(contender, size * settings.draws, 'noised images')


def augmentation(config) -> Work:
    """Of one batch, as the step does it."""
    size = _pretrain_batch(config)
    augment = jax.jit(jax.vmap(build.augmentation(config)))
    pixels = random_images(config, size)[0].astype(np.float32)
    keys = jax.random.split(jax.random.key(0), size)
    contender = timing.compiled('augmentation alone', augment, keys, pixels)
    return Work(contender, size, 'images')


def generation(config, model, sizes, params) -> Work:
    """One group of images through a short sampler."""
    config = config.copy_and_resolve_references()
    settings = config.generate.sampler
    settings.steps = _SAMPLER_STEPS
    sampler = build.samplers(config)['images']
    at_once = _images_at_once(settings, sizes)
    images = at_once * devices.count()
    contender = timing.compiled(
        f'generation ({settings.name})',
        generate.sample_function(model, sampler, at_once),
        (devices.replicate(params), None),
        devices.deal(np.arange(images, dtype=np.int32)),
        jax.random.key(1),
    )
    return Work(contender, _evaluations(settings) * images, 'images x network evaluations')


def _images_at_once(settings, sizes) -> int:
    """On a device, as the stage has it: with guidance the network takes each image twice."""
    return max(1, sizes.images // 2) if settings.guidance else sizes.images


def _evaluations(settings) -> int:
    """Of the network, per image."""
    of_steps = _SAMPLER_STEPS if settings.name == 'ddim' else 2 * _SAMPLER_STEPS - 1
    return of_steps * (2 if settings.guidance else 1)


def forward_pass(config, model, sizes, params) -> Work:
    """The denoiser alone, again and again, on as many images at once as generation gives it."""
    settings = config.generate.sampler
    at_once = _images_at_once(settings, sizes)
    rows = at_once * (2 if settings.guidance else 1)
    on_every_device = (len(devices.local()), rows)

    def denoise(params, x):
        return model.denoiser(params)(x, jnp.full(rows, 0.1), jnp.zeros(rows, jnp.int32))

    params = devices.replicate(params)
    x = np.random.default_rng(1).standard_normal(on_every_device + model.image_shape, np.float32)
    program = devices.parallel(denoise, in_axes=(0, 0))
    x = program(params, x)  # compiles; from now on it lies where it is needed
    # As many evaluations as generation makes, so that both are timed over the same span.
    evaluations = _evaluations(settings) * at_once // rows

    def call():
        image = x
        for _ in range(evaluations):  # each waits for the last, as in a sampler
            image = program(params, image)
        return image

    return Work(timing.Contender('forward pass', call), evaluations * rows * devices.count(), 'images')


def classifier_epoch(config) -> Work:
    """The paper's CNN once over the images, and its test on those held out."""
    settings = config.evaluate
    images, labels = random_images(config, _CLASSIFIER_IMAGES)
    network = networks.Cnn(config.data.classes)

    def call():
        return trainer.train(
            network, images, labels, key=jax.random.key(0),
            settings=trainer.Settings(
                epochs=1, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
                ema_decay=settings.ema_decay, held_out=settings.held_out,
            ),
        ).params  # fmt: skip

    return Work(timing.Contender('CNN classifier, one epoch', call), len(images), 'images')


class TrainingLoop:
    """The steps of fine-tuning, as the stage takes them, and what of its work a device waits for.

    Differs from `stages.finetune.run` in what is random (images, weights) and in the clock.
    """

    def __init__(self, config, model, sizes, params, batch: int):
        self.config = config
        settings = config.finetune
        count = _private_images(config)
        self.images, self.labels = random_images(config, count)
        self.sampler = poisson.PoissonSampler(size=count, probability=batch / count, key=1)
        self.microbatch = sizes.microbatch
        self.capacity = self.sampler.capacity(self.microbatch * devices.count())
        optimizer = optax.adam(settings.learning_rate)
        self.dp_step = steps.make_dp_step(
            model.example_loss(
                draws=settings.draws,
                label_dropout=settings.label_dropout,
                draws_at_once=sizes.draws,
            ),
            optimizer,
            GaussianMechanism(
                name=DP_SGD,
                noise_multiplier=1.0,
                sampling_probability=batch / count,
                sensitivity=settings.clip_norm,
            ),
            NoiseKey(identifier='benchmark', keys=jax.random.split(jax.random.key(0), 4)),
            expected_batch_size=self.sampler.expected_size,
            rows=self.capacity,
            microbatch=self.microbatch,
            ema_decay=settings.ema_decay,
        )
        self.state = state_lib.create(params, optimizer)

    def measure(self, repeats: int) -> dict:
        """Shares are medians over the turns.

        Of a turn's time: `idle` is how long, at most, no step was running or waiting for the device; and
        `own_work` is for how long the loop's thread took a core. A comparison with the steps alone says
        less: a minute later the machine may be slower. Not seen are the writers' threads, what the
        runtime takes to begin, and the handing over of a step after a checkpoint.
        """
        turns = [self.turn() for _ in range(repeats)]
        median = lambda name: statistics.median(turn[name] for turn in turns)
        every = self.config.loop.checkpoint_every_seconds
        return {
            'images_per_step': self.sampler.expected_size,
            'hidden': median('hidden'),
            'with_checkpoints': median('hidden') * every / (every + median('checkpoint_seconds')),
            'turns': turns,
        }

    def batch(self, number: int) -> tuple[dict, np.int32]:
        indices = self.sampler.indices(number)
        rows = steps.make_batch(self.images, self.labels, indices, self.capacity)
        return devices.deal(rows), steps.used_microbatches(len(indices), self.microbatch)

    def turn(self) -> dict[str, float]:
        """Some steps in the stage's loop: seconds, shares, and what a checkpoint holds it up."""
        asked, own_work, idle, written = [], [], [], []  # seconds, each
        before, seen_running = {}, 0.0  # the last step's metrics, and when it certainly had not ended

        def step(state, number):
            nonlocal before, seen_running
            asked.append(time.perf_counter())
            own_work.append(time.thread_time())
            if _is_running(before):
                seen_running = time.perf_counter()
            rows, used = self.batch(number)
            had_ended = not _is_running(before)
            (state, before), entry = self.dp_step(number, state, rows, used)
            now = time.perf_counter()
            idle.append(now - seen_running if had_ended else 0.0)
            seen_running = now
            ledger.append(entry)
            return state, before

        def write_and_note(*of_step):
            written.append(time.perf_counter())
            write(*of_step)

        with tempfile.TemporaryDirectory() as folder:
            ledger = ledger_lib.Ledger(Path(folder) / 'ledger.jsonl')
            with (
                _TimedStore(Path(folder) / 'resume') as store,
                tensorboard.writer(Path(folder) / 'metrics') as write,
            ):
                loop.train(
                    step,
                    self.state,
                    total_steps=_LOOP_STEPS + 3,
                    store=store,
                    name='benchmark',
                    write=write_and_note,
                    log_every_steps=min(self.config.loop.log_every_steps, _LOOP_STEPS // 2),
                    checkpoint_every_seconds=math.inf,
                )
        # From the third step, before which there was a running one, to the last, which only ends the span.
        seconds = asked[-1] - asked[2]
        idle_share = sum(idle[2:-1]) / seconds
        own_share = (own_work[-1] - own_work[2]) / seconds
        # On a CPU the loop takes its work's time from a device, for which the others wait.
        lost = idle_share + (own_share if jax.default_backend() == 'cpu' else 0)
        return {
            'seconds': seconds,
            'idle': idle_share,
            'own_work': own_share,
            'hidden': max(0.0, 1 - lost),
            # The last metrics are written when the last step has ended.
            'checkpoint_seconds': store.left - written[-1],
        }


def _is_running(metrics: dict) -> bool:
    return not all(value.is_ready() for value in metrics.values())


class _TimedStore(checkpoint.TrainingStore):
    """Remembers when it last let go after a save."""

    def save(self, step, state):
        super().save(step, state)
        self.left = time.perf_counter()
