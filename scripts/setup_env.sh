#!/usr/bin/env bash
# Makes .venv with the package and the extras named, from nothing but python3 and pip. Sourced by demo.sh and test.sh.
#   setup_env EXTRA [PIP_ARGUMENT ...]
# PYTHON chooses the interpreter, python3 by default. A machine without a GPU gets the CPU version of torch that CI
# tests; with a GPU, torch is left to the user's own installation or pip's choice.

setup_env() {
    local extra=$1
    shift
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv
    fi
    local torch=()
    command -v nvidia-smi >/dev/null || torch=(torch==2.13.0)
    echo "Installing into .venv (minutes the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${torch[@]}" -e ".[$extra]" "$@"
}
