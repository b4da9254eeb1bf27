"""The optimizer: Adam as optax has it, schedules that end at 0, and steps that noise does not shorten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpp_jax.training import optimizer


def walk(made, gradients):
    """The updates that an optimizer makes of gradients (n, d), one after the other."""
    state, found = made.init(jnp.zeros(gradients.shape[1])), []
    for gradient in gradients:
        updates, state = jax.jit(made.update)(gradient, state)
        found.append(updates)
    return np.stack(found)


def gradients(steps, size=50, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, size)).astype(np.float32)


def test_without_more_it_is_optax_adam():
    np.testing.assert_array_equal(
        walk(optimizer.make(0.01), gradients(5)), walk(optax.adam(0.01), gradients(5))
    )


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_a_schedule_begins_at_the_rate_and_falls_to_0(schedule):
    found = walk(optimizer.make(0.01, schedule=schedule, steps=10), gradients(11))
    plain = walk(optax.adam(0.01), gradients(11))
    rates = np.abs(found).mean(axis=1) / np.abs(plain).mean(axis=1)
    assert (
        rates[0] == pytest.approx(1)
        and (np.diff(rates) < 0).all()
        and rates[-1] == pytest.approx(0, abs=1e-6)
    )
    assert rates[5] == pytest.approx(0.5, rel=1e-3)


def test_noise_does_not_shorten_the_steps_of_what_is_steady():
    """A gradient of 0.3 under noise of 1: plain Adam divides by the noise."""
    noisy = 0.3 + gradients(2000, size=200)
    plain, corrected = (walk(optimizer.make(1.0, noise=noise), noisy)[-500:] for noise in (0.0, 1.0))
    assert -plain.mean() == pytest.approx(0.3 / np.sqrt(1.09), rel=0.1)
    assert -corrected.mean() == pytest.approx(1.0, rel=0.25)
    # Where there is noise alone, steps grow by the root of ten at most.
    still = gradients(300, size=200, seed=1)
    lengths = [np.abs(walk(optimizer.make(1.0, noise=noise), still)[100:]).mean() for noise in (0.0, 1.0)]
    assert lengths[1] <= 3.2 * lengths[0]


def test_a_schedule_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="schedule is 'step'; it must be one of"):
        optimizer.make(0.1, schedule='step')
