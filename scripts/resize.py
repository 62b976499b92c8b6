#!/usr/bin/env python
"""Give a Mixture of Experts more experts, or fewer.

    python scripts/resize.py --model_name_or_path ./moe --output_dir outputs/larger --method grow --factor 2
    python scripts/resize.py --model_name_or_path ./moe --output_dir outputs/larger --method grow --mode masked
    python scripts/resize.py --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/code --method prune --keep 32 \\
        --data code=code.txt

Growing keeps the function; pruning and merging keep what the text uses most. Sources: checkpoints of this package and of
Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek and gpt-oss.
"""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from modeling_moe.resizing import GrowthOptions, PruningOptions, ResizeOptions, resize_checkpoint
from modeling_moe.utils.command_line import parse, run


@dataclass
class Arguments:
    """Where from, where to."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the sparse model"})
    output_dir: str = field(metadata={"help": "folder to write, whole or not at all; an interrupted run goes on"})
    dtype: str = field(default="auto", metadata={"help": "auto (the source's), float32, bfloat16 or float16"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote there"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def main() -> None:
    """Resizes and prints what came out."""
    args, options, growth, pruning = parse([Arguments, ResizeOptions, GrowthOptions, PruningOptions], __doc__)
    before, after, reason_not_exact = resize_checkpoint(
        args.model_name_or_path,
        args.output_dir,
        options,
        growth,
        pruning,
        args.dtype,
        args.overwrite,
        trust_remote_code=args.trust_remote_code,
    )
    table = Table("", args.model_name_or_path, args.output_dir)
    for title, values in {
        "parameters": [f"{config.num_params():,}" for config in (before, after)],
        "active per token": [f"{config.num_active_params():,}" for config in (before, after)],
        "experts, per token": [f"{config.num_experts}, {config.num_experts_per_tok}" for config in (before, after)],
        "same function": ["", f"no: {reason_not_exact}" if reason_not_exact else "yes"],
    }.items():
        table.add_row(title, *values)
    Console().print(table)


if __name__ == "__main__":
    run(main)
