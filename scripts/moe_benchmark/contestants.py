# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the contestants: implementations of the experts, and the limit.

# T tokens, A = T * K assignments, H hidden, I expert width, E experts
"""

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .cases import Case
from .measure import Contestant
from .presets import PRESETS
from .workloads import Workload, experts_in


OURS = "moe"
RECOMPUTE = "moe_recompute"
TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
OTHERS = (*TRANSFORMERS, "liger", "sonicmoe")
IMPLEMENTATIONS = (OURS, *OTHERS)
# LoRA on experts by PEFT's own code
PEFT = "PEFT"
# a whole model, and models whose experts are on disk
WHOLE, ALL_SLOTS, QUARTER, ACCELERATE = "whole", "moe, slots for all", "moe, slots for a quarter", "Accelerate, disk"
# a model whose routing is logged in training -> the same model without
LOGGED = {OURS: "not logged", "Mixtral": "Mixtral, not logged"}
COPY = "copy"
DENSE = "dense"
GRAPH = " (graph)"
LIGER_AUTOTUNE = "LIGER_FUSED_MOE_AUTOTUNE"
MAX_COPIED_BYTES = 2_000_000_000
MAX_QUADRATIC_BYTES = 4_000_000_000


def is_ours(name: str) -> bool:
    """Returns whether an implementation belongs to this package."""
    return name.startswith(OURS) and not name.endswith(GRAPH)


def is_foreign(name: str) -> bool:
    """Returns whether an implementation belongs to another package; if it fails or is wrong, it is skipped and the run
    succeeds.
    """
    return name.removesuffix(GRAPH) in OTHERS or name in (PEFT, ACCELERATE) or name.endswith(", grouped_mm")


def is_known(name: str) -> bool:
    """Returns whether `name` is an implementation that can be requested."""
    return name in IMPLEMENTATIONS or name == RECOMPUTE or name in ALL_EXPERTS_FUNCTIONS


def pin_liger() -> str:
    """Turns off the autotuning of Liger's experts unless the environment asks for it.

    Autotuning compiles about 200 kernels before the first case. Liger reads the variable when it is imported.

    Returns:
        The setting as text, `"LIGER_FUSED_MOE_AUTOTUNE=0"` by default.
    """
    return f"{LIGER_AUTOTUNE}={os.environ.setdefault(LIGER_AUTOTUNE, '0')}"


def _liger(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
    """Calls Liger's fused experts through transformers' experts interface."""
    pin_liger()
    function = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction
    return function.apply(hidden_states, module.gate_up_proj, module.down_proj, top_k_index.int(), top_k_weights)


def register_adapters() -> None:
    """Registers packages that do not register themselves in transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register("liger", _liger)


def skip_reason(name: str, case: Case, device: torch.device, element_size: int) -> str | None:
    """Returns why an implementation is not measured in `case`, or None if it is."""
    preset = PRESETS[case.preset]
    weight_bytes = preset.expert_elements * element_size
    training = case.mode == "forward_backward"
    if name in ("liger", "sonicmoe", "moe_triton") and device.type != "cuda":
        return "needs CUDA"
    for implementation, package in (("liger", "liger_kernel"), ("sonicmoe", "kernels")):
        if name == implementation and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if name == "liger" and preset.family != "gated":
        return "does not support biases"
    if name == RECOMPUTE and not training:
        return "differs from moe only in backward"
    traffic = preset.experts**2 * weight_bytes
    if name == "eager" and training and preset.experts >= 64 and traffic > MAX_QUADRATIC_BYTES:
        return "its backward is quadratic in experts"
    copies = case.tokens * preset.per_token * weight_bytes
    if name == "batched_mm" and copies > MAX_COPIED_BYTES:
        return "would copy over 2 GB of weights"
    return None


def implementation(name: str, workload: Workload, mode: str) -> Contestant:
    """Returns a contestant that runs one pass of `workload` with an implementation.

    Args:
        name: key of transformers' experts interface, `"eager"`, or `"moe_recompute"`.
        workload: workload with the inputs of a case.
        mode: mode of a [`~moe_benchmark.cases.Case`].

    Returns:
        A contestant whose `run` returns the output, or with `mode="forward_backward"` the gradients of
        [`~moe_benchmark.contestants.leaves`].
    """
    module = module_of(name, workload)
    configs: list[Any] = [experts.config for experts in experts_in(module)]

    def prepare() -> None:
        for config in configs:
            config._experts_implementation = OURS if name == RECOMPUTE else name
            config.experts_recompute = name == RECOMPUTE
        workload.reset(module)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return workload.forward(module)

    differentiated = leaves(name, workload)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(workload.forward(module), differentiated, workload.grad)

    return Contestant(name, forward_backward if mode == "forward_backward" else forward, prepare)


def module_of(name: str, workload: Workload) -> nn.Module:
    """Returns the module that an implementation runs in; blocks and models of this package have their own router."""
    return workload.ours if is_ours(name) else workload.theirs


def leaves(name: str, workload: Workload) -> list[torch.Tensor]:
    """Returns the differentiated tensors: the inputs, then the parameters."""
    return [*workload.inputs(), *module_of(name, workload).parameters()]


def dense(case: Case, dtype: torch.dtype, device: torch.device) -> Contestant:
    """Returns the limit: the matrix products of `case` as if there were one expert, with preallocated outputs.

    Forward is (A, H) x (H, 2I) and (A, I) x (I, H); backward has four more products of these operands, transposed.
    """
    preset = PRESETS[case.preset]
    slots = case.tokens * preset.per_token
    hidden, width = preset.hidden, preset.intermediate

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype, device=device).mul_(columns**-0.5)

    x, a, up, down = random(slots, hidden), random(slots, width), random(2 * width, hidden), random(hidden, width)
    h, y = x.new_empty(slots, 2 * width), torch.empty_like(x)
    if case.mode == "forward_backward":
        grad_a, grad_up, grad_down = torch.empty_like(a), torch.empty_like(up), torch.empty_like(down)

    # y and h also serve as their own gradients; the last product writes the gradient of x into y
    def run() -> None:
        torch.mm(x, up.T, out=h)
        torch.mm(a, down.T, out=y)
        if case.mode == "forward_backward":
            torch.mm(y, down, out=grad_a)
            torch.mm(y.T, a, out=grad_down)
            torch.mm(h.T, x, out=grad_up)
            torch.mm(h, up, out=y)

    return Contestant(DENSE, run)


def captured(contestant: Contestant) -> Contestant:
    """Returns the contestant as a CUDA graph, which has no launch cost on the host.

    Raises:
        RuntimeError: if the contestant synchronises, or does anything else that a graph cannot contain.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contestant.prepare()
            contestant.run()
    torch.cuda.current_stream().wait_stream(side)
    contestant.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = contestant.run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return Contestant(contestant.name + GRAPH, replay)
