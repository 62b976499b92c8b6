# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the functions between an expert's two matrices and their derivatives in closed form.

# R rows, I expert width. h (R, C) is the product with the first matrix, a (R, I) the input of the second one
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


aten = torch.ops.aten
Constants = Sequence[float]


class Activation(NamedTuple):
    """Activation maps h to a, and the gradient of a to that of h.

    Both functions write into tensors that the caller gives them, because allocating memory costs a CPU more time than
    the arithmetic.

    Attributes:
        columns: C / I, which is 2 for a gated activation and 1 otherwise.
        forward: (h, constants, a), writes a.
        backward: (h, grad_a, constants, a, grad_h), writes a and grad_h, and overwrites grad_a.
        constants: the names of the constants, in order.
    """

    columns: int
    forward: Callable[[torch.Tensor, Constants, torch.Tensor], None]
    backward: Callable[[torch.Tensor, torch.Tensor, Constants, torch.Tensor, torch.Tensor], None]
    constants: tuple[str, ...] = ()


class Pointwise(NamedTuple):
    """Pointwise is a function f of one number and its derivative.

    Attributes:
        value: f(x, out=), writes f(x) to `out`.
        gradient: (grad, x, grad_input=), writes grad * f'(x) to `grad_input`.
    """

    value: Callable[..., object]
    gradient: Callable[..., object]


def _gelu_tanh(x: torch.Tensor, out: torch.Tensor) -> None:
    aten.gelu.out(x, approximate="tanh", out=out)


def _gelu_tanh_gradient(grad: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
    aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad_input)


def _relu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.clamp(x, min=0, out=out)


def _relu_gradient(grad: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
    aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)


def _relu_squared(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.clamp(x, min=0, out=out).square_()


def _relu_squared_gradient(grad: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
    torch.mul(grad, x.relu().mul_(2), out=grad_input)


POINTWISE: dict[str, Pointwise] = {
    "silu": Pointwise(aten.silu.out, aten.silu_backward.grad_input),
    "gelu": Pointwise(aten.gelu.out, aten.gelu_backward.grad_input),
    "gelu_tanh": Pointwise(_gelu_tanh, _gelu_tanh_gradient),
    "relu": Pointwise(_relu, _relu_gradient),
    "relu2": Pointwise(_relu_squared, _relu_squared_gradient),
}


def _plain(function: Pointwise) -> Activation:
    """Builds a = f(h)."""

    def forward(h: torch.Tensor, constants: Constants, a: torch.Tensor) -> None:
        function.value(h, out=a)

    def backward(
        h: torch.Tensor, grad_a: torch.Tensor, constants: Constants, a: torch.Tensor, grad_h: torch.Tensor
    ) -> None:
        function.value(h, out=a)
        function.gradient(grad_a, h, grad_input=grad_h)

    return Activation(1, forward, backward)


def _gated(function: Pointwise) -> Activation:
    """Builds a = f(g) * u with h = [g | u] (arXiv:2002.05202)."""

    def forward(h: torch.Tensor, constants: Constants, a: torch.Tensor) -> None:
        g, u = h.chunk(2, dim=-1)
        function.value(g, out=a)
        a.mul_(u)

    def backward(
        h: torch.Tensor, grad_a: torch.Tensor, constants: Constants, a: torch.Tensor, grad_h: torch.Tensor
    ) -> None:
        (g, u), (grad_g, grad_u) = h.chunk(2, dim=-1), grad_h.chunk(2, dim=-1)
        function.value(g, out=a)
        torch.mul(grad_a, a, out=grad_u)
        a.mul_(u)
        function.gradient(grad_a.mul_(u), g, grad_input=grad_g)

    return Activation(2, forward, backward)


def _split_halves(h: torch.Tensor) -> list[torch.Tensor]:
    return list(h.chunk(2, dim=-1))


def _split_pairs(h: torch.Tensor) -> list[torch.Tensor]:
    return [h[..., ::2], h[..., 1::2]]


def _clamped(split: Callable[[torch.Tensor], list[torch.Tensor]], shift: int) -> Activation:
    """Builds a = g * sigmoid(alpha * g) * (u + shift), with g clamped to at most `limit` and u to +-`limit`."""

    def parts(h: torch.Tensor, constants: Constants) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (alpha, limit), (g, u) = constants, split(h)
        g = g.clamp(max=limit)
        return g, u.clamp(-limit, limit).add_(shift), torch.sigmoid(alpha * g)

    def forward(h: torch.Tensor, constants: Constants, a: torch.Tensor) -> None:
        g, linear, sigmoid = parts(h, constants)
        torch.mul(g.mul_(sigmoid), linear, out=a)

    def backward(
        h: torch.Tensor, grad_a: torch.Tensor, constants: Constants, a: torch.Tensor, grad_h: torch.Tensor
    ) -> None:
        (alpha, limit), (g_of_h, u_of_h), (grad_g, grad_u) = constants, split(h), split(grad_h)
        g, linear, sigmoid = parts(h, constants)
        slope = sigmoid * (1 + alpha * g * (1 - sigmoid))
        grad_g.copy_(grad_a * linear * slope * (g_of_h <= limit))
        grad_u.copy_(grad_a * g * sigmoid * (u_of_h.abs() <= limit))
        torch.mul(g.mul_(sigmoid), linear, out=a)

    return Activation(2, forward, backward, ("alpha", "limit"))


# "silu" is a = f(h) and "silu_gated" is a = f(g) * u with h = [g | u]. "clamped_swiglu" is gpt-oss's activation with
# the constants alpha and limit; h holds pairs g0, u0, g1, u1, ... as in transformers' model, or the halves [g | u].
# "clamped_silu" adds no 1 to u and has alpha 1: DeepSeek-V4's
ACTIVATIONS: dict[str, Activation] = {
    **{name: _plain(function) for name, function in POINTWISE.items()},
    **{f"{name}_gated": _gated(function) for name, function in POINTWISE.items()},
    "clamped_swiglu_pairs": _clamped(_split_pairs, 1),
    "clamped_swiglu_gated": _clamped(_split_halves, 1),
    "clamped_silu_gated": _clamped(_split_halves, 0),
}
