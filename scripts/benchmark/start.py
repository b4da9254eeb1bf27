"""How long the program takes from its start to the end of its first step of fine-tuning.

`measure` starts it with `python -m scripts.benchmark.start`, which takes the program's own arguments.
"""

from collections.abc import Callable
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np


def measure(config, private: tuple, batch: int, starts: int) -> dict[str, list[float]]:
    """Seconds of `starts` programs without a compile cache ('cold'), and of as many with ('cached').

    Args:
        config: with all that the command line changed.
        private: images and labels of its shape.
        batch: expected images per step.
        starts: of each kind.
    """
    images, labels = private
    changes = {
        'data.average_down': 1,
        'data.train_images': len(images),
        'pretrain.enabled': False,
        'finetune.draws': config.finetune.draws,
        'finetune.batch_size': batch,
        'finetune.epochs': 1e-9,  # one step
    }
    if config.finetune.microbatch:
        changes['finetune.microbatch'] = config.finetune.microbatch
    command = [sys.executable, '-m', 'scripts.benchmark.start', *_config_arguments(sys.argv[1:])]
    found = {'cold': [], 'cached': []}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / 'train.npz', images=images, labels=labels)
        changes['data.source'] = f'npz:{folder}'
        command += [f'--config.{name}={value}' for name, value in changes.items()]
        for number in range(starts):
            for kind in found:
                found[kind].append(
                    _seconds_to_first_step(
                        [*command, f'--workdir={folder}/{kind}_{number}', '--stage=finetune'],
                        Path(folder) / f'programs_{number}',
                    )
                )
    return found


def _seconds_to_first_step(command: list[str], cache: Path) -> float:
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # the accelerator's memory is this process's already
    }
    started = time.time()
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f'{command} failed:\n{done.stdout}\n{done.stderr}')
    return float(done.stdout.splitlines()[-1]) - started


def _config_arguments(arguments: list[str]) -> list[str]:
    """Those that choose and change the config, for another process."""
    return [
        argument
        for before, argument in zip(['', *arguments], arguments)
        if argument.lstrip('-').split('=')[0].split('.')[0] == 'config'
        or before.startswith('-')
        and before.lstrip('-') == 'config'
    ]


def _run_to_first_step() -> None:
    """The program, which prints the time and ends when it has finished its first step."""
    # Here, and not for who imports this module: the program's flags are those of the benchmark, too.
    from dpp_jax import main
    from dpp_jax.training import loop

    train = loop.train

    def train_one(step: Callable, *arguments, **settings):
        def first(state, number):
            jax.block_until_ready(step(state, number))
            print(time.time(), flush=True)
            os._exit(0)

        return train(first, *arguments, **settings)

    loop.train = train_one
    main.entry_point()


if __name__ == '__main__':
    _run_to_first_step()
