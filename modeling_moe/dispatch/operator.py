# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts as one operator of torch, whatever back end computes it: what is saved for backward, and what is not.

Saved are the input (an alias), the first projection h, the weights and the grouping of the slots: C elements per slot.
Gathered inputs, activations and expert outputs are not, since backward can do without: with y = W a,
<dO, y> = <Wᵀ dO, a> is the gradient of a token's weight on the expert, and a comes from h (arXiv:2512.14080).
"""

from types import ModuleType

import torch

from .backends import grouped_mm, loop, native
from .low_rank import pair
from .token_order import Slots, group_slots


try:
    from .backends.triton import backend as triton_backend
except ImportError:
    triton_backend = None

BACKENDS: dict[str, ModuleType] = {"native": native, "loop": loop, "grouped_mm": grouped_mm}
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
    up_a: torch.Tensor | None = None,
    up_b: torch.Tensor | None = None,
    down_a: torch.Tensor | None = None,
    down_b: torch.Tensor | None = None,
    up_kept: torch.Tensor | None = None,
    down_kept: torch.Tensor | None = None,
    up_scaling: float = 1.0,
    down_scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums the chosen experts' outputs.

    Args:
        x: (T, H).
        index: (T, K) integer; an id outside [0, E) is an empty slot.
        weight: (T, K) fp32, or fp64 with fp64 weights.
        up: (E, C, H), C columns of the first projection. Matrices and biases have the dtype of `x`; for Triton's back
            end they may be fp32 beside an `x` of 16 bits, and so are their gradients.
        down: (E, H, I).
        up_bias: (E, C) or None.
        down_bias: (E, H) or None.
        gate: key of [`~modeling_moe.dispatch.gates.GATES`].
        constants: of the gate.
        backend: key of `BACKENDS`.
        keep_h: keep h for backward, or compute it there again.
        up_a, up_b, up_kept, up_scaling: a [`~modeling_moe.dispatch.low_rank.LowRank`] update of `up`, or None.
        down_a, down_b, down_kept, down_scaling: that of `down`; `down_kept` has a row for each slot t*K + k.

    Returns:
        The sum (T, H); h (T*K, C), or (0, C) if not kept; and the two fields of
        [`~modeling_moe.dispatch.token_order.Slots`].
    """
    slots = getattr(BACKENDS[backend], "group_slots", group_slots)(index, len(up))
    if not index.numel():
        return torch.zeros_like(x), x.new_empty(0, up.shape[1]), *slots
    low_rank = pair(up_a, up_b, down_a, down_b, up_kept, down_kept, up_scaling, down_scaling)
    arguments = (x, slots, weight, up, down, up_bias, down_bias, gate, constants, keep_h, low_rank)
    with torch.autocast(x.device.type, enabled=False):
        output, h = BACKENDS[backend].forward(*arguments)
    return output, h, *slots


@experts.register_fake
def _(x, index, weight, up, down, up_bias, down_bias, gate, constants, backend, keep_h, *_):
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
    up_a: torch.Tensor | None = None,
    up_b: torch.Tensor | None = None,
    down_a: torch.Tensor | None = None,
    down_b: torch.Tensor | None = None,
    up_kept: torch.Tensor | None = None,
    down_kept: torch.Tensor | None = None,
    up_scaling: float = 1.0,
    down_scaling: float = 1.0,
) -> list[torch.Tensor]:
    """Gradients of [`experts`], given that of its sum (T, H): those that `needs` asks for, of x, weight, up, down,
    up_bias, down_bias, up_a, up_b, down_a and down_b in this order."""
    if not order.numel():
        inputs = (x, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b)
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
            pair(up_a, up_b, down_a, down_b, up_kept, down_kept, up_scaling, down_scaling),
        )
    return [gradient for gradient in gradients if gradient is not None]


@experts_backward.register_fake
def _(
    grad, x, h, order, offsets, weight, up, down, up_bias, down_bias, gate, constants, backend, needs,
    up_a=None, up_b=None, down_a=None, down_b=None, *_,
):  # fmt: skip
    inputs = (x, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b)
    return [torch.empty_like(tensor) for tensor, needed in zip(inputs, needs, strict=True) if needed]


def _save(ctx, inputs, output):
    x, _, weight, up, down, up_bias, down_bias, ctx.gate, ctx.constants, ctx.backend, _, *low_rank = inputs
    *factors_and_kept, ctx.up_scaling, ctx.down_scaling = low_rank
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight, up, down, up_bias, down_bias, *factors_and_kept)


def _differentiate(ctx, grad, *_):
    x, _, *others = ctx.needs_input_grad[:7]
    # the dispatcher leaves out trailing arguments that are the defaults
    factors = [*ctx.needs_input_grad[11:15], False, False, False, False][:4]
    needs = [x, *others, *factors]
    gradients: list[torch.Tensor | None] = [None] * 10
    if grad is not None:
        saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        inputs, low_rank = saved[:9], saved[9:]
        settings = (ctx.gate, ctx.constants, ctx.backend, needs)
        wanted = iter(experts_backward(grad, *inputs, *settings, *low_rank, ctx.up_scaling, ctx.down_scaling))
        gradients = [next(wanted) if needed else None for needed in needs]
    return gradients[0], None, *gradients[1:6], None, None, None, None, *gradients[6:], None, None, None, None


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
    up_a: torch.Tensor | None = None,
    up_b: torch.Tensor | None = None,
    down_a: torch.Tensor | None = None,
    down_b: torch.Tensor | None = None,
    up_kept: torch.Tensor | None = None,
    down_kept: torch.Tensor | None = None,
    up_scaling: float = 1.0,
    down_scaling: float = 1.0,
) -> torch.Tensor:
    """[`experts`] for a few tokens and without gradient: reads the weights of the chosen experts, and nothing else.

    `experts_decode` is the same as an operator, which `torch.compile` wants and which costs as much as a small expert.
    """
    if not index.numel():
        return torch.zeros_like(x)
    arguments = (x, index, weight, up, down, up_bias, down_bias, gate, constants)
    low_rank = pair(up_a, up_b, down_a, down_b, up_kept, down_kept, up_scaling, down_scaling)
    with torch.autocast(x.device.type, enabled=False):
        return BACKENDS[backend].decode(*arguments) if low_rank is None else loop.decode(*arguments, low_rank)


experts_decode = torch.library.custom_op("modeling_moe::experts_decode", decode, mutates_args=())


@experts_decode.register_fake
def _(x, *_):
    return torch.empty_like(x)
