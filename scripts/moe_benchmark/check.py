# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compares the results of a pass with those of a float64 oracle that runs one expert after another.

# T tokens, K experts per token, H hidden, C columns of the first matrix, I expert width, E experts, R rows of one
expert
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .workloads import experts_in


# tolerance of the largest difference relative to the oracle's largest element
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# factor on the tolerance of other packages, which sum in 16 bits where this package sums in fp32
FOREIGN_TOLERANCE = 10
TOKENS = 128
ORACLE_FLOPS = 2e10
ORACLE_BYTES = 256e6
ROWS = 8192
# largest number of quantities in a message
NAMED = 4


class Disagreement(Exception):
    """An implementation differs from its reference by more than the tolerance; its times must not be reported."""


@dataclass
class Call:
    """Holds one call of an experts module.

    Attributes:
        module: the experts module.
        x: input (T, H).
        index: expert ids (T, K).
        weight: routing weights (T, K).
        output: output (T, H).
        grads: gradients of `"output"`, `"x"` and `"weight"` after backward has run.
    """

    module: Any
    x: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor | None = None
    grads: dict[str, torch.Tensor] = field(default_factory=dict)

    def watch(self, name: str, tensor: torch.Tensor) -> None:
        """Stores the gradient of a tensor when backward computes it."""
        tensor.register_hook(lambda grad: self.grads.__setitem__(name, grad))


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Call]]:
    """Yields a list that receives the calls of all experts modules within `module`."""
    calls: list[Call] = []

    def before(experts, args):
        x, index, weight = args
        if torch.is_grad_enabled():
            # new views, because the router may use the original tensors
            x, weight = x.view_as(x), weight.view_as(weight)
        call = Call(experts, x, index, weight)
        for name, tensor in (("x", x), ("weight", weight)):
            if torch.is_grad_enabled() and tensor.requires_grad:
                call.watch(name, tensor)
        calls.append(call)
        return x, index, weight

    def after(experts, args, output):
        calls[-1].output = output.detach()
        if output.requires_grad:
            calls[-1].watch("output", output)

    handles = []
    for experts in experts_in(module):
        handles += [experts.register_forward_pre_hook(before), experts.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Errors:
    """Collects, for each quantity, the largest difference relative to the largest reference element."""

    def __init__(self):
        self.differences: dict[str, list[torch.Tensor]] = {}
        self.references: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, actual: torch.Tensor, reference: torch.Tensor) -> None:
        """Compares two tensors of equal shape as a part of the quantity `name`."""
        difference = (actual.detach().to(reference.dtype) - reference).abs()
        self.differences.setdefault(name, []).append(difference.max())
        self.references.setdefault(name, []).append(reference.abs().max())

    def relative(self) -> dict[str, float]:
        """Returns the relative error of each quantity; it may be NaN or infinity."""
        return {
            name: (torch.stack(parts).max() / torch.stack(self.references[name]).max().clamp(min=1e-30)).item()
            for name, parts in self.differences.items()
        }


def relative_errors(calls: Sequence[Call], grads: dict[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Compares recorded calls with the oracle.

    Outputs and gradients of tokens and routing weights are compared for a sample of tokens. Gradients of parameters
    are compared for a sample of experts, over all their tokens; the sample contains the experts with the most and the
    fewest tokens. Small cases are compared in full.

    Args:
        calls: calls from [`recorded`].
        grads: gradient of each parameter; empty if no backward ran.

    Returns:
        For each quantity the largest difference over all calls, relative to the oracle's largest element.
    """
    errors = Errors()
    for call in calls:
        _compare_tokens(call, errors)
        if grads:
            _compare_parameters(call, grads, errors)
    return errors.relative()


def refuse_disagreement(
    errors: dict[str, float], tolerance: float, what: str, reference: str = "the float64 oracle"
) -> None:
    """Raises [`Disagreement`] if an error is NaN or above `tolerance`; `what` and `reference` name the sides in
    the message.
    """
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        where = ", ".join(wrong[:NAMED])
        raise Disagreement(f"{what} disagrees with {reference} in {where}{more} (at most {tolerance:.0e})")


class _Expert:
    """One expert in float64, with separate leaf parameters."""

    def __init__(self, module: Any, expert: int, trained: bool):
        self.module = module
        names = ["gate_up_proj", "down_proj"]
        names += [f"{name}_bias" for name in names] if module.has_bias else []
        self.parameters = {
            name: getattr(module, name)[expert].detach().double().requires_grad_(trained) for name in names
        }

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        matrix = self.parameters[name]
        y = x @ (matrix if self.module.is_transposed else matrix.T)
        return y + self.parameters[f"{name}_bias"] if self.module.has_bias else y

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weighted output (R, H) of rows x (R, H) with routing weights (R,)."""
        a = self.module._apply_gate(self._linear(x, "gate_up_proj"))
        return self._linear(a, "down_proj") * weight[:, None]


@torch.enable_grad()
def _compare_tokens(call: Call, errors: Errors) -> None:
    if call.output is None:
        raise ValueError("a recorded call has no output: its forward pass did not end.")
    tokens = torch.linspace(0, len(call.x) - 1, min(TOKENS, len(call.x)), device=call.x.device).long()
    x, weight, index = call.x.detach()[tokens].double(), call.weight.detach()[tokens].double(), call.index[tokens]
    output, grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight)
    backward = "output" in call.grads
    for number in index.unique().tolist():
        token, slot = torch.where(index == number)
        rows, factors = x[token].requires_grad_(backward), weight[token, slot].requires_grad_(backward)
        result = _Expert(call.module, number, trained=False)(rows, factors)
        output.index_add_(0, token, result.detach())
        if backward:
            grad = call.grads["output"][tokens[token]].double()
            row_grads, grad_weight[token, slot] = torch.autograd.grad(result, (rows, factors), grad)
            grad_x.index_add_(0, token, row_grads)
    errors.add("output", call.output[tokens], output)
    for name, reference in (("x", grad_x), ("weight", grad_weight)):
        if backward and name in call.grads:
            errors.add(f"gradient of {name}", call.grads[name][tokens], reference)


def _sample_experts(call: Call) -> list[int]:
    """Returns the experts with the most and the fewest tokens and others evenly between them, limited by time and
    memory.
    """
    experts = call.module.num_experts
    order = torch.bincount(call.index.flatten().cpu(), minlength=experts).argsort(descending=True).tolist()
    elements = call.module.gate_up_proj[0].numel() + call.module.down_proj[0].numel()
    flops = 6 * elements * call.index.numel() / experts
    count = int(min(experts, max(2, min(ORACLE_FLOPS / flops, ORACLE_BYTES / (8 * elements)))))
    chosen = torch.linspace(0, experts - 1, count).long().tolist()
    return [order[place] for place in chosen]


@torch.enable_grad()
def _compare_parameters(call: Call, grads: dict[torch.Tensor, torch.Tensor], errors: Errors) -> None:
    for number in _sample_experts(call):
        expert = _Expert(call.module, number, trained=True)
        names, parameters = list(expert.parameters), list(expert.parameters.values())
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        token, slot = torch.where(call.index == number)
        for rows, slots in zip(token.split(ROWS), slot.split(ROWS), strict=True):
            if not len(rows):
                continue
            x, factors = call.x.detach()[rows].double(), call.weight.detach()[rows, slots].double()
            parts = torch.autograd.grad(expert(x, factors), parameters, call.grads["output"][rows].double())
            for total, part in zip(totals, parts, strict=True):
                total += part
        for name, total in zip(names, totals, strict=True):
            errors.add(f"gradient of {name}", grads[getattr(call.module, name)][number], total)
