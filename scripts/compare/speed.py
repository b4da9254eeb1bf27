"""Speed and memory of the same work in both frameworks, each in its best form.

How it goes, for each kind of work:
1. Every form of either side runs alone on a small batch (`trials`). What fails says why.
2. The best form of ours, the best of PyTorch, and the fastest of PyTorch that takes a batch as a whole then
   take turns on growing batches (`sweep`), until they run out of memory or time, or the sizes end.
Medians of the turns count. A step is complete: random draws, gradient, (noise,) Adam, averaged weights.
"""

from collections.abc import Callable, Sequence
import dataclasses
import statistics
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from scripts.compare import workers

PyTree = Any
OURS, THEIRS = 'dpp_jax', 'PyTorch'
PLAIN, PRIVATE, SAMPLING = 'plain training step', 'DP step', 'sampling'
SAMPLING_STEPS = 4
SAMPLING_CALLS = 2 * SAMPLING_STEPS - 1  # of the denoiser, by Heun
UNITS = {
    PLAIN: 'noised images/s',
    PRIVATE: 'noised images/s',
    SAMPLING: 'denoised images/s (one call of the network for one image)',
}
WHOLE = 0  # rows at once: all
# Rows at once that suit PyTorch's cores: the best of 4, 8, 16, 32, 64 on two.
_SOME = 32
_SHARE_OF_ACCELERATOR = 0.45  # of each side: both live at once


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to do a kind of work.

    Attributes:
        side: `OURS` or `THEIRS`.
        name: for people.
        at_once: noised images (sampling: images; PyTorch's DP step: images) in work at once; `WHOLE`: all.
        is_compiled: by `torch.compile`.
        is_channels_last: PyTorch's images in memory.
        of: a name in `pytorch_private.FORMS`.
    """

    side: str
    name: str
    at_once: int = WHOLE
    is_compiled: bool = False
    is_channels_last: bool = True
    of: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured of a form with a batch.

    Attributes:
        work: what was done.
        side, form: by whom and how.
        batch: images.
        rate: of the median, in `UNITS`; None: it failed.
        seconds: of every turn.
        memory: most bytes during a call, beside loaded modules.
        build_seconds: until the first call was done.
        failure: why there are no figures.
    """

    work: str
    side: str
    form: str
    batch: int
    rate: float | None = None
    seconds: tuple[float, ...] = ()
    memory: int | None = None
    build_seconds: float | None = None
    failure: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long and how much.

    Attributes:
        turns: that count, of each form and batch.
        build_seconds: until a first call is done, with compilation.
        call_seconds: of a call; a form that takes longer gets no larger batch.
        memory_bytes: of a process on the host.
        is_quick: try few forms, without `torch.compile`.
    """

    turns: int = 3
    build_seconds: float = 900.0
    call_seconds: float = 60.0
    memory_bytes: float = 8 * 2**30
    is_quick: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What is computed: a config's network with these weights, on random images."""

    config: ConfigDict
    params: PyTree
    draws: int


def amount(task: Task, work: str, batch: int) -> int:
    """Units of work in one call."""
    return batch * {PLAIN: 1, PRIVATE: task.draws, SAMPLING: SAMPLING_CALLS}[work]


def forms(work: str, rule: int, draws: int, is_quick: bool) -> list[Form]:
    """Return what is tried.

    Args:
        work: of what kind.
        rule: noised images at once that our rule says.
        draws: of an image, in the DP step.
        is_quick: few of them, without `torch.compile`.
    """
    numbers = {rule} if is_quick else {max(1, rule // 2), rule, 2 * rule}
    ours = [Form(OURS, f'{n} at once', n) for n in sorted(numbers)]
    if work == PRIVATE:
        return ours + _private_forms(draws, is_quick)
    found = []
    for is_compiled in (False, True):
        for is_channels_last in (False, True):
            how = 'compiled' if is_compiled else 'eager'
            layout = 'channels last' if is_channels_last else 'NCHW'
            found += [
                Form(THEIRS, f'{how}, {layout}, {text}', n, is_compiled, is_channels_last)
                for n, text in ((_SOME, f'{_SOME} at once'), (WHOLE, 'whole batch'))
            ]
    # A whole batch, compiled, is compiled anew for every size: only if `run` finds that it may be the best.
    fit = [form for form in found if form.at_once != WHOLE or not form.is_compiled]
    quick = [form for form in fit if form.is_channels_last and form.at_once and not form.is_compiled]
    return ours + (quick if is_quick else fit)


def _private_forms(draws: int, is_quick: bool) -> list[Form]:
    """All of `pytorch_private`, with one image at once and with some."""
    from scripts.compare import pytorch_private

    some, found = images_at_once(draws), []
    for name in pytorch_private.FORMS:
        is_compiled = 'compiled' in name
        if is_quick and name not in ('Opacus, hooks that sum draws', 'loop over images'):
            continue
        if 'loop' in name:  # one after the other, in any case
            found.append(Form(THEIRS, name, 1, is_compiled, of=name))
            continue
        sizes = {some} if is_compiled or is_quick else {1, some}
        found += [Form(THEIRS, f'{name}, {n} images at once', n, is_compiled, of=name) for n in sorted(sizes)]
    return found


def images_at_once(draws: int) -> int:
    """Images whose noised images fill PyTorch's cores twice."""
    return max(1, 2 * _SOME // draws)


def whole(best: Form, work: str) -> Form:
    """Return a form that takes a batch as a whole, next to the best one."""
    if work == PRIVATE:
        name = 'Opacus, hooks that sum draws'
        return Form(THEIRS, f'{name}, whole batch', WHOLE, of=name)
    layout = 'channels last' if best.is_channels_last else 'NCHW'
    how = 'compiled' if best.is_compiled else 'eager'
    return dataclasses.replace(best, name=f'{how}, {layout}, whole batch', at_once=WHOLE)


def run(
    task: Task,
    work: str,
    *,
    trial_batch: int,
    batches: Sequence[int],
    rule: int,
    limits: Limits,
    tell: Callable[[str], None],
) -> tuple[list[Figure], list[Figure]]:
    """Measure one kind of work; return the trials and the sweep.

    Args:
        task: what is computed.
        work: `PLAIN`, `PRIVATE` or `SAMPLING`.
        trial_batch: images of the trials.
        batches: images of the sweep, growing.
        rule: noised images at once by our rule.
        limits: of time and memory.
        tell: is told what comes next.
    """
    tried = {}
    for form in forms(work, rule, task.draws, limits.is_quick):
        tell(f'{work}, {form.side}: {form.name}')
        (tried[form],) = turns(task, work, [form], trial_batch, dataclasses.replace(limits, turns=2))
    chosen = [_best(tried, side) for side in (OURS, THEIRS)]
    if chosen[1] is not None and not limits.is_quick:
        chosen.append(whole(chosen[1], work))
    found, going = [], [form for form in dict.fromkeys(chosen) if form is not None]
    for batch in batches:
        if not going:
            break
        tell(f'{work}, batches of {batch}')
        figures = turns(task, work, going, batch, limits)
        found += figures
        going = [
            form
            for form, figure in zip(going, figures)
            # Four times as many would take four times as long.
            if not figure.failure and statistics.median(figure.seconds) * 4 < limits.call_seconds
        ]
    return list(tried.values()), found


def _best(tried: dict[Form, Figure], side: str) -> Form | None:
    rates = {form: figure.rate for form, figure in tried.items() if form.side == side and figure.rate}
    return max(rates, key=rates.get, default=None)


def turns(task: Task, work: str, chosen: Sequence[Form], batch: int, limits: Limits) -> list[Figure]:
    """Let the forms take turns on batches of one size."""
    running, failures = {}, {}
    for form in chosen:
        try:
            running[form] = workers.Worker(
                build_ours if form.side == OURS else build_theirs,
                (task, work, form, batch),
                environment=_environment(form.side),
                build_seconds=limits.build_seconds,
                call_seconds=limits.call_seconds,
                memory_bytes=limits.memory_bytes,
            )
        except workers.Failed as error:
            failures[form] = str(error)
    calls = {form: [] for form in chosen}
    for _ in range(limits.turns):
        for form in [form for form in running if form not in failures]:
            try:
                calls[form].append(running[form].call())
            except workers.Failed as error:
                failures[form] = str(error)
    for worker in running.values():
        worker.close()
    found = []
    for form in chosen:
        about = {'work': work, 'side': form.side, 'form': form.name, 'batch': batch}
        if form in failures:
            found.append(Figure(**about, failure=failures[form]))
            continue
        seconds = tuple(each for each, _ in calls[form])
        memory = [bytes_ for _, bytes_ in calls[form] if bytes_ is not None]
        found.append(
            Figure(
                **about,
                rate=amount(task, work, batch) / statistics.median(seconds),
                seconds=seconds,
                memory=max(memory, default=None),
                build_seconds=running[form].build_seconds,
            )
        )
    return found


def _environment(side: str) -> dict[str, str]:
    if side == THEIRS:
        return {'JAX_PLATFORMS': 'cpu'}  # it is imported, and computes nothing
    return {
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'XLA_PYTHON_CLIENT_MEM_FRACTION': str(_SHARE_OF_ACCELERATOR),
    }


def build_ours(task: Task, work: str, form: Form, batch: int) -> tuple[Callable, Any]:
    """Make our call, and what watches its memory, in a process of its own."""
    import jax
    import jax.numpy as jnp
    import optax

    from dpp_jax import build
    from dpp_jax.data import augment
    from dpp_jax.privacy.budget import DP_SGD
    from dpp_jax.privacy.mechanism import NOISE_KEYS, GaussianMechanism, NoiseKey
    from dpp_jax.stages import generate
    from dpp_jax.training import devices, steps
    from dpp_jax.training import state as state_lib

    devices.one_per_core()
    devices.keep_compiled_programs()
    memory = workers.HostMemory()
    if jax.default_backend() != 'cpu':
        memory = workers.DeviceMemory(lambda: jax.local_devices()[0].memory_stats()['peak_bytes_in_use'])
    model, settings = build.model(task.config), task.config.finetune
    sizes = build.sizes(task.config, model, form.at_once)
    optimizer = optax.adam(settings.learning_rate)
    number = 1 if jax.default_backend() != 'cpu' else jax.local_device_count()
    with devices.limited_to(number):
        if work == SAMPLING:
            sampler = build.samplers(task.config)['images']
            sample = generate.sample_function(model, sampler, form.at_once)
            index, params = np.arange(batch), (devices.replicate(task.params), None)

            def call():
                generate.sample_images(
                    sample, params, jax.random.key(0), index, batch_size=batch, at_once=form.at_once
                )

            return _limited(devices, number, call), memory

        images, labels = random_images(model, batch)
        state = devices.replicate(state_lib.create(task.params, optimizer))
        size = devices.count() * (sizes.microbatch if work == PRIVATE else 1)
        capacity = -(-batch // size) * size
        rows = devices.deal(steps.make_batch(images, labels, np.arange(batch), capacity))
        if work == PLAIN:
            step = steps.make_pretrain_step(
                model.drawing(draws=1, label_dropout=settings.label_dropout),
                model.errors,
                optimizer,
                augment=augment.make_augmentation('none'),
                ema_decay=settings.ema_decay,
                images_at_once=form.at_once,
            )
            rest = (jax.random.key(1),)
        else:
            keys = jax.random.split(jax.random.key(1), NOISE_KEYS)
            step = steps.make_dp_step(
                model.example_loss(
                    draws=task.draws, label_dropout=settings.label_dropout, draws_at_once=sizes.draws
                ),
                optimizer,
                GaussianMechanism(
                    name=DP_SGD,
                    noise_multiplier=1.0,
                    sampling_probability=0.1,
                    sensitivity=settings.clip_norm,
                ),
                NoiseKey(identifier='comparison', keys=keys),
                expected_batch_size=float(batch),
                rows=capacity,
                microbatch=sizes.microbatch,
                ema_decay=settings.ema_decay,
            ).program
            rest = (steps.used_microbatches(batch, sizes.microbatch), keys, np.int32(0))
        current = jax.tree.map(jnp.array, state)

    def call():
        nonlocal current
        current, metrics = step(current, rows, *rest)
        jax.block_until_ready((current, metrics))

    return call, memory


def _limited(devices, number: int, call: Callable) -> Callable:
    def inside():
        with devices.limited_to(number):
            call()

    return inside


def build_theirs(task: Task, work: str, form: Form, batch: int) -> tuple[Callable, Any]:
    """Make PyTorch's call, in a process of its own."""
    import torch

    from dpp_jax import build
    from dpp_jax.training import devices
    from scripts.compare import pytorch_port as port

    if work == PRIVATE:
        from scripts.compare import pytorch_private as private

    torch.set_num_threads(devices.cores())
    on_gpu = torch.cuda.is_available()
    memory = workers.HostMemory()
    if on_gpu:
        # As XLA does it by default; and the fastest convolutions.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_per_process_memory_fraction(_SHARE_OF_ACCELERATOR)
        memory = workers.DeviceMemory(torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats)
    device = 'cuda' if on_gpu else 'cpu'
    model, settings = build.model(task.config), task.config.finetune
    kind = task.config.model.denoiser
    network = port.make_network(model, task.params, channels_last=form.is_channels_last).to(device)
    layout = torch.channels_last if form.is_channels_last else torch.contiguous_format
    at_once = form.at_once or batch

    def finished(call: Callable) -> Callable:
        def and_wait():
            call()
            if on_gpu:
                torch.cuda.synchronize()

        return and_wait

    if work == SAMPLING:
        network.eval()
        run = torch.compile(network, dynamic=False) if form.is_compiled else network
        options = task.config.generate.sampler
        denoise = port.guided(port.denoiser(run, kind), options.guidance, model.classes)
        sigmas = port.sigma_steps(SAMPLING_STEPS, options.t_min, options.t_max, options.rho)
        height, width, channels = model.image_shape

        @torch.no_grad()
        def sample():
            for first in range(0, batch, at_once):
                labels = torch.arange(first, min(first + at_once, batch), device=device) % model.classes
                z = torch.randn(len(labels), channels, height, width, device=device)
                port.to_pixels(port.heun(denoise, z.contiguous(memory_format=layout), labels, sigmas))

        return finished(sample), memory

    pixels, labels = random_images(model, batch)
    images = port.to_torch(pixels.astype(np.float32) / 127.5 - 1, device)
    labels = torch.tensor(labels).long().to(device)
    average = port.Average(network, settings.ema_decay)

    def rows(draws):
        found = port.draw(images, labels, draws, settings.label_dropout, model.classes, kind)
        return tuple(a.contiguous(memory_format=layout) if a.ndim == 4 else a for a in found)

    if work == PLAIN:
        adam = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, fused=True)
        run = torch.compile(network, dynamic=False) if form.is_compiled else network

        def step():
            port.plain_gradient(run, rows(1), at_once, kind)
            adam.step()
            average.update(network)

        return finished(step), memory

    taken = private.FORMS[form.of](
        network,
        draws=task.draws,
        clip_norm=settings.clip_norm,
        noise_multiplier=1.0,
        expected_batch_size=batch,
        learning_rate=settings.learning_rate,
        kind=kind,
    )

    def private_step():
        taken.step(rows(task.draws), at_once)
        average.update(network)

    return finished(private_step), memory


def random_images(model, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, H, W, C) and labels in turn."""
    pixels = np.random.default_rng(0).integers(0, 256, (count,) + model.image_shape, dtype=np.uint8)
    return pixels, (np.arange(count) % model.classes).astype(np.int32)


def ratios(figures: Sequence[Figure]) -> list[tuple[str, int, float]]:
    """Return (PyTorch's form, batch, how many times as fast ours is) where both have figures.

    The median over turns of the ratio in one turn: what slows a machine down slows down both.
    """
    found = []
    for batch in dict.fromkeys(figure.batch for figure in figures):
        group = [figure for figure in figures if figure.batch == batch and figure.rate]
        ours = [figure for figure in group if figure.side == OURS]
        for theirs in (figure for figure in group if figure.side == THEIRS):
            for mine in ours:
                pairs = zip(theirs.seconds, mine.seconds, strict=True)
                found.append((theirs.form, batch, statistics.median(a / b for a, b in pairs)))
    return found


def default_memory_bytes() -> float:
    """A third of what is free: two processes may be near the limit at once."""
    return workers.available_bytes() / 3
