"""The two training steps: an ordinary one, and DP-SGD (Abadi et al. 2016).

Both run under pmap and depend on a batch only through its real rows: the number of devices, the
microbatch and the padding change nothing but rounding.

A batch is a dict of arrays with a leading row axis: image (n, H, W, C) uint8, label (n,) int32,
index (n,) int32 (the image's number in its set), position (n,) int32 (the row's number in the logical
batch), mask (n,) bool (False: padding). Where the unit of privacy is a group of at most m images, a row is a
group: image (n, m, H, W, C), label and index (n, m), and present (n, m) bool (False: nobody's place). Beside
them, `gaussians` is what the denoiser is around, if anything (`Model.denoiser`), the same on every device.
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
from dpp_jax.privacy import groups, poisson, shares
from dpp_jax.privacy.clipping import Grid, Team, add_to_halves, clipped_gradient_sum, join_halves
from dpp_jax.privacy.mechanism import GaussianMechanism, NoiseKey, NoisySum
from dpp_jax.privacy.shares import WHOLE, Share
from dpp_jax.training import devices
from dpp_jax.training.state import TrainState, apply_gradient

PyTree = Any
# (params, image (H, W, C) in [-1, 1], label (), key[, number of a share of the draws][, gaussians]) → scalar
ExampleLoss = Callable[..., jax.Array]
# (key, image float32 0..255) → the same
Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def make_batch(
    images: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    capacity: int,
    members: np.ndarray | None = None,
    *,
    share: Share = WHOLE,
    rows: int | None = None,
    own: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Fetch the rows `indices` of images and labels, padded with zeros to a multiple of `capacity` rows.

    With `members` (see `groups.choose`), `indices` are groups, and rows have the images of each.

    Args:
        images, labels: of all units; of the share's own, if there are several.
        indices: (n,), of all shares.
        capacity, rows: as of `shares.pad`.
        members: (groups, m), of all shares.
        share: whose rows are fetched. They keep the numbers that they have among all.
        own: as of `groups.take`.
    """
    arrays = {'image': images, 'label': labels}
    units, mask = shares.pad(indices, capacity, share, rows)
    if members is None:
        batch, _ = poisson.fetch(arrays, indices, capacity, share, rows)
        batch['index'] = units
    else:
        numbers = groups.numbers(members, indices, capacity, share, rows)
        batch = groups.take(arrays, numbers, own)
        batch |= {'index': np.maximum(numbers, 0), 'present': numbers >= 0}
    return batch | {
        'label': batch['label'].astype(np.int32),
        'index': batch['index'].astype(np.int32),
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
        errors: (params, images (n, H, W, C) in [-1, 1], rows of draws (n, ...), gaussians) → losses (n,).
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

        def part_loss(params, gaussians, part):
            losses = errors(params, part['image'], part['drawn'], gaussians)
            return jnp.sum(jnp.where(part['mask'], losses, 0))

        rows, number = _in_equal_parts(rows, images_at_once)
        mean_of_parts = parts_lib.mean(part_loss, number)
        total, gradient = jax.value_and_grad(
            # The vector is taken apart and its gradient put together here, not for every part.
            lambda params: number * mean_of_parts(params.tree(), batch.get('gaussians'), rows)
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
    capacity: int | None = None,
    devices_per_image: int = 1,
) -> NoisySum:
    """Make (index, state, batch, microbatches) → ((state, metrics), ledger entry), for devices.

    Per-example gradients, clipped to the mechanism's sensitivity, are summed over microbatches and devices.
    The mechanism adds its noise to that sum once: every device draws the same noise from the same key. The
    noisy sum is divided by the expected number of images, a public constant. The state's memory is reused.

    Where a row is a group, its gradient is that of the sum of its images' losses, and is clipped as a whole.

    Where several devices share an image, each computes a share of its noise draws; what they have is averaged
    before the norm is taken, and the row counts once. Batches are dealt by `devices.deal_own`.

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
        rows: of all devices, that the sum has room for: a public constant.
        microbatch: examples of a device whose gradients exist at once; of a group, one image after the other.
        ema_decay: of the averaged weights.
        capacity: rows of the arrays of all devices, divisible by `microbatch` times the devices: a public
            constant. A batch with more than `rows` has larger arrays (`shares.pad`). None: `rows`.
        devices_per_image: that share each row, neighbors; divides the number of devices.

    Returns:
        the steps; `microbatches` (int32) is how many microbatches per device hold real rows, the same in
        every process.
    """

    grid = Grid(clip_norm=mechanism.sensitivity, rows=rows)
    team = Team(axis=devices.AXIS, size=devices_per_image) if devices_per_image > 1 else None

    def clipped_sum(draw_key, state: TrainState, batch: dict, microbatches: jax.Array):
        gaussians = batch.get('gaussians')
        own_loss = loss if gaussians is None else functools.partial(loss, gaussians=gaussians)
        batch = {name: leaf for name, leaf in batch.items() if name != 'gaussians'}

        def image_loss(params, example):
            # By the image's own number: who else is in the batch must not change its draws.
            example_key = jax.random.fold_in(draw_key, example['index'])
            image = to_model_range(example['image'])
            share = () if team is None else (team.place,)
            return own_loss(params, image, example['label'], example_key, *share)

        def example_loss(params, example):
            of_row = image_loss if example['label'].ndim == 0 else functools.partial(_group_loss, image_loss)
            return of_row(params.tree(), example)

        def device_sums(part, microbatch, microbatches):
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

        device_rows = (capacity or rows) * devices_per_image // jax.lax.psum(1, devices.AXIS)
        if batch['mask'].size <= device_rows:
            units, sums = jax.lax.psum(device_sums(batch, microbatch, microbatches), devices.AXIS)
        else:  # more images than anybody expected: an int32 may not hold their sum
            halves, sums = _in_halves(
                device_sums, batch, _fitting(microbatch, rows), microbatch, microbatches
            )
            units = jax.tree.map(lambda *pair: join_halves(pair, devices.AXIS), *halves)
            sums = jax.lax.psum(sums, devices.AXIS)
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


def _fitting(microbatch: int, rows: int) -> int:
    """Return the largest divisor of `microbatch` that is at most `rows`."""
    return max(part for part in range(1, min(microbatch, rows) + 1) if microbatch % part == 0)


def _in_halves(
    device_sums: Callable, batch: dict, part_rows: int, microbatch: int, microbatches: jax.Array
) -> tuple[tuple[PyTree, PyTree], dict[str, jax.Array]]:
    """Compute `device_sums` of a device's batch in parts whose sums an int32 holds.

    Args:
        device_sums: (batch, rows of a microbatch, microbatches) → units (int32), sums.
        batch: of the device.
        part_rows: rows of a part; a divisor of `microbatch`.
        microbatch, microbatches: rows, and how many of so many rows are visited.

    Returns:
        the units as halves (see `clipping.add_to_halves`), and the sums.
    """

    def visit(number, carry):
        (high, low), sums = carry
        part = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number * part_rows, part_rows), batch
        )
        units, news = device_sums(part, part_rows, 1)
        pairs = jax.tree.map(lambda *leaf: add_to_halves(leaf[:2], leaf[2]), high, low, units)
        halves = jax.tree.transpose(jax.tree.structure(units), None, pairs)
        return tuple(halves), jax.tree.map(jnp.add, sums, news)

    first = jax.tree.map(lambda leaf: leaf[:part_rows], batch)
    units, sums = jax.eval_shape(lambda part: device_sums(part, part_rows, 1), first)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
    start = ((zeros(units), zeros(units)), zeros(sums))
    return jax.lax.fori_loop(0, microbatches * (microbatch // part_rows), visit, start)


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
    """Return the microbatches per device that hold real rows, of the process with most of them: `rows`."""
    per_device = -(-rows * devices_per_image // len(devices.local()))
    return np.int32(-(-per_device // microbatch))
