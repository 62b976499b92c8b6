"""This script asks vLLM for the answers of checkpoints, one after another, in one process.

python -m serving_check.ask_vllm NAME=FOLDER=OUTPUT.json ...    in vLLM's environment
"""

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .answers import NEW_TOKENS, PROMPTS, Answers
from .cases import CASES


# read when vLLM is imported
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}


def ask(folder: Path, adapter: Path | None = None, **options: Any) -> Answers:
    """Returns vLLM's answers in fp32; an exception becomes the error, since a refusal is a result here.

    Args:
        folder: checkpoint.
        adapter: adapter of PEFT that all prompts are answered with.
        options: arguments of `vllm.LLM` beside the usual ones here, or in the place of these.
    """
    # a checker of types does not find the servers' packages, which are in other environments
    vllm, engine = import_module("vllm"), None
    usual = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    try:
        engine = vllm.LLM(str(folder), **usual | options)
        request = import_module("vllm.lora.request").LoRARequest("adapter", 1, str(adapter)) if adapter else None
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        outputs = [output.outputs[0] for output in engine.generate(prompts, sampling, lora_request=request)]
        ids = [list(output.token_ids) for output in outputs]
        logprobs = [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ]
        return Answers(ids, logprobs)
    except Exception as error:
        return Answers([], [], f"{type(error).__name__}: {error}")
    finally:
        del engine
        with contextlib.suppress(Exception):  # nothing was built
            import_module("vllm.distributed").cleanup_dist_env_and_memory()


def main() -> None:
    """Asks for each checkpoint of the command line, and writes the answers."""
    options = {case.folder: case.vllm for case in CASES}
    for argument in sys.argv[1:]:
        name, folder, output = argument.split("=")
        print(f"=== {name}", flush=True)
        answers = ask(Path(folder), **options[name])
        print(f"=== {name}: {answers.error or 'answered'}", flush=True)
        answers.save(Path(output))


if __name__ == "__main__":
    main()
