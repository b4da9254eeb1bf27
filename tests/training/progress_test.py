"""Progress bars: what they say while the compiler works, and the time left."""

import json
import re

import pytest

from dpp_jax.training import progress


@pytest.fixture
def clock(monkeypatch):
    """A bar's clock, in seconds: `clock.now`."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(
        progress.Bar, '_time', property(lambda _: lambda: Clock.now, lambda *_: None), raising=False
    )
    return Clock


@pytest.mark.parametrize('initial', [0, 50])
def test_the_time_left_is_that_of_steady_steps(clock, initial):
    with progress.bar(100, 'finetune', 'step', initial) as bar:
        assert 'compiling …' in str(bar) and '?' in str(bar)
        clock.now += 400  # the compiler's
        bar.update()
        assert 'compiling' not in str(bar) and '?' in str(bar)
        for _ in range(9):
            clock.now += 3
            bar.update()
            rate = bar.format_dict['rate']
            assert rate == pytest.approx(1 / 3)
            left = (100 - bar.n) * 3
            assert f'<{left // 60:02d}:{left % 60:02d}' in str(bar)


def test_a_bar_that_compiles_nothing_does_not_say_so():
    with progress.bar(3, 'png files', 'image', compiles=False) as bar:
        assert 'compiling' not in str(bar)


def test_a_note_stays_through_the_first_step():
    with progress.bar(3, 'train cnn', 'step') as bar:
        bar.set_postfix_str('epoch 1/3', refresh=False)
        bar.update()
        assert re.search('1/3 .*epoch 1/3', str(bar))


def test_what_is_in_progress_is_noted_while_it_is(tmp_path, monkeypatch, clock):
    path = tmp_path / 'progress.json'
    monkeypatch.setattr(progress, '_NOTE_SECONDS', 0.0)
    with progress.noted(path), progress.bar(100, 'finetune', 'step') as bar:
        bar.update()
        note = json.loads(path.read_text(encoding='utf-8'))
        assert (note['name'], note['done'], note['total'], note['unit']) == ('finetune', 1, 100, 'step')
        assert 'seconds_left' not in note  # one step tells no rate
        for _ in range(9):
            clock.now += 2
            bar.update()
        assert json.loads(path.read_text(encoding='utf-8'))['seconds_left'] == pytest.approx(180, rel=0.05)
        assert path.stat().st_mode & 0o077 == 0
    assert not path.exists()
    with progress.bar(100, 'finetune', 'step') as bar:
        bar.update()
    assert not path.exists()
