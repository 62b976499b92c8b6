#!/usr/bin/env python
"""Merge a saved LoRA adapter into its base model, and write the result as a model of its own.

    python scripts/merge_adapter.py --model_name_or_path outputs/adapter --output_dir outputs/merged
    python scripts/merge_adapter.py --model_name_or_path name/adapter --base_model ./Qwen3-30B-A3B --output_dir outputs/merged

The adapter may have been trained by PEFT alone, on a dense model, on one of transformers' MoE models, experts and routers
included, or on this package's. The result has the base model's dtype.
"""

from rich.console import Console
from rich.table import Table

from modeling_moe.lora import MergeArguments, merge_adapter
from modeling_moe.utils.command_line import parse, run


def main() -> None:
    """Merges and prints what came out."""
    (args,) = parse([MergeArguments], __doc__)
    model = merge_adapter(args)
    table = Table("", args.output_dir)
    table.add_row("model_type", model.config.model_type)
    table.add_row("parameters", f"{model.num_parameters():,}")
    table.add_row("dtype", str(model.dtype).removeprefix("torch."))
    Console().print(table)


if __name__ == "__main__":
    run(main)
