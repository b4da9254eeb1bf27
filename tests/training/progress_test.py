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
            minutes, seconds = re.search(r'<(\d\d):(\d\d),', str(bar)).groups()
            assert int(minutes) * 60 + int(seconds) == pytest.approx((100 - bar.n) * 3, abs=1)


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


def test_a_log_file_gets_whole_lines_and_nothing_of_what_is_quick(clock, capsys):
    for name, seconds in (('slow', 10), ('quick', 0.1)):
        with progress.bar(113, name, 'query') as bar:
            clock.now += 400 if name == 'slow' else 1  # the compiler's
            bar.update()
            for _ in range(12):
                clock.now += seconds
                bar.update(2)
    told = capsys.readouterr().err
    assert '\r' not in told and told.endswith('\n')
    assert told.splitlines() == [
        'slow: 1 of 113 queries',
        'slow: 7 of 113 queries, 5.0 s/query, 8:50 left',
        'slow: 13 of 113 queries, 5.0 s/query, 8:20 left',
        'slow: 19 of 113 queries, 5.0 s/query, 7:50 left',
        'slow: 25 of 113 queries, 5.0 s/query, 7:20 left',
        'slow: 25 of 113 queries, took 8:40',
    ]


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    with progress.bar(20, 'finetune', 'step') as bar:
        for _ in range(20):
            clock.now += 1
            bar.update()
    told = capsys.readouterr().err
    assert '\r' in told and '100%|' in told
