# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command prints the size of an upcycled model, and the memory to train and to serve it, from config.json alone.

    moe plan --model_name_or_path HuggingFaceTB/SmolLM2-135M --num_experts 4
    moe plan --model_name_or_path meta-llama/Llama-3.1-8B --num_experts 64 --granularity 8 --num_experts_per_tok 8
    moe plan --model_name_or_path ./dense --method split --dtype bfloat16

The flags are those of `moe upcycle`, which makes the model. Of a name on the Hub only config.json is downloaded, and of a
folder only config.json is read; `moe upcycle --dry_run` also checks the headers of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from ..conversion import Verification
from ..upcycling import UpcyclingOptions, UpcyclingPlan, make_plan
from ..utils.command_line import parse
from ..utils.loading import DtypeName, load_config, parse_dtype
from ..utils.sizes import size_text


@dataclass
class PlanArguments:
    """Which model would be upcycled."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the dense model"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the result; auto: the dtype in config.json"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def plan(args: PlanArguments, options: UpcyclingOptions) -> UpcyclingPlan:
    """Plans an upcycling from the configurations of the dense models alone.

    Raises:
        UserError: if a configuration cannot be loaded or upcycled, or an option makes no model of it.
    """
    first, *further = (
        load_config(name, gguf_file, trust_remote_code=args.trust_remote_code)
        for name, gguf_file in [
            (args.model_name_or_path, args.gguf_file),
            *((name, None) for name in options.sources or []),
        ]
    )
    described = first.dtype if isinstance(first.dtype, torch.dtype) else torch.float32
    return make_plan(first, options, parse_dtype(args.dtype) or described, further)


def print_plan(plan: UpcyclingPlan, title: str, verification: Verification | None = None) -> None:
    """Prints the tensors of an upcycled model, and what the model costs."""
    config, dtype = plan.config, str(plan.dtype).removeprefix("torch.")
    groups = Table("tensors", "count", "parameters", "size")
    for group in plan.groups:
        groups.add_row(group.name, group.count, f"{group.params:,}", size_text(group.nbytes))
    layers, dense_layers = config.num_hidden_layers, len(config.mlp_only_layers)
    weights, cache = size_text(plan.bytes_on_disk), size_text(plan.cache_bytes())
    rows = [
        ("dense parameters", f"{plan.dense_params:,}"),
        ("parameters", f"{plan.params:,}"),
        ("active per token", f"{plan.active_params:,}"),
        ("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}"),
        ("shared experts", f"{config.num_shared_experts}"),
        ("sparse layers", f"{layers - dense_layers} of {layers}"),
        ("weights on disk", f"{weights}, {dtype}"),
        ("memory to train", f"{size_text(plan.bytes_to_train)} and activations (AdamW, all weights)"),
        ("memory to serve", f"{weights} and {cache} for each 1000 tokens of a text"),
        ("computes the dense function", f"no: {plan.reason_not_exact}" if plan.reason_not_exact else "yes"),
        *((("fields of config.json without effect", ", ".join(plan.without_effect)),) if plan.without_effect else ()),
        *(verification.rows() if verification else []),
    ]
    table = Table("", title)
    for row in rows:
        table.add_row(*row)
    Console().print(groups)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Plans and prints."""
    args, options = parse([PlanArguments, UpcyclingOptions], __doc__, argv)
    print_plan(plan(args, options), "plan, nothing written")
