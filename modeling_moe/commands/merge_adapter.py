# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command merges a saved LoRA adapter into the base model, and writes the result as a model without adapter.

    moe merge_adapter --model_name_or_path outputs/adapter --output_dir outputs/merged
    moe merge_adapter --model_name_or_path name/adapter --base_model ./Qwen3-30B-A3B --output_dir outputs/merged

The adapter may have been trained by PEFT alone, on a dense model, on one of transformers' MoE models, experts and routers
included, or on this package's. The result has the base model's dtype.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..lora import MergeArguments, merge_adapter
from ..utils.command_line import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Merges, and prints the type and size of the result."""
    (args,) = parse([MergeArguments], __doc__, argv)
    model = merge_adapter(args)
    table = Table("", args.output_dir)
    table.add_row("model_type", model.config.model_type)
    table.add_row("parameters", f"{model.num_parameters():,}")
    table.add_row("dtype", str(model.dtype).removeprefix("torch."))
    Console().print(table)
