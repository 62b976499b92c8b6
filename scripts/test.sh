#!/usr/bin/env bash
# The one gate: set-up, lint, format, types, tests.
#   bash scripts/test.sh                          what CI runs
#   bash scripts/test.sh --slow                   the tests marked slow as well
#   bash scripts/test.sh --transformers 5.19.0    the core tests on another transformers, in an environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh

select=(-m "not slow and not gpu")
while [ $# -gt 0 ]; do
    case $1 in
        --slow) select=(-m "not gpu") ;;
        --transformers) version=$2 && shift ;;
        *) echo "test.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done

setup_env dev "transformers==5.23.0"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
if [ -n "${version:-}" ]; then
    .venv/bin/python -m pip install --quiet --no-deps --target ".venv/transformers-$version" --upgrade "transformers==$version"
    PYTHONPATH=".venv/transformers-$version" .venv/bin/python -m pytest -n auto "${select[@]}" tests/core
    exit
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
.venv/bin/python -m pytest -n auto "${select[@]}"
