# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""From transformers' experts interface to the operator: which back end serves a module, and what none can."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from .low_rank import LowRankPair, arguments
from .operator import BACKENDS, decode, experts, experts_decode


# module -> activation in `ACTIVATIONS`
ACTIVATION_NAMES: dict[type[nn.Module], str] = {
    SiLUActivation: "silu",
    nn.SiLU: "silu",
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    ReLUSquaredActivation: "relu2",
}
# the most tokens, and the most slots, that count as decoding
DECODE_TOKENS = 16
DECODE_SLOTS = 256


def gate_of(module: nn.Module) -> tuple[str, list[float]] | None:
    """Key in [`~modeling_moe.dispatch.gates.GATES`] and constants of what `module` does between its two matrices, or
    None if that has no derivative here."""
    apply_gate = getattr(type(module), "_apply_gate", None)
    if module.has_gate and apply_gate is GptOssExperts._apply_gate:
        return "clamped_swiglu_pairs", [float(module.alpha), float(module.limit)]
    # this model's experts, whose class is another one where a checkpoint brings its code
    if module.has_gate and hasattr(module, "gate_clamp"):
        if module.gate_clamp is not None:
            return "clamped_swiglu_gated", list(module.gate_clamp)
    elif module.has_gate and apply_gate is not _default_apply_gate:
        return None
    activation = ACTIVATION_NAMES.get(type(module.act_fn))
    if activation is None:
        return None
    return (f"{activation}_gated" if module.has_gate else activation), []


def _weights(module: nn.Module) -> list[Any]:
    """(E, C, H), (E, H, I), (E, C) or None, (E, H) or None, whichever way `module` lays them out."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    matrices = [getattr(module, up), module.down_proj]
    if module.is_transposed:
        matrices = [matrix.transpose(1, 2) for matrix in matrices]
    biases = [getattr(module, f"{up}_bias"), module.down_proj_bias] if module.has_bias else [None, None]
    return matrices + biases


def _low_rank(module: nn.Module) -> LowRankPair | None:
    """What `module.low_rank` (parameter -> [`LowRank`]) adds to the matrices, if anything."""
    updates = getattr(module, "low_rank", None)
    if not updates:
        return None
    return LowRankPair(updates.get("gate_up_proj" if module.has_gate else "up_proj"), updates.get("down_proj"))


def unserved(module: nn.Module, gate: tuple[str, list[float]] | None = None) -> str | None:
    """Why the operator cannot compute `module`, whose `gate_of` need not be asked for again if it is given, or None if
    it can."""
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm after each expert"
    if gate is None and gate_of(module) is None:
        return f"its gate or activation ({type(module.act_fn).__name__}) has no derivative here"
    return None


def _drops(low_rank: LowRankPair | None) -> bool:
    return low_rank is not None and any(update and update.dropout for update in low_rank)


def _served_by(
    backend: str, x: torch.Tensor, weights: list[Any], gate: str | None = None, low_rank: LowRankPair | None = None
) -> bool:
    """Whether `backend` can compute in the dtype of `x` on its device with matrices of the sizes of `weights`."""
    if backend == "native":
        return x.device.type == "cpu" and not _drops(low_rank) and BACKENDS["native"].available(x.dtype, gate)
    if backend == "triton":
        return "triton" in BACKENDS and BACKENDS["triton"].available(x.device) and x.dtype != torch.float64
    if backend == "grouped_mm":
        # rows of a multiple of 16 bytes
        sizes = (*weights[0].shape[1:], *weights[1].shape[1:])
        return x.dtype != torch.float64 and all(size * x.element_size() % 16 == 0 for size in sizes)
    return True


def _choose(
    backend: str | None, x: torch.Tensor, weights: list[Any], gate: str | None, low_rank: LowRankPair | None
) -> str:
    """The back end asked for, if it can serve; else the fastest for the device that can."""
    preference = ("triton", "grouped_mm", "loop") if x.device.type == "cuda" else ("native", "loop")
    names = (name for name in (backend, *preference) if name is not None)
    return next(name for name in names if _served_by(name, x, weights, gate, low_rank))


def _decodes(
    backend: str,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: list[Any],
    gradient: bool,
    low_rank: LowRankPair | None,
) -> bool:
    few = len(x) <= DECODE_TOKENS and index.numel() <= DECODE_SLOTS
    if low_rank is not None and (backend != "loop" or _drops(low_rank)):
        return False
    if backend == "native" and any(matrices.stride(-1) != 1 for matrices in weights[:2]):
        return False
    return few and not gradient and hasattr(BACKENDS[backend], "decode")


def _runs_now(x: torch.Tensor) -> bool:
    """Whether `x` has numbers, rather than being watched by something that wants to see operators. transformers'
    `is_tracing` asks more, and takes a tenth of the time that a small expert does."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) is torch.Tensor and not x.is_meta and not watched


def _has_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def backend_of(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, backend: str | None = None
) -> str:
    """Says what computes `module` for these inputs: a key of [`~modeling_moe.dispatch.operator.BACKENDS`], with
    `" (decode)"` after it where the path for few tokens is taken; or `"transformers: "` and the reason why it is left
    to transformers' own functions.

    Args:
        module: experts of this package's model or of one of transformers'.
        hidden_states: (T, H).
        top_k_index: (T, K).
        backend: key of `BACKENDS`, as if this one were asked for by name; if not given, the one that the module's own
            `experts_implementation` asks for (`"moe_loop"`: `loop`), if it asks for one.

    Example:
        >>> import torch
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> from modeling_moe.dispatch import backend_of
        >>> config = MoEConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        >>> experts = MoEForCausalLM(config).model.layers[0].mlp.experts
        >>> backend_of(experts, torch.zeros(100, 64), torch.zeros(100, 2, dtype=torch.long))
        'native'
    """
    if reason := unserved(module):
        return f"transformers: {reason}"
    weights, low_rank = _weights(module), _low_rank(module)
    gate, _ = gate_of(module)
    if backend is None:
        implementation = getattr(module.config, "_experts_implementation", None) or ""
        backend = implementation.removeprefix("moe_") if implementation.startswith("moe_") else None
    name = _choose(backend, hidden_states.to(weights[0].dtype), weights, gate, low_rank)
    gradient = _has_gradient(hidden_states, *weights, *(low_rank.factors if low_rank else ()))
    decodes = _decodes(name, hidden_states, top_k_index, weights, gradient, low_rank)
    return f"{name} (decode)" if decodes else name


def experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """transformers' contract for experts, by the operator of this package.

    Args:
        module: holds the experts' weights, as transformers' `use_experts_implementation` describes them; what its
            `low_rank`, if any, maps their names to is added: [`~modeling_moe.dispatch.low_rank.LowRank`].
        hidden_states: (T, H).
        top_k_index: (T, K) integer; an id outside [0, E) marks an empty slot.
        top_k_weights: (T, K) factors on the experts' outputs.
        backend: key of `BACKENDS`; the fastest if not given, or if that one cannot serve this dtype, device or shape.

    Returns:
        (T, H) in the dtype of `hidden_states`, summed in fp32. Under autocast the products are computed in its dtype.

    Raises:
        ValueError: for inputs whose shapes or dtypes do not fit.
    """
    _check(hidden_states, top_k_index, top_k_weights, module)
    # a narrower integer has no room for the number of experts, which marks an empty slot
    top_k_index = top_k_index.long()
    weights, low_rank = _weights(module), _low_rank(module)
    gate = gate_of(module)
    if reason := unserved(module, gate):
        if low_rank is not None:
            raise ValueError(f"the experts cannot have low-rank updates here: {reason}")
        return _by_transformers(module, hidden_states, top_k_index, top_k_weights)
    dtype, device = weights[0].dtype, hidden_states.device.type
    autocast = not hidden_states.is_meta and torch.is_autocast_enabled(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
    if low_rank is not None and any(len(factor) != len(weights[0]) for factor in low_rank.factors):
        raise ValueError(f"low_rank has factors for other than the {len(weights[0])} experts here: slice them")
    x = hidden_states.to(dtype).contiguous()
    factors = top_k_weights.to(torch.promote_types(dtype, torch.float32)).contiguous()
    kind, constants = gate
    name = _choose(backend, x, weights, kind, low_rank)
    if autocast and name != "triton":
        # Triton's back end casts for itself: backward needs no copy, and gradients are in fp32 from the start
        weights = [None if weight is None else weight.to(dtype) for weight in weights]
    up, down, up_bias, down_bias = weights
    call = (x, top_k_index, factors, up, down, up_bias, down_bias, kind, constants, name)
    gradient = _has_gradient(x, factors, *weights, *(low_rank.factors if low_rank else ()))
    if _decodes(name, x, top_k_index, weights, gradient, low_rank):
        function = decode if _runs_now(x) else experts_decode
        output = function(*call, *arguments(low_rank))
    else:
        keep_h = gradient and not getattr(module.config, "experts_recompute", False)
        dropped = low_rank and low_rank.drop(len(x), top_k_index.numel())
        output = experts(*call, keep_h, *arguments(dropped))[0]
    return output.to(hidden_states.dtype)


def _check(hidden_states, top_k_index, top_k_weights, module) -> None:
    if hidden_states.dim() != 2 or top_k_index.dim() != 2 or len(hidden_states) != len(top_k_index):
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and top_k_index {tuple(top_k_index.shape)} must be (T, H) and "
            "(T, K) of the same T: flatten the batch first."
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights {tuple(top_k_weights.shape)} must have the shape of top_k_index "
            f"{tuple(top_k_index.shape)}: one weight for each slot."
        )
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise ValueError(f"top_k_index is {top_k_index.dtype}: expert ids are integers, convert them with .long().")
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    if hidden_states.shape[1] != hidden:
        raise ValueError(
            f"hidden_states has width {hidden_states.shape[1]} and the experts {hidden}: they must agree."
        )


def _eager_forward(experts_class: type[nn.Module]) -> Callable[..., torch.Tensor]:
    """The forward that a class of experts was written with, beneath transformers' choice of an implementation."""
    forwards = (vars(base).get("forward") for base in experts_class.__mro__)
    return next(forward.__wrapped__ for forward in forwards if hasattr(forward, "__wrapped__"))


def _by_transformers(module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """transformers' grouped_mm on an accelerator; the class's own loop over the experts elsewhere, and for the dtype and
    the sizes that grouped_mm cannot do."""
    # on CPUs grouped_mm rounds sums of 16-bit products more than the loop does, and is no faster
    if hidden_states.device.type == "cpu" or not _served_by("grouped_mm", hidden_states, _weights(module)):
        return _eager_forward(type(module))(module, hidden_states, top_k_index, top_k_weights)
    empty = (top_k_index < 0) | (top_k_index >= module.num_experts)
    if module._is_expert_parallel:
        # under this flag alone grouped_mm skips the slots whose id is beyond the last expert
        index = top_k_index.masked_fill(empty, module.num_experts)
    else:
        # a row that no expert takes may hold anything, and 0 times NaN is NaN
        hidden_states = hidden_states.masked_fill(empty.all(dim=-1, keepdim=True), 0)
        index = top_k_index.masked_fill(empty, 0)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, index, top_k_weights.masked_fill(empty, 0))
