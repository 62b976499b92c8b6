# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command writes a checkpoint of one family in the format of another, with the same logits.

    moe convert --model_name_or_path mistralai/Mixtral-8x7B-v0.1 --output_dir outputs/mixtral --target moe
    moe convert --model_name_or_path ./OLMoE-1B-7B --output_dir outputs/olmoe --dtype bfloat16 --verify
    moe convert --model_name_or_path outputs/moe --output_dir outputs/served --target auto --check transformers
    moe convert --model_name_or_path outputs/moe --output_dir outputs/local --target auto --server llama.cpp
    moe convert --model_name_or_path ./GLM-4.5-Air --output_dir outputs/glm --dry_run

Sources: this package's checkpoints; the sparse families of docs/source-families.md, such as Mixtral, Qwen3-MoE, DeepSeek-V3,
GLM-4.5, ERNIE-4.5 and gpt-oss; and, as a model whose layers are all dense, Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo2,
OLMo3, Phi-3, Gemma 2 and 3, Granite, GPT-2 and GPT-NeoX. Of a multimodal model the text model is converted. Targets: moe
(this package), mixtral, granitemoeshared, qwen3_moe, qwen2_moe, deepseek_v3, glm4_moe, minimax_m2, gpt_oss, olmoe; auto takes
the one that holds the model exactly and that most servers run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table

from ..configuration_moe import MoEConfig
from ..conversion import (
    AUTO,
    SERVERS,
    TARGETS,
    Conversion,
    ConversionPlan,
    choose_target,
    convert_checkpoint,
    plan_conversion,
    verdicts,
)
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
    target: str = field(
        default="moe",
        metadata={
            "help": "format to write; auto: the one that holds the model exactly and that most servers run",
            "choices": ("moe", AUTO, *TARGETS),
        },
    )
    server: str | None = field(
        default=None,
        metadata={
            "help": "server that will run the export: a target which it computes wrongly is refused, and target auto takes one "
            "that it computes exactly",
            "choices": tuple(SERVERS),
        },
    )
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the result; auto: the source's dtype"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote to output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan, read no weights, write nothing"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare the logits"})
    check: Literal["transformers"] | None = field(
        default=None,
        metadata={
            "help": "transformers: load the result in transformers without this package, in fp32, and refuse a result with "
            "other logits than the source's"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if self.dry_run and (self.verify or self.check):
            raise UserError("verify and check compare the result, and dry_run makes none: leave them or dry_run out")


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
        server=args.server,
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
        server=args.server,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, or only plans with `dry_run`, and prints the size of the result."""
    (args,) = parse([ConvertArguments], __doc__, argv)
    if args.dry_run:
        planned = plan(args)
        more = [("weights on disk", size_text(planned.nbytes)), *(("note", note) for note in planned.notes)]
        print_model(planned.config, "plan, nothing written", more)
        print_servers(args, planned.target, planned.config)
        return
    done = convert(args)
    more = done.verification.rows() if done.verification else []
    if done.plain:
        more = [*more, ("largest logit difference in transformers", f"{done.plain.largest_difference:.1e}")]
    print_model(done.config, args.output_dir, more)
    print_servers(args, done.target, done.config)


def print_model(config: MoEConfig, title: str, more: Sequence[tuple[str, str]]) -> None:
    """Prints the size of a model, and the rows `more` under it."""
    layers, dense_layers = config.num_hidden_layers, len(config.mlp_only_layers)
    attention = (("attention experts, per token", f"{config.attention_experts}, {config.attention_experts_per_tok}"),)
    rows = [
        ("parameters", f"{config.num_params():,}"),
        ("active per token", f"{config.num_active_params():,}"),
        ("sparse layers", f"{layers - dense_layers} of {layers}"),
        ("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}"),
        *(attention if config.routed_attention is not None else ()),
        ("dtype", str(config.dtype).removeprefix("torch.")),
        *more,
    ]
    table = Table("", title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_servers(args: ConvertArguments, target: str, config: MoEConfig) -> None:
    """Prints why `auto` takes its target, which servers run it, and which do not and why.

    Args:
        args: what the user asked for.
        target: target of the result.
        config: configuration of the model.
    """
    if target not in TARGETS:
        return
    found = verdicts(TARGETS[target].config(config))
    told = [choose_target(config, args.server).reason] if args.target == AUTO else []
    told.append(f"Served by {', '.join(verdict.server.name for verdict in found if not verdict.faults)}.")
    told += [f"Not by {server.name}: it {'; it '.join(faults)}." for server, faults in found if faults]
    for sentence in told:
        Console().print(sentence, highlight=False, soft_wrap=True)
