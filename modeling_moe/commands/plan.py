# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command prints parameters, memory and time of any causal LM on a device, from config.json alone.

    moe plan --model_name_or_path allenai/OLMoE-1B-7B-0924 --device H100
    moe plan --model_name_or_path deepseek_v3 --device H200 --train lora --fsdp_size 16 --ep_size 16 --sequence_length 4096
    moe plan --model_name_or_path ./dense --batch_size 4 --train full --recompute none layers
    moe plan --model_name_or_path meta-llama/Llama-3.1-8B --num_experts 64 --granularity 8 --num_experts_per_tok 8

A model is a folder, a name on the Hub (only config.json is downloaded), a preset of `moe presets`, or a config.json. The
headers of a folder's weights are compared with config.json; no weight is read. Flags of `moe upcycle` plan the upcycled
model: set --num_experts. --json writes the numbers for scripts, in bytes and seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from ..conversion import Verification
from ..planning import (
    METHODS,
    RECOMPUTE,
    Device,
    Parallelism,
    Request,
    check_headers,
    device_named,
    local_folder_of,
    make_plan,
    measure_device,
    read_config,
    simulated_model,
)
from ..upcycling import UpcyclingOptions, UpcyclingPlan
from ..upcycling import make_plan as make_upcycling_plan
from ..utils.atomic import write_text
from ..utils.command_line import parse, refuse_missing_folder
from ..utils.errors import UserError
from ..utils.loading import DtypeName, load_config, parse_dtype
from ..utils.sizes import size_text
from .plan_tables import plan_json, print_model_plan


Name = TypeVar("Name", bound=str)


@dataclass
class PlanArguments:
    """Which model to plan, on which device."""

    model_name_or_path: str = field(
        metadata={"help": "folder, Hub name, preset or config.json of a causal LM, sparse or dense"}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: DtypeName = field(
        default="auto",
        metadata={
            "help": "dtype of the weights; auto: that of config.json, and float32 where all or the routers train"
        },
    )
    device: str = field(
        default="measure",
        metadata={
            "help": "measure: this machine, by a short probe; or a name in configuration/devices.yaml, such as H100"
        },
    )
    device_memory: float | None = field(default=None, metadata={"help": "memory of the device in GB"})
    device_bandwidth: float | None = field(default=None, metadata={"help": "bandwidth of this memory in GB/s"})
    device_tflops: float | None = field(default=None, metadata={"help": "TFLOP/s of dense matrix products"})
    batch_size: int = field(default=1, metadata={"help": "sequences of one process"})
    sequence_length: int = field(default=2048, metadata={"help": "tokens of a sequence, or of a prompt"})
    train: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"what trains: some of {', '.join(METHODS)}"}
    )
    recompute: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "what backward computes again: none, experts (experts_recompute) or layers (gradient_checkpointing)"
        },
    )
    lora_r: int = field(default=16, metadata={"help": "rank of LoRA's updates"})
    experts_implementation: str = field(
        default="moe", metadata={"help": "experts function of transformers' interface"}
    )
    ddp_size: int = field(default=1, metadata={"help": "copies of the (split) model"})
    fsdp_size: int = field(default=1, metadata={"help": "processes over which FSDP2 splits the weights"})
    tp_size: int = field(default=1, metadata={"help": "processes over which tensor parallelism splits layers"})
    ep_size: int = field(default=1, metadata={"help": "processes among which experts are divided"})
    json: str | None = field(default=None, metadata={"help": "file for the numbers, or - for standard output alone"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


@dataclass
class PlannedUpcycling(UpcyclingOptions):
    """The upcycling to plan; without these flags the model is planned as it is."""

    num_experts: int = field(
        default=0,
        metadata={
            "help": "number of experts in each sparse layer; 0: plan the model as it is, or 8 beside other flags"
        },
    )

    def asked(self) -> UpcyclingOptions | None:
        """Returns the options of the upcycling; None if no flag asks for one."""
        if self == PlannedUpcycling():
            return None
        options = UpcyclingOptions(**vars(self))
        return options if self.num_experts else replace(options, num_experts=UpcyclingOptions().num_experts)


def plan_upcycling(args: PlanArguments, options: UpcyclingOptions) -> UpcyclingPlan:
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
    return make_upcycling_plan(first, options, parse_dtype(args.dtype) or described, further)


def make_request(args: PlanArguments, config: PreTrainedConfig) -> Request:
    """Returns what the flags ask for; `--device measure` measures this machine.

    Raises:
        UserError: if a device is unknown, or a number is out of its range.
    """
    described = config.get_text_config().dtype
    asked = parse_dtype(args.dtype)
    dtype = asked or (described if isinstance(described, torch.dtype) else torch.float32)
    request = Request(
        device=device_named("CPU"),
        dtype=dtype,
        train_dtype=asked or torch.float32,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        train=_known("train", args.train, METHODS),
        recompute=_known("recompute", args.recompute, RECOMPUTE),
        lora_r=args.lora_r,
        parallelism=Parallelism(args.ddp_size, args.fsdp_size, args.tp_size, args.ep_size),
        experts_implementation=args.experts_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    return replace(request, device=_device(args, [request.dtype, request.train_dtype]))


def _known(flag: str, values: list[str], known: tuple[Name, ...]) -> list[Name]:
    """Returns the values of a flag as the names that they are.

    Raises:
        UserError: for a value that is none of them.
    """
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"{flag} {unknown[0]!r} is unknown: it must be some of {', '.join(known)}")
    return [name for name in known if name in values]


def _device(args: PlanArguments, dtypes: list[torch.dtype]) -> Device:
    device = measure_device(dtypes) if args.device == "measure" else device_named(args.device)
    return device.with_numbers(args.device_memory, args.device_bandwidth, args.device_tflops, dtypes)


def print_plan(plan: UpcyclingPlan, title: str, verification: Verification | None = None) -> None:
    """Prints the tensors of an upcycled model, and what the model costs."""
    config, dtype = plan.config, str(plan.dtype).removeprefix("torch.")
    groups = Table("tensors", "count", "parameters", "size")
    for group in plan.groups:
        groups.add_row(group.name, group.count, f"{group.params:,}", size_text(group.nbytes))
    layers, dense_layers = config.num_hidden_layers, len(config.mlp_only_layers)
    weights, cache = size_text(plan.bytes_on_disk), size_text(plan.cache_bytes())
    sparse = (
        ("experts, per token", f"{config.num_experts}, {config.num_experts_per_tok}"),
        ("shared experts", f"{config.num_shared_experts}"),
    )
    attention = (
        ("attention experts, per token", f"{config.attention_experts}, {config.attention_experts_per_tok}"),
        ("query heads of a token", f"{config.num_attention_heads}, {config.num_key_value_heads} of keys"),
    )
    rows = [
        ("dense parameters", f"{plan.dense_params:,}"),
        ("parameters", f"{plan.params:,}"),
        ("active per token", f"{plan.active_params:,}"),
        *(sparse if dense_layers < layers else ()),
        *(attention if config.routed_attention is not None else ()),
        ("sparse layers", f"{layers - dense_layers} of {layers}"),
        ("weights on disk", f"{weights}, {dtype}"),
        ("memory to train", f"{size_text(plan.bytes_to_train)} and activations (AdamW, all weights)"),
        ("memory to serve", f"{weights} and {cache} for each 1000 tokens of a text"),
        *([("left out of the source", ", ".join(plan.left_out))] if plan.left_out else []),
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
    """Plans, prints, and writes the numbers."""
    args, options = parse([PlanArguments, PlannedUpcycling], __doc__, argv)
    to_file = args.json if args.json != "-" else None
    refuse_missing_folder(json=to_file)
    upcycling = plan_upcycling(args, asked) if (asked := options.asked()) is not None else None
    if upcycling is not None:
        config: PreTrainedConfig = upcycling.config
    else:
        config = read_config(args.model_name_or_path, args.gguf_file, trust_remote_code=args.trust_remote_code)
    request, folder = make_request(args, config), local_folder_of(args.model_name_or_path, args.gguf_file)
    headers = None
    if upcycling is None and folder is not None:
        headers = check_headers(
            folder, simulated_model(config, request.dtype, trust_remote_code=args.trust_remote_code)
        )
    plan = make_plan(config, request)
    if args.json == "-":
        print(plan_json(plan), end="")
        return
    if to_file is not None:
        write_text(Path(to_file), plan_json(plan))
    if upcycling is not None:
        print_plan(upcycling, "plan, nothing written")
    print_model_plan(plan, headers)
