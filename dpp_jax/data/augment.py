"""Random changes of images for pre-training.

Each augmentation is a frozen dataclass of its settings. Called with a key and an image it is a pure
function: jit and vmap it freely. An image is float32 (H, W, C), C = 1 or 3, with values in [0, 255],
and keeps its shape. A new augmentation is one class and one entry of `AUGMENTATIONS`.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import numbers

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.data import image_operations as ops

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]

# Of RandAugment, in torchvision's order.
OPERATIONS = (
    *('identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate'),
    *('brightness', 'color', 'contrast', 'sharpness'),
    *('posterize', 'solarize', 'auto_contrast', 'equalize'),
)
# The operations fall into six programs: vmap runs every branch of a switch on every image, and so runs
# one warp and one blend instead of six and four.
_FIRST_BLEND = OPERATIONS.index('brightness')
_PROGRAM = np.array([0] * 6 + [1] * 4 + [2, 3, 4, 5], np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unchanged:
    """No augmentation."""

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Return the image as it is."""
        return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment: randomly chosen operations, one after another.

    Cubuk et al. 2019, arXiv 1909.13719, with the operations and magnitudes of
    torchvision.transforms.RandAugment (nearest neighbor, fill 0).

    Attributes:
        operations: how many are drawn, with replacement, at least 0.
        magnitude: m, the strongest level, in 1..bins - 1.
        bins: number of levels, at least 2; level bins - 1 is an operation's extreme.
        random_magnitude: True draws the level of each operation uniformly from 1..m, as DP-FETA does;
            False uses m, as torchvision does.
    """

    operations: int = 2
    magnitude: int = 3
    bins: int = 31
    random_magnitude: bool = True

    def __post_init__(self):
        """Raise a ValueError that names the setting, its value and what is allowed."""
        for name, least in (('operations', 0), ('magnitude', 1), ('bins', 2)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f'{name} is {value!r}; it must be a whole number, at least {least}')
        if self.magnitude >= self.bins:
            raise ValueError(f'magnitude is {self.magnitude}; it must be in 1..{self.bins - 1} (bins - 1)')
        if not isinstance(self.random_magnitude, bool):
            raise ValueError(f'random_magnitude is {self.random_magnitude!r}; it must be True or False')

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Return an augmented image.

        Args:
            key: of jax.random.
            image: float32 (H, W, C), whole numbers in 0..255.

        Returns:
            float32 (H, W, C), whole numbers in 0..255.

        Raises:
            ValueError: the image has another shape or dtype.
        """
        _check_image(image)

        def body(changed, draw):
            return apply_operation(changed, *draw, bins=self.bins), None

        return jax.lax.scan(body, image, self.draw(key))[0]

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what the augmentation does with this key.

        Returns:
            index: int32 (operations,), into `OPERATIONS`, uniform.
            level: int32 (operations,), uniform in 1..magnitude, or magnitude.
            negative: bool (operations,), probability 1/2: flips signed operations.
        """
        index_key, level_key, sign_key = jax.random.split(key, 3)
        shape = (self.operations,)
        index = jax.random.randint(index_key, shape, 0, len(OPERATIONS))
        level = jnp.full(shape, self.magnitude, jnp.int32)
        if self.random_magnitude:
            level = jax.random.randint(level_key, shape, 1, self.magnitude + 1)
        return index, level, jax.random.bernoulli(sign_key, shape=shape)


def apply_operation(
    image: jax.Array, index: jax.Array, level: jax.Array, negative: jax.Array, *, bins: int
) -> jax.Array:
    """Return the image after one operation of RandAugment.

    Args:
        image: float32 (H, W, C), whole numbers in 0..255.
        index: int32 (), into `OPERATIONS`.
        level: int32 (), 0..bins - 1.
        negative: bool (), the sign of shears, translations, rotation, brightness, color, contrast
            and sharpness.
        bins: number of levels.

    Returns:
        float32 (H, W, C), whole numbers in 0..255.
    """
    matrices, values = _magnitudes(bins, *image.shape[:2])
    negative = jnp.asarray(negative).astype(jnp.int32)
    matrix = jnp.asarray(matrices)[index, level, negative]
    value = jnp.asarray(values)[index, level, negative]

    def blend():
        backgrounds = (ops.black, ops.gray, ops.mean_gray, ops.smooth)
        background = jax.lax.switch(index - _FIRST_BLEND, backgrounds, image)
        return ops.blend(background, image, value)

    programs = (
        lambda: ops.warp(image, matrix),
        blend,
        lambda: ops.posterize(image, value),
        lambda: ops.solarize(image, value),
        lambda: ops.auto_contrast(image),
        lambda: ops.equalize(image),
    )
    return jax.lax.switch(jnp.asarray(_PROGRAM)[index], programs)


@functools.cache
def _magnitudes(bins: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return torchvision's magnitudes by [operation, level, sign (1: negative)].

    Returns:
        matrices: for `image_operations.warp`, int32 (14, bins, 2, 6); the identity where an operation
            is no warp.
        values: the other magnitudes as the operations take them, float32 (14, bins, 2).
    """
    matrices = np.tile(ops.shear_x_matrix(0.0), (len(OPERATIONS), bins, 2, 1))
    values = np.zeros((len(OPERATIONS), bins, 2), np.float32)
    warps = {
        'shear_x': (0.3, ops.shear_x_matrix),
        'shear_y': (0.3, ops.shear_y_matrix),
        'translate_x': (150.0 / 331.0 * width, lambda right: ops.translate_matrix(right, 0)),
        'translate_y': (150.0 / 331.0 * height, lambda down: ops.translate_matrix(0, down)),
        'rotate': (30.0, lambda degrees: ops.rotate_matrix(degrees, height, width)),
    }
    for name, (extreme, matrix) in warps.items():
        for level, magnitude in enumerate(np.linspace(0.0, extreme, bins)):
            matrices[OPERATIONS.index(name), level] = [matrix(magnitude), matrix(-magnitude)]
    change = np.linspace(0.0, 0.9, bins)
    values[_FIRST_BLEND : _FIRST_BLEND + 4] = np.stack([1 + change, 1 - change], axis=-1)
    values[OPERATIONS.index('posterize')] = 8 - np.round(np.linspace(0.0, 4.0, bins))[:, None]
    values[OPERATIONS.index('solarize')] = np.linspace(255.0, 0.0, bins)[:, None]
    return matrices, values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """A small random movement, for images that are too small for RandAugment.

    Attributes:
        shift: pixels, at least 0: each axis moves by a uniform draw from ±shift.
        degrees: at least 0: rotation around the center, uniform in ±degrees.
        zoom: in [0, 1): scale, uniform in 1 ± zoom.
    """

    shift: float = 1.0
    degrees: float = 10.0
    zoom: float = 0.1

    def __post_init__(self):
        """Raise a ValueError that names the setting, its value and what is allowed."""
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                raise ValueError(f'{name} is {value!r}; it must be a finite number, at least 0')
        if self.zoom >= 1:
            raise ValueError(f'zoom is {self.zoom}; it must be in [0, 1)')

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Return the moved image, bilinear, with zeros around it.

        Args:
            key: of jax.random.
            image: float32 (H, W, C), values in [0, 255].

        Returns:
            float32 (H, W, C), values in [0, 255], not whole numbers.

        Raises:
            ValueError: the image has another shape or dtype.
        """
        _check_image(image)
        shift_key, angle_key, zoom_key = jax.random.split(key, 3)
        offset = jax.random.uniform(shift_key, (2,), minval=-self.shift, maxval=self.shift)
        angle = jnp.deg2rad(jax.random.uniform(angle_key, minval=-self.degrees, maxval=self.degrees))
        scale = 1 + jax.random.uniform(zoom_key, minval=-self.zoom, maxval=self.zoom)
        cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
        turn = jnp.array([[cos, -sin], [sin, cos]])
        # A border of zeros lets the image fade out over one pixel; dm-pix alone would cut it off where
        # a source lies outside the outermost pixels' centers.
        padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
        center = (np.array(padded.shape[:2], np.float32) - 1) / 2
        # Written out: a matrix product may run in reduced precision on an accelerator.
        offset += center - (turn[:, 0] * center[0] + turn[:, 1] * center[1])
        matrix = jnp.eye(3, 4).at[:2, :2].set(turn).at[:2, 3].set(offset)
        with jax.default_matmul_precision('highest'):  # for dm-pix's coordinates, for the same reason
            moved = dm_pix.affine_transform(padded, matrix, order=1, mode='constant', cval=0.0)
        return jnp.clip(moved[1:-1, 1:-1], 0, 255)  # weights may sum to 1 + 1e-7


AUGMENTATIONS: dict[str, type] = {'none': Unchanged, 'rand_augment': RandAugment, 'affine': Affine}


def make_augmentation(name: str, **settings) -> Augmentation:
    """Return the augmentation of this name with these settings.

    Args:
        name: a key of `AUGMENTATIONS`.
        **settings: attributes of that entry's class; the others have defaults.

    Returns:
        (key, image) → image, a pure function.

    Raises:
        ValueError: an unknown name or setting, or a value that is not allowed.
    """
    if name not in AUGMENTATIONS:
        allowed = ', '.join(repr(known) for known in AUGMENTATIONS)
        raise ValueError(f'augmentation is {name!r}; it must be one of {allowed}')
    known = [field.name for field in dataclasses.fields(AUGMENTATIONS[name])]
    for setting in settings:
        if setting not in known:
            allowed = ', '.join(known) or 'none'
            raise ValueError(f'augmentation {name!r} has no setting {setting!r}; its settings: {allowed}')
    return AUGMENTATIONS[name](**settings)


def _check_image(image: jax.Array) -> None:
    """Raise a ValueError for another shape or dtype than the module's."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != jnp.float32:
        raise ValueError(f'image is {image.dtype} {image.shape}; it must be float32 (H, W, C), C = 1 or 3')
