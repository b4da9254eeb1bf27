"""Make differentially private synthetic images. Flags → one call.

    dpp-jax --config=mnist_28:1 --workdir=runs/mnist --stage=plan    what a run would spend; reads no image
    dpp-jax --config=mnist_28:1 --workdir=runs/mnist                 every stage that is not done yet

The number after the colon is ε. A setting is changed by --config.finetune.epochs=20; `configs/default.py`
lists them all. `python -m dpp_jax.main` in a checkout does the same as `dpp-jax`.
"""

import os

from absl import flags
from ml_collections import config_flags

from dpp_jax import command_line
from dpp_jax.training import preemption

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'A shipped config or a path to a file, and ε after a colon: digits_8:10, path/mine.py:1.',
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of this run; the program makes it.')
_STAGE = flags.DEFINE_enum(
    'stage',
    'all',
    ['plan', 'central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report', 'all', 'clean', 'compose'],
    'What to run: one stage; all: those that are not done; plan: spends nothing; clean: deletes private/; '
    'compose: prints what the folders of --with spent together.',
)
_WITH = flags.DEFINE_string('with', '', 'Work directories, separated by commas, for --stage=compose.')


def main(argv):
    del argv
    with command_line.errors_in_one_line():
        # Imported late: a mistake on the command line is told at once.
        from dpp_jax import pipeline
        from dpp_jax.run import composition
        from dpp_jax.training import devices

        if _STAGE.value == 'compose':
            print(composition.text(_WITH.value))
            return
        devices.one_per_core()
        devices.keep_compiled_programs()
        preemption.stop_on_sigterm()
        pipeline.run(_CONFIG.value, os.path.expanduser(_WORKDIR.value), _STAGE.value)


def entry_point():
    """Run the console script `dpp-jax`."""
    preemption.leave_on_sigterm()  # the imports of `main` take seconds
    command_line.run(main, help_text=__doc__, shown=[_CONFIG, _WORKDIR, _STAGE, _WITH])


if __name__ == '__main__':
    entry_point()
