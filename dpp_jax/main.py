"""Command line: flags → one call.

python -m dpp_jax.main --config=configs/mnist_28.py:1 --workdir=runs/mnist --stage=all
"""

import logging as standard_logging
import os
from pathlib import Path
import signal
import sys
import threading

from absl import app, flags, logging
from ml_collections import config_flags

from dpp_jax.training import preemption

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Settings: a file of configs/, with ε after a colon.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of this run; made if it is not there.')
_STAGE = flags.DEFINE_enum(
    'stage',
    'all',
    ['plan', 'central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report', 'all', 'clean'],
    'What to run; clean deletes private/.',
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unknown arguments {argv[1:]}; settings are written --config.name=value')
    if not flags.FLAGS['verbosity'].present:
        _quieten()
    try:
        config = _CONFIG.value
        config.dp  # a config file that could not be loaded says so here
    except OSError as error:
        sys.exit('dpp-jax: ' + ' '.join(str(error).split()))
    # Imported late: a typing error on the command line is answered at once.
    import jax

    from dpp_jax import pipeline
    from dpp_jax.training import devices, loop

    devices.one_per_core()
    devices.keep_compiled_programs()
    preemption.stop_on_sigterm()
    try:
        pipeline.run(config, _WORKDIR.value, _STAGE.value)
    except preemption.Interrupted as stopped:
        print(f'\n{stopped}. The same command goes on from there.', file=sys.stderr)
        _exit(0 if stopped.signal_number == signal.SIGTERM else 130)
    except KeyboardInterrupt:
        print('\nInterrupted. The same command goes on from what is saved.', file=sys.stderr)
        _exit(130)
    except jax.errors.JaxRuntimeError as error:
        if flags.FLAGS['verbosity'].present or 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        print(
            "dpp-jax: the device's memory does not hold what is in work at once. The same command goes on with "
            'a smaller --config.loop.images_at_once or --config.finetune.microbatch (--stage=plan shows them)',
            file=sys.stderr,
        )
        _exit(1)
    except (ValueError, OSError, loop.Diverged) as error:
        if flags.FLAGS['verbosity'].present:
            raise  # with the traceback
        print(f'dpp-jax: {error}', file=sys.stderr)
        _exit(1)


def _quieten():
    """Keep what libraries say of their own failures off the screen; --verbosity shows it.

    Whatever stops a run reaches `main` as an exception, and is told in a line. A save that fails on a
    full disk is told by orbax's threads as well, in hundreds of lines of tracebacks.
    """
    logging.set_verbosity(logging.WARNING)
    for name in ('absl', 'asyncio'):  # absl: orbax's
        standard_logging.getLogger(name).setLevel(standard_logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda _: None


def _exit(code):
    """End the process at once; all files are closed by now.

    Not sys.exit: threads of a failed save would wait for each other, and a compilation that was
    interrupted crashes when Python takes JAX apart.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(argv):
    """Flags, with an error of one line instead of a traceback into a config file."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        text = str(error).strip()
        sys.exit('dpp-jax: ' + (text.splitlines()[-1] if 'Traceback' in text else text))
    except AttributeError as error:  # how ml_collections reports a setting that does not exist
        cause = error.args[0]
        text = cause.args[0] if isinstance(cause, Exception) else cause
        sys.exit('dpp-jax: there is no setting ' + ' '.join(str(text).split()))


def entry_point():
    """The console script `dpp-jax`."""
    preemption.leave_on_sigterm()  # the imports of `main` take seconds
    # Config files import each other as `configs.<name>`: make their parent folder importable.
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], '']):
        name, equals, value = argument.lstrip('-').partition('=')
        if name == 'config' and argument.startswith('-'):
            path = (value if equals else following).split(':')[0]
            sys.path.append(str(Path(path).absolute().parent.parent))
    flags.mark_flags_as_required(['config', 'workdir'])
    app.run(main, flags_parser=parse)


if __name__ == '__main__':
    entry_point()
