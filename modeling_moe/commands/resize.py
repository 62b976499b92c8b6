# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command gives a Mixture of Experts more experts, or fewer.

    moe resize --model_name_or_path ./moe --output_dir outputs/larger --method grow --factor 2
    moe resize --model_name_or_path ./moe --output_dir outputs/larger --method grow --mode masked
    moe resize --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/code --method prune --keep 32 --data code=code.txt
    moe resize --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/half --method prune --keep 32 --score load \\
        --data code=code.txt law=law.txt --save_usage use.json
    moe resize --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/quarter --method prune --keep 16 --usage_json use.json

Growing keeps the function; pruning and merging keep what the text uses most. Pruning takes any model of transformers whose
experts follow its experts interface, and the result has the source's family and names on disk. The other methods take
checkpoints of this package and of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek and gpt-oss, and write one of this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ..resizing import GrowthOptions, ModelSize, PruningOptions, ResizeOptions, resize_checkpoint
from ..utils.command_line import parse, refuse_missing_folder
from ..utils.loading import DtypeName


@dataclass
class ResizeArguments:
    """Which model to resize, and where to write the result."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the sparse model"})
    output_dir: str = field(
        metadata={"help": "folder to write, whole or not at all; the same command continues an interrupted run"}
    )
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the result; auto: the source's dtype"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote to output_dir"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def _column(size: ModelSize) -> list[str]:
    active = "unknown" if size.active is None else f"{size.active:,}"
    return [f"{size.parameters:,}", active, f"{size.num_experts}, {size.experts_per_token or 'unknown'}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Resizes, and prints the size before and after."""
    args, options, growth, pruning = parse(
        [ResizeArguments, ResizeOptions, GrowthOptions, PruningOptions], __doc__, argv
    )
    refuse_missing_folder(save_usage=options.save_usage)
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
    titles = ("parameters", "active per token", "experts, per token")
    for row in zip(titles, _column(before), _column(after), strict=True):
        table.add_row(*row)
    table.add_row("same function", "", f"no: {reason_not_exact}" if reason_not_exact else "yes")
    Console().print(table)
