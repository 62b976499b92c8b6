#!/usr/bin/env bash
# Makes a virtual environment with the package, from nothing but python3 and pip. Sourced by demo.sh and test.sh.
#   setup_env FOLDER EXTRA [PIP_ARGUMENT ...]
# PYTHON chooses the interpreter, python3 by default. A machine without a GPU gets the version of torch that CI tests;
# with one, pip takes the newest that fits.

setup_env() {
    local folder=$1 extra=$2 torch=()
    shift 2
    if [ ! -x "$folder/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$folder"
    fi
    command -v nvidia-smi >/dev/null || torch=(torch==2.13.0)
    echo "Installing into $folder (minutes the first time) ..."
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check "${torch[@]}" -e ".[$extra]" "$@"
}
