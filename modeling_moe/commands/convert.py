# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command writes a checkpoint of one family in the format of another, with the same logits.

    moe convert --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --output_dir outputs/mixtral --target moe
    moe convert --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/olmoe --dtype bfloat16 --verify
    moe convert --model_name_or_path outputs/moe --output_dir outputs/served --target auto --check transformers

Sources: this package's checkpoints; Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-MoE, -V2 and -V3, gpt-oss; and, as a
model whose layers are all dense, Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo2, OLMo3, Phi-3, Gemma 2 and 3, Granite, GPT-2
and GPT-NeoX. Targets: moe (this package), mixtral, granitemoeshared, qwen3_moe,
qwen2_moe, deepseek_v3, glm4_moe, minimax_m2, gpt_oss, olmoe; auto takes the one that most servers run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table

from ..conversion import AUTO, TARGETS, Conversion, choose_target, convert_checkpoint, verdicts
from ..utils.command_line import parse
from ..utils.loading import DtypeName


@dataclass
class ConvertArguments:
    """Which checkpoint to convert, and where to write the result."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the source"})
    output_dir: str = field(
        metadata={"help": "folder to write, whole or not at all; the same command continues an interrupted run"}
    )
    target: str = field(
        default="moe",
        metadata={
            "help": "format to write; auto: the one that holds the model exactly and that most servers run",
            "choices": ("moe", AUTO, *TARGETS),
        },
    )
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the result; auto: the source's dtype"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote to output_dir"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare the logits"})
    check: Literal["transformers"] | None = field(
        default=None,
        metadata={
            "help": "transformers: load the result in transformers without this package, in fp32, and refuse a result with "
            "other logits than the source's"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def convert(args: ConvertArguments) -> Conversion:
    """Converts a checkpoint.

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
        check_plain=args.check == "transformers",
    )


def _told_of_servers(args: ConvertArguments, done: Conversion) -> list[str]:
    """Returns sentences: why `auto` took its target, and which servers run the result, and which do not and why."""
    if done.target not in TARGETS:
        return []
    told = [choose_target(done.config).reason] if args.target == AUTO else []
    found = verdicts(TARGETS[done.target].config(done.config))
    told.append(f"Served by {', '.join(verdict.server.name for verdict in found if not verdict.faults)}.")
    told += [
        f"Not by {verdict.server.name}: it {'; it '.join(verdict.faults)}." for verdict in found if verdict.faults
    ]
    return told


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, and prints the size of the result."""
    (args,) = parse([ConvertArguments], __doc__, argv)
    done = convert(args)
    config, verification = done.config, done.verification
    layers, dense_layers = config.num_hidden_layers, len(config.mlp_only_layers)
    rows = [
        ("parameters", f"{config.num_params():,}"),
        ("active per token", f"{config.num_active_params():,}"),
        ("sparse layers", f"{layers - dense_layers} of {layers}"),
        ("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}"),
        ("dtype", str(config.dtype).removeprefix("torch.")),
        *(verification.rows() if verification else []),
        *(
            [("in plain transformers", f"{done.plain.largest_difference:.1e}")]
            if done.plain
            else []
        ),
    ]
    table = Table("", args.output_dir)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for sentence in _told_of_servers(args, done):
        console.print(sentence, highlight=False, soft_wrap=True)
