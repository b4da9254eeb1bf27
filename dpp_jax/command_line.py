"""What absl leaves open for a program's command line: configs by name, and every error in one line."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import difflib
import logging as standard_logging
import os
from pathlib import Path
import re
import runpy
import signal
import sys
import threading
import traceback

from absl import app, flags, logging

import dpp_jax
from dpp_jax import configs
from dpp_jax.training import preemption

_SHIPPED = Path(configs.__path__[0])
_HELP = re.compile(r'--?(help|helpshort|helpfull|helpxml|\?)')
_SETTING = re.compile(r'--?(?:no)?config\.([^=]+)')
_EXAMPLE = '--config=digits_8:10 --workdir=runs/digits'


class Mistake(Exception):
    """The command line cannot be used; the message tells the user why, in one line."""


def run(main: Callable, help_text: str, shown: Sequence[flags.FlagHolder]) -> None:
    """Run `main` under absl, with the flags of `parse`.

    Args:
        main: takes what is left of the arguments; it ends within `errors_in_one_line`.
        help_text: what --help prints above the flags.
        shown: the flags that --help lists.
    """
    # absl looks for both in the module that was started: for the console script that is not ours.
    sys.modules['__main__'].__doc__ = help_text
    for flag in shown:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    app.run(main, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags, and return what is left: the program's name. Mistakes end the process with a line."""
    try:
        argv = _arranged(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False))
        sys.argv[:] = argv  # ml_collections reads the settings from there
        left = flags.FLAGS(argv)
        if left[1:]:
            raise Mistake(f'{left[1]} is not a flag; flags are written --name=value')
        workdir = flags.FLAGS['workdir'].value
        if not workdir or workdir.startswith('-'):
            found = 'missing' if workdir is None else workdir or 'empty'
            raise Mistake(f'--workdir is {found}; it must name the folder of this run, as in {_EXAMPLE}')
        return left
    except (Mistake, flags.Error) as error:
        sys.exit('dpp-jax: ' + ' '.join(str(error).split()))


def _arranged(argv: list[str]) -> list[str]:
    """Return the arguments as ml_collections wants them; raises Mistake where they cannot be used.

    --config comes first and names a file. Of a setting given twice the last value stays: ml_collections
    would join the values of a tuple.
    """
    program, *arguments = argv
    chosen, rest = None, []
    while arguments:
        argument = arguments.pop(0)
        if re.fullmatch('--?config', argument) and arguments:
            argument += '=' + arguments.pop(0)
        name, equals, value = argument.partition('=')
        if name.lstrip('-') == 'config':
            chosen = value
            continue
        if equals and _SETTING.match(name):
            rest = [other for other in rest if not other.startswith(f'{name}=')]
        rest.append(argument)
    if any(_HELP.fullmatch(argument) for argument in rest):
        return [program, *rest]
    if chosen is None:
        raise Mistake(f'--config is missing; it must name a config, as in {_EXAMPLE}')
    chosen = find_config(chosen)
    known = _names(chosen)
    for setting in filter(None, map(_SETTING.match, rest)):
        _check_name(setting[1], known)
    return [program, f'--config={chosen}', *rest]


def find_config(text: str) -> str:
    """Return the file that --config means, with its ε: 'digits_8:10' → '<folder>/digits_8.py:10'.

    Args:
        text: a path to a file or the name of a shipped config, and ε after a colon.

    Raises:
        Mistake: there is no such config.
    """
    name, *epsilon = text.split(':', 1)
    path = Path(name).expanduser()
    if not path.is_file():
        path = _shipped(name)
    return ':'.join([str(path), *epsilon])


def _shipped(name: str) -> Path:
    """Return the file of a shipped config, asked for as `digits_8` or as `configs/digits_8.py`."""
    path = Path(name)
    files = {file.stem: file for file in _SHIPPED.glob('*.py') if file.stem != '__init__'}
    if path.stem in files and path.suffix in ('', '.py') and str(path.parent) in ('.', 'configs'):
        return files[path.stem]
    shipped = sorted(files.keys() - {'default'})
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    advice = f'; did you mean {near[0]}?' if near else ''
    raise Mistake(f'--config is {name!r}; it must be a file or one of {", ".join(shipped)}{advice}')


def _names(config: str) -> list[str]:
    """Return the names of all settings and groups of a config; raises Mistake where it cannot be loaded.

    ml_collections loads the file once more, but tells of mistakes by tracebacks.
    """
    name, *epsilon = config.split(':', 1)
    path = Path(name).absolute()
    # A config may import its neighbors, by `configs.<name>` too; in a checkout also the shipped ones.
    sys.path += [str(path.parent), str(path.parents[1]), str(Path(dpp_jax.__file__).resolve().parents[1])]
    try:
        found = runpy.run_path(str(path))
        if 'get_config' not in found:
            raise ValueError('a config must define get_config(epsilon), which returns a ConfigDict')
        settings = found['get_config'](*epsilon).to_dict()
    except SyntaxError as error:
        raise Mistake(f'{error.filename}, line {error.lineno}: {error.msg}') from error
    except Exception as error:
        raise Mistake(f'{_reason(error)} ({_place(error, path)})') from error
    return list(_flattened(settings))


def _reason(error: Exception) -> str:
    """Return what a config file raised, and what to write instead where that is known."""
    if isinstance(error, ImportError) and error.name == 'configs':
        return f'{error}; write `from dpp_jax.configs import default`'
    return str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'


def _place(error: Exception, path: Path) -> str:
    """Return the file, and the last of its lines that led to the error."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f'{path}, line {lines[-1]}' if lines else str(path)


def _flattened(settings: dict, prefix: str = '') -> Iterator[str]:
    """Yield the dotted names of all entries of nested dicts."""
    for name, value in settings.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _flattened(value, f'{prefix}{name}.')


def _check_name(name: str, known: list[str]) -> None:
    """Raise Mistake, with the names that may be meant, unless the config has the setting."""
    if name in known:
        return
    last = name.rpartition('.')[2]
    same = [other for other in known if other.rpartition('.')[2] == last]
    near = difflib.get_close_matches(name, known, n=1) or same
    advice = '; did you mean ' + ' or '.join(f'config.{other}' for other in near) + '?' if near else ''
    raise Mistake(f'there is no setting config.{name}{advice}')


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Tell whatever ends the run in one line, and end the process; with --verbosity by its traceback.

    Also keeps off the screen what libraries say of their own failures: it reaches this place as an
    exception. A save that fails on a full disk is told by orbax's threads as well, in hundreds of lines.
    """
    verbose = flags.FLAGS['verbosity'].present
    if not verbose:
        logging.set_verbosity(logging.WARNING)
        for name in ('absl', 'asyncio'):  # absl: orbax's
            standard_logging.getLogger(name).setLevel(standard_logging.CRITICAL)
        threading.excepthook = sys.unraisablehook = lambda _: None
    try:
        yield
    except preemption.Interrupted as stopped:
        code = 0 if stopped.signal_number == signal.SIGTERM else 130
        _end(f'\n{stopped}. Run the same command to continue.', code)
    except KeyboardInterrupt:
        _end('\nInterrupted. Run the same command to continue from what is saved.', 130)
    except Exception as error:
        line = _line(error)
        if verbose or line is None:
            raise
        _end(f'dpp-jax: {line}', 1)


def _line(error: Exception) -> str | None:
    """Return what tells the user how to mend an error, or None: then it is ours."""
    from dpp_jax.training import loop  # late: imports JAX

    if isinstance(error, (ValueError, OSError, loop.Diverged)):
        return str(error)
    if isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
        return (
            "the device's memory is too small for what runs at once. Choose a smaller "
            '--config.loop.images_at_once or --config.finetune.microbatch (--stage=plan shows them); '
            'the same command then goes on'
        )
    if isinstance(error, RuntimeError) and 'nable to initialize backend' in str(error):
        return f'JAX cannot use this device; set JAX_PLATFORMS to another, as JAX_PLATFORMS=cpu ({error})'
    return None


def _end(line: str, code: int) -> None:
    """Print a line and end the process at once; all files are closed by now.

    Not by sys.exit: threads of a failed save would wait for each other, and a compilation that was
    interrupted crashes when Python takes JAX apart.
    """
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
