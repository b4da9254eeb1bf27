"""The checks that every set of images passes."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpp_jax.data import images

IMAGES = np.zeros((6, 4, 4, 1), np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0])


@pytest.mark.parametrize(
    ('wrong', 'text'),
    [
        (IMAGES[:0], r'toys: the images have shape \(0, 4, 4, 1\); there must be at least one'),
        (np.float32(IMAGES), 'toys: the images are float32 of shape .* must be uint8'),
        (IMAGES[:, :, 0, 0], r'of shape \(6, 4\); they must be'),
        (IMAGES[0], r'of shape \(4, 4, 1\); they must be'),
        (IMAGES[:, :, :3], r'toys: each image has shape \(4, 3, 1\); it must have shape \(4, 4, 1\)'),
    ],
)
def test_check_images_says_what_is_wrong(wrong, text):
    images.check_images(IMAGES, name='toys', image_shape=(4, 4, 1))
    with pytest.raises(ValueError, match=text):
        images.check_images(wrong, name='toys', image_shape=(4, 4, 1))


def test_any_image_shape_will_do_when_none_is_asked_for():
    images.check_images(IMAGES[:, :, :3], name='toys')


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({'labels': LABELS[:5]}, r'toys: the labels are int64 of shape \(5,\); .* \(6,\), one per image'),
        ({'labels': LABELS.astype(float)}, 'toys: the labels are float64'),
        (
            {'labels': np.array([0, 1, 2, 3, 0, 1])},
            r'go from 0 to 3; .* 0\.\.2, because config.data.classes is 3',
        ),
        ({'labels': np.array([0, 1, 2, -1, 0, 1])}, r'go from -1 to 2; .* 0\.\.2'),
        ({'labels': np.array([0, 2, 2, 0, 0, 2])}, 'toys: no image has class 1;'),
        ({'classes': 5}, 'toys: no image has class 3, 4;'),
        ({'classes': 0}, 'toys: classes is 0; it must be at least 1'),
    ],
)
def test_check_labels_says_what_is_wrong(changes, text):
    good = {'labels': LABELS, 'count': 6, 'classes': 3, 'name': 'toys'}
    images.check_labels(**good)
    with pytest.raises(ValueError, match=text):
        images.check_labels(**good | changes)


def test_a_class_may_be_missing_where_that_is_allowed():
    images.check_labels(LABELS, count=6, classes=5, name='toys', every_class=False)


def test_checks_return_numpy_arrays_of_the_same_values():
    checked = images.check_images(jnp.asarray(IMAGES), name='toys')
    assert isinstance(checked, np.ndarray)
    np.testing.assert_array_equal(checked, IMAGES)
    checked = images.check_labels(jnp.asarray(LABELS), count=6, classes=3, name='toys')
    assert isinstance(checked, np.ndarray)
    np.testing.assert_array_equal(checked, LABELS)
