# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module registers the experts as torch operators and defines what autograd saves for backward.

Saved are the input (an alias), the first projection h, the weights and the expert order: C elements per assignment.
Gathered inputs, activations and expert outputs are not saved, because backward does not need them: with y = W a,
<dO, y> = <Wᵀ dO, a> is the gradient of a combine weight, and a follows from h (arXiv:2512.14080).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .backend import Backend
from .backends import BACKENDS
from .expert_order import ExpertOrder
from .problem import ExpertsProblem, FlatProblem, Needs


@torch.library.custom_op("modeling_moe::experts", mutates_args=())
def experts(
    tensors: Sequence[torch.Tensor],
    layout: str,
    activation: str,
    numbers: Sequence[float],
    index: torch.Tensor,
    backend: str,
    keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes each token's weighted sum over its experts.

    Args:
        tensors, layout, activation, numbers: a [`~modeling_moe.dispatch.problem.FlatProblem`].
        index: (T, K) integer expert ids. An id outside [0, E) marks an empty assignment.
        backend: a key of [`~modeling_moe.dispatch.backends.BACKENDS`].
        keep_h: True to keep h for backward, False to let backward compute it again.

    Returns:
        The fields of [`~modeling_moe.dispatch.problem.Combined`], then those of
        [`~modeling_moe.dispatch.expert_order.ExpertOrder`].
    """
    problem = ExpertsProblem.unflatten(FlatProblem(tensors, layout, activation, numbers))
    order = BACKENDS[backend].order_by_expert(index, problem.num_experts)
    if not index.numel():
        nothing = problem.x.new_empty(0, problem.up.shape[1])
        return torch.zeros_like(problem.x), nothing, order.assignment, order.offsets
    with torch.autocast(problem.x.device.type, enabled=False):
        combined = BACKENDS[backend].forward(problem, order, keep_h)
    return combined.output, combined.h, order.assignment, order.offsets


@experts.register_fake
def _(
    tensors: Sequence[torch.Tensor],
    layout: str,
    activation: str,
    numbers: Sequence[float],
    index: torch.Tensor,
    backend: str,
    keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = ExpertsProblem.unflatten(FlatProblem(tensors, layout, activation, numbers))
    assignment = index.new_empty(index.numel(), dtype=torch.int32)
    h = problem.x.new_empty(index.numel() if keep_h else 0, problem.up.shape[1])
    offsets = index.new_empty(problem.num_experts + 1, dtype=torch.int32)
    return torch.empty_like(problem.x), h, assignment, offsets


@torch.library.custom_op("modeling_moe::experts_backward", mutates_args=())
def experts_backward(
    tensors: Sequence[torch.Tensor],
    layout: str,
    activation: str,
    numbers: Sequence[float],
    grad: torch.Tensor,
    h: torch.Tensor,
    assignment: torch.Tensor,
    offsets: torch.Tensor,
    backend: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Computes the gradients of [`experts`].

    Args:
        tensors, layout, activation, numbers: a [`~modeling_moe.dispatch.problem.FlatProblem`].
        grad: (T, H), the gradient of the output.
        h, assignment, offsets: the other outputs of [`experts`].
        backend: the back end of the forward pass.
        needs: for each of `tensors`, True if its gradient is needed.

    Returns:
        The gradients that are needed, in the order of `tensors`.
    """
    names = [name for name, needed in zip(layout.split(), needs, strict=True) if needed]
    problem = ExpertsProblem.unflatten(FlatProblem(tensors, layout, activation, numbers))
    if not len(assignment):
        return [torch.zeros_like(tensor) for tensor, needed in zip(tensors, needs, strict=True) if needed]
    order, needed = ExpertOrder(assignment, offsets), Needs(**dict.fromkeys(names, True))
    with torch.autocast(problem.x.device.type, enabled=False):
        gradients = BACKENDS[backend].backward(problem, order, grad.contiguous(), h, needed)
    return [getattr(gradients, name) for name in names]


@experts_backward.register_fake
def _(
    tensors: Sequence[torch.Tensor],
    layout: str,
    activation: str,
    numbers: Sequence[float],
    grad: torch.Tensor,
    h: torch.Tensor,
    assignment: torch.Tensor,
    offsets: torch.Tensor,
    backend: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor, needed in zip(tensors, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *flat, _, ctx.backend, _ = inputs
    tensors, *ctx.settings = flat
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[list[torch.Tensor | None] | None, ...]:
    needs, *others = ctx.needs_input_grad
    gradients: list[torch.Tensor | None] = [None] * len(needs)
    if grad is not None:
        h, assignment, offsets, *tensors = ctx.saved_tensors  # checkpointing allows one access
        outputs = (h, assignment, offsets)
        computed: Iterator[torch.Tensor] = iter(
            experts_backward(tensors, *ctx.settings, grad, *outputs, ctx.backend, needs)
        )
        gradients = [next(computed) if needed else None for needed in needs]
    return gradients, *(None for _ in others)


def _refuse(ctx: Any, *_: torch.Tensor | None) -> None:
    raise NotImplementedError(
        "The experts' gradient cannot be differentiated again: load the model with experts_implementation='eager'."
    )


experts.register_autograd(_differentiate, setup_context=_save)
experts_backward.register_autograd(_refuse)


def is_plain(x: torch.Tensor) -> bool:
    """Returns True if `x` is a plain, materialised tensor: not meta, fake or a subclass, and not under `torch.compile`
    or tracing.

    transformers' `is_tracing` asks for more, and takes a tenth of the time of a small expert.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) is torch.Tensor and not x.is_meta and not traced


def decode(problem: ExpertsProblem, index: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Computes the output (T, H) of a few tokens without gradient, reading only the chosen experts' matrices.

    [`experts_decode`] does this as an operator, which `torch.compile` needs and which costs as much time as a small
    expert.

    Args:
        problem: at most [`~modeling_moe.dispatch.backend.DECODE_TOKENS`] tokens.
        index: (T, K) integer expert ids. An id outside [0, E) marks an empty assignment.
        backend: a back end that decodes `problem`.
    """
    if not index.numel():
        return torch.zeros_like(problem.x)
    with torch.autocast(problem.x.device.type, enabled=False):
        return backend.decode(problem, index)


@torch.library.custom_op("modeling_moe::experts_decode", mutates_args=())
def experts_decode(
    tensors: Sequence[torch.Tensor],
    layout: str,
    activation: str,
    numbers: Sequence[float],
    index: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """Computes [`decode`] as an operator, from a [`~modeling_moe.dispatch.problem.FlatProblem`]."""
    problem = ExpertsProblem.unflatten(FlatProblem(tensors, layout, activation, numbers))
    return decode(problem, index, BACKENDS[backend])


@experts_decode.register_fake
def _(
    tensors: Sequence[torch.Tensor],
    layout: str,
    activation: str,
    numbers: Sequence[float],
    index: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    return torch.empty_like(tensors[layout.split().index("x")])
