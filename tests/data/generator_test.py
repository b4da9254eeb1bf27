"""The generator: fitted to mean features, it makes images of every class that have them."""

import jax
import numpy as np

from dpp_jax.data.generator import Generator
from dpp_jax.privacy.queries import FrequencyQuery

SHAPE = (6, 6, 1)


def blobs(count, seed=0):
    """Two classes: a bright left or right half, of varying brightness."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = np.zeros((count, *SHAPE))
    images[labels == 0, :, :3] = 1
    images[labels == 1, :, 3:] = 1
    return images * rng.uniform(0.4, 1, (count, 1, 1, 1)), labels


def test_a_fitted_generator_has_the_features_that_it_was_given_and_varies():
    images, labels = blobs(400)
    query = FrequencyQuery(classes=2, dimensions=36, features=500)
    embedding = np.stack(
        [query.embed(np.float32(images[labels == k]).reshape(-1, 36)).mean(0) for k in (0, 1)]
    )
    generator = Generator(image_shape=SHAPE, classes=2, width=32)
    start, step = generator.fitting(query.embed, steps=300, learning_rate=5e-3, images=64)
    state = start(jax.random.key(0))
    for number in range(300):
        state = step(state, jax.random.key(number), embedding)
    wanted = np.repeat([0, 1], 200)
    drawn = generator.draw(state[0], wanted, 5, 0)
    assert drawn.dtype == np.uint8 and drawn.shape == (400, *SHAPE)
    for label in (0, 1):
        own, real = drawn[wanted == label] / 255, images[labels == label]
        np.testing.assert_allclose(own.mean(0), real.mean(0), atol=0.12)
        bright = real.mean(0) > 0.1
        spread = own[:, bright].mean(1).std()
        assert 0.5 < spread / real[:, bright].mean(1).std() < 1.5


def test_images_depend_on_key_and_number_alone():
    generator = Generator(image_shape=SHAPE, classes=2, width=8)
    weights = generator.init(jax.random.key(0))
    labels = np.array([0, 1, 1, 0])
    first = generator.draw(weights, labels, 2**100, 3)
    np.testing.assert_array_equal(first, generator.draw(weights, labels, 2**100, 3))
    for other in ((2**100, 4), (2**99, 3)):
        assert (first != generator.draw(weights, labels, *other)).any()
