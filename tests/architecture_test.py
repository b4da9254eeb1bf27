"""Imports run one way, and the privacy code knows nothing but numbers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'dpp_jax'
LEAVES = {'privacy', 'diffusion', 'data', 'evaluation'}
# What each room may import of the others.
ALLOWED = {
    'privacy': set(),
    'diffusion': set(),
    'data': set(),
    'evaluation': set(),
    'interop': {'diffusion'},
    'training': LEAVES,
    'auditing': {'privacy'},
    'run': LEAVES | {'training'},
    'stages': LEAVES | {'training', 'run'},
    'pipeline': LEAVES | {'training', 'run', 'stages'},
    'command_line': {'configs', 'training'},
    'main': {'command_line', 'training', 'pipeline'},
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
    if relative.parts[0] not in ('run', 'stages', 'pipeline.py', 'main.py'):
        assert not any(name.startswith('ml_collections') for name in names)
    if str(relative) != 'training/devices.py':
        source = path.read_text()
        assert 'jax.pmap(' not in source and 'shard_map(' not in source


def test_every_room_is_covered_by_the_rule():
    rooms = {path.relative_to(PACKAGE).with_suffix('').parts[0] for path in MODULES}
    assert rooms == set(ALLOWED)
