"""Step time on 1, 2, 4, 8 simulated devices against the model of `run/step_time.py`, and what it predicts.

    python -m scripts.benchmark.scaling --config=configs/digits_8.py:10

All devices are in one process and share the cores: the images take the same work on any number of them, so
that a longer step is what devices cost. Steps with all images and with none take turns; the table has
medians. Fitted are what a noised image, a parameter's update, a byte and a collective take. Then the config's
own batch is predicted for chips that are only assumed (`--chips`, `--rate`, `--backend`).
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax
from scipy import optimize

from dpp_jax import build
from dpp_jax.diffusion import model as model_lib
from dpp_jax.privacy.budget import DP_SGD
from dpp_jax.privacy.mechanism import NOISE_KEYS, GaussianMechanism, NoiseKey
from dpp_jax.run import step_time
from dpp_jax.training import devices, steps
from dpp_jax.training import state as state_lib
from scripts.benchmark import timing


@dataclasses.dataclass
class Measured:
    """A layout, with the steps of a full and an empty batch on it."""

    layout: step_time.Layout
    full: timing.Contender
    empty: timing.Contender


def define_flags() -> None:
    """Define the flags of the command; not when other programs import the module."""
    config_flags.DEFINE_config_file('config', None, 'As for the program.')
    flags.DEFINE_list('devices', ['1', '2', '4', '8'], 'Numbers of devices to measure; empty: none.')
    flags.DEFINE_integer('images', 64, 'Images of a step, a multiple of devices and microbatch.')
    flags.DEFINE_integer('draws', 8, 'Noise draws K in what is measured.')
    flags.DEFINE_integer('repeats', 7, 'Turns that count, at least 1.')
    flags.DEFINE_float('turn_seconds', 0.5, 'How long each step is measured in every turn.')
    flags.DEFINE_list('chips', ['8', '64', '256', '1024', '4096'], 'Numbers of devices to predict.')
    flags.DEFINE_float('rate', 5000.0, 'Assumed noised images per second of a chip.')
    flags.DEFINE_string('backend', 'tpu', 'Kind of the chips: tpu or gpu.')
    flags.DEFINE_integer('per_host', 8, 'Chips of a host.')
    flags.DEFINE_integer('at_once', 512, 'Noised images that a chip takes at once, at most.')
    flags.DEFINE_string('json', None, 'File for the figures.')


def main(argv):
    del argv
    config, counts = flags.FLAGS.config, [int(number) for number in flags.FLAGS.devices]
    report = {}
    if counts:
        jax.config.update('jax_num_cpu_devices', max(counts))
        devices.one_per_core()
        report |= measure(
            config,
            counts,
            images=flags.FLAGS.images,
            draws=flags.FLAGS.draws,
            repeats=flags.FLAGS.repeats,
            turn_seconds=flags.FLAGS.turn_seconds,
        )
        print(measured_text(report) + '\n', flush=True)
    report['predicted'] = predictions(
        config,
        [int(number) for number in flags.FLAGS.chips],
        rate=flags.FLAGS.rate,
        backend=flags.FLAGS.backend,
        per_host=flags.FLAGS.per_host,
        at_once=flags.FLAGS.at_once,
    )
    print(predicted_text(report['predicted']))
    if flags.FLAGS.json:
        Path(flags.FLAGS.json).write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')


def measure(
    config, counts: Sequence[int], *, images: int, draws: int, repeats: int, turn_seconds: float
) -> dict:
    """Measure each number of devices, and all sizes of teams of the largest, and fit the model."""
    config.model.around = 'none'  # next to no work
    model = build.model(config)
    sizes = [(count, 1) for count in counts]
    sizes += [(max(counts), size) for size in counts if size > 1 and draws % size == 0]
    found = [_steps(config, model, count, size, images, draws) for count, size in sizes]
    timing.measure([step for each in found for step in (each.empty, each.full)], repeats, turn_seconds)
    parameters = model_lib.size(model.shapes())
    rows, seconds = [], []
    for each in found:
        for contender, real in ((each.empty, 0), (each.full, images)):
            rows.append(_work(each.layout, real, draws, parameters))
            seconds.append(contender.median)
    # Relative errors: a step without images is short, and says most of the two other figures.
    fitted, _ = optimize.nnls(np.array(rows) / np.array(seconds)[:, None], np.ones(len(seconds)))
    predicted = np.array(rows) @ fitted
    return {
        'images': images,
        'draws': draws,
        'parameters': parameters,
        'cores': devices.cores(),
        'fitted': dict(zip(('noised_image', 'parameter', 'byte', 'collective'), map(float, fitted))),
        'steps': [
            {
                'devices': each.layout.devices,
                'devices_per_image': each.layout.devices_per_image,
                'empty': each.empty.median,
                'empty_predicted': predicted[2 * number],
                'full': each.full.median,
                'full_predicted': predicted[2 * number + 1],
                'turns': each.full.seconds,
            }
            for number, each in enumerate(found)
        ],
    }


def _work(layout: step_time.Layout, images: int, draws: int, parameters: int) -> list[float]:
    """Count what all devices together compute, update and send."""
    d, g = layout.devices, layout.devices_per_image
    rows = images * g / d  # of a device
    summed, shared = 2 * (d - 1) / d, rows * (g - 1) / g
    collectives = (d > 1) + (g > 1) * step_time.COLLECTIVES_OF_TEAM * rows
    return [images * draws, parameters * d, 4 * parameters * d * (summed + shared), d * collectives]


def _steps(config, model, count: int, size: int, images: int, draws: int) -> Measured:
    """Compile the step for the first `count` devices."""
    settings, rng = config.finetune, np.random.default_rng(0)
    layout = step_time.Layout(devices=count, microbatch=1, devices_per_image=size)
    mechanism = GaussianMechanism(
        name=DP_SGD, noise_multiplier=1.0, sampling_probability=0.1, sensitivity=settings.clip_norm
    )
    keys = jax.random.split(jax.random.key(1), NOISE_KEYS)
    optimizer = optax.adam(settings.learning_rate)
    with devices.limited_to(count):
        step = steps.make_dp_step(
            model.example_loss(draws=draws, label_dropout=settings.label_dropout, shares=size),
            optimizer,
            mechanism,
            NoiseKey(identifier='benchmark', keys=keys),
            expected_batch_size=float(images),
            rows=images,
            microbatch=1,
            ema_decay=settings.ema_decay,
            devices_per_image=size,
        )
        pixels = rng.integers(0, 256, (images,) + model.image_shape, dtype=np.uint8)
        labels = (np.arange(images) % model.classes).astype(np.int32)
        rows = devices.deal_own(steps.make_batch(pixels, labels, np.arange(images), images), size)
        state = devices.replicate(state_lib.create(model.init(jax.random.key(0)), optimizer))
        program = step.program.lower(state, rows, np.int32(0), keys, np.int32(0)).compile()

        def contender(real: int) -> timing.Contender:
            current, used = jax.tree.map(jnp.array, state), steps.used_microbatches(real, 1, size)

            def call():
                nonlocal current  # its memory goes to the next one
                current, metrics = program(current, rows, used, keys, np.int32(0))
                return current, metrics

            return timing.Contender(f'{count} devices, {size} for an image, {real} images', call)

        return Measured(layout=layout, full=contender(images), empty=contender(0))


def measured_text(report: dict) -> str:
    """The measured steps as a table."""
    fitted = report['fitted']
    lines = [
        f'{report["images"]} images x {report["draws"]} draws, {report["parameters"]:,} parameters, '
        f'{report["cores"]} cores for all devices',
        f'fitted: a noised image {1e3 * fitted["noised_image"]:.3g} ms, and of each device a parameter '
        f'{1e9 * fitted["parameter"]:.3g} ns, a byte {1e9 * fitted["byte"]:.3g} ns, a collective '
        f'{1e3 * fitted["collective"]:.3g} ms',
        '',
        f'{"devices":>8}{"per image":>11}{"ms":>9}{"model":>9}{"no images":>11}{"model":>9}',
    ]
    for step in report['steps']:
        ms = [1e3 * step[name] for name in ('full', 'full_predicted', 'empty', 'empty_predicted')]
        lines.append(
            f'{step["devices"]:8}{step["devices_per_image"]:11}'
            + ''.join(f'{value:{width},.1f}' for value, width in zip(ms, (9, 9, 11, 9)))
        )
    return '\n'.join(lines)


def predictions(
    config, chips: Sequence[int], *, rate: float, backend: str, per_host: int, at_once: int
) -> list[dict]:
    """Predict the config's step, spread by the rule, for each number of chips."""
    parameters = model_lib.size(build.model(config).shapes())
    step = step_time.Step(batch=build.batch(config), draws=config.finetune.draws, parameters=parameters)
    found = []
    for count in chips:
        machine = step_time.machine(
            backend,
            parameters=parameters,
            devices=count,
            devices_of_host=min(count, per_host),
            image_seconds=1 / rate,
        )
        hosts = max(1, count // per_host)
        most = step_time.Layout(devices=count, microbatch=max(1, at_once // step.draws), hosts=hosts)
        layouts = {
            'largest': most,
            'lower': step_time.choose(step, machine, most, sizes=[1]),
            'by the rule': step_time.choose(
                step, machine, most, sizes=step_time.teams(step.draws, min(count, per_host))
            ),
        }
        for name, layout in layouts.items():
            predicted = step_time.predict(step, machine, layout)
            found.append(
                {
                    'name': name,
                    **dataclasses.asdict(layout),
                    **dataclasses.asdict(predicted),
                    'seconds': predicted.seconds,
                }
            )
    return found


def predicted_text(rows: list[dict]) -> str:
    """The predictions as a table."""

    columns = ('ms', 'padding', 'sending', 'efficiency')
    title = f'{"chips":>6}  {"microbatch":12}{"rows":>6}{"devices per image":>19}'
    lines = [title + ''.join(f'{name:>12}' for name in columns)]
    for row in rows:
        ms = ''.join(f'{1e3 * row[name]:12,.1f}' for name in ('seconds', 'padding', 'sending'))
        lines.append(
            f'{row["devices"]:6}  {row["name"]:12}{row["microbatch"]:6}{row["devices_per_image"]:19}{ms}'
            f'{row["efficiency"]:12.0%}'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    define_flags()
    flags.mark_flag_as_required('config')
    app.run(main)
