"""What the stage hands to the private step is what the plan accounts for."""

import shutil

import jax
import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.data.images import Images
from dpp_jax.data.rows import Rows
from dpp_jax.privacy import poisson
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.run.folder import WorkDir
from dpp_jax.run.keys import Keys
from dpp_jax.stages import finetune
from dpp_jax.training import devices, steps


class Loop:
    """Takes the steps and nothing else."""

    @staticmethod
    def train(step, state, *, total_steps, **_):
        for number in range(total_steps):
            state, _ = step(state, number)
        return state


@pytest.mark.parametrize('team', [1, 2])
def test_every_step_gets_the_plans_mechanism_and_the_samplers_batch(
    tiny_config, tiny_model, tmp_path, monkeypatch, team
):
    check_steps(tiny_config, tiny_model, tmp_path, monkeypatch, WHOLE, team)


def test_processes_take_the_same_steps_with_the_rows_of_their_own_shares(
    tiny_config, tiny_model, tmp_path, monkeypatch
):
    count, seen = tiny_config().data.train_images, []
    for index in range(3):
        folder = tmp_path / str(index)
        (folder / 'private').mkdir(parents=True)
        if index:  # the keys of the first process
            shutil.copy(tmp_path / '0' / 'private' / 'keys.json', folder / 'private')
        share = Share(index, 3)
        seen.append(check_steps(tiny_config, tiny_model, folder, monkeypatch, share))
    for settings in ('rows', 'capacity', 'expected_batch_size'):
        assert len({process[settings] for process in seen}) == 1
    for steps_of_all in zip(*(process['steps'] for process in seen)):
        assert len({(len(batch['mask']), used) for batch, used, *_ in steps_of_all}) == 1
    q = seen[0]['mechanism'].sampling_probability
    one = poisson.PoissonSampler(size=count, probability=q, key=1)
    assert seen[0]['rows'] == one.capacity(1)  # the unit of sums does not depend on shares and devices


def check_steps(tiny_config, tiny_model, tmp_path, monkeypatch, share, team=1):
    """Run the stage in one process; its settings and batches."""
    config = tiny_config(pretrain__enabled=False, finetune__devices_per_image=team)
    config.finetune.update(schedule='linear', noise_correction=True)
    config.seed = None
    workdir, plan = WorkDir(tmp_path), build.plan(config, tiny_model)
    releases, sizes = plan.budget.of(DP_SGD), build.sizes(config, tiny_model)
    rng = np.random.default_rng(0)
    count = config.data.train_images
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, count)
    own = share.own(np.arange(count))
    ledger, keys = Ledger(workdir.ledger), Keys(workdir.keys, config.seed)
    seen, settings, optimizers = [], {}, []
    make_optimizer = finetune.optimizer_lib.make

    def record_optimizer(rate, **named):
        optimizers.append({'rate': rate, **named})
        return make_optimizer(rate, **named)

    def fake_step(loss, optimizer, mechanism, noise_key, **named):
        settings.update(named, mechanism=mechanism, noise_key=noise_key)

        def program(state, batch, used, key, index):
            for rows in batch.values():  # all devices of a team have the same
                np.testing.assert_array_equal(rows[::team], rows[team - 1 :: team])
            flat = {name: devices.collect(rows[::team]) for name, rows in batch.items()}
            seen.append((flat, int(used), key, int(index), len(ledger.entries)))
            return state, {'loss': np.zeros(1)}

        # The real one, but for what runs on the devices.
        return mechanism.noisy(None, noise_key, then=None, compiled=lambda _: program)

    monkeypatch.setattr(steps, 'make_dp_step', fake_step)
    monkeypatch.setattr(finetune.optimizer_lib, 'make', record_optimizer)
    monkeypatch.setattr(finetune.loop, 'train', Loop.train)
    recorded_before_release = []

    def before_release():
        assert not workdir.model('finetune').exists()
        recorded_before_release.append(ledger.count(DP_SGD))

    finetune.run(
        config,
        workdir,
        keys,
        ledger,
        Images(images=images[own], labels=labels[own], rows=Rows(count, share.images(None))),
        before_release,
        releases=releases,
        unit=plan.unit,
        model=tiny_model,
        sizes=sizes,
        share=share,
    )

    own_keys = keys.of_mechanism(DP_SGD, ledger)
    mechanism = settings['mechanism']
    figures = plan.figures()
    assert mechanism == releases.mechanism
    assert mechanism.noise_multiplier == figures['noise_multiplier']
    assert mechanism.sampling_probability == figures['sampling_probability']
    assert mechanism.sensitivity == config.finetune.clip_norm
    assert settings['devices_per_image'] == team
    (optimizer,) = optimizers
    noise = mechanism.noise_multiplier * mechanism.sensitivity / settings['expected_batch_size']
    expected = {'rate': config.finetune.learning_rate, 'schedule': 'linear', 'steps': figures['steps']}
    assert optimizer == {**expected, 'noise': pytest.approx(noise)}
    assert settings['noise_key'].identifier == own_keys.noise.identifier
    assert settings['expected_batch_size'] == pytest.approx(mechanism.sampling_probability * count)
    assert settings['expected_batch_size'] == pytest.approx(plan.expected_batch_size)
    sampler = poisson.PoissonSampler(
        size=count, probability=mechanism.sampling_probability, key=own_keys.sampling
    )
    assert len(seen) == figures['steps'] == ledger.count(DP_SGD)
    for number, (batch, used, key, index, recorded) in enumerate(seen):
        most, drawn = share.largest(sampler.indices(number)), share.own(sampler.indices(number))
        rows = batch['mask']
        np.testing.assert_array_equal(batch['index'][rows], drawn)
        np.testing.assert_array_equal(batch['image'][rows], images[drawn])
        np.testing.assert_array_equal(batch['label'][rows], labels[drawn])
        assert not batch['image'][~rows].any() and not batch['label'][~rows].any()
        assert used * settings['microbatch'] * devices.count() // team >= most
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(own_keys.noise.keys))
        # The step before is in the ledger when its result is used.
        assert index == recorded == number
    query = keys.of_mechanism(CENTRAL_QUERY, ledger)
    assert query.sampling != own_keys.sampling
    assert [entry.index for entry in ledger.entries] == list(range(figures['steps']))
    assert {entry.randomness for entry in ledger.entries} == {own_keys.noise.identifier}
    assert recorded_before_release == [figures['steps']]
    assert workdir.model('finetune').exists()
    return settings | {'steps': seen}
