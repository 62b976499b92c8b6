#!/usr/bin/env python
"""Turn a dense checkpoint into a Mixture of Experts that computes the same until it is trained.

    python scripts/upcycle.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir outputs/moe --num_experts 4
    python scripts/upcycle.py --model_name_or_path ./dense --output_dir outputs/moe --shared_expert true --noise 0.05
    python scripts/upcycle.py --model_name_or_path ./dense --output_dir outputs/moe --dry_run

Sources: Llama (SmolLM2, Yi, ...), Mistral, Qwen2 and Qwen3, as safetensors or GGUF (--gguf_file).
"""

from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from modeling_moe.cli import parse, run
from modeling_moe.files import parse_dtype
from modeling_moe.upcycling import UpcyclingOptions, UpcyclingPlan, Verification, make_plan, upcycle_checkpoint


@dataclass
class Arguments:
    """Where from, where to."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the dense model"})
    output_dir: str = field(metadata={"help": "folder to write, whole or not at all"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the source's), float32, bfloat16 or float16"})
    overwrite: bool = field(default=False, metadata={"help": "replace output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan, read no weights, write nothing"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare"})


def print_plan(plan: UpcyclingPlan, verification: Verification | None, title: str) -> None:
    """Prints what was or would be made."""
    config = plan.config
    table = Table("", title)
    table.add_row("dense parameters", f"{plan.dense_params:,}")
    table.add_row("parameters", f"{config.num_params():,}")
    table.add_row("active per token", f"{config.num_active_params():,}")
    table.add_row("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}")
    table.add_row("shared experts", f"{config.num_shared_experts}")
    table.add_row("weights on disk", f"{plan.bytes_on_disk / 1e9:.2f} GB, {str(config.dtype).removeprefix('torch.')}")
    table.add_row("computes the dense function", f"no: {plan.inexactness}" if plan.inexactness else "yes")
    if verification is not None:
        table.add_row("loss, dense and result", f"{verification.dense_loss:.4f}, {verification.moe_loss:.4f}")
        table.add_row("largest logit difference", f"{verification.largest_difference:.1e}")
    Console().print(table)


def main() -> None:
    """Plans or upcycles, and prints the plan."""
    args, options = parse([Arguments, UpcyclingOptions], __doc__)
    if args.dry_run:
        gguf = {"gguf_file": args.gguf_file} if args.gguf_file else {}
        source = AutoConfig.from_pretrained(args.model_name_or_path, **gguf)
        dtype = parse_dtype(args.dtype) or source.dtype or torch.float32
        print_plan(make_plan(source, options, dtype), None, "plan, nothing written")
        return
    plan, verification = upcycle_checkpoint(
        args.model_name_or_path, args.output_dir, options, args.gguf_file, args.dtype, args.overwrite, args.verify
    )
    print_plan(plan, verification, args.output_dir)


if __name__ == "__main__":
    run(main)
