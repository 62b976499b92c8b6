# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts function `"moe_offloaded"` computes experts from the slots of an expert cache.

The back end is the one that computes the resident model. A pass whose experts do not fit into the slots runs in rounds,
in ascending order of expert ids, which is the order in which the back ends add up on CPUs.

# T tokens, K experts per token, H hidden size
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..dispatch import (
    ExpertsProblem,
    Gradients,
    HeldExperts,
    Needs,
    PreparedCall,
    by_slot,
    check_arguments,
    expert_of_slot,
    index_in_round,
    prepare,
    recognise,
)
from .cache import ExpertCache, Round


# name of the experts function in transformers' `ALL_EXPERTS_FUNCTIONS`
IMPLEMENTATION = "moe_offloaded"
# the tensors of a problem that can get a gradient, or that backward reads beside the experts
DIFFERENTIABLE = ("x", "weight", "up_a", "up_b", "down_a", "down_b")


class Offloaded(NamedTuple):
    """Offloaded says how an experts module is computed; the module's attribute `offloaded` holds it.

    Attributes:
        cache: the cache of the layer.
        backend: the back end to ask for, or None for the fastest one.
    """

    cache: ExpertCache
    backend: str | None


def offloaded_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Computes offloaded experts as [`~modeling_moe.dispatch.experts_forward`] computes resident ones.

    Args:
        module: experts that [`~modeling_moe.offload.offload_experts`] has offloaded.
        hidden_states: (T, H).
        top_k_index: (T, K) integer. An id outside [0, E) marks an empty assignment.
        top_k_weights: (T, K) factors on the experts' outputs.

    Returns:
        (T, H) in the dtype of `hidden_states`.

    Raises:
        ValueError: for a module that is not offloaded, and where a resident module raises it.
    """
    offloaded: Offloaded | None = module.__dict__.get("offloaded")
    if offloaded is None:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r} needs experts in a cache: call offload_experts(model)"
        )
    forward = _uncompiled if torch.compiler.is_compiling() else _forward
    return forward(module, offloaded, hidden_states, top_k_index, top_k_weights)


def _forward(
    module: Any,
    offloaded: Offloaded,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    check_arguments(hidden_states, top_k_index, top_k_weights, module)
    cache = offloaded.cache
    _check_place(module, cache, hidden_states)
    activation, reason = recognise(module)
    if activation is None:
        raise ValueError(f"{type(module).__name__} changed after it was offloaded: {reason}")
    held = HeldExperts(cache.slots.tensors, cache.slots.table)
    call = prepare(module, hidden_states, top_k_index, top_k_weights, activation, offloaded.backend, held)
    call = call._replace(problem=call.problem.with_dropout())
    if call.problem.requires_grad():
        tensors = call.problem.named_tensors()
        output = _Differentiable.apply(cache, call, *(tensors.get(name) for name in DIFFERENTIABLE))
    else:
        output = _compute(cache, call)
    return output.to(hidden_states.dtype)


# what is read depends on the experts that the router chose, so a compiled model leaves its graph here; the mere wrapper costs
# as much as a small expert
_uncompiled = torch.compiler.disable(_forward)


def _check_place(module: nn.Module, cache: ExpertCache, hidden_states: torch.Tensor) -> None:
    """Raises ValueError for tokens on another device than the slots, and for trainable experts."""
    device = cache.device
    if hidden_states.device != device:
        raise ValueError(
            f"the experts' slots are on {device} and the tokens on {hidden_states.device}: move the model to "
            f"{hidden_states.device} before offload_experts"
        )
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        raise ValueError(
            "offloaded experts cannot be trained, since they are read again for each pass: call requires_grad_(False) on "
            "them and train LoRA on the experts, or train the model without offload"
        )


def _current(call: PreparedCall) -> ExpertsProblem:
    """Returns the problem with the experts that are in the slots now."""
    return call.problem if call.matrix_dtype is None else call.problem.with_matrices_in(call.matrix_dtype)


def _compute(cache: ExpertCache, call: PreparedCall) -> torch.Tensor:
    """Computes the output (T, H) without gradient."""
    needed = cache.needed(call.index)
    if not needed:
        return torch.zeros_like(call.problem.x)
    with cache.running(needed) as rounds, _no_autocast(call):
        if cache.number_of_rounds(needed) == 1:
            next(rounds)
            return _one_round(call, keep_h=False)[0]
        return _several_rounds(call, rounds)


def _no_autocast(call: PreparedCall) -> AbstractContextManager[Any]:
    """Returns a context without autocast; entering one costs time, so it does nothing where there is none."""
    device = call.problem.x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _one_round(call: PreparedCall, keep_h: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a pass whose experts are all resident, as the operator computes it.

    Returns:
        The output (T, H) and h.
    """
    problem, index, backend = _current(call), call.index, call.backend
    if not backend.serves_slots:
        problem, index = by_slot(problem, index)
    if call.decodes:
        return backend.decode(problem, index), problem.x.new_empty(0)
    return backend.forward(problem, backend.order_by_expert(index, problem.num_experts), keep_h)


def _several_rounds(call: PreparedCall, rounds: Any) -> torch.Tensor:
    work = call.backend.rounds(call.problem, call.index, call.decodes)
    for first, last in rounds:
        work.add(_current(call), first, last)
    return work.output()


class _Differentiable(torch.autograd.Function):
    """_Differentiable computes offloaded experts with gradients to tokens, combine weights and low-rank factors.

    Saved are these tensors and, if one round serves and the model does not recompute it, h. The experts are read again
    for backward.
    """

    @staticmethod
    def forward(ctx: Any, cache: ExpertCache, call: PreparedCall, *tensors: torch.Tensor | None) -> torch.Tensor:
        needed = cache.needed(call.index)
        h = call.problem.x.new_empty(0, call.problem.up.shape[1])
        if not needed:
            output = torch.zeros_like(call.problem.x)
        else:
            with cache.running(needed) as rounds, _no_autocast(call):
                if cache.number_of_rounds(needed) == 1:
                    next(rounds)
                    output, h = _one_round(call, call.keeps_h)
                else:
                    output = _several_rounds(call, rounds)
        ctx.save_for_backward(h, *tensors)
        ctx.cache, ctx.call = cache, _without_tensors(call)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,), wanted = grad_outputs, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "The gradient of offloaded experts cannot be differentiated again: do not offload them."
            )
        if grad is None:
            return None, None, *(None for _ in wanted)
        h, *tensors = ctx.saved_tensors
        call = _with_tensors(ctx.call, *tensors)
        needs = Needs(**dict(zip(DIFFERENTIABLE, wanted, strict=True)))
        with _no_autocast(call):
            gradients = _backward(ctx.cache, call, grad.contiguous(), h, needs)
        return None, None, *(getattr(gradients, name) for name in DIFFERENTIABLE)


def _without_tensors(call: PreparedCall) -> PreparedCall:
    """Returns a call without the tensors that autograd saves, which would be kept alive otherwise."""
    nothing = call.problem.x.new_empty(0)
    updates = [
        None if update is None else update._replace(a=nothing, b=nothing)
        for update in (call.problem.up_update, call.problem.down_update)
    ]
    problem = call.problem._replace(x=nothing, weight=nothing, up_update=updates[0], down_update=updates[1])
    return call._replace(problem=problem)


def _with_tensors(
    call: PreparedCall, x: Any, weight: Any, up_a: Any, up_b: Any, down_a: Any, down_b: Any
) -> PreparedCall:
    """Puts saved tensors, in the order of `DIFFERENTIABLE`, back into a call."""
    up, down = call.problem.up_update, call.problem.down_update
    up = None if up is None else up._replace(a=up_a, b=up_b)
    down = None if down is None else down._replace(a=down_a, b=down_b)
    return call._replace(problem=call.problem._replace(x=x, weight=weight, up_update=up, down_update=down))


def _backward(cache: ExpertCache, call: PreparedCall, grad: torch.Tensor, h: torch.Tensor, needs: Needs) -> Gradients:
    """Computes the gradients, round by round, from experts that are read again."""
    x = call.problem.x
    grad_x = torch.zeros_like(x, dtype=call.problem.wide_dtype) if needs.x else None
    tensors = call.problem.named_tensors()
    total = {name: torch.zeros_like(tensors[name]) for name in DIFFERENTIABLE[1:] if getattr(needs, name)}
    needed = cache.needed(call.index)
    if needed:
        with cache.running(needed) as rounds:
            for part in rounds:
                gradients = _round_gradients(call, part, grad, h, needs, grad_x)
                # each expert and each assignment has its gradient in one round only
                for name, sum_of_rounds in total.items():
                    sum_of_rounds.add_(getattr(gradients, name))
    return Gradients(x=None if grad_x is None else grad_x.to(x.dtype), **total)


def _round_gradients(
    call: PreparedCall, part: Round, grad: torch.Tensor, h: torch.Tensor, needs: Needs, grad_x: torch.Tensor | None
) -> Gradients:
    """Computes the gradients of one round, and adds that of x to `grad_x` (T, H)."""
    problem, backend = _current(call), call.backend
    index = index_in_round(call.index, *part, problem.num_experts)
    if backend.serves_slots:
        order = backend.order_by_expert(index, problem.num_experts)
        return backend.add_gradients(problem, order, grad, h, needs, grad_x)
    slotted, index = by_slot(problem, index)
    order = backend.order_by_expert(index, slotted.num_experts)
    gradients = backend.add_gradients(slotted, order, grad, h, needs, grad_x)
    expert = expert_of_slot(problem)
    factors = {
        name: None
        if gradient is None
        else gradient.new_zeros(problem.num_experts, *gradient.shape[1:]).index_add_(0, expert, gradient)
        for name in ("up_a", "up_b", "down_a", "down_b")
        for gradient in (getattr(gradients, name),)
    }
    return gradients._replace(**factors)
