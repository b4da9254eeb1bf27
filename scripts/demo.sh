#!/usr/bin/env bash
# The whole pipeline on scikit-learn's 8x8 digits, in minutes on two cores. Run it again after an
# interruption: it goes on. Arguments are passed on, as --config.finetune.epochs=30 or --workdir=DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
use_environment "${DPP_VENV:-.venv}" "" "0.6 GB"
exec python -m dpp_jax.main --config=configs/digits_8.py:10 --workdir=runs/digits_8 --stage=all "$@"
