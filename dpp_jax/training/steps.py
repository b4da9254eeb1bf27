"""The two training steps: an ordinary one, and DP-SGD (Abadi et al. 2016).

Both run under pmap and depend on a batch only through its real rows: the number of devices, the
microbatch and the padding change nothing but rounding.

A batch is a dict of arrays with a leading row axis: image (n, H, W, C) uint8, label (n,) int32,
index (n,) int32 (the image's number in its set), position (n,) int32 (the row's number in the logical
batch), mask (n,) bool (False: padding). Where the unit of privacy is a group of at most m images, a row is a
group: image (n, m, H, W, C), label and index (n, m), and present (n, m) bool (False: nobody's place).
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpp_jax.diffusion import microbatch as parts_lib
from dpp_jax.privacy import groups, poisson
from dpp_jax.privacy.clipping import Grid, Team, clipped_gradient_sum, saturated_sum
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey, NoisySum
from dpp_jax.training import devices
from dpp_jax.training.state import TrainState, apply_gradient

PyTree = Any
# (params, image (H, W, C) in [-1, 1], label (), key[, number of a share of the draws]) → scalar
ExampleLoss = Callable[..., jax.Array]
# (key, image float32 0..255) → the same
Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def make_batch(
    images: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    capacity: int,
    members: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Fetch the rows `indices` of images and labels, padded with zeros to a multiple of `capacity` rows.

    With `members` (see `groups.choose`), `indices` are groups, and rows have the images of each.
    """
    arrays = {'image': images, 'label': labels}
    if members is not None:
        arrays['index'] = np.arange(len(images), dtype=np.int32)
        batch, present = groups.fetch(arrays, members, indices, capacity)
        return batch | {
            'label': batch['label'].astype(np.int32),
            'position': np.arange(len(present), dtype=np.int32),
            'present': present,
            'mask': np.arange(len(present)) < len(indices),
        }
    batch, mask = poisson.fetch(arrays, indices, capacity)
    index = np.zeros(len(mask), np.int32)
    index[: len(indices)] = indices
    return {
        'image': batch['image'],
        'label': batch['label'].astype(np.int32),
        'index': index,
        'position': np.arange(len(mask), dtype=np.int32),
        'mask': mask,
    }


def to_model_range(image: jax.Array) -> jax.Array:
    """Map pixels 0..255 to [-1, 1] float32."""
    return image.astype(jnp.float32) / 127.5 - 1


def make_pretrain_step(
    draw: Callable,
    errors: Callable,
    optimizer: optax.GradientTransformation,
    *,
    augment: Augmentation,
    ema_decay: float,
    images_at_once: int | None = None,
) -> Callable:
    """Make (state, batch, key) → (state, metrics), for devices; the state's memory is reused.

    The gradient is that of the mean loss over the real rows of all devices. All their noised images are
    rows of one batch: nothing is computed per example.

    Args:
        draw: (label (), key) → what is random of one image's noised images, leaves (K, ...).
        errors: (params, images (n, H, W, C) in [-1, 1], rows of draws (n, ...)) → losses (n,).
        optimizer: of the weights.
        augment: of every image, before it is noised.
        ema_decay: of the averaged weights.
        images_at_once: noised images of a device that pass through the network together (None: all);
            it changes rounding only.
    """

    def step(state: TrainState, batch: dict, key: jax.Array):
        step_key = jax.random.fold_in(key, state.step)

        def noised(image, label, position):
            augment_key, draw_key = jax.random.split(jax.random.fold_in(step_key, position))
            pixels = augment(augment_key, image.astype(jnp.float32))
            return to_model_range(pixels), draw(label, draw_key)

        images, drawn = jax.vmap(noised)(batch['image'], batch['label'], batch['position'])
        draws = jax.tree.leaves(drawn)[0].shape[1]
        rows = {
            'image': jnp.repeat(images, draws, axis=0),
            'mask': jnp.repeat(batch['mask'], draws),
            'drawn': jax.tree.map(lambda leaf: leaf.reshape((-1,) + leaf.shape[2:]), drawn),
        }

        def part_loss(params, _, part):
            losses = errors(params, part['image'], part['drawn'])
            return jnp.sum(jnp.where(part['mask'], losses, 0))

        rows, number = _in_equal_parts(rows, images_at_once)
        mean_of_parts = parts_lib.mean(part_loss, number)
        total, gradient = jax.value_and_grad(
            # The vector is taken apart and its gradient put together here, not for every part.
            lambda params: number * mean_of_parts(params.tree(), None, rows)
        )(state.params)
        count = jnp.sum(rows['mask'])
        total, gradient, count = jax.lax.psum((total, gradient, count), devices.AXIS)
        gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
        return apply_gradient(state, gradient, optimizer, ema_decay), {'loss': total / count}

    return devices.parallel(step, in_axes=(0, 0, None), donate=(0,))


def _in_equal_parts(rows: dict, at_once: int | None) -> tuple[dict, int]:
    """Pad the rows so that they can be cut into equal parts, as few as `at_once` (None: all) allows.

    The last row is repeated, without its mask: 25 rows of which 4 go at once would otherwise be 25 parts of
    one, and every part adds up a gradient of all weights.

    Returns:
        the rows and the number of parts.
    """
    size = rows['mask'].size
    number = math.ceil(size / (at_once or size))
    more = number * math.ceil(size / number) - size
    more_of = lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], more, axis=0)])
    padded = jax.tree.map(more_of, rows)
    return padded | {'mask': padded['mask'] & (np.arange(size + more) < size)}, number


def make_dp_step(
    loss: ExampleLoss,
    optimizer: optax.GradientTransformation,
    mechanism: GaussianMechanism,
    noise_key: NoiseKey,
    *,
    expected_batch_size: float,
    rows: int,
    microbatch: int,
    ema_decay: float,
    devices_per_image: int = 1,
) -> NoisySum:
    """Make (index, state, batch, microbatches) → ((state, metrics), ledger entry), for devices.

    Per-example gradients, clipped to the mechanism's sensitivity, are summed over microbatches and devices.
    The mechanism adds its noise to that sum once: every device draws the same noise from the same key. The
    noisy sum is divided by the expected number of images, a public constant. The state's memory is reused.

    Where a row is a group, its gradient is that of the sum of its images' losses, and is clipped as a whole.

    Where several devices share an image, each computes a share of its noise draws; what they have is averaged
    before the norm is taken, and the row counts once. Batches are dealt by `devices.deal_to_teams`.

    The metrics are sums and means over private examples WITHOUT noise: for private/ only, and they decide
    nothing. The loss is NaN if no example's is finite.

    Args:
        loss: of one example. With `devices_per_image` > 1 its last argument is the number of a share of the
            draws, 0 <= share < `devices_per_image`; the example's loss is the mean over the shares.
        optimizer: of the weights.
        mechanism: its sensitivity is the clip norm C.
        noise_key: secret; the loss draws its random numbers from it, too, by the image's own number.
        expected_batch_size: q N images, a public constant. Images, also where a row is a group: the update is
            then the mean gradient of an image, and a learning rate means the same.
        rows: of a padded batch, of all devices: a public constant. Batches have so many, or a multiple.
        microbatch: examples of a device whose gradients exist at once; of a group, one image after the other.
        ema_decay: of the averaged weights.
        devices_per_image: that share each row, neighbors; divides the number of devices.

    Returns:
        the steps; `microbatches` (int32) is how many microbatches per device hold real rows.
    """

    grid = Grid(clip_norm=mechanism.sensitivity, rows=rows)
    team = Team(axis=devices.AXIS, size=devices_per_image) if devices_per_image > 1 else None

    def clipped_sum(draw_key, state: TrainState, batch: dict, microbatches: jax.Array):
        def image_loss(params, example):
            # By the image's own number: who else is in the batch must not change its draws.
            example_key = jax.random.fold_in(draw_key, example['index'])
            image = to_model_range(example['image'])
            share = () if team is None else (team.place,)
            return loss(params, image, example['label'], example_key, *share)

        def example_loss(params, example):
            of_row = image_loss if example['label'].ndim == 0 else functools.partial(_group_loss, image_loss)
            return of_row(params.tree(), example)

        def device_sums(part, microbatches):
            return clipped_gradient_sum(
                example_loss,
                state.params,
                {name: part[name] for name in ('image', 'label', 'index', 'present') if name in part},
                part['mask'],
                grid=grid,
                microbatch=microbatch,
                microbatches=microbatches,
                team=team,
            )

        own_rows = rows * devices_per_image // jax.lax.psum(1, devices.AXIS)
        parts = math.ceil(batch['mask'].size / own_rows)
        if parts == 1:
            units, sums = jax.lax.psum(device_sums(batch, microbatches), devices.AXIS)
        else:  # more images than anybody expected: an int32 may not hold their sum
            batch = jax.tree.map(lambda leaf: leaf.reshape(parts, own_rows, *leaf.shape[1:]), batch)
            full = own_rows // microbatch
            left = jnp.clip(microbatches - full * jnp.arange(parts), 0, full)
            device_parts = jax.lax.map(lambda part: device_sums(*part), (batch, left))
            units, sums = jax.lax.psum(device_parts, devices.AXIS)
            units, sums = jax.tree.map(saturated_sum, units), jax.tree.map(lambda s: s.sum(0), sums)
        return jax.tree.map(grid.decode, units), sums

    def update(noisy_sum, sums, state: TrainState, *_):
        gradient = jax.tree.map(lambda leaf: leaf / expected_batch_size, noisy_sum)
        state = apply_gradient(state, gradient, optimizer, ema_decay)
        return state, _dp_metrics(sums)

    return mechanism.noisy(
        clipped_sum,
        noise_key,
        then=update,
        compiled=lambda step: devices.parallel(step, in_axes=(0, 0, None, None, None), donate=(0,)),
        is_random=True,
    )


def _group_loss(image_loss: Callable[[PyTree, dict], jax.Array], params: PyTree, group: dict) -> jax.Array:
    """Add up the losses of a group's images, one after the other: only one image's activations are kept.

    Args:
        image_loss: (params, one image's leaves) → scalar.
        params: of the model.
        group: leaves (m, ...), with `present`.
    """

    def present_loss(params, _, image):
        image = jax.tree.map(lambda leaf: leaf[0], image)
        return jnp.where(image['present'], image_loss(params, image), 0)

    number = len(group['label'])
    return number * parts_lib.mean(present_loss, number)(params, None, group)


def _dp_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Compute what is written to private/ of the sums over a batch, see `make_dp_step`."""
    finite = sums['examples'] - sums['non_finite']
    rows = jnp.maximum(finite, 1)
    return {
        'loss': jnp.where((finite == 0) & (sums['examples'] > 0), jnp.nan, sums['loss'] / rows),
        'gradient_norm': sums['norm'] / rows,
        'clipped_share': sums['clipped'] / rows,
        'non_finite': sums['non_finite'],
        'batch_size': sums['examples'],
    }


def used_microbatches(rows: int, microbatch: int, devices_per_image: int = 1) -> np.int32:
    """Return the microbatches per device that hold real rows when `rows` rows are dealt to all devices."""
    per_device = -(-rows * devices_per_image // devices.count())
    return np.int32(-(-per_device // microbatch))
