#!/usr/bin/env bash
# This runs all checks: set-up, lint, format, types, tests.
#   bash scripts/test.sh                     all checks, on the tested releases
#   bash scripts/test.sh --slow              also the tests marked slow
#   bash scripts/test.sh --matrix            most tests and a short demo on other releases, two hours: scripts/matrix.sh
#   bash scripts/test.sh --matrix newest     on the newest releases, as CI does; or oldest-python-3.10, peft==0.21.0 ...
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
source scripts/matrix.sh

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
select="not slow"
case ${1:-} in
    "") ;;
    --slow) select="" && shift ;;
    --help) sed -n "2,6s/^# //p" scripts/test.sh && exit ;;
    --matrix) shift; run_matrix "$@"; exit ;;
esac
[ $# = 0 ] || { echo "test.sh: unknown argument $1 (see --help)" >&2 && exit 2; }
setup_env .venv dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
# a file stays on one worker, which makes the fixtures of a module once
.venv/bin/python -m pytest -n auto --dist loadfile -m "$select"
