"""This script asks vLLM for the answers of checkpoints, one after another, in one process.

python -m serving_check.ask_vllm NAME=FOLDER=OUTPUT.json ...    in vLLM's environment
"""

import contextlib
import os
import sys
from pathlib import Path

from .answers import NEW_TOKENS, PROMPTS, Answers


# read when vLLM is imported
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}


def ask(folder: str, compiled: bool = False) -> Answers:
    """Returns vLLM's answers in fp32; an exception becomes the error, since a refusal is a result here."""
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = None
    try:
        engine = vllm.LLM(
            model=folder,
            dtype="float32",
            enforce_eager=not compiled,
            max_model_len=128,
            max_num_seqs=4,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False
        )
        outputs = [
            output.outputs[0] for output in engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
        ]
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
            cleanup_dist_env_and_memory()


def main() -> None:
    """Asks for each checkpoint of the command line, and writes the answers."""
    for argument in sys.argv[1:]:
        name, folder, output = argument.split("=")
        print(f"=== {name}", flush=True)
        answers = ask(folder, compiled=name.endswith("compiled"))
        print(f"=== {name}: {answers.error or 'answered'}", flush=True)
        answers.save(Path(output))


if __name__ == "__main__":
    main()
