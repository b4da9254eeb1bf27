"""What the stage hands to the private step is what the plan accounts for."""

import jax
import numpy as np
import pytest

from dpp_jax.privacy import poisson
from dpp_jax.privacy.ledger import Ledger
from dpp_jax.run import folder as workdir_lib
from dpp_jax.stages import finetune
from dpp_jax.stages import plan as plan_lib
from dpp_jax.training import devices, steps


def test_every_step_gets_the_plans_mechanism_and_the_samplers_batch(
    tiny_config, tiny_model, tmp_path, monkeypatch
):
    config = tiny_config(pretrain__enabled=False)
    config.seed = None
    workdir, plan = workdir_lib.WorkDir(tmp_path), plan_lib.make(config, tiny_model)
    rng = np.random.default_rng(0)
    count = config.data.train_images
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, count)
    seen, settings = [], {}

    def fake_step(loss, optimizer, mechanism, **named):
        settings.update(named, mechanism=mechanism)

        def step(state, batch, used, key):
            flat = {name: devices.collect(rows) for name, rows in batch.items()}
            seen.append((flat, int(used), key))
            return state, {'loss': np.zeros(1)}

        return step

    class Loop:
        """Takes the steps and nothing else."""

        @staticmethod
        def train(step, state, *, total_steps, **_):
            for number in range(total_steps):
                state, _ = step(state, number)
            return state

    monkeypatch.setattr(steps, 'make_dp_step', fake_step)
    monkeypatch.setattr(finetune.loop, 'train', Loop.train)
    ledger = Ledger(tmp_path / 'ledger.jsonl')
    finetune.run(config, workdir, ledger, plan, tiny_model, images, labels)

    keys = workdir.keys('dp_sgd', None)
    mechanism = settings['mechanism']
    assert mechanism.noise_multiplier == plan.noise_multiplier
    assert mechanism.sampling_probability == plan.sampling_probability
    assert mechanism.sensitivity == config.finetune.clip_norm
    assert settings['expected_batch_size'] == pytest.approx(plan.sampling_probability * count)
    assert settings['expected_batch_size'] == pytest.approx(plan.expected_batch_size)
    sampler = poisson.PoissonSampler(size=count, probability=plan.sampling_probability, key=keys.sampling)
    assert len(seen) == plan.steps == ledger.count('dp_sgd')
    for number, (batch, used, key) in enumerate(seen):
        drawn = sampler.indices(number)
        rows = batch['mask']
        np.testing.assert_array_equal(batch['index'][rows], drawn)
        np.testing.assert_array_equal(batch['image'][rows], images[drawn])
        np.testing.assert_array_equal(batch['label'][rows], labels[drawn])
        assert used * settings['microbatch'] * devices.count() >= len(drawn)
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(keys.noise))
    query = workdir.keys('central_query', None)
    assert query.sampling != keys.sampling
    assert [entry.index for entry in ledger.entries] == list(range(plan.steps))
    assert {entry.randomness for entry in ledger.entries} == {keys.identifier}
