"""What cannot work, told before it is spent: noise against signal, by numbers of the plan alone.

Every warning gives its figure and what would help. None refuses a run: a threshold is a judgment. Of what ran
elsewhere there is none: nothing can be changed.
"""

import dataclasses
import math

from dpp_jax.data import class_moments
from dpp_jax.privacy import accounting, calibration
from dpp_jax.privacy import budget as budget_lib
from dpp_jax.privacy.budget import CENTRAL_QUERY, DP_SGD, FREQUENCY, MOMENTS, QUERIES, Budget, Releases
from dpp_jax.privacy.queries import FrequencyQuery, MomentsQuery

# A central image with half of the gray range as noise shows nothing; the shipped configs have 0.02 to 0.24.
_MOST_IMAGE_NOISE = 0.5
# Noise of a DP-SGD step over the largest sum of clipped gradients: the paper's settings have 1 to 4.
_MOST_STEP_NOISE = 10.0
# An eigenvalue that stands out, over the largest variance of a class: digits have five or six above 0.05.
_MOST_EDGE = 0.25
_MOST_FEATURE_NOISE = 0.3  # of a class's mean features, whose norm is at most 1
_FEWEST_IMAGES_PER_CLASS = 100
_QUERIES_OF_ALL = 2  # that are given as advice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What a warning about central images needs to know.

    Attributes:
        kind: of the query.
        sensitivity: Δ of one query.
        downsample: factor by which images are reduced for it.
        most_downsample: the largest that is allowed.
        is_scaled_by_group: whether Δ is so many times as large as a group has images.
    """

    kind: str
    sensitivity: float
    downsample: int
    most_downsample: int
    is_scaled_by_group: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsQuestion:
    """What a warning about class moments needs to know.

    Attributes:
        query: what is asked.
        images_per_class: a public number.
        is_used: whether the model, its pre-training or the synthetic images depend on them.
    """

    query: MomentsQuery
    images_per_class: float
    is_used: bool

    @property
    def most(self) -> float:
        """The largest variance that a class can have, of all frequencies together: B²."""
        return self.query.clip_norm**2

    def edge(self, releases: Releases) -> float:
        """Compute the eigenvalue above which one stands out of the noise."""
        sampled = releases.mechanism.sampling_probability * self.images_per_class
        _, noise = self.query.noise(releases.mechanism.noise_multiplier, sampled)
        return class_moments.edge(noise, self.query.dimensions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyQuestion:
    """What a warning about the frequency query needs to know.

    Attributes:
        query: what is asked.
        images_per_class: a public number.
        steps: of pre-training, on images of the generator.
    """

    query: FrequencyQuery
    images_per_class: float
    steps: int

    def noise(self, releases: Releases) -> float:
        """Compute the noise (standard deviation) of mean features in any direction; their norm is <= 1."""
        sampled = releases.mechanism.sampling_probability * self.images_per_class
        return self.query.noise(releases.mechanism.noise_multiplier, sampled)


def find(
    budget: Budget,
    *,
    images: int,
    classes: int,
    parameters: int,
    batch_size: float,
    question: Question,
    moments: MomentsQuestion | None = None,
    frequency: FrequencyQuestion | None = None,
    smallest_class: int | None = None,
) -> list[str]:
    """Return one text for each thing that cannot work.

    Args:
        budget: of the plan.
        images: N, as the plan has it.
        classes: among which they are divided.
        parameters: d of the network.
        batch_size: B, expected images of a DP-SGD step.
        question: what the query asks.
        moments: what the query for class moments asks; None: there is none.
        frequency: what the frequency query asks; None: there is none.
        smallest_class: private images of the smallest class; None: not known.
    """
    found = [
        _class_size(images, classes, smallest_class),
        _central_images(budget, images / classes, question, smallest_class),
        _public_counts(budget, question),
        _moments(budget, moments),
        _frequency(budget, frequency),
        _steps(budget, images, parameters, batch_size),
    ]
    return [text for text in found if text]


def image_noise(sigma: float, sensitivity: float, sampling_probability: float, per_class: float) -> float:
    """Compute the standard deviation of a pixel's noise, where the gray range is 1.

    For the mode query: of a count of votes, where 1 is the votes of a whole class.
    """
    return sigma * sensitivity / (sampling_probability * per_class)


def step_noise(sigma: float, parameters: int, batch_size: float) -> float:
    """Compute the norm of a step's noise, σ C √d, over the largest norm of the sum without it, B C."""
    return sigma * math.sqrt(parameters) / batch_size


def _class_size(images: int, classes: int, smallest_class: int | None) -> str | None:
    what_helps = (
        f'few: only what many images have in common can be learned. What helps: {_FEWEST_IMAGES_PER_CLASS} '
        f'{"per class, or fewer classes (data.classes)" if classes > 1 else "or more"}'
    )
    if images < _FEWEST_IMAGES_PER_CLASS * classes:
        number = f'{images:,} private images'
        if classes > 1:
            number += f' in {classes} classes are {images / classes:,.1f} per class, which'
        return f'{number} {"is" if classes > 1 else "are"} {what_helps}'
    if smallest_class is not None and smallest_class < _FEWEST_IMAGES_PER_CLASS:
        return f'the smallest class has {smallest_class:,} private images, which is {what_helps}'
    return None


def _public_counts(budget: Budget, question: Question) -> str | None:
    asked = budget.of(CENTRAL_QUERY)
    if not question.is_scaled_by_group or asked is None or asked.declared:
        return None
    return (
        f'the sensitivity of the query, {question.sensitivity:.4g}, is that of all of a group, because '
        "class counts are public. query.class_counts='noisy' has that of about one image, at the same ε"
    )


def _central_images(
    budget: Budget, per_class: float, question: Question, smallest_class: int | None
) -> str | None:
    asked = budget.of(CENTRAL_QUERY)
    if asked is None or asked.declared:
        return None
    sigma, q = asked.mechanism.noise_multiplier, asked.mechanism.sampling_probability
    whose = 'a central image'
    if smallest_class is not None and smallest_class < per_class / 2:
        # Noise is that of its sum, so few images stand against as much.
        per_class, whose = max(1, smallest_class), 'the central image of the smallest class'
    noise = image_noise(sigma, question.sensitivity, q, per_class)
    if noise <= _MOST_IMAGE_NOISE:
        return None
    if question.kind == 'mode':
        figure = f'{noise:,.2g} times the votes of a whole class'
    else:
        figure = f'{255 * noise:,.0f} gray levels, {noise:,.2g} times the gray range of 0 to 255'
    help_texts = [f'{math.ceil(per_class * noise / _MOST_IMAGE_NOISE):,} images per class']
    advice = _all_images(budget, per_class, question)
    if advice is not None:
        help_texts.append(advice)
    if question.downsample < question.most_downsample:
        factor = question.most_downsample / question.downsample
        help_texts.append(
            f'query.downsample up to {question.most_downsample} (noise {noise / factor:,.2g}, for that alone)'
        )
    if question.kind == 'mean':
        help_texts.append('query.clip_norm with query.pixel_center, as in digits_8')
    return (
        f'the noise of each pixel of {whose} has a standard deviation of {figure}: it shows '
        f'nothing. σ Δ / (q N / classes) = {sigma:.4g} x {question.sensitivity:.4g} / {q * per_class:,.4g}. '
        f'What helps: {"; ".join(help_texts)}'
    )


def _moments(budget: Budget, question: MomentsQuestion | None) -> str | None:
    releases = budget.of(MOMENTS)
    if releases is None:
        return None
    if not question.is_used:
        return _unused(budget, MOMENTS)
    share = question.edge(releases) / question.most
    if share <= _MOST_EDGE:
        return None
    factor = share / _MOST_EDGE
    return (
        f'hardly an eigenvalue of the class moments can stand out of the noise: only those above {share:.2g} '
        f'times the largest variance that a class can have, moments.clip_norm² = {question.most:.3g}. What '
        f'helps, each alone: moments.noise_multiplier={_down(releases.mechanism.noise_multiplier / factor)}; '
        f'moments.frequencies={max(1, math.floor(question.query.dimensions / factor**2))}; '
        f'{math.ceil(factor * question.images_per_class):,} images per class'
    )


def _frequency(budget: Budget, question: FrequencyQuestion | None) -> str | None:
    releases = budget.of(FREQUENCY)
    if releases is None:
        return None
    if not question.steps:
        return _unused(budget, FREQUENCY)
    noise = question.noise(releases)
    if noise <= _MOST_FEATURE_NOISE:
        return None
    factor = noise / _MOST_FEATURE_NOISE
    return (
        f'the noise of the mean features of a class is {noise:.2g} in every direction, and their norm is at '
        'most 1: the generator learns hardly more than noise. What helps, each alone: '
        f'frequency.noise_multiplier={_down(releases.mechanism.noise_multiplier / factor)}; '
        f'{math.ceil(factor * question.images_per_class):,} images per class'
    )


def _unused(budget: Budget, mechanism: str) -> str:
    """Say that the answer of a query is never used."""
    name, epsilon = QUERIES[mechanism], accounting.format_epsilon(budget.spent(mechanism))
    return (
        f'{name}.enabled spends ε = {epsilon} alone, and no training uses the answer: '
        f'pretrain.{name}_steps is 0. Pre-train on images drawn from it, or set {name}.enabled=False'
    )


def _all_images(budget: Budget, per_class: float, question: Question) -> str | None:
    """Say what noise fewer queries of all images have, that spend as much alone; None if none is better."""
    asked = budget.of(CENTRAL_QUERY)
    epsilon = budget.spent(CENTRAL_QUERY)
    if asked.mechanism.sampling_probability == 1:
        return None
    count = min(_QUERIES_OF_ALL, asked.count)
    try:
        sigma = calibration.calibrate(
            lambda sigma: accounting.subsampled_gaussian(sigma, 1.0, count), epsilon, budget.delta, 'rdp'
        )
    except ValueError:
        return None
    noise = image_noise(sigma, question.sensitivity, 1.0, per_class)
    return (
        f'query.sampling_probability=1, query.queries={count}, query.noise_multiplier={_up(sigma)} '
        f'(same ε; noise {noise:,.2g})'
    )


def _up(sigma: float) -> str:
    """Write σ with two decimals, rounded up."""
    return f'{math.ceil(100 * sigma) / 100:g}'


def _down(sigma: float) -> str:
    """Write σ with two decimals, rounded down."""
    return f'{math.floor(100 * sigma) / 100:g}'


def _steps(budget: Budget, images: int, parameters: int, batch_size: float) -> str | None:
    releases = budget.of(DP_SGD)
    sigma = releases.mechanism.noise_multiplier
    noise = step_noise(sigma, parameters, batch_size)
    if noise <= _MOST_STEP_NOISE or releases.declared:
        return None
    epochs = releases.count * releases.mechanism.sampling_probability
    tries = [
        (f'finetune.batch_size={images}', epochs, parameters),
        (f'finetune.epochs={max(1, round(epochs / 4))}', max(1, round(epochs / 4)), parameters),
        ('half of model.width', max(1, round(epochs / 4)), parameters / 4),
    ]
    helping = []
    for change, passes, size in tries:
        noise_then = _step_noise_of_all(budget, images, passes, size)
        if noise_then is not None:
            helping.append(f'{change} ({times(noise_then)} times)')
    helping = '; '.join([*helping, 'a larger ε', 'more images'])
    root = math.sqrt(parameters)
    return (
        f'the noise of each fine-tuning step is {times(noise)} times as long as the sum of clipped '
        f'gradients can be: σ C √d = {sigma:.4g} x C x {root:,.0f}, against B C = {batch_size:,.1f} x C '
        f"(1 to 4 times in the paper's settings). What helps, one change after the other: {helping}"
    )


def times(number: float) -> str:
    """Write how many times as long noise is, with two digits or more."""
    return f'{number:,.0f}' if number >= 9.5 else f'{number:.2g}'


def _step_noise_of_all(budget: Budget, images: int, epochs: float, parameters: float) -> float | None:
    """Compute the noise of a step on all images, as often as `epochs` says; None if no noise is enough."""
    free = lambda sigma: Releases(
        mechanism=dataclasses.replace(
            budget.of(DP_SGD).mechanism, noise_multiplier=sigma, sampling_probability=1.0
        ),
        count=max(1, round(epochs)),
    )
    known = [part for part in budget.releases if part.mechanism.name != DP_SGD]
    try:
        sigma = calibration.calibrate(
            lambda sigma: budget_lib.total_event([*budget.before, *known, free(sigma)]),
            budget.epsilon,
            budget.delta,
        )
    except ValueError:
        return None
    return step_noise(sigma, parameters, images)
