"""The model of step time: its expectation is that of real batches, and it stops where it says."""

from pathlib import Path

import numpy as np
import pytest

from dpp_jax.configs import mnist_28
from dpp_jax.privacy.poisson import PoissonSampler
from dpp_jax.run import step_time
from dpp_jax.run.step_time import Batch, Layout, Machine, Step
from dpp_jax.training import devices, steps
from scripts.benchmark import scaling

DOCS = Path(__file__).resolve().parents[2] / 'docs'
MNIST = Step(batch=Batch(units=60_000, probability=1 / 15), draws=32, parameters=1_485_217)


@pytest.mark.parametrize(
    'units, probability, rows',
    [
        (400, 0.1, 1),
        (400, 0.1, 8),
        (400, 0.1, 40),
        (400, 0.1, 300),
        (2000, 0.4, 16),
        (9, 1.0, 4),
        (30, 0.01, 8),
    ],
)
def test_the_mean_number_of_microbatches_is_that_of_sampled_batches(units, probability, rows):
    batch = Batch(units=units, probability=probability)
    sampler = PoissonSampler(size=units, probability=probability, key=7)
    found = [-(-len(sampler.indices(number)) // rows) for number in range(3000)]
    error = np.std(found) / np.sqrt(len(found))
    assert batch.microbatches(rows) == pytest.approx(np.mean(found), abs=4 * error + 1e-9)


@pytest.mark.parametrize('rows', [10, 30, 59, 61, 64, 100])
def test_the_short_formula_for_small_microbatches_meets_the_sum(rows):
    """On both sides of where one takes over from the other: a batch has a standard deviation of 60."""
    batch = Batch(units=90_000, probability=0.04168)
    numbers = np.arange(3000, 4500)
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 90_001)))])
    logs = log[90_000] - log[numbers] - log[90_000 - numbers]
    weights = np.exp(logs + numbers * np.log(0.04168) + (90_000 - numbers) * np.log1p(-0.04168))
    assert batch.deviation == pytest.approx(60, abs=0.1) and weights.sum() == pytest.approx(1)
    assert batch.microbatches(rows) == pytest.approx(weights @ np.ceil(numbers / rows), rel=1e-7)


def test_microbatches_are_those_that_a_step_visits():
    layout = Layout(devices=8, microbatch=3, devices_per_image=2)
    with devices.limited_to(8):
        for rows in range(50):
            visited = steps.used_microbatches(rows, 3, 2)
            assert (
                visited == Batch(units=max(1, rows), probability=1.0).microbatches(layout.rows_at_once)
                or not rows
            )


@pytest.mark.parametrize('hosts, own', [(2, 7), (4, 3), (16, 1)])
def test_hosts_wait_for_the_one_that_has_most(hosts, own):
    """Against samples: each host has the rows of its own units."""
    rows = np.random.default_rng(0).binomial(4800 // hosts, 0.05, (20_000, hosts)).max(axis=1)
    found = Batch(units=4800, probability=0.05).microbatches(own * hosts, hosts)
    assert found == pytest.approx(np.ceil(rows / own).mean(), rel=3e-3)
    assert found > Batch(units=4800, probability=0.05).microbatches(own * hosts)


def machine(**changes):
    values = dict(
        image_seconds=1e-3, update_seconds=0.0, bytes_per_second=np.inf, team_bytes_per_second=np.inf,
        collective_seconds=0.0,
    )  # fmt: skip
    return Machine(**(values | changes))


def test_efficiency_falls_where_devices_have_less_than_a_microbatch_and_shared_draws_bring_it_back():
    def efficiency(count, size=1, microbatch=16):
        layout = Layout(devices=count, microbatch=microbatch, devices_per_image=size)
        return step_time.predict(MNIST, machine(), layout).efficiency

    assert efficiency(1, microbatch=1) == pytest.approx(1)
    assert efficiency(8) > 0.98 and efficiency(8) > efficiency(64) > efficiency(256) > 0.9
    assert efficiency(1024) == pytest.approx(4000 / (1024 * 16))
    assert efficiency(1024) < efficiency(1024, 2) < efficiency(1024, 4) < efficiency(1024, 8)
    # Less than one image for each device: nothing else helps.
    assert efficiency(8192, microbatch=1) < 0.5 and efficiency(8192, 8, microbatch=1) > 0.85


def test_every_term_is_what_its_formula_says():
    known = machine(
        update_seconds=0.5, bytes_per_second=1e6, team_bytes_per_second=1e7, collective_seconds=1e-2
    )
    step = Step(batch=Batch(units=24, probability=1.0), draws=4, parameters=1000, images_per_row=3)
    found = step_time.predict(step, known, Layout(devices=8, microbatch=5, devices_per_image=2))
    rows = 10  # 24 rows in 4 teams, in whole microbatches of 5
    assert found.images == pytest.approx(6 * 3 * 2e-3) and found.padding == pytest.approx(4 * 3 * 2e-3)
    assert found.sending == pytest.approx(2 * 7 / 8 * 4e-3 + rows * 0.5 * 4e-4 + (1 + 3 * 2) * 1e-2)
    assert found.seconds == pytest.approx(found.images + found.padding + found.sending + 0.5)
    assert found.efficiency == pytest.approx((24 * 3 * 4e-3 + 0.5) / (8 * found.seconds))


@pytest.mark.parametrize('count', [1, 8, 128, 256, 512, 1024, 4096, 16384])
@pytest.mark.parametrize('is_set', [False, True])
def test_the_choice_is_one_device_for_an_image_until_devices_lack_images(count, is_set):
    assumed = step_time.machine(
        'tpu', parameters=1_485_217, devices=count, devices_of_host=8, operations=3.46e9
    )
    most = Layout(devices=count, microbatch=16)
    found = step_time.choose(MNIST, assumed, most, sizes=[1, 2, 4, 8], is_microbatch_set=is_set)
    seconds = lambda layout: step_time.predict(MNIST, assumed, layout).seconds
    if count * 16 <= 4000:
        assert found == most
    else:
        assert 8 % found.devices_per_image == 0 and found.microbatch <= 16
        assert seconds(found) <= seconds(most)
        assert not is_set or found.microbatch == 16
        # No team of another size is clearly faster, whatever its microbatch, if that may change.
        for size in (1, 2, 4, 8):
            other = Layout(devices=count, microbatch=16, devices_per_image=size)
            lowered = [other] if is_set else [step_time.even(MNIST.batch, other, more) for more in range(9)]
            assert 0.9 * seconds(found) <= min(map(seconds, lowered))
    if count >= (512 if is_set else 16384):
        assert found.devices_per_image > 1


def test_the_tables_of_the_documentation_are_what_the_model_says():
    rows = scaling.predictions(
        mnist_28.get_config('1'),
        [8, 64, 256, 1024, 4096],
        rate=5000.0,
        backend='tpu',
        per_host=8,
        at_once=512,
    )
    text = ' '.join((DOCS / 'scaling.md').read_text(encoding='utf-8').replace('*', '').split())
    for count in (8, 64, 256, 1024, 4096):
        largest, lower, ruled = (row for row in rows if row['devices'] == count)
        line = (
            f'| {count:,} | {4000 / count:,.0f} | {largest["efficiency"]:.0%} | {lower["efficiency"]:.0%} | '
            f'{ruled["efficiency"]:.0%} ({ruled["devices_per_image"]} × {ruled["microbatch"]}) | '
            f'{1e3 * ruled["seconds"]:,.0f} ms |'
        ).replace('%', ' %')
        assert line in text, line
