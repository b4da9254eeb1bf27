"""Imports run one way, and the privacy code knows nothing but numbers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'dpp_jax'
LEAVES = {'files', 'privacy', 'diffusion', 'data'}
# What each room may import of the others.
ALLOWED = {
    'object_store': set(),
    'lease': {'object_store'},
    'files': {'object_store', 'lease'},
    'privacy': {'files'},
    'diffusion': set(),
    'data': {'files'},
    'auditing': {'privacy'},
    'interop': {'diffusion'},
    'training': LEAVES,
    'evaluation': {'files', 'data', 'diffusion', 'training', 'interop'},
    'run': LEAVES | {'training'},
    'pages': LEAVES | {'run', 'configs'},
    'stages': LEAVES | {'training', 'evaluation', 'run', 'pages', 'interop'},
    'build': LEAVES | {'training', 'evaluation', 'run'},
    'settings': LEAVES | {'training', 'evaluation', 'run', 'build', 'interop'},
    'gate': LEAVES | {'training', 'run', 'stages', 'build'},
    'derive': LEAVES | {'training', 'run', 'build'},
    'planning': LEAVES | {'training', 'run', 'stages', 'build', 'settings', 'gate', 'derive'},
    'pipeline': LEAVES | {'training', 'run', 'stages', 'build', 'settings', 'gate', 'derive', 'planning'},
    'command_line': {'configs', 'training', 'object_store'},
    'status': LEAVES | {'training', 'run', 'gate', 'configs'},
    'library': LEAVES
    | {'training', 'run', 'stages', 'build', 'settings', 'configs', 'command_line', 'pipeline'},
    'fid_command': {'data', 'training', 'evaluation'},
    'main': {'command_line', 'training', 'run', 'pipeline', 'status'},
}
# Rooms that know what a config is; below them, functions take arrays, callables and named arguments.
KNOW_CONFIG = {
    'stages',
    'build.py',
    'settings.py',
    'gate.py',
    'derive.py',
    'planning.py',
    'pipeline.py',
    'library.py',
    'command_line.py',
    'main.py',
}
MODULES = sorted(path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py')


def imported(path):
    """Full names of everything that a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix('').parts[0]
    rooms = {name.split('.')[1] for name in imported(path) if name.startswith('dpp_jax.')}
    assert rooms - {room} <= ALLOWED[room]


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_config_stops_at_the_stages_and_pmap_at_one_module(path):
    relative = path.relative_to(PACKAGE)
    names = set(imported(path))
    if relative.parts[0] not in KNOW_CONFIG:
        assert not any(name.startswith('ml_collections') for name in names)
    if str(relative) != 'training/devices.py':
        source = path.read_text()
        assert 'jax.pmap(' not in source and 'shard_map(' not in source


def test_every_room_is_covered_by_the_rule():
    rooms = {path.relative_to(PACKAGE).with_suffix('').parts[0] for path in MODULES}
    assert rooms == set(ALLOWED)


def test_no_stage_imports_a_stage():
    """What stages share lies in run/: a stage reads what another one left in the folder."""
    stages = PACKAGE / 'stages'
    for path in stages.rglob('*.py'):
        own = path.relative_to(stages).with_suffix('').parts[0]
        found = [name for name in imported(path) if name.startswith('dpp_jax.stages')]
        assert not [name for name in found if not name.startswith(f'dpp_jax.stages.{own}.')], path


def test_files_are_synced_renamed_and_locked_in_one_place():
    for path in MODULES:
        if path != PACKAGE / 'files.py':
            source = path.read_text()
            for call in ('os.fsync', 'os.replace', 'flock', 'FileLock('):
                assert call not in source, f'{call} in {path}'


def text_in_the_encoding_of_the_locale(path):
    """Places that read or write text and name no encoding; `files` itself encodes."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call) or any(keyword.arg == 'encoding' for keyword in node.keywords):
            continue
        called = ast.unparse(node.func)
        is_binary = called == 'open' and len(node.args) > 1 and 'b' in ast.unparse(node.args[1])
        if called.endswith(('.read_text', '.write_text')) and called != 'files.write_text':
            yield f'{path}, line {node.lineno}'
        elif called == 'open' and not is_binary:
            yield f'{path}, line {node.lineno}'


def test_text_is_utf8_whatever_the_locale():
    scripts = PACKAGE.parent / 'scripts'
    for path in [*MODULES, *scripts.rglob('*.py')]:
        assert not list(text_in_the_encoding_of_the_locale(path))


def test_one_place_draws_the_noise():
    """Only a mechanism takes a noise key; nobody else adds noise itself."""
    for path in MODULES:
        relative = str(path.relative_to(PACKAGE))
        if relative != 'privacy/mechanism.py':
            assert '_add_noise' not in path.read_text(), path
