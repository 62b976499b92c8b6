# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Whether a pass computed what it should, against one expert after another in float64.

# T tokens, K per token, H hidden, C columns of the first matrix, I expert width, E experts, R rows of one expert
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .workloads import experts_in


# largest difference over the oracle's largest element
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# others add up in 16 bits where we do not: that is no reason to leave them out
FOREIGN_TOLERANCE = 10
TOKENS = 128
ORACLE_FLOPS = 2e10
ORACLE_BYTES = 256e6
ROWS = 8192
# quantities that a message lists
NAMED = 4


class Disagreement(Exception):
    """An implementation gave something else than what it was compared with: none of its numbers may be reported."""


@dataclass
class Call:
    """One call of an experts module.

    Attributes:
        module: the experts.
        x: (T, H).
        index: (T, K).
        weight: (T, K).
        output: (T, H).
        grads: gradients of `"output"`, `"x"` and `"weight"` once backward has run.
    """

    module: Any
    x: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor | None = None
    grads: dict[str, torch.Tensor] = field(default_factory=dict)

    def watch(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps the gradient of a tensor in the graph."""
        tensor.register_hook(lambda grad: self.grads.__setitem__(name, grad))


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Call]]:
    """Yields a list that receives the experts' calls within `module`, whatever level it is."""
    calls: list[Call] = []

    def before(experts, args):
        x, index, weight = args
        if torch.is_grad_enabled():
            # views of their own, since the router may use the same tensors
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
    """Largest difference over largest reference, by quantity."""

    def __init__(self):
        self.differences: dict[str, list[torch.Tensor]] = {}
        self.references: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, actual: torch.Tensor, reference: torch.Tensor) -> None:
        """Compares two tensors of one shape as a part of the quantity `name`."""
        difference = (actual.detach().to(reference.dtype) - reference).abs()
        self.differences.setdefault(name, []).append(difference.max())
        self.references.setdefault(name, []).append(reference.abs().max())

    def relative(self) -> dict[str, float]:
        """NaN and infinity included."""
        return {
            name: (torch.stack(parts).max() / torch.stack(self.references[name]).max().clamp(min=1e-30)).item()
            for name, parts in self.differences.items()
        }


def relative_errors(calls: Sequence[Call], grads: dict[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Compares recorded calls with the oracle.

    Outputs and gradients of tokens and of their weights are compared for a sample of tokens, gradients of parameters
    for a sample of experts over all their tokens, the busiest and the idlest among them. Small cases are compared
    whole.

    Args:
        calls: from [`recorded`].
        grads: parameter -> its gradient; empty if no backward ran.

    Returns:
        By quantity, over all calls, the largest difference over the oracle's largest element.
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
    """Raises [`Disagreement`] between `what` and `reference` if any error, or NaN, is beyond `tolerance`."""
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        where = ", ".join(wrong[:NAMED])
        raise Disagreement(f"{what} disagrees with {reference} in {where}{more} (at most {tolerance:.0e})")


class _Expert:
    """One expert in float64, its parameters leaves of their own."""

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
        """Rows x (R, H) and their weights (R,) to (R, H)."""
        a = self.module._apply_gate(self._linear(x, "gate_up_proj"))
        return self._linear(a, "down_proj") * weight[:, None]


@torch.enable_grad()
def _compare_tokens(call: Call, errors: Errors) -> None:
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
    """Busiest, idlest, then evenly spread, as many as the oracle has time and memory for."""
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
