# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts as one operator of torch, whatever back end computes it: what is saved for backward, and what is not.

Saved are the input (an alias), the first projection h, the weights and the grouping of the slots: C elements per slot.
Gathered inputs, activations and expert outputs are not, since backward can do without: with y = W a,
<dO, y> = <Wᵀ dO, a> is the gradient of a token's weight on the expert, and a comes from h (arXiv:2512.14080).
"""

from types import ModuleType

import torch

from . import grouped, loop
from .slots import Slots, group_slots


try:
    from . import triton_backend
except ImportError:
    triton_backend = None

BACKENDS: dict[str, ModuleType] = {"loop": loop, "grouped_mm": grouped}
if triton_backend is not None:
    BACKENDS["triton"] = triton_backend


@torch.library.custom_op("modeling_moe::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: str,
    constants: list[float],
    backend: str,
    keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums the chosen experts' outputs.

    Args:
        x: (T, H).
        index: (T, K) int64; an id outside [0, E) is an empty slot.
        weight: (T, K) fp32, or fp64 with fp64 weights.
        up: (E, C, H), C columns of the first projection.
        down: (E, H, I).
        up_bias: (E, C) or None.
        down_bias: (E, H) or None.
        gate: key of [`~modeling_moe.dispatch.gates.GATES`].
        constants: of the gate.
        backend: key of `BACKENDS`.
        keep_h: keep h for backward, or compute it there again.

    Returns:
        The sum (T, H); h (T*K, C), or (0, C) if not kept; and the two fields of
        [`~modeling_moe.dispatch.slots.Slots`].
    """
    slots = group_slots(index, len(up))
    if not index.numel():
        return torch.zeros_like(x), x.new_empty(0, up.shape[1]), *slots
    with torch.autocast(x.device.type, enabled=False):
        output, h = BACKENDS[backend].forward(x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h)
    return output, h, *slots


@experts.register_fake
def _(x, index, weight, up, down, up_bias, down_bias, gate, constants, backend, keep_h):
    order = index.new_empty(index.numel(), dtype=torch.int32)
    h = x.new_empty(index.numel() if keep_h else 0, up.shape[1])
    return torch.empty_like(x), h, order, index.new_empty(len(up) + 1, dtype=torch.int32)


@torch.library.custom_op("modeling_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: str,
    constants: list[float],
    backend: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of [`experts`], given that of its sum (T, H): those that `needs` asks for, of x, weight, up, down,
    up_bias and down_bias in this order."""
    if not order.numel():
        inputs = (x, weight, up, down, up_bias, down_bias)
        return [torch.zeros_like(tensor) for tensor, needed in zip(inputs, needs, strict=True) if needed]
    with torch.autocast(x.device.type, enabled=False):
        gradients = BACKENDS[backend].backward(
            grad.contiguous(),
            x,
            h,
            Slots(order, offsets),
            weight,
            up,
            down,
            up_bias,
            down_bias,
            gate,
            constants,
            needs,
        )
    return [gradient for gradient in gradients if gradient is not None]


@experts_backward.register_fake
def _(grad, x, h, order, offsets, weight, up, down, up_bias, down_bias, gate, constants, backend, needs):
    inputs = (x, weight, up, down, up_bias, down_bias)
    return [torch.empty_like(tensor) for tensor, needed in zip(inputs, needs, strict=True) if needed]


def _save(ctx, inputs, output):
    x, _, weight, up, down, up_bias, down_bias, ctx.gate, ctx.constants, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight, up, down, up_bias, down_bias)


def _differentiate(ctx, grad, *_):
    x, _, *others = ctx.needs_input_grad[:7]
    needs = [x, *others]
    gradients = [None] * 6
    if grad is not None:
        wanted = iter(experts_backward(grad, *ctx.saved_tensors, ctx.gate, ctx.constants, ctx.backend, needs))
        gradients = [next(wanted) if needed else None for needed in needs]
    return gradients[0], None, *gradients[1:], None, None, None, None


def _refuse(ctx, *_):
    raise NotImplementedError(
        "The experts' gradient cannot be differentiated again: load the model with experts_implementation='eager'."
    )


experts.register_autograd(_differentiate, setup_context=_save)
experts_backward.register_autograd(_refuse)


def decode(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: str,
    constants: list[float],
    backend: str,
) -> torch.Tensor:
    """[`experts`] for a few tokens and without gradient: reads the weights of the chosen experts, and nothing else.

    `experts_decode` is the same as an operator, which `torch.compile` wants and which costs as much as a small expert.
    """
    if not index.numel():
        return torch.zeros_like(x)
    with torch.autocast(x.device.type, enabled=False):
        return BACKENDS[backend].decode(x, index, weight, up, down, up_bias, down_bias, gate, constants)


experts_decode = torch.library.custom_op("modeling_moe::experts_decode", decode, mutates_args=())


@experts_decode.register_fake
def _(x, *_):
    return torch.empty_like(x)
