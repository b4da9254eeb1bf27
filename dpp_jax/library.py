"""For programs: run what the command line runs, and sample from what a run released.

import dpp_jax

config = dpp_jax.config('folder', 8, **{'data.source': 'folder:/data/scans'})
dpp_jax.synthesize(config, 'runs/scans')
images, labels = dpp_jax.load('runs/scans').sample(100)
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from pathlib import Path
import secrets
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dpp_jax import build, command_line, files, pipeline, settings
from dpp_jax.configs import default
from dpp_jax.privacy import accounting
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir
from dpp_jax.stages import generate
from dpp_jax.stages.generate import sampling
from dpp_jax.training import devices, preemption


def config(name: str | Path, epsilon: float | str, **changes: Any) -> ConfigDict:
    """Return the settings of a run, to be changed further as `config.finetune.epochs = 20`.

    Args:
        name: a shipped config ('mnist_28'), or the path of a config file.
        epsilon: the budget of the run, > 0; or what stands after the colon of --config, as '1,moments'.
        **changes: full names of settings with their values, as **{'data.source': 'folder:/data/scans'}.

    Raises:
        ValueError: there is no such config or setting, or the config file cannot be loaded.
    """
    try:
        found = command_line.find_config(f'{name}:{epsilon}')
        result = command_line.load_config(found)
        for setting in changes:
            command_line.check_setting(setting, result)
    except command_line.Mistake as mistake:
        raise ValueError(str(mistake)) from mistake
    with result.unlocked(), result.ignore_type():
        result.update_from_flattened_dict(changes)
    return result


def synthesize(
    config: ConfigDict, workdir: str | Path, stage: str = 'all', *, private: str | Path | None = None
) -> None:
    """Run one stage, or all that are not done, as the command line does; in this process alone.

    It prints the same lines. Ctrl-C raises KeyboardInterrupt after the step; the same call then goes on.

    Args:
        config: the settings, see `config`.
        workdir: folder of the run; it is made if it is not there.
        stage: 'import', 'central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report'; 'all': those
            that are not done; 'plan': spends nothing; 'export': writes the model for the PyTorch
            implementation; 'clean': deletes private/.
        private: folder for private/, if not in `workdir`.

    Raises:
        ValueError, OSError: settings, data or work directory are not as they must be. Nothing is spent.
        KeyboardInterrupt: it was interrupted; what is saved goes on from there.
    """
    if stage not in command_line.PIPELINE_STAGES:
        raise ValueError(f'stage is {stage!r}; it must be one of {", ".join(command_line.PIPELINE_STAGES)}')
    command_line.prepare_jax()
    try:
        pipeline.run(config, files.path(workdir), stage, private=private)
    except preemption.Interrupted as stopped:
        raise KeyboardInterrupt(f'{stopped}. Call it again to go on') from stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Privacy:
    """What the released statement says of a run.

    Attributes:
        epsilon, delta: of all that was released together.
        unit: what neighboring sets differ in: 'image', or 'group' (all images of a person).
        neighboring_relation: in words.
        accountant: that computed ε.
        is_private: False: the run had a seed, and nothing of it is private.
        declared: the condition of all that, where the run began with an imported checkpoint; else None.
        text: the whole statement, in Markdown.
    """

    epsilon: float
    delta: float
    unit: str
    neighboring_relation: str
    accountant: str
    is_private: bool
    declared: str | None
    text: str = dataclasses.field(repr=False)


class Released:
    """A released model. It costs no privacy, however many images are drawn from it.

    Attributes:
        classes: names of the classes, in the order of labels.
        image_shape: (H, W, C) of the images.
        privacy: what the privacy statement says.
    """

    def __init__(self, workdir: str | Path):
        """Read a released model, see `load`."""
        root = files.path(workdir)
        self._folder = WorkDir(root, release=root if (root / 'config.json').exists() else None)
        self._config = _recorded(self._folder)
        settings.check(self._config)
        self._model = build.model(self._config)
        weights = artefacts.weights(self._folder, 'finetune', self._model.shapes())
        gaussians = build.gaussians(self._config, self._folder)
        self._params = devices.replicate((weights['ema_params'], gaussians))
        self._at_once = build.sizes(self._config, self._model).images
        self._programs = {}  # settings of a sampler → its program
        self.classes = build.class_names(self._config)
        self.image_shape = self._model.image_shape

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        shown = accounting.format_epsilon(self.privacy.epsilon)
        condition = ', as declared' if self.privacy.declared else ''
        return (
            f'<dpp_jax model {self._config.name!r}: {height}x{width}x{channels}, '
            f'{len(self.classes)} classes, '
            f'ε = {shown}, δ = {accounting.format_exact(self.privacy.delta)}{condition}>'
        )

    @functools.cached_property
    def privacy(self) -> Privacy:
        """What the privacy statement says."""
        folder = self._folder
        said = files.read_json(
            folder.statement,
            'Restore the file',
            {'epsilon': float, 'delta': float, 'unit': str, 'neighboring_relation': str, 'accountant': str,
             'private': bool},
        )  # fmt: skip
        return Privacy(
            epsilon=said['epsilon'],
            delta=said['delta'],
            unit=said['unit'],
            neighboring_relation=said['neighboring_relation'],
            accountant=said['accountant'],
            is_private=said['private'],
            declared=said.get('declared'),
            text=folder.statement_text.read_text(encoding='utf-8'),
        )

    def sample(
        self,
        n: int,
        labels: Sequence[int | str] | int | str | None = None,
        *,
        sampler: str | Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw images from the diffusion model, also where the run has others too (`generate.moments_share`).

        Args:
            n: how many images, at least 1.
            labels: n numbers of classes (0 .. classes - 1) or their names, or one for all; None: as
                `generate.class_counts` of the run has them.
            sampler: name ('heun', 'dpmpp_2m'), or settings in place of the run's, such as {'steps': 50}.
            seed: the same seed gives the same images; None: others in every call.

        Returns:
            images: uint8 (n, H, W, C).
            labels: int32 (n,).

        Raises:
            ValueError: an argument is not allowed.
        """
        if not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f'n is {n!r}; it must be a whole number, at least 1')
        chosen = self._labels(n, labels)
        images = sampling.sample_images(
            self._program({'name': sampler} if isinstance(sampler, str) else dict(sampler or {})),
            self._params,
            _key(seed),
            sampling.image_numbers(chosen, len(self.classes)),
            batch_size=self._config.generate.batch_size,
            at_once=self._at_once,
        )
        return images, chosen

    def _labels(self, n: int, labels: Any) -> np.ndarray:
        """Return n labels, int32, from what the user gave."""
        classes = len(self.classes)
        if labels is None:
            return generate.default_labels(self._config, self._folder, n)
        if isinstance(labels, str) or np.ndim(labels) == 0:
            labels = [labels] * n
        numbers = {name: number for number, name in enumerate(self.classes)}
        found = np.array([numbers.get(label, label) if isinstance(label, str) else label for label in labels])
        is_good = found.shape == (n,) and found.dtype.kind in 'iu'
        if not is_good or found.min() < 0 or found.max() >= classes:
            names = ', '.join(map(repr, self.classes[:10])) + (', …' if classes > 10 else '')
            raise ValueError(
                f'labels is {labels!r}; it must be {n} whole numbers in 0 .. {classes - 1}, or names: {names}'
            )
        return found.astype(np.int32)

    def _program(self, changes: dict[str, Any]):
        """Return the program that samples with these changed settings; made once."""
        name = repr(sorted(changes.items()))
        if name not in self._programs:
            config = self._config.copy_and_resolve_references()
            chosen = config.generate.sampler
            unknown = sorted(set(changes) - set(chosen))
            if unknown:
                raise ValueError(
                    f'sampler has {unknown[0]!r}, which is no setting of it; it has {", ".join(chosen)}'
                )
            with chosen.ignore_type():
                chosen.update(changes)
            settings.check(config)
            at_once = max(1, self._at_once // 2) if chosen.guidance else self._at_once
            sample = build.samplers(config)['images']
            self._programs[name] = sampling.sample_function(self._model, sample, at_once)
        return self._programs[name]


def load(workdir: str | Path) -> Released:
    """Read the model that a run released.

    Args:
        workdir: a work directory, or a copy of its release/.

    Raises:
        FileNotFoundError, ValueError: no model is there, or it is damaged.
    """
    return Released(workdir)


def _key(seed: int | None) -> jax.Array:
    if seed is not None:
        return jax.random.key(seed, impl='threefry2x32')
    words = np.frombuffer(secrets.token_bytes(8), np.uint32)
    return jax.random.wrap_key_data(words, impl='threefry2x32')


def _recorded(folder: WorkDir) -> ConfigDict:
    """Read the settings of a run; those that its version did not have are as in configs/default.py."""
    if not folder.config.exists():
        raise FileNotFoundError(
            f'{folder.config} is not there; workdir must be that of a run, or its release/'
        )
    recorded = artefacts.settings_of_images(folder)
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
