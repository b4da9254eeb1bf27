"""For programs: what a released model needs to be sampled from, in one call."""

from collections.abc import Sequence
from pathlib import Path
import secrets
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import build, files, settings
from dpp_jax.configs import default
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import generate
from dpp_jax.training import devices


def sample(
    workdir: str | Path,
    n: int,
    labels: Sequence[int] | None = None,
    *,
    seed: int | None = None,
    **changes: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images from a released model. It costs no privacy, however many are drawn.

    Args:
        workdir: a work directory, or a copy of its release/.
        n: how many images, at least 1.
        labels: n integers in 0 .. classes - 1; None: as `generate.class_counts` of the run has them.
        seed: the same seed gives the same images; None: others in every call.
        **changes: settings of the sampler, such as steps=50, in place of those in release/config.json.

    Returns:
        images: uint8 (n, H, W, C).
        labels: int32 (n,).

    Raises:
        FileNotFoundError, ValueError: no model is there, it is damaged, or an argument is not allowed.
    """
    root = files.path(workdir)
    folder = WorkDir(root, release=root if (root / 'config.json').exists() else None)
    config = _config(folder)
    config.generate.sampler.update(changes)
    settings.check(config)
    classes = config.data.classes
    if not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f'n is {n!r}; it must be a whole number, at least 1')
    chosen = generate.default_labels(config, folder, n) if labels is None else np.asarray(labels)
    if chosen.shape != (n,) or chosen.dtype.kind not in 'iu' or chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(f'labels is {labels!r}; it must be {n} whole numbers in 0 .. {classes - 1}')
    model = build.model(config)
    params = devices.replicate(artefacts.weights(folder, 'finetune', model.shapes())['ema_params'])
    at_once = build.sizes(config, model).images
    images = generate.sample_images(
        generate.sample_function(model, build.samplers(config)['images'], at_once),
        params,
        _key(seed),
        np.arange(n) * classes + chosen,  # the remainder is the label, and no number comes twice
        batch_size=config.generate.batch_size,
        at_once=at_once,
    )
    return images, chosen.astype(np.int32)


def _key(seed: int | None) -> jax.Array:
    if seed is not None:
        return jax.random.key(seed, impl='threefry2x32')
    words = np.frombuffer(secrets.token_bytes(8), np.uint32)
    return jax.random.wrap_key_data(words, impl='threefry2x32')


def _config(folder: WorkDir) -> ConfigDict:
    """Read the settings of a run; those that its version did not have are as in configs/default.py."""
    if not folder.config.exists():
        raise FileNotFoundError(
            f'{folder.config} is not there; workdir must be that of a run, or its release/'
        )
    recorded = files.read_json(folder.config, 'Restore the file')
    config = default.get_config('1')
    with config.ignore_type():
        for name, value in recorded.items():
            _set(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def _set(config: ConfigDict, name: str, value: Any) -> None:
    """Set `name`, as 'generate.sampler.steps', also if there is no such setting."""
    *sections, last = name.split('.')
    for section in sections:
        if section not in config:
            config[section] = ConfigDict()
        config = config[section]
    config[last] = value
