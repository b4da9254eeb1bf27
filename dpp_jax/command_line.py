"""The flags, and what absl leaves open for them: configs by name, and every error in one line."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import dpp_jax
from dpp_jax import configs, object_store
from dpp_jax.training import preemption

CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'A shipped config or a path to a file, and ε after a colon: digits_8:10, path/mine.py:1.',
    lock_config=True,
)
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of this run; the program makes it. Or gs://<bucket>/<path>.'
)
PRIVATE = flags.DEFINE_string(
    'private', None, 'Folder for private/, if not in --workdir: on a disk of this machine, or another bucket.'
)
# What `pipeline.run` takes; the others read folders, and need no config.
PIPELINE_STAGES = (
    'plan', 'import', 'central', 'pretrain', 'finetune', 'generate', 'evaluate', 'report', 'all', 'export',
    'clean',
)  # fmt: skip
STAGE = flags.DEFINE_enum(
    'stage',
    'all',
    [*PIPELINE_STAGES, 'status', 'compose'],
    'What to run: one stage; all: those that are not done; plan: spends nothing; import: begins with a '
    'checkpoint of the PyTorch implementation (--config.import.path); export: writes the model for that '
    '(--config.export.path); clean: deletes private/; '
    'status: prints how far the run in --workdir is; compose: prints what the folders of --with spent '
    'together.',
)
JSON = flags.DEFINE_boolean('json', False, 'Print --stage=status as a JSON object, for scripts.')
WITH = flags.DEFINE_string('with', '', 'Work directories, separated by commas, for --stage=compose.')
DISTRIBUTED = flags.DEFINE_string(
    'distributed',
    'auto',
    'How this process finds the others of its run: auto (TPU pods, SLURM, GKE; one process where nothing is '
    'found), none, or <coordinator>:<port>,<processes>,<index>.',
)
HOSTS = flags.DEFINE_integer('hosts', None, 'How many processes the run must have.', lower_bound=1)
HOST_TIMEOUT = flags.DEFINE_float(
    'host_timeout',
    60.0,
    'Seconds after which a process that is silent, or late where all meet, ends the run.',
    lower_bound=4.0,
)

_SHIPPED = Path(configs.__path__[0])
_HELP = re.compile(r'--?(help|helpshort|helpfull|helpxml|\?)')
# `import` is a word of Python, so the section has another name there.
_IMPORT = re.compile(r'^(--?(?:no)?config\.)import\.')
_SETTING = re.compile(r'--?(?:no)?config\.([^=]+)')
# How XLA's own errors begin, also those of a connection to another process that is gone.
_OF_XLA = re.compile('(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ')
_EXAMPLE = '--config=digits_8:10 --workdir=runs/digits'


class Mistake(Exception):
    """The command line cannot be used; the message tells the user why, in one line."""


def run(main: Callable, help_text: str) -> None:
    """Run `main` under absl, with the flags of `parse`.

    Args:
        main: takes what is left of the arguments; it ends within `errors_in_one_line`.
        help_text: what --help prints above the flags.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show ε shows a question mark. A log file has each line when it is printed.
        stream.reconfigure(errors='replace', line_buffering=True)
    # absl looks for both in the module that was started: for the console script that is not ours.
    sys.modules['__main__'].__doc__ = help_text
    for flag in (CONFIG, WORKDIR, PRIVATE, STAGE, WITH, DISTRIBUTED, HOSTS, HOST_TIMEOUT, JSON):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    app.run(main, flags_parser=parse)


def workdir() -> Path:
    """Return the folder that --workdir means."""
    return _folder('workdir', WORKDIR.value)


def private() -> Path | None:
    """Return the folder that --private means; None without it."""
    return None if PRIVATE.value is None else _folder('private', PRIVATE.value)


def _folder(flag: str, text: str) -> Path:
    """Return the path that a flag means; raises an OSError if it is in a store that does not answer."""
    path = object_store.path(text)
    if '://' in str(path):
        object_store.check(path, f'--{flag}')
    return path


def start_jax() -> None:
    """Start JAX with the settings of this program.

    Raises:
        ValueError: the environment asks for what is not there, or for what JAX does not know.
    """
    prepare_jax()
    if STAGE.value not in PIPELINE_STAGES:  # reads folders alone
        return
    from dpp_jax.training import devices, hosts

    asked = {'hosts': HOSTS.value, 'timeout': HOST_TIMEOUT.value}
    hosts.find(hosts.asked(DISTRIBUTED.value), **asked)
    with _told_with_environment():
        devices.local()
    hosts.join(**asked)
    hosts.introduce()
    devices.connect()


def prepare_jax() -> None:
    """Give JAX the settings of this program, as far as it has not begun; raises a ValueError if it cannot."""
    with _told_with_environment():
        from dpp_jax.training import devices  # imports JAX, which reads the environment

        devices.one_per_core()
        devices.in_32_bits()
        devices.keep_compiled_programs()


@contextlib.contextmanager
def _told_with_environment() -> Iterator[None]:
    """Tell errors of JAX as it starts together with the variables that it reads."""
    names = sorted(name for name in os.environ if name.startswith(('JAX_', 'XLA_')))
    asked = ' '.join(f'{name}={os.environ[name]}' for name in names)
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        told = ' '.join(str(error).split()) or 'there is no such device'
        raise ValueError(
            f'JAX cannot start with {asked or "the devices of this machine"} ({told}). Change that; '
            'JAX_PLATFORMS=cpu works on every machine'
        ) from error


def leave() -> None:
    """End a run that ended well, with its other processes."""
    from dpp_jax.training import hosts

    hosts.leave()


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags, and return what is left: the program's name. Mistakes end the process with a line."""
    try:
        argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
        for argument in argv:
            _check_text(argument)
        argv = _arranged(argv)
        sys.argv[:] = argv  # ml_collections reads the settings from there
        left = flags.FLAGS(argv)
        if left[1:]:
            raise Mistake(f'{left[1]} is not a flag; flags are written --name=value')
        if flags.FLAGS['json'].value and flags.FLAGS['stage'].value != 'status':
            raise Mistake(f'--json is for --stage=status; --stage is {flags.FLAGS["stage"].value}')
        if flags.FLAGS['stage'].value != 'compose':
            _check_folder('workdir', flags.FLAGS['workdir'].value)
            if flags.FLAGS['private'].value is not None:
                _check_folder('private', flags.FLAGS['private'].value)
        return left
    except (Mistake, flags.Error, ValueError) as error:  # absl has both for what it cannot parse
        sys.exit('dpp-jax: ' + ' '.join(str(error).split()))


def _check_text(argument: str) -> None:
    """Raise Mistake where Python could not decode an argument: files are written in UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise Mistake(
            f'{argument!r} is no {sys.getfilesystemencoding()} text, which this locale asks for; set '
            'PYTHONUTF8=1 if it is UTF-8, or use other characters'
        ) from error


def _check_folder(flag: str, text: str | None) -> None:
    """Raise Mistake unless a flag names a folder, which an unset shell variable does not."""
    if text is None:
        found = 'missing'
    elif not text.strip():
        found = 'empty'
    elif text.startswith('-') or not _has_home(text):
        found = text
    else:
        try:
            object_store.path(text)
        except ValueError as error:
            raise Mistake(f'--{flag} is {error}') from error
        return
    example = f'the folder of this run, as in {_EXAMPLE}' if flag == 'workdir' else 'a folder'
    raise Mistake(f'--{flag} is {found}; it must name {example}')


def _has_home(path: str) -> bool:
    """Whether the `~` or `~user` that a path may begin with is known."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        return False
    return True


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
        name, _, value = argument.partition('=')
        if name.lstrip('-') == 'config':
            chosen = value
        else:
            rest.append(argument)
    if any(_HELP.fullmatch(argument) for argument in rest):
        return [program, *rest]
    if chosen is None and re.search(r'(^|\n)--?stage[=\n](compose|status)($|\n)', '\n'.join(rest)):
        return [program, *rest]  # reads folders, no settings
    if chosen is None:
        raise Mistake(f'--config is missing; it must name a config, as in {_EXAMPLE}')
    chosen = find_config(chosen)
    return [program, f'--config={chosen}', *_last_of_each(rest, _values(chosen))]


def _last_of_each(arguments: list[str], known: Mapping[str, Any]) -> list[str]:
    """Return the arguments, with the last value of each setting in one word; Mistake for unknown ones.

    Args:
        arguments: without --config.
        known: the config's value of every setting.
    """
    others, settings, left = [], {}, list(arguments)
    while left:
        argument = _IMPORT.sub(r'\1imported.', left.pop(0))
        setting = _SETTING.match(argument)
        if not setting:
            others.append(argument)
            continue
        name = setting[1]
        _check_name(name, known)
        if '=' not in argument and not isinstance(known[name], bool):
            if not left or left[0].startswith('--'):
                raise Mistake(f'config.{name} has no value; write --config.{name}={known[name]}')
            argument += '=' + left.pop(0)
        settings[name] = argument
    return [*settings.values(), *others]


def find_config(text: str) -> str:
    """Return the file that --config means, with its ε: 'digits_8:10' → '<folder>/digits_8.py:10'.

    Args:
        text: a path to a file or the name of a shipped config, and ε after a colon.

    Raises:
        Mistake: there is no such config, or no ε.
    """
    name, _, epsilon = text.partition(':')
    path = Path(name)
    if _has_home(name) and path.expanduser().is_file():
        path = path.expanduser()
    else:
        path = _shipped(name)
    if not epsilon:
        raise Mistake(f'--config is {text}; ε must stand after a colon, as in --config={name}:10')
    return f'{path}:{epsilon}'


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


def load_config(config: str) -> ConfigDict:
    """Return the settings of a config file, as ml_collections loads it once more.

    Args:
        config: its path, and ε after a colon, as `find_config` gives it.

    Raises:
        Mistake: it cannot be loaded; ml_collections would tell by a traceback.
    """
    name, _, epsilon = config.partition(':')
    path = Path(name).absolute()
    # A config may import its neighbors, by `configs.<name>` too; in a checkout also the shipped ones.
    sys.path += [str(path.parent), str(path.parents[1]), str(Path(dpp_jax.__file__).resolve().parents[1])]
    try:
        found = runpy.run_path(str(path))
        if 'get_config' not in found:
            raise ValueError('a config must define get_config(epsilon), which returns a ConfigDict')
        settings = found['get_config'](epsilon)
        settings.to_dict()
        return settings
    except SyntaxError as error:
        raise Mistake(f'{error.filename}, line {error.lineno}: {error.msg}') from error
    except Exception as error:
        raise Mistake(f'{_reason(error)} ({_place(error, path)})') from error


def _values(config: str) -> dict[str, Any]:
    """Return all settings and groups of a config by their full names; raises Mistake as `load_config`."""
    return dict(_flattened(load_config(config).to_dict()))


def check_setting(name: str, config: ConfigDict) -> None:
    """Raise Mistake, with the names that may be meant, unless a config has the setting."""
    _check_name(name, dict(_flattened(config.to_dict())))


def _reason(error: Exception) -> str:
    """Return what a config file raised, and what to write instead where that is known."""
    if isinstance(error, ImportError) and error.name == 'configs':
        return f'{error}; write `from dpp_jax.configs import default`'
    return str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'


def _place(error: Exception, path: Path) -> str:
    """Return the file, and the last of its lines that led to the error."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f'{path}, line {lines[-1]}' if lines else str(path)


def _flattened(settings: dict, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield all entries of nested dicts, by their dotted names."""
    for name, value in settings.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _flattened(value, f'{prefix}{name}.')


def _check_name(name: str, known: Mapping[str, Any]) -> None:
    """Raise Mistake, with the names that may be meant, unless the config has the setting."""
    if name in known and not isinstance(known[name], dict):
        return
    if name in known:
        raise Mistake(
            f'config.{name} is a group; change a setting of it, as config.{name}.{[*known[name]][0]}'
        )
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
        if _hosts() and _OF_XLA.match(str(error)):
            _hosts().wait_for_verdict()  # on who was lost, of which this may be a consequence
        if verbose or line is None:
            _tell_others(f'{type(error).__name__}: {error}', 1)
            raise
        _end(f'dpp-jax: {line}', 1)


def _line(error: Exception) -> str | None:
    """Return what tells the user how to mend an error, or None: then it is ours."""
    diverged = getattr(sys.modules.get('dpp_jax.training.loop'), 'Diverged', ValueError)  # imports JAX
    if isinstance(error, (ValueError, OSError, diverged)):
        return str(error)
    if object_store.is_from_store(error):
        return (
            f'the object store failed ({type(error).__name__}: {object_store.first_line(error)}). Run the '
            'same command to continue'
        )
    if isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
        return (
            "the device's memory is too small for what runs at once. Choose a smaller "
            '--config.loop.images_at_once or --config.finetune.microbatch (--stage=plan shows them); '
            'the same command then goes on'
        )
    return None


def _end(line: str, code: int) -> None:
    """Print a line and end the process at once; all files are closed by now.

    Not by sys.exit: threads of a failed save would wait for each other, and a compilation that was
    interrupted crashes when Python takes JAX apart.
    """
    others = _hosts()
    if others and others.is_together():
        if code != 1 and not others.is_first():
            # Process 0 says what is saved, and where it stopped. Launchers look for these words.
            line = f'process {others.index()}: stopped. Run the same command to continue.'
        elif code == 1:
            line = f'dpp-jax: process {others.index()}: {line.removeprefix("dpp-jax: ")}'
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    _tell_others(line, code)
    os._exit(code)


def _tell_others(line: str, code: int) -> None:
    """Let the other processes of the run end, too."""
    if _hosts():
        _hosts().fail(' '.join(line.removeprefix('dpp-jax: ').split()), code)


def _hosts():
    """Return the module, if the program came as far as JAX, which it imports."""
    return sys.modules.get('dpp_jax.training.hosts')
