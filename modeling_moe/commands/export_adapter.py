# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command writes a saved LoRA adapter for a server, and checks by logits that the adapter still changes the model.

    moe export_adapter --model_name_or_path outputs/adapter --output_dir outputs/served_adapter --server vllm
    moe export_adapter --model_name_or_path outputs/adapter --served_model outputs/mixtral --output_dir outputs/gguf_adapter \\
        --server llama.cpp
    moe export_adapter --model_name_or_path outputs/adapter --output_dir outputs/merged --merged true

vLLM, SGLang and llama.cpp refuse the factors of experts as PEFT saves them, or leave them out without a word. The exported
folder has two-dimensional factors for each expert, under the names of the served model's family. A part that no server
loads from an adapter, such as a router that was trained in full, is refused by name.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..lora import ExportAdapterArguments, export_adapter
from ..utils.command_line import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Exports, and prints what the adapter changes and how to load it."""
    (args,) = parse([ExportAdapterArguments], __doc__, argv)
    comparison = export_adapter(args)
    table = Table("", args.output_dir)
    if comparison is None:
        table.add_row("logits", "not compared (--verify false)")
    else:
        table.add_row("change of the logits when trained", f"{comparison.change:.2e}")
        table.add_row("change of the logits when served", f"{comparison.served_change:.2e}")
        table.add_row("largest difference of the two", f"{comparison.error:.1e}")
        if args.merged:
            table.add_row("change of the logits by rounding the weights", f"{comparison.rounding:.1e}")
    if args.server == "llama.cpp" and not args.merged:
        served = args.served_model or args.base_model or "BASE_MODEL"
        table.add_row("next", f"python convert_lora_to_gguf.py --base {served} {args.output_dir}")
    Console().print(table)
