# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What stands between an expert's two matrices, with its derivative in closed form.

# R rows, I expert width. h (R, C) is what the first matrix gives, a (R, I) what the second one takes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


aten = torch.ops.aten


class Gate(NamedTuple):
    """h -> a, and back. Results go into tensors given: fresh memory costs a CPU more than the arithmetic.

    Attributes:
        columns: C / I, 2 if gated.
        forward: (h, constants, a): writes a.
        backward: (h, da, constants, a, dh): writes a and dh; da is overwritten.
    """

    columns: int
    forward: Callable[..., None]
    backward: Callable[..., None]


def _gelu_tanh(x: torch.Tensor, out: torch.Tensor) -> None:
    aten.gelu.out(x, approximate="tanh", out=out)


def _gelu_tanh_backward(grad: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
    aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad_input)


def _relu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.clamp(x, min=0, out=out)


def _relu_backward(grad: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
    aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)


def _relu_squared(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.clamp(x, min=0, out=out).square_()


def _relu_squared_backward(grad: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
    torch.mul(grad, x.relu().mul_(2), out=grad_input)


# name -> f(x, out=), and f'(x) * grad from (grad, x, grad_input=)
ACTIVATIONS = {
    "silu": (aten.silu.out, aten.silu_backward.grad_input),
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
    "relu": (_relu, _relu_backward),
    "relu2": (_relu_squared, _relu_squared_backward),
}


def _plain(activation, derivative) -> Gate:
    """a = f(h)."""

    def forward(h, constants, a) -> None:
        activation(h, out=a)

    def backward(h, grad_a, constants, a, grad_h) -> None:
        activation(h, out=a)
        derivative(grad_a, h, grad_input=grad_h)

    return Gate(1, forward, backward)


def _gated(activation, derivative) -> Gate:
    """a = f(g) * u with h = [g | u] (arXiv:2002.05202)."""

    def forward(h, constants, a) -> None:
        gate, up = h.chunk(2, dim=-1)
        activation(gate, out=a)
        a.mul_(up)

    def backward(h, grad_a, constants, a, grad_h) -> None:
        (gate, up), (grad_gate, grad_up) = h.chunk(2, dim=-1), grad_h.chunk(2, dim=-1)
        activation(gate, out=a)
        torch.mul(grad_a, a, out=grad_up)
        a.mul_(up)
        derivative(grad_a.mul_(up), gate, grad_input=grad_gate)

    return Gate(2, forward, backward)


def _halves(h: torch.Tensor) -> list[torch.Tensor]:
    return list(h.chunk(2, dim=-1))


def _pairs(h: torch.Tensor) -> list[torch.Tensor]:
    return [h[..., ::2], h[..., 1::2]]


def _clamped(split: Callable[[torch.Tensor], list[torch.Tensor]]) -> Gate:
    """gpt-oss's a = g * sigmoid(alpha * g) * (u + 1), with g and u clamped."""

    def parts(h, constants) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (alpha, limit), (gate, up) = constants, split(h)
        gate = gate.clamp(max=limit)
        return gate, up.clamp(-limit, limit).add_(1), torch.sigmoid(alpha * gate)

    def forward(h, constants, a) -> None:
        gate, linear, sigmoid = parts(h, constants)
        torch.mul(gate.mul_(sigmoid), linear, out=a)

    def backward(h, grad_a, constants, a, grad_h) -> None:
        (alpha, limit), (gate_h, up_h), (grad_gate, grad_up) = constants, split(h), split(grad_h)
        gate, linear, sigmoid = parts(h, constants)
        slope = sigmoid * (1 + alpha * gate * (1 - sigmoid))
        grad_gate.copy_(grad_a * linear * slope * (gate_h <= limit))
        grad_up.copy_(grad_a * gate * sigmoid * (up_h.abs() <= limit))
        torch.mul(gate.mul_(sigmoid), linear, out=a)

    return Gate(2, forward, backward)


# "silu" is f(h), "silu_gated" f(g) * u with h = [g | u]; "clamped_swiglu" is gpt-oss's gate, in pairs g0, u0, g1, u1, ...
# as in transformers' model or in halves; its constants are alpha and limit
GATES: dict[str, Gate] = {
    **{name: _plain(*functions) for name, functions in ACTIVATIONS.items()},
    **{f"{name}_gated": _gated(*functions) for name, functions in ACTIVATIONS.items()},
    "clamped_swiglu_pairs": _clamped(_pairs),
    "clamped_swiglu_gated": _clamped(_halves),
}
