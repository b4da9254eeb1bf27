"""The queries: contribution of an image, sensitivity, estimate (mean and mode: DP-FETA, section 4.1).

A query takes a Poisson sample of the private images and releases, for every class, the sum of its sampled
images' contributions, with Gaussian noise of standard deviation σ·Δ (`mechanism`). One image belongs to one
class. If its contribution counts as nothing (zero-out, N fixed), or if it is added or removed, all classes'
sums together change by at most the norm Δ of one contribution; if it is replaced, by at most 2 Δ:

| query | contribution of an image with d pixels in [0, 1] | sensitivity Δ |
|---|---|---|
| mean | pixels minus `pixel_center` c | sqrt(d) max(c, 1 - c) |
| mean, `clip_norm` B | the same, scaled down to norm B where it is longer | min(B, the above) |
| mean, `class_counts` noisy | one more coordinate w = 0.2 Δ, which counts the image | sqrt(Δ² + w²) |
| mode | d one-hot histograms of `bins` bins | sqrt(d) |
| moments | vector minus center, scaled down to norm B, and its outer product; weighted | 1 |
| moments, `class_counts` noisy | one more coordinate, which counts the image; weighted | 1 |
| frequency | F random Fourier features, whose norm is 1 | 1 |
| frequency, `class_counts` noisy | one more coordinate, which counts the image; weighted | 1 |

Where the unit is a group of up to m images (`groups`), its contribution is the sum of theirs, over all
classes, scaled down as a whole to norm Δ where it is longer. Δ is as above: noisy counts shrink with what
they count, and votes weigh less. But public counts cannot know what was scaled: there Δ is m times as large,
and nothing is longer.

The estimate divides by n_c = q N / classes, a public constant, or by the noisy counts: post-processing. (The
PyTorch code divides by the sampled count of the class, which the noise does not cover.)

Mean and mode ask for central images, one value for every pixel and class. Moments come after them, around a
center that is computed from what they released (`moments`). The frequency query asks for mean features of
whole images, and needs no center.

A new query is one class here and one entry in `QUERIES`. Its fields are settings of its section by name.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dpp_jax.privacy import checks
from dpp_jax.privacy.queries.common import COUNT_WEIGHT, Query, Spread
from dpp_jax.privacy.queries.frequency import FrequencyQuery
from dpp_jax.privacy.queries.mean import MeanQuery
from dpp_jax.privacy.queries.mode import ModeQuery
from dpp_jax.privacy.queries.moments import MomentsQuery

__all__ = (
    'CENTRAL_KINDS',
    'COUNT_WEIGHT',
    'QUERIES',
    'FrequencyQuery',
    'MeanQuery',
    'ModeQuery',
    'MomentsQuery',
    'Query',
    'Spread',
    'make_query',
)
QUERIES: dict[str, type[Query]] = {
    'mean': MeanQuery,
    'mode': ModeQuery,
    'moments': MomentsQuery,
    'frequency': FrequencyQuery,
}
CENTRAL_KINDS = ('mean', 'mode')  # that ask for central images
# Settings that promise less noise or other sums: a query that cannot keep them must not drop them silently.
_PROMISES: Mapping[str, Any] = {'clip_norm': None, 'class_counts': 'public'}


def make_query(
    kind: str,
    *,
    classes: int,
    dimensions: int,
    settings: Mapping[str, Any],
    images_per_group: int | None = None,
) -> Query:
    """Make the query of this kind.

    Args:
        kind: a name in `QUERIES`.
        classes: number of classes.
        dimensions: values of an image.
        settings: by name; those that are fields of the query's class are used.
        images_per_group: as of `Query`.

    Raises:
        ValueError: the kind is unknown, a setting is out of range, or the query cannot use it.
    """
    names = ' or '.join(repr(name) for name in QUERIES)
    checks.require('kind', kind, kind in QUERIES, names)
    query = QUERIES[kind]
    own = {field.name for field in dataclasses.fields(query)}
    for name, unused in _PROMISES.items():
        if name not in own and settings.get(name, unused) != unused:
            raise ValueError(
                f'{name} is {settings[name]!r}, which the {kind} query cannot use; it must be {unused!r}, or '
                'another kind be chosen'
            )
    used = {name: value for name, value in settings.items() if name in own}
    return query(classes=classes, dimensions=dimensions, images_per_group=images_per_group, **used)
