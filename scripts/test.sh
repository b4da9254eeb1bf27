#!/usr/bin/env bash
# The whole test suite, in an environment of its own. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
if [ -z "${VIRTUAL_ENV:-}" ]; then
  use_environment "${DPP_TEST_VENV:-.venv-test}" "[test]" "1 GB or more (PyTorch)"
elif ! python -c 'import dpp_jax, hypothesis, jax_privacy, opacus, pytest, torch, xdist' 2>/dev/null; then
  echo "The active environment, $VIRTUAL_ENV, lacks the tests' packages." \
    "Run: pip install -c constraints.txt -e '.[test]', or deactivate it: then one is made." >&2
  exit 1
fi
# tests/conftest.py puts the files in order: xdist would begin with those of many tests, not of long ones.
exec python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder "$@"
