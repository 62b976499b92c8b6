#!/usr/bin/env bash
# This makes a virtual environment with the package; it needs only python3 and pip. demo.sh and test.sh source it.
#   setup_env FOLDER EXTRA
# PYTHON names the interpreter, python3 by default. Packages in tested.txt are installed in the releases listed there.

setup_env() {
    local folder=$1 extra=$2
    if [ ! -x "$folder/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$folder"
    fi
    echo "Installing into $folder (minutes the first time) ..."
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check -c configuration/constraints/tested.txt \
        -e ".[$extra]"
}
