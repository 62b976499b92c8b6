# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module prints a model's plan as tables, and as JSON for scripts."""

import json
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..planning import Collective, Device, Headers, InferencePlan, Memory, ModelPlan, PassTime
from ..utils.sizes import size_text


# training plans of one table
MOST_COLUMNS = 4


def print_model_plan(plan: ModelPlan, headers: Headers | None = None) -> None:
    """Prints the device, the parameters, memory and time, the limits, and what to change where the plan does not fit."""
    console = Console()
    console.print(_sizes_table(plan, headers))
    console.print(_device_table(plan.request.device))
    if plan.inference is not None:
        console.print(_generation_table(plan, plan.inference))
        if plan.inference.exchange:
            console.print(_exchange_table("prompt", plan.inference.exchange))
    for table in _training_tables(plan):
        console.print(table)
    if plan.training and plan.training[0].exchange:
        console.print(_exchange_table(f"step of {plan.training[0].method}", plan.training[0].exchange))
    if plan.limits:
        table = Table(
            "largest that fits", f"sequences of {plan.request.sequence_length} tokens", "tokens of one sequence"
        )
        for limit in plan.limits:
            table.add_row(limit.what, f"{limit.batch_size:,}", f"{limit.sequence_length:,}")
        console.print(table)
    for what, changes in plan.changes.items():
        table = Table(f"{what} does not fit: change", "memory then", "fits")
        for change in changes:
            table.add_row(change.text, size_text(change.total), "yes" if change.fits else "no")
        console.print(table)
    for note in plan.notes:
        console.print(note, soft_wrap=True, markup=False)


def _sizes_table(plan: ModelPlan, headers: Headers | None) -> Table:
    sizes, dtype = plan.sizes, _name(plan.request.dtype)
    table = Table("parameters", "count", f"size in {dtype}")
    for name, group in sizes.groups.items():
        table.add_row(name, f"{group.params:,}", size_text(group.nbytes))
    table.add_row("all", f"{sizes.total:,}", size_text(sizes.weight_bytes))
    table.add_row("active per token", "unknown" if sizes.active is None else f"{sizes.active:,}", "")
    for each in (torch.float32, torch.bfloat16):
        table.add_row(f"all in {_name(each)}", "", size_text(sizes.total * each.itemsize))
    if sizes.num_experts:
        per_token = "unknown" if sizes.top_k is None else str(sizes.top_k)
        table.add_row("experts, per token, layers", f"{sizes.num_experts}, {per_token}, {sizes.sparse_layers}", "")
    if sizes.experts_in_4_bits:
        in_4_bits = sizes.weight_bytes - sizes.expert_bytes + sizes.experts_in_4_bits
        table.add_row("all, experts in 4 bits", "", size_text(in_4_bits))
    if headers is not None:
        table.add_row("on disk", f"{headers.params:,}", size_text(headers.nbytes))
    return table


def _device_table(device: Device) -> Table:
    def marked(name: str, text: str) -> str:
        return f"{text} (assumed)" if name in device.assumed else text

    flops = ", ".join(f"{rate / 1e12:.3g} {_name(dtype)}" for dtype, rate in device.flops.items())
    table = Table("device", device.name)
    table.add_row("memory", marked("memory_gb", size_text(int(device.memory), up=False)))
    table.add_row("bandwidth counted on", marked("bandwidth", f"{device.bandwidth / 1e9:.4g} GB/s"))
    table.add_row("TFLOP/s counted on", marked("tflops", flops))
    link = f"{device.link_bandwidth / 1e9:.3g} GB/s" + (" (assumed)" if "link_bandwidth" in device.assumed else "")
    latency = f"{device.link_latency * 1e6:.3g} µs" + (" (assumed)" if "link_latency" in device.assumed else "")
    table.add_row("links, latency", f"{link}, {latency}")
    table.add_row("starting an operator", marked("operator_seconds", f"{device.operator_seconds * 1e6:.3g} µs"))
    table.add_row("source", device.source)
    return table


def _generation_table(plan: ModelPlan, inference: InferencePlan) -> Table:
    table = Table(
        f"generation in {_name(inference.dtype)}",
        f"prompt of {plan.request.sequence_length} tokens",
        "each further token",
        title=_who(plan),
    )
    memory = inference.memory
    for title, nbytes in (
        ("weights", memory.weights),
        ("cache and activations", memory.activations),
        ("copies for exchange", memory.exchange),
        ("memory", memory.total),
    ):
        table.add_row(title, size_text(nbytes), "")
    table.add_row("fits", "yes" if inference.fits else "no", "")
    table.add_row("cache", size_text(inference.cache), f"{inference.cache_per_token:,} bytes a sequence")
    times = (inference.prefill, inference.decode)
    table.add_row("time", *(_seconds(time.seconds) for time in times))
    table.add_row("tokens per second", *(_rate(time) for time in times))
    table.add_row("bound by", inference.prefill_bound_by, inference.decode_bound_by)
    return table


def _training_tables(plan: ModelPlan) -> Iterator[Table]:
    """Yields tables of at most `MOST_COLUMNS` training plans, which a terminal of 80 columns shows whole."""
    for start in range(0, len(plan.training), MOST_COLUMNS):
        shown = plan.training[start : start + MOST_COLUMNS]
        titles = (f"{each.method}, {_name(each.dtype)}, recompute {each.recompute}" for each in shown)
        table = Table("train", *titles, title=_who(plan))
        for part in ("weights", "gradients", "optimizer", "activations"):
            table.add_row(part, *(size_text(getattr(each.memory, part)) for each in shown))
        table.add_row("copies for exchange", *(size_text(each.memory.exchange) for each in shown))
        table.add_row("memory", *(size_text(each.memory.total) for each in shown))
        table.add_row("fits", *("yes" if each.fits else "no" for each in shown))
        table.add_row("time of a step", *(_seconds(each.time.seconds) for each in shown))
        table.add_row("tokens per second", *(_rate(each.time) for each in shown))
        table.add_row("bound by", *(each.bound_by for each in shown))
        yield table


def _who(plan: ModelPlan) -> str:
    request = plan.request
    processes = request.parallelism.processes
    who = "one process" if processes == 1 else f"one of {processes} processes"
    return f"{who}, {request.batch_size} x {request.sequence_length} tokens"


def _exchange_table(what: str, exchange: list[Collective]) -> Table:
    table = Table(f"exchange, {what}", "collectives", "bytes sent by a process", "time")
    for each in exchange:
        table.add_row(each.name, str(each.calls), size_text(each.nbytes), _seconds(each.seconds))
    return table


def _rate(time: PassTime) -> str:
    rate = time.tokens_per_second
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def _seconds(seconds: float) -> str:
    unit, name = next(((u, n) for u, n in ((1, "s"), (1e-3, "ms")) if seconds >= u), (1e-6, "µs"))
    return f"{seconds / unit:.3g} {name}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_json(plan: ModelPlan) -> str:
    """Returns a plan as JSON: the fields of [`~modeling_moe.planning.plan.ModelPlan`], with the sums and rates beside them."""
    values = _plain(plan)
    values["sizes"] |= {"total": plan.sizes.total, "weight_bytes": plan.sizes.weight_bytes}
    return json.dumps(values, indent=2, default=str) + "\n"


def _plain(value: Any) -> Any:
    """Returns a plan's part in the types of JSON."""
    if isinstance(value, Memory):
        return asdict(value) | {"total": value.total}
    if isinstance(value, PassTime):
        return value._asdict() | {"seconds": value.seconds, "tokens_per_second": value.tokens_per_second}
    if is_dataclass(value):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, torch.dtype):
        return _name(value)
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
