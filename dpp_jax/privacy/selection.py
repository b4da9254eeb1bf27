"""The selection among candidates: a noisy count of the private images that each classifies correctly.

Candidates are classifiers that were made of what is released already: each is a fixed function. Of k
candidates, an image's contribution has k coordinates: ½ where the candidate gives the image its label, and -½
where not. What is released is the sum over all images (q = 1), with Gaussian noise of standard deviation σ·Δ
in every coordinate (`mechanism`): once, for all candidates together. If an image counts as nothing
(zero-out), or is added or removed, the sum changes by its contribution, whose norm is √k / 2; if it is
replaced, by at most twice as much:

| unit | contribution | sensitivity Δ |
|---|---|---|
| image | ±½ for each candidate | √k / 2 |
| group | the mean of the contributions of its images that are used | √k / 2 |

One release or one for each classifier: with equal noise on each sum, both spend the same ε (T releases of k
sums have T times the squared sensitivity of one, as one of T k sums has). One has one entry and one key.

Sum over N, plus ½, estimates the accuracy: post-processing, and so is the choice of the largest.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import numpy as np

from dpp_jax.privacy import checks
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey, NoisySum

_MOST = 2**24  # float32 has every whole number up to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What is asked of the private images.

    Attributes:
        candidates: k ≥ 1.
        units: number of images, or of groups, ≥ 1: public; any number near it, where theirs is not.

    Raises:
        ValueError: a field is out of range.
    """

    candidates: int
    units: int

    def __post_init__(self):
        for name in ('candidates', 'units'):
            value = getattr(self, name)
            checks.require(name, value, checks.is_whole(value, 1), 'a whole number, at least 1')

    @property
    def sensitivity(self) -> float:
        """Δ: the largest L2 norm of one unit's contribution to the sums of all candidates together."""
        return math.sqrt(self.candidates) / 2

    def sum(self, is_right: np.ndarray, members: np.ndarray | None = None) -> np.float32:
        """Add up the contributions to the sum of one candidate, without error.

        Contributions are cut, towards zero, to whole multiples of a public power of two, and a sum to what
        float32 has every multiple of: neither brings two sums further apart.

        Args:
            is_right: (n,) bool, of every private image whether it got its label.
            members: (groups, m), as of `groups.choose`; None: the unit is one image.
        """
        scale = 2 ** max(0, math.floor(math.log2(_MOST / self.units)))  # of one half
        signs = 2 * np.asarray(is_right, np.int64) - 1
        if members is None:
            whole = scale * signs
        else:
            is_there = members >= 0
            of_group = np.where(is_there, signs[np.maximum(members, 0)], 0).sum(axis=1)
            sizes = is_there.sum(axis=1)  # at least 1
            whole = np.sign(of_group) * (scale * np.abs(of_group) // sizes)
        return np.float32(np.clip(whole.sum(), -_MOST, _MOST) / (2 * scale))

    def noisy(
        self,
        mechanism: GaussianMechanism,
        noise_key: NoiseKey,
        *,
        compiled: Callable[[Callable], Callable] = jax.jit,
    ) -> NoisySum:
        """Join the sums with their noise: (index, sums) → (estimated accuracies, ledger entry).

        `sums` are float32 (candidates,), one of `sum` for each; so are the accuracies, in [0, 1] but for the
        noise.

        Raises:
            ValueError: the mechanism's sensitivity is below the query's, or it takes a sample.
        """
        is_covered = mechanism.sensitivity >= self.sensitivity
        allowed = f'at least {self.sensitivity!r}, the sensitivity of the selection'
        checks.require('sensitivity', mechanism.sensitivity, is_covered, allowed)
        q = mechanism.sampling_probability
        checks.require('sampling_probability', q, q == 1, '1: every image is asked')

        def checked(sums: jax.Array) -> tuple[jax.Array, None]:
            is_good = sums.shape == (self.candidates,)
            checks.require('sums', sums.shape, is_good, f'({self.candidates},), one for each candidate')
            return sums, None

        return mechanism.noisy(
            checked,
            noise_key,
            then=lambda noisy, *_: noisy / self.units + 0.5,
            compiled=compiled,
        )
