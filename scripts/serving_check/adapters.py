"""This script asks vLLM and llama.cpp about exported adapters, and compares them with transformers and PEFT.

python -m serving_check.adapters make FOLDER SMOLLM2      in this package's environment; SMOLLM2 holds the GGUF file
python -m serving_check.adapters vllm FOLDER              in vLLM's environment
python -m serving_check.adapters llama FOLDER LLAMA_CPP   in llama.cpp's environment; LLAMA_CPP is a source tree
python -m serving_check.adapters table FOLDER             in any; exits with 1 if an answer is not the expected one

vLLM has no kernel for LoRA on fused experts on CPU (`kernel` in the table holds what it says). There, a plain function takes
the place of `TritonExperts.apply` and computes with the factors that vLLM has loaded, packed and scaled in its own buffers.
So the check covers vLLM's names, shapes, ranks and scaling, and not the kernel.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .answers import NEW_TOKENS, PROMPTS, Answers, compare


CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"routed_scaling_factor": 2.0},
    "qwen3_moe": {"qk_norm": "head"},
    "qwen2_moe": {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 64,
        "shared_expert_gate": True,
        "qkv_bias": True,
    },
}
RANK = 8
# a server's answers -> the answers of transformers that they must equal
EXPECTED = {"vllm": "adapter", "vllm_base": "base", "vllm_merged": "adapter"} | {
    "llama": "adapter",
    "llama_base": "base",
    "llama_merged": "adapter",
}


def make(root: Path, smollm2: Path) -> None:
    """Makes models, adapters and exports of all cases, and asks transformers."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from modeling_moe.conversion import convert_checkpoint
    from modeling_moe.lora import ExportAdapterArguments, export_adapter, moe_lora_config
    from modeling_moe.utils.loading import load_tokenizer

    from .cases import Case
    from .make import GGUF, answers, make_random

    tokenizer = load_tokenizer(str(smollm2), GGUF)
    for target, fields in CASES.items():
        folder = root / target
        folder.mkdir(parents=True, exist_ok=True)
        make_random(Case(target, fields), folder / "moe", tokenizer)
        model = AutoModelForCausalLM.from_pretrained(folder / "moe")
        adapted = get_peft_model(model, moe_lora_config(model, r=RANK, router=False))
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(str(folder / "trained"))
        convert_checkpoint(str(folder / "moe"), folder / "base", target, overwrite=True)
        for output, server, merged in (
            ("vllm", "vllm", False),
            ("llama", "llama.cpp", False),
            ("merged", "vllm", True),
        ):
            arguments = {"served_model": str(folder / "base"), "server": server, "merged": merged, "overwrite": True}
            export_adapter(ExportAdapterArguments(str(folder / "trained"), str(folder / output), **arguments))
        answers(folder / "moe").save(folder / "base.json")
        answers(folder / "trained").save(folder / "adapter.json")
        print(f"=== {target}", flush=True)


def _plain_experts(
    self: Any,
    output: Any,
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    *_: Any,
    **__: Any,
) -> None:
    """Computes experts and the factors that vLLM has loaded, token by token, in the place of `TritonExperts.apply`."""
    import torch

    context = self._lora_context
    slots = context.punica_wrapper.token_lora_indices
    for token, hidden in enumerate(hidden_states):
        total, slot = torch.zeros_like(hidden), int(slots[token])
        for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            gate, up = (w1[expert] @ hidden).chunk(2)
            if slot >= 0:
                parts = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                gate, up = (
                    out + b[slot, expert] @ (a[slot, expert] @ hidden)
                    for out, (a, b) in zip((gate, up), parts, strict=True)
                )
            inner = torch.nn.functional.silu(gate) * up
            value = w2[expert] @ inner
            if slot >= 0:
                a, b = context.w2_lora_a_stacked[0], context.w2_lora_b_stacked[0]
                value = value + b[slot, expert] @ (a[slot, expert] @ inner)
            total += weight * value
        output[token].copy_(total)


def _asked(engine: Any, adapter: Path | None) -> Answers:
    vllm = import_module("vllm")
    request = import_module("vllm.lora.request").LoRARequest("adapter", 1, str(adapter)) if adapter else None
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = [output.outputs[0] for output in engine.generate(prompts, sampling, lora_request=request)]
    steps = [list(zip(output.logprobs, output.token_ids, strict=True)) for output in outputs]
    logprobs = [[step[token].logprob for step, token in each] for each in steps]
    return Answers([list(output.token_ids) for output in outputs], logprobs)


def _with_engine(folder: Path, ask: Callable[[Any], Answers], **options: Any) -> Answers:
    """Returns what `ask` returns for an engine; an exception becomes the error, since a refusal is a result here."""
    vllm, engine = import_module("vllm"), None
    common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    try:
        engine = vllm.LLM(str(folder), skip_tokenizer_init=True, enable_prefix_caching=False, **common, **options)
        return ask(engine)
    except Exception as error:
        return Answers([], [], f"{type(error).__name__}: {error}")
    finally:
        del engine
        with contextlib.suppress(Exception):  # nothing was built
            import_module("vllm.distributed").cleanup_dist_env_and_memory()


def ask_vllm(root: Path) -> None:
    """Asks vLLM about adapters, base models, merged models and the files that PEFT itself has saved."""
    module = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
    experts = import_module(module).TritonExperts
    kernel = experts.apply
    for target in CASES:
        folder, lora = root / target, {"enable_lora": True, "max_lora_rank": RANK}
        _with_engine(folder / "base", lambda engine, at=folder: _asked(engine, at / "vllm"), **lora).save(
            folder / "kernel.json"
        )
        experts.apply = _plain_experts
        for name, adapter in (("vllm", "vllm"), ("vllm_base", None), ("vllm_peft", "trained")):
            place = folder / adapter if adapter else None
            answers = _with_engine(folder / "base", lambda engine, at=place: _asked(engine, at), **lora)
            answers.save(folder / f"{name}.json")
        experts.apply = kernel
        _with_engine(folder / "merged", lambda engine: _asked(engine, None)).save(folder / "vllm_merged.json")


def _asked_llama(model: Path, adapter: Path | None) -> Answers:
    # a checker of types does not find the servers' packages, which are in other environments
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(model), 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.verbosity = 0
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server, ids, logprobs = xllamacpp.Server(params), [], []
    fixed = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True, "cache_prompt": False}
    for prompt in PROMPTS:
        answer = server.handle_completions({"prompt": prompt} | fixed)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            return Answers([], [], str(answer))
        told = answer["choices"][0]["logprobs"]["content"]
        ids.append([token["id"] for token in told])
        logprobs.append([token["logprob"] for token in told])
    return Answers(ids, logprobs)


def ask_llama(root: Path, tree: str) -> None:
    """Converts models and adapters by llama.cpp's converters, and asks llama.cpp."""

    def converted(script: str, *arguments: str) -> str | None:
        command = [sys.executable, f"{tree}/{script}", *arguments, "--outtype", "f32"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return (run.stderr.strip().splitlines() or ["no message"])[-1] if run.returncode else None

    for target in CASES:
        folder = root / target
        files = {name: folder / f"{name}.gguf" for name in ("base", "merged", "llama", "trained")}
        errors = {
            name: converted("convert_hf_to_gguf.py", str(folder / name), "--outfile", str(files[name]))
            for name in ("base", "merged")
        } | {
            name: converted(
                "convert_lora_to_gguf.py",
                str(folder / name),
                "--base",
                str(folder / "base"),
                "--outfile",
                str(files[name]),
            )
            for name in ("llama", "trained")
        }
        asked = {"llama": ("base", "llama"), "llama_base": ("base", None), "llama_merged": ("merged", None)} | {
            "llama_peft": ("base", "trained")
        }
        for name, (model, adapter) in asked.items():
            error = errors[model] or (errors[adapter] if adapter else None)
            try:
                answers = (
                    Answers([], [], f"converter: {error}")
                    if error
                    else _asked_llama(files[model], files[adapter] if adapter else None)
                )
            except Exception as failure:  # a file that llama.cpp does not load is a result here
                answers = Answers([], [], f"{type(failure).__name__}: {failure}")
            answers.save(folder / f"{name}.json")


def table(root: Path) -> bool:
    """Prints a table of all answers, and returns whether each is the expected one and adapters change the answers."""
    passed = True
    print("| model | server | same tokens | largest difference of a log-probability |\n|---|---|---|---|")
    for target in CASES:
        folder = root / target
        expected = {name: Answers.load(folder / f"{name}.json") for name in ("adapter", "base")}
        changed = not compare(expected["base"], expected["adapter"]).exact
        passed = passed and changed
        for name, like in EXPECTED.items():
            found = Answers.load(folder / f"{name}.json")
            if found.error:
                print(f"| {target} | {name} | FAILED | {found.error[:160]} |")
                passed = False
                continue
            result = compare(expected[like], found)
            passed = passed and result.exact
            print(f"| {target} | {name} | {result.same} of {result.tokens} | {result.difference:.1e} |")
        for name in ("kernel", "vllm_peft", "llama_peft"):
            # none of these may be taken for working: the kernel that vLLM lacks on CPU, and the file as PEFT saves it
            found = Answers.load(folder / f"{name}.json")
            told = "answered without the experts' factors"
            if found.error:
                told = f"refused: {found.error.splitlines()[-1][:160]}"
            elif compare(expected["adapter"], found).exact:
                told, passed = "ANSWERED: this script and the documentation are out of date", False
            print(f"| {target} | {name} | - | {told} |")
    return passed


def main() -> None:
    """Runs the step that the command line names."""
    # read when vLLM is imported
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    step, root, *more = sys.argv[1:]
    if step == "make":
        make(Path(root), Path(more[0]))
    elif step == "vllm":
        ask_vllm(Path(root))
    elif step == "llama":
        ask_llama(Path(root), more[0])
    elif step == "table":
        sys.exit(0 if table(Path(root)) else 1)
    else:
        sys.exit(f"{step} is no step: choose make, vllm, llama or table")


if __name__ == "__main__":
    main()
