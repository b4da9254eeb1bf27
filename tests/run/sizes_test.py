"""What is at once on a device: settings are obeyed, and the rest fits together."""

import time
import types

import jax
import pytest

from dpp_jax import build
from dpp_jax.configs import digits_8, mnist_28
from dpp_jax.run import sizes
from dpp_jax.run.folder import WorkDir
from dpp_jax.training import devices


def choose(config):
    return build.sizes(config, build.model(config))


@pytest.mark.parametrize('images', [None, 1, 5, 8, 64, 1000])
@pytest.mark.parametrize('microbatch', [None, 1, 3, 50])
def test_draws_divide_and_no_more_than_the_images_set_go_together(images, microbatch):
    config = mnist_28.get_config('1')
    config.loop.images_at_once = images
    config.finetune.microbatch = microbatch
    found = choose(config)
    assert config.finetune.draws % found.draws == 0
    assert found.microbatch == (microbatch or found.microbatch)
    # One draw of each image of a microbatch is the least.
    assert found.microbatch * found.draws <= max(found.images, found.microbatch)
    assert found.images == (images or found.images)


def test_a_trial_does_two_microbatches(tiny_config):
    """The real one: it runs, and counts what it did."""
    config = tiny_config(finetune__microbatch=None, model__multipliers=(1,), model__attention_resolutions=())
    model, draws = build.model(config), config.finetune.draws
    at_once = sizes.choose(model, draws=draws, images_at_once=4)
    trial = sizes._trial(model, at_once, draws=draws, label_dropout=config.finetune.label_dropout)
    assert trial() == jax.local_device_count() * 2 * at_once.microbatch * draws
    assert at_once.microbatch == 2


@pytest.mark.parametrize(
    'size, count, expected',
    [
        (None, 8, sizes.Sizes(images=512, microbatch=16, draws=32)),
        (None, 4096, sizes.Sizes(images=512, microbatch=1, draws=16, devices_per_image=2)),
        (1, 1024, sizes.Sizes(images=512, microbatch=3, draws=32)),
        (8, 8, sizes.Sizes(images=512, microbatch=16, draws=4, devices_per_image=8)),
    ],
)
def test_devices_share_an_image_as_set_or_where_they_lack_images(size, count, expected, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    monkeypatch.setattr(devices, 'count', lambda: count)
    config = mnist_28.get_config('1')
    config.loop.images_at_once, config.finetune.devices_per_image = 512, size
    assert choose(config) == expected


def test_devices_that_cannot_form_teams_are_told():
    shared = sizes.Sizes(images=1, microbatch=1, draws=1, devices_per_image=2)
    shared.check_devices()
    with devices.limited_to(7), pytest.raises(ValueError, match='_per_image is 2; it must divide the 7 dev'):
        shared.check_devices()


def test_small_images_go_in_greater_numbers(monkeypatch):
    monkeypatch.setattr(devices, 'local', lambda: jax.local_devices()[:1])
    monkeypatch.setattr(devices, 'cores', lambda: 2)
    small, large = (choose(c.get_config('1')) for c in (digits_8, mnist_28))
    assert (large.microbatch, large.draws) == (1, 8)
    assert small.images > 10 * large.images
    monkeypatch.setattr(devices, 'cores', lambda: 8)
    assert choose(mnist_28.get_config('1')).images == 4 * large.images
    monkeypatch.setattr(devices, 'local', lambda: jax.local_devices()[:8])
    assert choose(mnist_28.get_config('1')).images == large.images // 2, 'one core for each'


@pytest.mark.parametrize(('gigabytes', 'images'), [(None, 512), (80, 512), (12, 128)])
def test_an_accelerator_holds_what_its_memory_allows(monkeypatch, gigabytes, images):
    device = types.SimpleNamespace(memory_stats=lambda: gigabytes and {'bytes_limit': gigabytes * 1e9})
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(devices, 'local', lambda: [device])
    assert choose(mnist_28.get_config('1')) == sizes.Sizes(images=images, microbatch=images // 32, draws=32)


def test_the_fastest_is_taken_if_it_is_clearly_faster():
    def call(images, seconds):
        def work():
            time.sleep(seconds)
            return images

        return work

    assert sizes.fastest({4: call(4, 0.04), 8: call(8, 0.02), 16: call(16, 0.2)}, 4) == 8
    assert sizes.fastest({4: call(4, 0.04), 8: call(8, 0.08)}, 4) == 4  # the same speed
    assert sizes.fastest({2: call(2, 0.02)}, 4) == 2  # what was preferred does not fit
    assert sizes.fastest({}, 4) == 4


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Trials of any number at once, of which half the rule's is the fastest; and who was tried."""
    tried, rule = [], choose(mnist_28.get_config('1')).images

    def trial(model, at_once, *, draws, label_dropout):
        tried.append(at_once.images)
        assert at_once == sizes.choose(model, draws=draws, images_at_once=at_once.images)
        if at_once.images == 2 * rule:
            return None  # too much for the memory
        return lambda: time.sleep(0.01 if at_once.images == rule // 2 else 0.05) or 1

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(sizes, '_trial', trial)
    return tried


def settle(root, noised_images, **changes):
    config = mnist_28.get_config('1')
    config.update_from_flattened_dict(changes)
    return build.settled_images(config, build.model(config), WorkDir(root).sizes, noised_images)


def test_a_long_training_is_worth_a_trial_that_is_not_repeated(trials, tmp_path):
    rule = choose(mnist_28.get_config('1')).images
    assert settle(tmp_path / 'one', 10**9) == rule // 2
    assert sorted(trials) == [rule // 4, rule // 2, rule, 2 * rule]
    assert settle(tmp_path / 'other', 10**9) == rule // 2
    assert len(trials) == 4


def test_a_short_training_and_what_the_user_sets_are_not_tried(trials, tmp_path):
    assert settle(tmp_path / 'short', 1000) == choose(mnist_28.get_config('1')).images
    assert settle(tmp_path / 'set', 10**9, **{'loop.images_at_once': 5}) == 5
    assert not trials and not (tmp_path / 'set').exists()


def test_a_folder_keeps_what_it_began_with_on_the_same_kind_of_device(trials, tmp_path, monkeypatch):
    """Another number would change the rounding of a run that goes on."""
    first = settle(tmp_path, 1000)
    assert settle(tmp_path, 10**9) == first and not trials
    monkeypatch.setattr(devices, 'kind', lambda: 'another')
    assert settle(tmp_path, 10**9) == first // 2 and trials
