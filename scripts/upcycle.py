#!/usr/bin/env python
"""Turn dense checkpoints into a Mixture of Experts that computes the same until it is trained.

    python scripts/upcycle.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir outputs/moe --num_experts 4
    python scripts/upcycle.py --model_name_or_path ./dense --output_dir outputs/moe --num_experts 64 --granularity 8 \\
        --num_experts_per_tok 8
    python scripts/upcycle.py --model_name_or_path ./math --sources ./code ./law --num_experts 3 --output_dir outputs/btx \\
        --router_init ridge --calibration_data math=math.txt code=code.txt law=law.txt
    python scripts/upcycle.py --model_name_or_path ./dense --output_dir outputs/moe --dry_run

Sources: Llama (SmolLM2, Yi, ...), Mistral, Qwen2, Qwen3, SmolLM3, OLMo2, OLMo3, Phi-3, Gemma 2 and 3, Granite, GPT-2 and
GPT-NeoX, as safetensors or GGUF (--gguf_file). An interrupted run goes on when the same command is given again.
"""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from modeling_moe.conversion import Verification
from modeling_moe.upcycling import UpcyclingOptions, UpcyclingPlan, open_sources, plan_upcycling, upcycle_checkpoint
from modeling_moe.utils.command_line import parse, run


@dataclass
class Arguments:
    """Where from, where to."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the dense model"})
    output_dir: str = field(metadata={"help": "folder to write, whole or not at all; an interrupted run goes on"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the source's), float32, bfloat16 or float16"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote there"})
    max_shard_size: str = field(default="5GB", metadata={"help": "largest file; what an interruption costs at most"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan, read no weights, write nothing"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def print_plan(plan: UpcyclingPlan, verification: Verification | None, title: str) -> None:
    """Prints what was or would be made."""
    config, size = plan.config, str(plan.dtype).removeprefix("torch.")
    groups = Table("tensors", "count", "parameters", "GB")
    for group in plan.groups:
        groups.add_row(group.name, group.count, f"{group.params:,}", f"{group.nbytes / 1e9:.3f}")
    table = Table("", title)
    table.add_row("dense parameters", f"{plan.dense_params:,}")
    table.add_row("parameters", f"{plan.params:,}")
    table.add_row("active per token", f"{plan.active_params:,}")
    table.add_row("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}")
    table.add_row("shared experts", f"{config.num_shared_experts}")
    table.add_row(
        "sparse layers", f"{config.num_hidden_layers - len(config.mlp_only_layers)} of {config.num_hidden_layers}"
    )
    table.add_row("weights on disk", f"{plan.bytes_on_disk / 1e9:.2f} GB, {size}")
    table.add_row("memory to train", f"{plan.bytes_to_train / 1e9:.2f} GB and activations (AdamW, all weights)")
    serving = f"{plan.bytes_on_disk / 1e9:.2f} GB and {plan.cache_bytes() / 1e9:.3f} GB for each 1000 tokens of a text"
    table.add_row("memory to serve", serving)
    table.add_row("computes the dense function", f"no: {plan.reason_not_exact}" if plan.reason_not_exact else "yes")
    for name, text in verification.rows() if verification else []:
        table.add_row(name, text)
    Console().print(groups)
    Console().print(table)


def main() -> None:
    """Plans or upcycles, and prints the plan."""
    args, options = parse([Arguments, UpcyclingOptions], __doc__)
    if args.dry_run:
        sources = open_sources(
            args.model_name_or_path, options, args.gguf_file, args.dtype, trust_remote_code=args.trust_remote_code
        )
        print_plan(plan_upcycling(sources, options), None, "plan, nothing written")
        return
    plan, verification = upcycle_checkpoint(
        args.model_name_or_path,
        args.output_dir,
        options,
        args.gguf_file,
        args.dtype,
        args.overwrite,
        args.verify,
        args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
    )
    print_plan(plan, verification, args.output_dir)


if __name__ == "__main__":
    run(main)
