"""What cannot be computed is known from public numbers."""

import pytest

from dpp_jax.evaluation import needs


@pytest.mark.parametrize(
    'changes, lines',
    [
        ({}, []),
        ({'classes': 1}, ['config.data.classes is 1; classifiers need at least 2']),
        ({'classes': 1, 'fid': False}, ['config.data.classes is 1']),
        ({'classes': 1, 'fid': False, 'classifiers': 0}, []),
        ({'test_images': 1}, ['the test set has 1 image(s); the FID of real test images needs at least 2']),
        ({'test_images': 1, 'fid': False}, []),
        ({'classes': 1, 'test_images': 1}, ['config.data.classes is 1', 'the test set has 1 image(s)']),
    ],
    ids=repr,
)
def test_what_will_be_left_out_is_said_with_the_reason(changes, lines):
    good = {'classes': 2, 'test_images': 2, 'fid': True, 'classifiers': 3}
    found = needs.left_out(**good | changes)
    assert len(found) == len(lines)
    assert all(line in told for line, told in zip(lines, found))
