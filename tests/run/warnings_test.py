"""Warnings come where the paper's settings cannot work, not where they do, and each has its figure."""

import numpy as np
import pytest

from dpp_jax import build
from dpp_jax.configs import camelyon_32, celeba_32, digits_8, fmnist_28, mnist_14, mnist_28, mnist_28_hour
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey
from dpp_jax.run import warnings
from dpp_jax.stages import plan

CONFIGS = (camelyon_32, celeba_32, digits_8, fmnist_28, mnist_14, mnist_28, mnist_28_hour)


def found(config):
    return plan.warnings_of(config, build.plan(config, build.model(config)))


@pytest.mark.parametrize(
    'module, epsilon',
    # At ε = 1, 1,437 digits are few.
    [(module, '10') for module in CONFIGS] + [(module, '1') for module in CONFIGS if module != digits_8],
    ids=lambda value: getattr(value, '__name__', value).rpartition('.')[2],
)
def test_shipped_configs_have_none_at_the_epsilons_of_the_paper(module, epsilon):
    assert found(module.get_config(epsilon)) == []


def test_a_few_images_with_the_settings_of_many_are_warned_of():
    config = celeba_32.get_config('1')
    config.data.update(train_images=90)
    config.finetune.batch_size = 64
    texts = found(config)
    assert [text.split(':')[0][:40] for text in texts] == [text[:40] for text in texts] and len(texts) == 3
    classes, images, steps = texts
    assert '45.0 per class' in classes
    assert 'times the gray range' in images and 'query.sampling_probability=1, query.queries=2' in images
    assert 'finetune.batch_size=90 (' in steps
    assert all('What helps' in text and '\n' not in text for text in texts)


@pytest.mark.parametrize('kind', ['mean', 'mode'])
def test_settings_that_a_warning_names_spend_no_more(kind):
    config = celeba_32.get_config('1')
    config.data.update(train_images=900)
    config.finetune.batch_size = 256
    config.query.kind = kind
    before = build.plan(config, build.model(config)).budget.spent('central_query')
    (text,) = [text for text in found(config) if 'central image' in text]
    sigma = float(text.partition('query.noise_multiplier=')[2].split()[0])
    config.query.update(sampling_probability=1.0, queries=2, noise_multiplier=sigma)
    assert build.plan(config, build.model(config)).budget.spent('central_query') <= before


def test_the_noise_of_a_pixel_is_what_a_query_adds():
    """On images that are all black, what comes back is the noise."""
    import jax

    config = digits_8.get_config('10')
    config.query.update(noise_multiplier=2.0, sampling_probability=0.5)
    query, n, classes = build.query(config), 400, 10
    mechanism = GaussianMechanism(
        name='central_query', noise_multiplier=2.0, sampling_probability=0.5, sensitivity=query.sensitivity
    )
    keys = jax.random.split(jax.random.key(3), 4)
    ask = query.noisy(mechanism, NoiseKey(identifier='test', keys=keys), 0.5 * n, n)
    batch = {'images': np.zeros((n, 8, 8, 1), np.uint8), 'labels': np.arange(n) % classes}
    answers = [np.asarray(ask(i, batch, np.zeros(n, bool))[0]) for i in range(8)]
    measured = np.std(np.stack(answers), axis=(1, 2, 3, 4)).mean()
    assert measured == pytest.approx(warnings.image_noise(2.0, query.sensitivity, 0.5, n / classes), rel=0.03)


@pytest.mark.parametrize('counts, is_told', [('public', True), ('noisy', False)])
def test_public_counts_of_groups_are_warned_of(counts, is_told):
    config = digits_8.get_config('10')
    config.dp.update(unit='group', images_per_group=2)
    config.data.update(groups='person', train_groups=719)
    config.query.class_counts = counts
    assert any("query.class_counts='noisy'" in text for text in found(config)) == is_told
