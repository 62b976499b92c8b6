#!/usr/bin/env bash
# Runs tests and the demo on other releases, each set of them in an environment of its own. Sourced by test.sh.
#   run_matrix [ENVIRONMENT ...]
# An environment is a name in configuration/constraints/matrix.txt, by default each of them in turn, or releases such as
# peft==0.20.0 or "transformers==5.20.2 huggingface-hub" that take the place of the tested ones.

MATRIX=configuration/constraints/matrix.txt

# interpreter of a Python version, python3 for -
find_python() {
    local candidate
    [ "$1" = - ] && echo "${PYTHON:-python3}" && return
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        "$candidate" -c "" 2>/dev/null && echo "$candidate" && return
    done
    echo "test.sh: no Python $1 here: install it (pyenv install $1, uv python install $1)" >&2
    return 1
}

# tested.txt with other releases: `name==version`, or a name alone for the newest
releases() {
    local line change
    while read -r line; do
        for change in "$@"; do
            [[ $line == "${change%%==*}=="* ]] && continue 2
        done
        [[ $line == "#"* ]] || echo "$line"
    done < configuration/constraints/tested.txt
    [ $# = 0 ] || printf '%s\n' "$@"
    echo "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'"
}

run_environment() {
    local name=$1 python=$2 folder=.venv-$1 log
    shift 2
    python=$(find_python "$python") || return 1
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    releases "$@" > "$folder/requirements.txt"
    # the registry's newest, whatever this machine's own constraints and this package's bounds say
    PIP_CONSTRAINT=/dev/null "$folder/bin/python" -m pip install -qq --disable-pip-version-check --upgrade \
        -r "$folder/requirements.txt" || return 1
    PIP_CONSTRAINT=/dev/null "$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-deps -e . || return 1
    "$folder/bin/python" -m pytest -q -n auto -m "not slow and not gpu" \
        tests/core tests/dispatch tests/lora tests/scripts tests/hub tests/training/test_trl.py || return 1
    bash scripts/demo.sh --venv "$folder" --output_dir "outputs/matrix-$name" --max_steps 2 || return 1
}

installed() {
    "$1/bin/python" -m pip list --format=freeze --disable-pip-version-check 2>/dev/null |
        grep -E "^(torch|triton|transformers|peft|trl|accelerate)==" | tr '\n' ' '
}

run_matrix() {
    local line name python changes failed=()
    [ $# -gt 0 ] || set -- $(grep -v "^#" "$MATRIX" | cut -d " " -f 1)
    for name in "$@"; do
        line=$(grep -E "^$name " "$MATRIX" || true)
        if [[ $name == *==* ]]; then
            line="${name//[ =]/-} - $name"
        elif [ -z "$line" ]; then
            echo "test.sh: $MATRIX has no environment $name" >&2 && return 2
        fi
        read -r name python changes <<< "$line"
        printf '\n== %s (%s)\n' "$name" "${changes:-as tested}"
        # shellcheck disable=SC2086
        if run_environment "$name" "$python" $changes; then
            echo "== $name passed: $(installed ".venv-$name")"
        else
            failed+=("$name")
            echo "== $name FAILED: $(installed ".venv-$name" || true)" >&2
            echo "Mend the code for this release. Until then keep it out: lower the bound of its package in pyproject.toml," \
                "so that pip does not install it beside this one." >&2
        fi
    done
    [ ${#failed[@]} = 0 ] || { echo "Failed: ${failed[*]}" >&2 && return 1; }
}
