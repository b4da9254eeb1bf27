"""Stage `export`: write the newest model of a run as a file that the PyTorch implementation loads.

It is post-processing of what is in release/, and costs no privacy.
"""

from pathlib import Path

from ml_collections import ConfigDict

from dpp_jax import files
from dpp_jax.diffusion.model import Model
from dpp_jax.interop import pytorch
from dpp_jax.run import artefacts
from dpp_jax.run.folder import WorkDir


def run(config: ConfigDict, workdir: WorkDir, *, model: Model, steps: dict[str, int]) -> None:
    """Write weights and averaged weights of the fine-tuned model; if there is none, of the pre-trained one.

    Args:
        config: the settings.
        workdir: to read from.
        model: whose weights they are.
        steps: training → how many updates its model has had.

    Raises:
        ValueError: there is no model, another file is in the way, or PyTorch is not installed.
        OSError: the file cannot be written.
    """
    there = [name for name in ('finetune', 'pretrain') if files.is_whole(workdir.model(name))]
    if not there:
        raise ValueError(
            f'--stage=export needs a model, and {workdir.root} has none yet. Run --stage=pretrain first, '
            '--stage=import or --stage=all'
        )
    training = there[0]
    path = files.path(config.export.path) if config.export.path else workdir.exported(training)
    content = _content(config, workdir, model, training, steps[training], path.name)
    known = path.read_bytes() if path.is_file() else None
    if path.exists() and known != content:
        raise ValueError(
            f'config.export.path: {path} is there already, and is not this model. Move it away, or name '
            'another file'
        )
    if known is None:
        files.write_bytes(path, content)
    what = f'weights and averaged weights of model/{training}, after {steps[training]:,} steps'
    print(f'{path} {"has" if known else "now has"} {what}: {len(content):,} bytes.', flush=True)


def _content(
    config: ConfigDict, workdir: WorkDir, model: Model, training: str, step: int, name: str
) -> bytes:
    """Return the bytes of the file, which tell no time and no path but its name."""
    weights = artefacts.weights(workdir, training, model.shapes())
    settings = config[training]
    with files.local_folder() as folder:
        path = Path(folder) / name
        try:
            pytorch.write_checkpoint(
                path,
                **weights,
                step=step,
                model=model,
                ema_decay=settings.ema_decay,
                learning_rate=settings.learning_rate,
                note=files.note_of(workdir.config),
            )
        except ImportError as error:
            raise ValueError(f'--stage=export: {error}') from error
        return path.read_bytes()
