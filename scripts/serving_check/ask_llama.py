"""This script converts checkpoints by llama.cpp's converter and asks llama.cpp for the answers.

python -m serving_check.ask_llama LLAMA_CPP NAME=FOLDER=OUTPUT.json ...    in llama.cpp's environment
LLAMA_CPP is a source tree of llama.cpp with convert_hf_to_gguf.py.
"""

import json
import subprocess
import sys
from pathlib import Path

from .answers import NEW_TOKENS, PROMPTS, Answers


def convert(tree: str, folder: str, output: Path) -> str | None:
    """Converts a checkpoint to GGUF in fp32. Returns the converter's last line if it refuses the checkpoint, else None."""
    command = [sys.executable, f"{tree}/convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stderr.strip().splitlines() or ["no message"])[-1] if run.returncode else None


def ask(gguf: Path) -> Answers:
    """Returns llama.cpp's answers, with keys and values in fp32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(gguf), 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.verbosity = 0
    server = xllamacpp.Server(params)
    ids, logprobs = [], []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1} | {
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            return Answers([], [], str(answer))
        told = answer["choices"][0]["logprobs"]["content"]
        ids.append([token["id"] for token in told])
        logprobs.append([token["logprob"] for token in told])
    return Answers(ids, logprobs)


def main() -> None:
    """Converts and asks for each checkpoint of the command line, and writes the answers."""
    tree = sys.argv[1]
    for argument in sys.argv[2:]:
        name, folder, output = argument.split("=")
        gguf = Path(output).with_suffix(".gguf")
        error = convert(tree, folder, gguf)
        if error is None:
            try:
                answers = ask(gguf)
            except Exception as failure:  # a model that llama.cpp does not load is a result here
                answers = Answers([], [], f"{type(failure).__name__}: {failure}")
            gguf.unlink()
        else:
            answers = Answers([], [], f"converter: {error}")
        print(f"=== {name}: {answers.error or 'answered'}", flush=True)
        answers.save(Path(output))


if __name__ == "__main__":
    main()
