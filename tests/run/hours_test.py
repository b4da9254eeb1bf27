"""Hours on this machine: measured where a rate is kept, a guess at once elsewhere; weeks are called weeks."""

import time

import pytest

from dpp_jax.run import hours


@pytest.mark.parametrize(
    'seconds, text',
    [
        (3, 'less than a minute'),
        (90, 'about 1.5 minutes'),
        (7200, 'about 2 hours'),
        (3600 * 23.4, 'about 23 hours'),
        (86_400 * 3, 'about 3 days'),
        (86_400 * 163, 'about 23 weeks'),
        (86_400 * 365, 'about 1 year'),
        (1e13, 'about 317,098 years'),
    ],
)
def test_a_time_is_said_in_its_largest_unit(seconds, text):
    assert hours.words(seconds) == text


def test_a_rate_that_was_measured_is_used_and_another_is_guessed_at_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    start = time.monotonic()
    guess, is_measured = hours.rate(tiny_model)
    assert guess > 0 and not is_measured and time.monotonic() - start < 20
    hours.keep(tiny_model, 123.0)
    assert hours.rate(tiny_model) == (123.0, True)
    monkeypatch.setattr(hours.devices, 'kind', lambda: 'another')
    assert not hours.rate(tiny_model)[1]


def test_a_cache_that_cannot_be_written_or_read_is_no_matter(tiny_model, tmp_path, monkeypatch):
    (tmp_path / 'dpp_jax').write_text('no folder')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    hours.keep(tiny_model, 123.0)
    assert not hours.rate(tiny_model)[1]


@pytest.mark.parametrize(
    'sampler, count',
    [
        (dict(name='ddim', steps=50, guidance=0.0), 500),
        (dict(name='heun', steps=50, guidance=0.0), 990),
        (dict(name='heun', steps=50, guidance=0.5), 1980),
    ],
)
def test_a_sampler_evaluates_the_network_as_often_as_its_steps_say(sampler, count):
    assert hours.evaluations(10, **sampler) == count


def test_generation_takes_a_third_of_a_gradient_for_each_evaluation():
    assert hours.of_generation(300, 10.0) == pytest.approx(hours.of_trainings(100, 10.0)) == 10.0
