# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command writes a checkpoint of one family in the format of another, with the same logits.

    moe convert --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --output_dir outputs/mixtral --target moe
    moe convert --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/olmoe --dtype bfloat16 --verify
    moe convert --model_name_or_path outputs/moe --output_dir outputs/served --target qwen3_moe
    moe convert --model_name_or_path ./GLM-4.5-Air --output_dir outputs/glm --dry_run

Sources: this package's checkpoints; the sparse families of docs/source-families.md, such as Mixtral, Qwen3-MoE, DeepSeek-V3,
GLM-4.5, ERNIE-4.5 and gpt-oss; and, as a model whose layers are all dense, Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo2,
OLMo3, Phi-3, Gemma 2 and 3, Granite, GPT-2 and GPT-NeoX. Of a multimodal model the text model is converted. Targets: moe
(this package), mixtral, qwen2_moe, qwen3_moe, olmoe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ..configuration_moe import MoEConfig
from ..conversion import TARGETS, ConversionPlan, Verification, convert_checkpoint, plan_conversion
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.loading import DtypeName
from ..utils.sizes import size_text


@dataclass
class ConvertArguments:
    """Which checkpoint to convert, and where to write the result."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the source"})
    output_dir: str = field(
        metadata={"help": "folder to write, whole or not at all; the same command continues an interrupted run"}
    )
    target: str = field(default="moe", metadata={"help": "format to write", "choices": ("moe", *TARGETS)})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the result; auto: the source's dtype"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote to output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan, read no weights, write nothing"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare the logits"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if self.dry_run and self.verify:
            raise UserError("verify compares the result, and dry_run makes none: leave one of them out")


def convert(args: ConvertArguments) -> tuple[MoEConfig, Verification | None]:
    """Converts a checkpoint.

    Returns:
        The model's configuration, and the comparison with the source if `args.verify` is set.

    Raises:
        UserError: see [`~modeling_moe.conversion.convert_checkpoint`].
    """
    return convert_checkpoint(
        args.model_name_or_path,
        args.output_dir,
        args.target,
        args.gguf_file,
        args.dtype,
        args.overwrite,
        args.verify,
        trust_remote_code=args.trust_remote_code,
    )


def plan(args: ConvertArguments) -> ConversionPlan:
    """Checks from the headers of the files whether the conversion can be made.

    Raises:
        UserError: see [`~modeling_moe.conversion.plan_conversion`].
    """
    return plan_conversion(
        args.model_name_or_path,
        args.target,
        args.gguf_file,
        args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, or only plans with `dry_run`, and prints the size of the result."""
    (args,) = parse([ConvertArguments], __doc__, argv)
    if args.dry_run:
        planned = plan(args)
        more = [("weights on disk", size_text(planned.nbytes)), *(("note", note) for note in planned.notes)]
        print_model(planned.config, "plan, nothing written", more)
        return
    config, verification = convert(args)
    print_model(config, args.output_dir, verification.rows() if verification else [])


def print_model(config: MoEConfig, title: str, more: Sequence[tuple[str, str]]) -> None:
    """Prints the size of a model, and the rows `more` under it."""
    layers, dense_layers = config.num_hidden_layers, len(config.mlp_only_layers)
    rows = [
        ("parameters", f"{config.num_params():,}"),
        ("active per token", f"{config.num_active_params():,}"),
        ("sparse layers", f"{layers - dense_layers} of {layers}"),
        ("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}"),
        ("dtype", str(config.dtype).removeprefix("torch.")),
        *more,
    ]
    table = Table("", title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
