"""This script converts checkpoints by llama.cpp's converter and asks llama.cpp for the answers.

python -m serving_check.ask_llama LLAMA_CPP NAME=FOLDER=OUTPUT.json ...    in llama.cpp's environment
LLAMA_CPP is a source tree of llama.cpp with convert_hf_to_gguf.py.
"""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from .answers import NEW_TOKENS, PROMPTS, Answers


def convert(tree: str, folder: str, output: Path, base: str | None = None) -> str | None:
    """Converts a checkpoint, or an adapter of the checkpoint `base`, to GGUF in fp32.

    Returns:
        The converter's last line if the converter refuses the folder, else None.
    """
    script = ["convert_hf_to_gguf.py"] if base is None else ["convert_lora_to_gguf.py", "--base", base]
    command = [
        sys.executable,
        f"{tree}/{script[0]}",
        folder,
        *script[1:],
        "--outtype",
        "f32",
        "--outfile",
        str(output),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stderr.strip().splitlines() or ["no message"])[-1] if run.returncode else None


def ask(gguf: Path, adapter: Path | None = None) -> Answers:
    """Returns llama.cpp's answers, with keys and values in fp32; a model that llama.cpp does not load becomes the error."""
    try:
        return _asked(gguf, adapter)
    except Exception as failure:  # a refusal is a result here
        return Answers([], [], f"{type(failure).__name__}: {failure}")


def _asked(gguf: Path, adapter: Path | None) -> Answers:
    # a checker of types does not find the servers' packages, which are in other environments
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(gguf), 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.verbosity = 0
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
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
            answers = ask(gguf)
            gguf.unlink()
        else:
            answers = Answers([], [], f"converter: {error}")
        print(f"=== {name}: {answers.error or 'answered'}", flush=True)
        answers.save(Path(output))


if __name__ == "__main__":
    main()
