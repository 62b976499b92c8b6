#!/usr/bin/env bash
# This runs tests and the demo on other releases, each set of releases in a separate environment. test.sh sources it.
#   run_matrix [ENVIRONMENT ...]
# An environment is a name in configuration/constraints/matrix.txt, by default each name in turn; or releases that replace
# the tested ones: peft==0.21.0, torch (the newest), "transformers==5.20.2 huggingface-hub".

MATRIX=configuration/constraints/matrix.txt
TESTED=configuration/constraints/tested.txt

# find_python prints the interpreter of a Python version; - stands for python3
find_python() {
    local candidate
    [ "$1" = - ] && echo "${PYTHON:-python3}" && return
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        "$candidate" -c "" 2>/dev/null && echo "$candidate" && return
    done
    echo "test.sh: Python $1 is not installed: install it (pyenv install $1, uv python install $1)" >&2
    return 1
}

# package prints the name of a release's package as tested.txt writes names
package() {
    local name=${1%%==*}
    name=${name,,}
    echo "${name//_/-}"
}

# releases prints tested.txt with other releases: `name==version`, or a name alone for the newest
releases() {
    local line change
    while read -r line; do
        for change in "$@"; do
            change=$(package "$change")
            [[ $line == "$change=="* ]] && continue 2
        done
        [[ $line == "#"* ]] || echo "$line"
    done < "$TESTED"
    [ $# = 0 ] || printf '%s\n' "$@"
    echo "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'"
}

install_environment() {
    local folder=$1 python=$2
    shift 2
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    releases "$@" > "$folder/requirements.txt"
    # pip installs the registry's newest release, whatever the constraints of this machine and the bounds of this package
    export PIP_CONSTRAINT=/dev/null
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check --upgrade -r "$folder/requirements.txt" &&
        "$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-deps -e .
}

# left out: the tests of the benchmark, of mutate.py, and of fields that change nothing, which other releases hardly affect
test_environment() {
    local folder=$1 output=$2
    "$folder/bin/python" -m pytest -q -n auto --dist loadfile -m "not slow" --ignore tests/scripts/test_mutate.py \
        --ignore tests/core/test_configuration_unread.py --ignore-glob "tests/scripts/test_benchmark*" \
        tests/core tests/dispatch tests/generation tests/lora tests/monitoring tests/offload tests/scripts tests/hub \
        tests/training/test_trl.py \
        tests/training/test_foreign_balance.py tests/training/test_foreign_bias.py &&
        bash scripts/demo.sh --venv "$folder" --output_dir "$output" --max_steps 2
}

installed() {
    "$1/bin/python" -m pip list --format=freeze --disable-pip-version-check 2>/dev/null |
        grep -E "^(torch|triton|transformers|peft|trl|accelerate)==" | tr '\n' ' '
}

# environment prints the line of the matrix for a name in it, or for releases
environment() {
    local name
    if awk -v name="$1" '$1 == name && !/^#/ { found = 1; print } END { exit !found }' "$MATRIX"; then
        return
    elif grep -q "^$(package "${1%% *}")==" "$TESTED"; then
        name=${1//==/-}
        echo "${name// /-} - $1"
    else
        echo "test.sh: $1 is neither an environment of $MATRIX nor a release (name==version) of a package in $TESTED" >&2
        return 2
    fi
}

run_matrix() {
    local name python changes line lines=() failed=()
    [ $# -gt 0 ] || set -- $(grep -v "^#" "$MATRIX" | cut -d " " -f 1)
    for name in "$@"; do
        line=$(environment "$name") || return 2
        lines+=("$line")
    done
    for line in "${lines[@]}"; do
        read -r name python changes <<< "$line"
        printf '\n== %s (%s)\n' "$name" "${changes:-as tested}"
        # shellcheck disable=SC2086
        if ! python=$(find_python "$python") || ! install_environment ".venv-$name" "$python" $changes; then
            echo "== $name could not be installed: nothing was tested" >&2
            failed+=("$name")
        elif test_environment ".venv-$name" "outputs/matrix-$name"; then
            echo "== $name passed: $(installed ".venv-$name")"
        else
            echo "== $name FAILED: $(installed ".venv-$name")" >&2
            echo "Fix the code for these releases, or exclude them by the bounds in pyproject.toml." >&2
            failed+=("$name")
        fi
    done
    [ ${#failed[@]} = 0 ] || { echo "Failed: ${failed[*]}" >&2 && return 1; }
}
