#!/usr/bin/env python
"""Write a checkpoint of transformers' own as a MoE checkpoint with the same logits.

    python scripts/convert.py --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --output_dir outputs/mixtral --target moe
    python scripts/convert.py --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/olmoe --target moe --dtype bfloat16

Sources: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE; and Llama, Mistral, Qwen2 and Qwen3 as a MoE whose layers are all dense.
"""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from modeling_moe.cli import UserError, parse, run
from modeling_moe.conversion import convert_checkpoint


@dataclass
class Arguments:
    """Arguments of the conversion."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the source"})
    output_dir: str = field(metadata={"help": "folder to write, whole or not at all"})
    target: str = field(default="moe", metadata={"help": "format to write: moe"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the source's), float32, bfloat16 or float16"})
    overwrite: bool = field(default=False, metadata={"help": "replace output_dir"})


def main() -> None:
    """Converts and prints what came out."""
    (args,) = parse([Arguments], __doc__)
    if args.target != "moe":
        raise UserError(f"target {args.target!r} is unknown: it must be moe")
    model = convert_checkpoint(args.model_name_or_path, args.output_dir, args.gguf_file, args.dtype, args.overwrite)
    config = model.config
    table = Table("", args.output_dir)
    table.add_row("parameters", f"{config.num_params():,}")
    table.add_row("active per token", f"{config.num_active_params():,}")
    table.add_row(
        "sparse layers", f"{config.num_hidden_layers - len(config.mlp_only_layers)} of {config.num_hidden_layers}"
    )
    table.add_row("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}")
    table.add_row("dtype", str(model.dtype))
    Console().print(table)


if __name__ == "__main__":
    run(main)
