#!/usr/bin/env bash
# This builds the documentation into build/site, in strict mode: a dead link or an unknown name is an error.
#   bash scripts/docs.sh            build
#   bash scripts/docs.sh --serve    show the pages on http://127.0.0.1:8000 and rebuild them on changes
# The tools are installed into .venv-docs; they read the package's source and do not import it. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
command=(build --strict --quiet)
case ${1:-} in
    "") ;;
    --help) sed -n "2,5s/^# //p" scripts/docs.sh && exit ;;
    --serve) command=(serve) ;;
    *) echo "docs.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
esac
if [ ! -x .venv-docs/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv-docs
fi
# the extra alone, without torch and transformers
read -ra tools < <(.venv-docs/bin/python - <<'PYTHON_CODE'
import re
text = open("pyproject.toml", encoding="utf-8").read()
print(*re.findall(r'"([^"]+)"', re.search(r"^docs = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)[1]))
PYTHON_CODE
)
.venv-docs/bin/python -m pip install -qq --disable-pip-version-check "${tools[@]}"
export NO_MKDOCS_2_WARNING=1
.venv-docs/bin/mkdocs "${command[@]}"
[ "${command[0]}" = serve ] || echo "docs: build/site/index.html"
