#!/usr/bin/env bash
# The whole test suite, in an environment of its own. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
if [ -z "${VIRTUAL_ENV:-}" ]; then
  use_environment "${DPP_TEST_VENV:-.venv-test}" "[test]"
fi
exec python -m pytest --numprocesses=auto --dist=loadfile "$@"
