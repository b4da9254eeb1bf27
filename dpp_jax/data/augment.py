"""Random changes of images, as pure functions of a key and an image: jit and vmap them freely.

`rand_augment`: RandAugment (Cubuk et al. 2019, arXiv 1909.13719) with the operations and magnitudes
of torchvision.transforms.RandAugment on Pillow images (nearest neighbour, fill 0).
`shift_rotate_zoom`: a small random movement, for images that are too small for RandAugment.

**Value range.** An image is float32 (H, W, C), C = 1 or 3. RandAugment takes INTEGER values 0..255
and returns integer values 0..255, the same as Pillow's to the last grey level (see
`image_operations`). `shift_rotate_zoom` interpolates: it takes and returns real values in [0, 255].
"""

from collections.abc import Callable
import functools
import inspect
import math
import numbers

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from dpp_jax.data import image_operations as ops

# In torchvision's order.
OPERATIONS = (
    *('identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate'),
    *('brightness', 'color', 'contrast', 'sharpness'),
    *('posterize', 'solarize', 'auto_contrast', 'equalize'),
)
# The operations fall into six programs, so that vmap, which runs every branch of a switch on every
# image, runs one warp and one blend instead of six and four.
_FIRST_BLEND = OPERATIONS.index('brightness')
_PROGRAM = np.array([0] * 6 + [1] * 4 + [2, 3, 4, 5], np.int32)

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def make_augmentation(name: str, **settings) -> Augmentation:
    """A name and its settings → (key, image) → image.

    Args:
        name: 'none'; 'rand_augment' (settings as of `rand_augment`); 'affine' (as of
            `shift_rotate_zoom`).
        **settings: 'none' ignores them, so that a config can switch augmentation off without
            taking its settings away.

    Returns:
        A pure function of a key and one image, see the module's text; the shape stays.

    Raises:
        ValueError: an unknown name or setting, or a value that is not allowed.
    """
    if name == 'none':
        return lambda key, image: image
    policies = {
        'rand_augment': (rand_augment, _check_rand_augment),
        'affine': (shift_rotate_zoom, _check_affine),
    }
    if name not in policies:
        allowed = ', '.join(repr(known) for known in ('none', *policies))
        raise ValueError(f'augmentation is {name!r}; it must be one of {allowed}')
    policy, check = policies[name]
    known = list(inspect.signature(policy).parameters)[2:]
    for setting in settings:
        if setting not in known:
            raise ValueError(f'augmentation {name!r} has no setting {setting!r}; it has {", ".join(known)}')
    check(**settings)
    return functools.partial(policy, **settings)


def rand_augment(
    key: jax.Array,
    image: jax.Array,
    *,
    operations: int = 2,
    magnitude: int = 3,
    bins: int = 31,
    random_magnitude: bool = True,
) -> jax.Array:
    """RandAugment: randomly chosen operations, one after another.

    Args:
        key: of jax.random.
        image: float32 (H, W, C), integer values 0..255.
        operations: how many are drawn, with replacement, ≥ 0.
        magnitude: m, the strongest level, in 1..bins - 1.
        bins: number of levels, ≥ 2; level bins - 1 is an operation's extreme.
        random_magnitude: True draws every operation's level uniformly from 1..m (the method's
            pre-training); False uses m (torchvision).

    Returns:
        float32 (H, W, C), integer values 0..255.

    Raises:
        ValueError: a setting or the image's shape or dtype is not as above.
    """
    _check_rand_augment(
        operations=operations,
        magnitude=magnitude,
        bins=bins,
        random_magnitude=random_magnitude,
    )
    _check_image(image)
    draws = draw_operations(
        key, operations=operations, magnitude=magnitude, random_magnitude=random_magnitude
    )

    def body(changed, draw):
        return apply_operation(changed, *draw, bins=bins), None

    return jax.lax.scan(body, image, draws)[0]


def draw_operations(
    key: jax.Array, *, operations: int, magnitude: int, random_magnitude: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `rand_augment` does with this key.

    Returns:
        index: int32 (operations,), into `OPERATIONS`, uniform.
        level: int32 (operations,), uniform in 1..magnitude, or magnitude.
        negative: bool (operations,), probability 1/2: flips signed operations.
    """
    index_key, level_key, sign_key = jax.random.split(key, 3)
    shape = (operations,)
    index = jax.random.randint(index_key, shape, 0, len(OPERATIONS))
    level = jnp.full(shape, magnitude, jnp.int32)
    if random_magnitude:
        level = jax.random.randint(level_key, shape, 1, magnitude + 1)
    return index, level, jax.random.bernoulli(sign_key, shape=shape)


def apply_operation(
    image: jax.Array, index: jax.Array, level: jax.Array, negative: jax.Array, *, bins: int = 31
) -> jax.Array:
    """One operation of RandAugment with torchvision's magnitude for a level.

    Args:
        image: float32 (H, W, C), integer values 0..255.
        index: int32 (), into `OPERATIONS`.
        level: int32 (), 0..bins - 1.
        negative: bool (), the sign of shears, translations, rotation, brightness, color, contrast
            and sharpness.
        bins: number of levels.

    Returns:
        float32 (H, W, C), integer values 0..255.
    """
    matrices, values = _tables(bins, *image.shape[:2])
    negative = jnp.asarray(negative).astype(jnp.int32)
    matrix = jnp.asarray(matrices)[index, level, negative]
    value = jnp.asarray(values)[index, level, negative]

    def blend():
        backgrounds = (ops.black, ops.grey, ops.mean_grey, ops.smooth)
        background = jax.lax.switch(index - _FIRST_BLEND, backgrounds, image)
        return ops.blend(background, image, value)

    programs = (
        lambda: ops.warp(image, matrix),
        blend,
        lambda: ops.posterize(image, value.astype(jnp.int32)),
        lambda: ops.solarize(image, value),
        lambda: ops.auto_contrast(image),
        lambda: ops.equalize(image),
    )
    return jax.lax.switch(jnp.asarray(_PROGRAM)[index], programs)


def shift_rotate_zoom(
    key: jax.Array,
    image: jax.Array,
    *,
    shift: float = 1.0,
    degrees: float = 10.0,
    zoom: float = 0.1,
) -> jax.Array:
    """A small random movement, bilinear, with zeros around the image.

    Args:
        key: of jax.random.
        image: float32 (H, W, C), values in [0, 255].
        shift: pixels, ≥ 0: each axis moves by a uniform draw from ±shift.
        degrees: ≥ 0: rotation around the centre, uniform in ±degrees.
        zoom: in [0, 1): scale, uniform in 1 ± zoom.

    Returns:
        float32 (H, W, C), real values in [0, 255].

    Raises:
        ValueError: a setting or the image's shape or dtype is not as above.
    """
    _check_affine(shift=shift, degrees=degrees, zoom=zoom)
    _check_image(image)
    shift_key, angle_key, zoom_key = jax.random.split(key, 3)
    offset = jax.random.uniform(shift_key, (2,), minval=-shift, maxval=shift)
    angle = jnp.deg2rad(jax.random.uniform(angle_key, minval=-degrees, maxval=degrees))
    scale = 1 + jax.random.uniform(zoom_key, minval=-zoom, maxval=zoom)
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    turn = jnp.array([[cos, -sin], [sin, cos]])
    # A border of zeros lets the image fade out over one pixel; dm-pix alone would cut it off where
    # a source lies outside the outermost pixels' centres.
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    center = (np.array(padded.shape[:2], np.float32) - 1) / 2
    # Written out: a matrix product may run in reduced precision on an accelerator.
    offset += center - (turn[:, 0] * center[0] + turn[:, 1] * center[1])
    matrix = jnp.eye(3, 4).at[:2, :2].set(turn).at[:2, 3].set(offset)
    with jax.default_matmul_precision('highest'):  # for dm-pix's coordinates, for the same reason
        moved = dm_pix.affine_transform(padded, matrix, order=1, mode='constant', cval=0.0)
    return jnp.clip(moved[1:-1, 1:-1], 0, 255)  # weights may sum to 1 + 1e-7


# ---- magnitudes and checks ----------------------------------------------------------------------


@functools.cache
def _tables(bins: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's magnitudes, by [operation, level, sign (1: negative)].

    → matrices for `image_operations.warp`, int32 (14, bins, 2, 6) (the identity for operations that
    are no warps), and the other magnitudes as the operations take them, float32 (14, bins, 2).
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
        for level, magnitude in enumerate(_linspace(0.0, extreme, bins)):
            pair = [matrix(float(magnitude)), matrix(-float(magnitude))]
            matrices[OPERATIONS.index(name), level] = pair
    change = _linspace(0.0, 0.9, bins).astype(np.float64)
    values[_FIRST_BLEND : _FIRST_BLEND + 4] = np.stack([1 + change, 1 - change], axis=-1)
    lost = np.arange(bins, dtype=np.float32) / np.float32((bins - 1) / 4)
    values[OPERATIONS.index('posterize')] = 8 - np.round(lost)[:, None]
    values[OPERATIONS.index('solarize')] = _linspace(255.0, 0.0, bins)[:, None]
    return matrices, values


def _linspace(start: float, stop: float, bins: int) -> np.ndarray:
    """torch.linspace in float32: the first half counts from `start`, the second from `stop`."""
    step = np.float64((np.float32(stop) - np.float32(start)) / np.float32(bins - 1))
    index = np.arange(bins)
    # In double precision and then rounded once, like the fused operation that PyTorch uses.
    up, down = np.float32(start) + step * index, np.float32(stop) - step * index[::-1]
    return np.where(index < bins // 2, up, down).astype(np.float32)


def _check_rand_augment(
    operations: int = 2, magnitude: int = 3, bins: int = 31, random_magnitude: bool = True
) -> None:
    """Raise a ValueError that names the setting."""
    for name, value in (('operations', operations), ('magnitude', magnitude), ('bins', bins)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ValueError(f'{name} is {value!r}; it must be a whole number')
    if not isinstance(random_magnitude, bool):
        raise ValueError(f'random_magnitude is {random_magnitude!r}; it must be True or False')
    if operations < 0:
        raise ValueError(f'operations is {operations}; it must be >= 0')
    if bins < 2:
        raise ValueError(f'bins is {bins}; it must be >= 2')
    if not 1 <= magnitude < bins:
        raise ValueError(f'magnitude is {magnitude}; it must be in 1..{bins - 1} (bins - 1)')


def _check_affine(shift: float = 1.0, degrees: float = 10.0, zoom: float = 0.1) -> None:
    """Raise a ValueError that names the setting."""
    for name, value in (('shift', shift), ('degrees', degrees), ('zoom', zoom)):
        if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
            raise ValueError(f'{name} is {value!r}; it must be a finite number >= 0')
    if zoom >= 1:
        raise ValueError(f'zoom is {zoom}; it must be in [0, 1)')


def _check_image(image: jax.Array) -> None:
    """Raise a ValueError for another shape or dtype than the module's."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != jnp.float32:
        raise ValueError(f'image is {image.dtype} {image.shape}; it must be float32 (H, W, C), C = 1 or 3')
