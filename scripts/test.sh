#!/usr/bin/env bash
# The one gate: set-up, lint, format, types, tests.
#   bash scripts/test.sh                          what CI runs
#   bash scripts/test.sh --slow                   the tests marked slow as well
#   bash scripts/test.sh --transformers 5.19.0    the core tests on another transformers, in an environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh

select="not slow and not gpu"
version=
while [ $# -gt 0 ]; do
    case $1 in
        --slow) select="not gpu" ;;
        --transformers) version=$2 && shift ;;
        *) echo "test.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

if [ -n "$version" ]; then
    setup_env ".venv-transformers-$version" test "transformers==$version"
    exec ".venv-transformers-$version/bin/python" -m pytest -n auto -m "$select" tests/core
fi
setup_env .venv dev "transformers==5.23.0"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
.venv/bin/python -m pytest -n auto -m "$select"
