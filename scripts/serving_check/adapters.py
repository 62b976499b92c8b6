"""This script asks vLLM and llama.cpp about exported adapters, and compares them with transformers and PEFT.

python -m serving_check.adapters make FOLDER SMOLLM2      in this package's environment; SMOLLM2 holds the GGUF file
python -m serving_check.adapters vllm FOLDER              in vLLM's environment
python -m serving_check.adapters llama FOLDER LLAMA_CPP   in llama.cpp's environment; LLAMA_CPP is a source tree
python -m serving_check.adapters table FOLDER [PAGE VERSION ...]    in any; writes the page's table, and exits with 1 if an
                                                          answer is not the expected one

vLLM has no kernel for LoRA on fused experts on CPU (`kernel` in the table holds what it says). There, a plain function takes
the place of `TritonExperts.apply` and computes with the factors that vLLM has loaded, packed and scaled in its own buffers.
So the check covers vLLM's names, shapes, ranks and scaling, and not the kernel.
"""

import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .answers import Answers, compare
from .page import write_section


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
# file of a server's answers -> what was asked, and the answers of transformers that they must equal
EXPECTED = {
    "llama": ("llama.cpp, adapter", "adapter"),
    "llama_base": ("llama.cpp, without adapter", "base"),
    "llama_merged": ("llama.cpp, merged", "adapter"),
    "vllm": ("vLLM, adapter, a plain function for its kernel", "adapter"),
    "vllm_base": ("vLLM, without adapter", "base"),
    "vllm_merged": ("vLLM, merged", "adapter"),
}
NOT_EXPECTED = {
    "llama_peft": "llama.cpp, the file as PEFT saves it",
    "kernel": "vLLM, adapter, its own kernel",
    "vllm_peft": "vLLM, the file as PEFT saves it",
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
        # answers of an earlier run must not pass for answers of this one
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
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
        answers(folder / "moe", tokenizer).save(folder / "base.json")
        answers(folder / "trained", tokenizer).save(folder / "adapter.json")
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


def ask_vllm(root: Path) -> None:
    """Asks vLLM about adapters, base models, merged models and the files that PEFT itself has saved."""
    from .ask_vllm import ask

    module = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
    experts = import_module(module).TritonExperts
    kernel = experts.apply
    for target in CASES:
        folder, lora = root / target, {"enable_lora": True, "max_lora_rank": RANK}
        ask(folder / "base", folder / "vllm", **lora).save(folder / "kernel.json")
        experts.apply = _plain_experts
        for name, adapter in (("vllm", folder / "vllm"), ("vllm_base", None), ("vllm_peft", folder / "trained")):
            ask(folder / "base", adapter, **lora).save(folder / f"{name}.json")
        experts.apply = kernel
        ask(folder / "merged").save(folder / "vllm_merged.json")


def ask_llama(root: Path, tree: str) -> None:
    """Converts models and adapters by llama.cpp's converters, and asks llama.cpp."""
    from .ask_llama import ask, convert

    for target in CASES:
        folder = root / target
        files = {name: folder / f"{name}.gguf" for name in ("base", "merged", "llama", "trained")}
        errors = {
            name: convert(tree, str(folder / name), file, None if name in ("base", "merged") else str(folder / "base"))
            for name, file in files.items()
        }
        asked = {"llama": ("base", "llama"), "llama_base": ("base", None), "llama_merged": ("merged", None)} | {
            "llama_peft": ("base", "trained")
        }
        for name, (model, adapter) in asked.items():
            error = errors[model] or (errors[adapter] if adapter else None)
            answers = (
                Answers([], [], f"converter: {error}")
                if error
                else ask(files[model], files[adapter] if adapter else None)
            )
            answers.save(folder / f"{name}.json")


def table(root: Path) -> tuple[list[str], bool]:
    """Returns the table of all answers, and whether each is the expected one and adapters change the answers."""
    passed = True
    lines = ["| Model | Asked | Same tokens | Largest difference of a log-probability |", "|---|---|---|---|"]
    for target in CASES:
        folder = root / target
        expected = {name: Answers.load(folder / f"{name}.json") for name in ("adapter", "base")}
        if compare(expected["base"], expected["adapter"]).exact:
            lines.append(f"| {target} | transformers | - | **the adapter changes nothing** |")
            passed = False
        for name, (title, like) in EXPECTED.items():
            found = Answers.load(folder / f"{name}.json")
            if found.error:
                lines.append(f"| {target} | {title} | **failed** | {_cell(found.error)} |")
                passed = False
                continue
            result = compare(expected[like], found)
            passed = passed and result.exact
            same = f"{result.same} of {result.tokens}"
            lines.append(
                f"| {target} | {title} | {same if result.exact else f'**{same}**'} | {result.difference:.0e} |"
            )
        for name, title in NOT_EXPECTED.items():
            # none of these may be taken for working: the kernel that vLLM lacks on CPU, and the file as PEFT saves it
            found = Answers.load(folder / f"{name}.json")
            told = "answered without the experts' factors"
            if found.error:
                told = f"refused: {_cell(found.error)}"
            elif compare(expected["adapter"], found).exact:
                told, passed = "**answered: the documentation is out of date**", False
            lines.append(f"| {target} | {title} | - | {told} |")
    return lines, passed


def _cell(error: str) -> str:
    """Returns the beginning of an error's last line, without what a table or a page cannot hold."""
    return error.splitlines()[-1][:100].replace("|", "/").replace("<", "(").replace(">", ")")


def main() -> None:
    """Runs the step that the command line names."""
    step, root, *more = sys.argv[1:]
    if step == "make":
        make(Path(root), Path(more[0]))
    elif step == "vllm":
        ask_vllm(Path(root))
    elif step == "llama":
        ask_llama(Path(root), more[0])
    elif step == "table":
        lines, passed = table(Path(root))
        print("\n".join(lines))
        if more:
            write_section(Path(more[0]), "adapters", more[1:], lines)
        sys.exit(not passed)
    else:
        sys.exit(f"{step} is no step: choose make, vllm, llama or table")


if __name__ == "__main__":
    main()
