#!/usr/bin/env python
"""Write a checkpoint of one family in the format of another, with the same logits.

    python scripts/convert.py --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --output_dir outputs/mixtral --target moe
    python scripts/convert.py --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/olmoe --dtype bfloat16 --verify
    python scripts/convert.py --model_name_or_path outputs/moe --output_dir outputs/served --target qwen3_moe

Sources: this package's checkpoints; Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-MoE, -V2 and -V3, gpt-oss; and, as a
model whose layers are all dense, Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo2, OLMo3, Phi-3, Gemma 2 and 3, Granite, GPT-2
and GPT-NeoX. Targets: moe (this package), mixtral, qwen2_moe, qwen3_moe, olmoe.
"""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from modeling_moe.conversion import convert_checkpoint
from modeling_moe.utils.command_line import parse, run


@dataclass
class Arguments:
    """Arguments of the conversion."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the source"})
    output_dir: str = field(metadata={"help": "folder to write, whole or not at all; an interrupted run goes on"})
    target: str = field(
        default="moe", metadata={"help": "format to write: moe, mixtral, qwen2_moe, qwen3_moe or olmoe"}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the source's), float32, bfloat16 or float16"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote there"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def main() -> None:
    """Converts and prints what came out."""
    (args,) = parse([Arguments], __doc__)
    config, verification = convert_checkpoint(
        args.model_name_or_path,
        args.output_dir,
        args.target,
        args.gguf_file,
        args.dtype,
        args.overwrite,
        args.verify,
        trust_remote_code=args.trust_remote_code,
    )
    table = Table("", args.output_dir)
    table.add_row("parameters", f"{config.num_params():,}")
    table.add_row("active per token", f"{config.num_active_params():,}")
    table.add_row(
        "sparse layers", f"{config.num_hidden_layers - len(config.mlp_only_layers)} of {config.num_hidden_layers}"
    )
    table.add_row("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}")
    table.add_row("dtype", str(config.dtype).removeprefix("torch."))
    for title, text in verification.rows() if verification else []:
        table.add_row(title, text)
    Console().print(table)


if __name__ == "__main__":
    run(main)
