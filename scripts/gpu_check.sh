#!/usr/bin/env bash
# This checks on one GPU that the package is correct and how fast it is, in less than 8 minutes and without network.
#   bash scripts/gpu_check.sh                          all parts below except science
#   bash scripts/gpu_check.sh --part kernels --part sweep
#   bash scripts/gpu_check.sh --part science           SmolLM2-135M upcycled against dense, at most 300 s; how to provide
#                                                      the weights: PYTHONPATH=scripts python3 -m moe_benchmark.gpu.weights --help
#   bash scripts/gpu_check.sh --size tiny              shapes of a few rows
#   bash scripts/gpu_check.sh --limit 600              at most this many seconds for each part, instead of those below
#
# part         at most  what
# environment     25 s  versions, GPU, bandwidth of a copy, rate of products
# precompile      60 s  fills Triton's cache for all other parts, on all cores, without the GPU
# tests           75 s  pytest -m gpu in 8 processes
# correctness     55 s  gradients of a model, no synchronisation, CUDA graphs, torch.compile, generation, LoRA, 4 bits
# comparison     105 s  against transformers' grouped_mm, Liger and dense products at the presets' shapes
# kernels         45 s  ms and TFLOP/s of each launch
# sweep           45 s  other tiles
# lora            30 s  low-rank updates against full fine-tuning
# memory          25 s  peak memory against grouped_mm and Liger
#
# The folder OUT (outputs/gpu) gets results.jsonl, one line for each number, and log.txt; lines of parts that do not run
# again are kept. Each part is a separate process, which is ended at its limit. The exit code is 1 if anything failed.
# `python3 scripts/gpu_report.py` makes a page of the results.
#
# It needs python3 with torch >= 2.11, triton >= 3.6, transformers >= 5.17, peft and pytest (-xdist, -timeout). Wheels in
# the folder .whl are installed; useful are datasets dill multiprocess evaluate liger_kernel gguf bitsandbytes:
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl datasets dill multiprocess \
#       evaluate liger_kernel gguf bitsandbytes --platform manylinux_2_24_x86_64
# If transfers are limited, `zip -d .whl/bitsandbytes*.whl "*cuda1[12]*.so" "*rocm*.so" "*xpu*.so"` leaves 7 of its 43 MB.
# A missing package is named, with what is omitted without it.
set -uo pipefail
cd "$(dirname "$0")/.."

DEFAULT=(environment precompile tests correctness comparison kernels sweep lora memory)
declare -A LIMITS=(
    [environment]=25 [precompile]=60 [tests]=75 [correctness]=55 [comparison]=105 [kernels]=45 [sweep]=45 [lora]=30
    [memory]=25 [science]=300
)

parts=() size=full limit_of_all=
while [ $# -gt 0 ]; do
    case $1 in
        --help) sed -n "2,/^set /s/^# \{0,1\}//p" "$0" && exit ;;
        --part | --size | --limit) [ $# -gt 1 ] || { echo "gpu_check.sh: $1 needs a value (see --help)" >&2 && exit 2; } ;;&
        --part)
            [ -n "${LIMITS[$2]:-}" ] || { echo "gpu_check.sh: unknown part $2 (see --help)" >&2 && exit 2; }
            parts+=("$2") && shift 2
            ;;
        --size)
            [[ $2 =~ ^(full|tiny)$ ]] || { echo "gpu_check.sh: unknown size $2, choose full or tiny" >&2 && exit 2; }
            size=$2 && shift 2
            ;;
        --limit)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || { echo "gpu_check.sh: --limit $2 is not a number of seconds" >&2 && exit 2; }
            limit_of_all=$2 && shift 2
            ;;
        *) echo "gpu_check.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${DEFAULT[@]}")

OUT=${OUT:-outputs/gpu}
mkdir -p "$OUT"
results=$OUT/results.jsonl log=$OUT/log.txt
touch "$results" && : >"$log"
for part in "${parts[@]}"; do sed -i "/^{\"part\": \"$part\"/d" "$results"; done

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$PWD:$PWD/scripts:$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
shopt -s nullglob
wheels=(.whl/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "${wheels[@]}" 2>&1 | tee -a "$log"
fi

# a line of results.jsonl for a part that cannot write it
record() { printf '{"part": "%s", "at_s": %d, "error": "%s"}\n' "$1" "$2" "$3" | tee -a "$log" >>"$results"; }

run_part() {
    local part=$1 limit=${limit_of_all:-${LIMITS[$1]}} start=$SECONDS code spent
    # what has started by then can end before the limit
    local until=$(($(date +%s) + limit - limit / 8 - 3))
    echo "== $part, at most $limit s" | tee -a "$log"
    timeout -k 5 "$limit" python3 -m moe_benchmark.gpu "$part" --output "$OUT" --size "$size" \
        --until "$until" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]} spent=$((SECONDS - start))
    [ "$code" != 2 ] || exit 2 # the part cannot run, and has printed the reason
    if [ "$code" = 124 ] || { [ "$code" = 137 ] && [ "$spent" -ge "$limit" ]; }; then
        record "$part" "$spent" "over its limit of $limit s"
    elif [ "$code" -gt 128 ]; then
        record "$part" "$spent" "killed by signal $((code - 128))"
    elif [ "$code" != 0 ]; then
        record "$part" "$spent" "ended with code $code before its end"
    fi
}

for part in "${parts[@]}"; do run_part "$part"; done
python3 -m moe_benchmark.gpu summary --output "$OUT" 2>&1 | tee -a "$log"
exit "${PIPESTATUS[0]}"
