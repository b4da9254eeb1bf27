"""What is at once on a device: settings are obeyed, and the rest fits together."""

import jax
import pytest

from configs import digits_8, mnist_28
from dpp_jax.stages import plan, sizes


@pytest.mark.parametrize('images', [None, 1, 5, 8, 64, 1000])
@pytest.mark.parametrize('microbatch', [None, 1, 3, 50])
def test_draws_divide_and_no_more_than_the_images_set_go_together(images, microbatch):
    config = mnist_28.get_config('1')
    config.loop.images_at_once = images
    config.finetune.microbatch = microbatch
    found = sizes.choose(config)
    assert config.finetune.draws % found.draws == 0
    assert found.microbatch == (microbatch or found.microbatch)
    # One draw of each image of a microbatch is the least.
    assert found.microbatch * found.draws <= max(found.images, found.microbatch)
    assert found.images == (images or found.images)


def test_small_images_go_in_greater_numbers(monkeypatch):
    small, large = (sizes.choose(c.get_config('1')) for c in (digits_8, mnist_28))
    assert (large.microbatch, large.draws) == (1, 8)
    assert small.images > 10 * large.images
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert sizes.choose(mnist_28.get_config('1')) == sizes.Sizes(512, 16, 32)


@pytest.mark.parametrize('name', ['finetune.microbatch', 'loop.images_at_once'])
def test_sizes_that_cannot_be_are_named(name):
    config = mnist_28.get_config('1')
    config.update_from_flattened_dict({name: 0})
    with pytest.raises(ValueError, match=f'config.{name} is 0; it must be a whole number'):
        plan.check(config)
