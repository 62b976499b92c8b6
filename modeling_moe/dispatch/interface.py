# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module turns a call of transformers' experts interface into an [`ExpertsProblem`] and hands it to a back end.

# T tokens, K experts per token, E experts, H hidden size, I expert width, C columns of the first projection
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..attention_experts import attends
from .backend import DECODE_ASSIGNMENTS, DECODE_TOKENS, Backend
from .backends import NAMES, choose
from .backends.grouped_mm import takes_rows
from .low_rank import LowRank
from .operator import decode, experts, experts_decode, is_plain
from .problem import ExpertsProblem
from .recognition import ActivationChoice, recognise


class ExpertsModule(Protocol):
    """ExpertsModule lists what every module has that follows transformers' experts interface."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    num_experts: int
    down_proj: torch.Tensor
    config: PreTrainedConfig


def follows_interface(module: nn.Module) -> TypeGuard[ExpertsModule]:
    """Returns True if a module has what [`ExpertsModule`] lists."""
    return all(hasattr(module, name) for name in ExpertsModule.__annotations__)


def activation_of(module: nn.Module) -> ActivationChoice | None:
    """Returns what experts compute between their two matrices, or None if the operator cannot compute the experts."""
    return recognise(module).activation if follows_interface(module) else None


def reason_unsupported(module: nn.Module) -> str | None:
    """Returns why the operators cannot compute a module of experts, or None if they can."""
    if attends(module):
        return None
    if not follows_interface(module):
        missing = next(name for name in ExpertsModule.__annotations__ if not hasattr(module, name))
        return f"it has no {missing}, which transformers' experts interface asks for"
    return recognise(module).reason


class _Matrices(NamedTuple):
    """_Matrices holds (E, C, H), (E, H, I), (E, C) or None and (E, H) or None, whatever the layout of the module."""

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


def _matrices_of(module: ExpertsModule, held: "HeldExperts | None" = None) -> _Matrices:
    def read(name: str) -> torch.Tensor:
        return getattr(module, name) if held is None else held.tensors[name]

    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down, up_bias, down_bias = read(name), read("down_proj"), None, None
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if module.has_bias:
        up_bias, down_bias = read(f"{name}_bias"), read("down_proj_bias")
    return _Matrices(up, down, up_bias, down_bias)


class HeldExperts(NamedTuple):
    """HeldExperts holds some experts of a module, whose own parameters are not read.

    Attributes:
        tensors: name of a parameter -> memory (S, ...) of S slots, each as large as one expert's slice.
        slots: (E,) int32 on the CPU, the slot of each expert.
    """

    tensors: Mapping[str, torch.Tensor]
    slots: torch.Tensor


class PreparedCall(NamedTuple):
    """PreparedCall holds what a call of experts is computed from.

    Attributes:
        problem: the tokens, the combine weights and the experts.
        index: (T, K) int64. An id outside [0, E) marks an empty assignment.
        backend: the back end that computes the call.
        decodes: True for the path of a few tokens.
        keeps_h: True if h is kept for backward.
        matrix_dtype: the dtype to cast the matrices to, or None.
    """

    problem: ExpertsProblem
    index: torch.Tensor
    backend: Backend
    decodes: bool
    keeps_h: bool
    matrix_dtype: torch.dtype | None


def _problem(
    module: ExpertsModule,
    x: torch.Tensor,
    weight: torch.Tensor,
    matrices: _Matrices,
    activation: ActivationChoice,
    slots: torch.Tensor | None = None,
) -> ExpertsProblem:
    """Builds the problem of a module; `module.low_rank` maps names of parameters to updates.

    Raises:
        ValueError: for updates of another number of experts.
    """
    updates: dict[str, LowRank] | None = getattr(module, "low_rank", None)
    if not updates:
        return ExpertsProblem(x, weight, *matrices, *activation, slots=slots)
    number = len(matrices.up if slots is None else slots)
    if any(len(factor) != number for update in updates.values() for factor in (update.a, update.b)):
        raise ValueError(f"low_rank has factors for another number of experts than {number}: slice them")
    up, down = updates.get("gate_up_proj" if module.has_gate else "up_proj"), updates.get("down_proj")
    return ExpertsProblem(x, weight, *matrices, *activation, up_update=up, down_update=down, slots=slots)


def _decodes(backend: Backend, problem: ExpertsProblem) -> bool:
    """Returns True if the path for a few tokens serves."""
    tokens, top_k = problem.weight.shape
    few = tokens <= DECODE_TOKENS and tokens * top_k <= DECODE_ASSIGNMENTS
    return few and backend.decodes(problem) and not problem.requires_grad()


def backend_of(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, backend: str | None = None
) -> str:
    """Says which back end computes a module for these inputs.

    Args:
        module: experts of this package's model or of one of transformers' models.
        hidden_states: (T, H).
        top_k_index: (T, K).
        backend: the back end to ask for, a key of `BACKENDS`. By default it is the one that the module's
            `experts_implementation` asks for: `"moe_loop"` asks for `"loop"`, and `"moe"` for none.

    Returns:
        A key of [`~modeling_moe.dispatch.backends.BACKENDS`], with `" (decode)"` after it where the path for a few
        tokens is taken; or `"transformers: "` and the reason why transformers' own functions compute the module.

    Raises:
        TypeError: for a module that does not follow transformers' experts interface.

    Example:
        >>> import torch
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> from modeling_moe.dispatch import backend_of
        >>> config = MoEConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        >>> experts = MoEForCausalLM(config).model.layers[0].mlp.experts
        >>> backend_of(experts, torch.zeros(100, 64), torch.zeros(100, 2, dtype=torch.long))
        'native'
    """
    if not follows_interface(module):
        raise TypeError(f"{type(module).__name__} does not follow transformers' experts interface: pass its experts.")
    activation, reason = recognise(module)
    if activation is None:
        return f"transformers: {reason}"
    if backend is None:
        implementation = getattr(module.config, "_experts_implementation", None) or ""
        asked = implementation.removeprefix("moe_")
        backend = asked if asked in NAMES else None
    matrices, weight = _matrices_of(module), top_k_index.new_zeros(top_k_index.shape, dtype=torch.float32)
    problem = _problem(module, hidden_states.to(matrices.up.dtype), weight, matrices, activation)
    chosen = choose(backend, problem)
    return f"{chosen.name} (decode)" if _decodes(chosen, problem) else chosen.name


def experts_forward(
    module: ExpertsModule,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """Computes the experts under transformers' contract, by the operator of this package.

    Args:
        module: holds the experts' weights as transformers' `use_experts_implementation` describes them. If it has an
            attribute `low_rank`, a dict from parameter names to [`~modeling_moe.dispatch.low_rank.LowRank`], these
            updates are added.
        hidden_states: (T, H).
        top_k_index: (T, K) integer. An id outside [0, E) marks an empty assignment.
        top_k_weights: (T, K) factors on the experts' outputs.
        backend: a key of `BACKENDS`. By default, and where this back end cannot serve the dtype, the device or the
            shapes, the fastest one that can is taken.

    Returns:
        (T, H) in the dtype of `hidden_states`, summed in fp32. Under autocast the products are computed in its dtype.

    Raises:
        ValueError: for inputs whose shapes or dtypes do not fit, and for low-rank updates that cannot be served.
    """
    check_arguments(hidden_states, top_k_index, top_k_weights, module)
    activation, reason = recognise(module)
    if activation is None:
        if getattr(module, "low_rank", None):
            raise ValueError(f"the experts cannot have low-rank updates here: {reason}")
        return _by_transformers(module, hidden_states, top_k_index.long(), top_k_weights)
    call = prepare(module, hidden_states, top_k_index, top_k_weights, activation, backend)
    problem, index, chosen = call.problem, call.index, call.backend
    if call.matrix_dtype is not None:
        problem = problem.with_matrices_in(call.matrix_dtype)
    if call.decodes:
        plain = is_plain(problem.x)
        output = decode(problem, index, chosen) if plain else experts_decode(*problem.flatten(), index, chosen.name)
    else:
        output = experts(*problem.with_dropout().flatten(), index, chosen.name, call.keeps_h)[0]
    return output.to(hidden_states.dtype)


def prepare(
    module: ExpertsModule,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: ActivationChoice,
    backend: str | None,
    held: HeldExperts | None = None,
) -> PreparedCall:
    """Brings the arguments of [`experts_forward`] into the dtypes of the operator and chooses the back end.

    Args:
        module, hidden_states, top_k_index, top_k_weights, backend: as for [`experts_forward`].
        activation: what the experts compute between their matrices.
        held: the experts, in the place of the module's own parameters.
    """
    matrices, device = _matrices_of(module, held), hidden_states.device.type
    autocast = not hidden_states.is_meta and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else matrices.up.dtype
    x = hidden_states.to(dtype).contiguous()
    weight = top_k_weights.to(torch.promote_types(dtype, torch.float32)).contiguous()
    problem = _problem(module, x, weight, matrices, activation, None if held is None else held.slots)
    chosen = choose(backend, problem)
    casts = autocast and not chosen.casts_matrices
    # a narrower integer has no room for the number of experts, which marks an empty assignment
    return PreparedCall(
        problem,
        top_k_index.long(),
        chosen,
        decodes=_decodes(chosen, problem),
        keeps_h=problem.requires_grad() and not getattr(module.config, "experts_recompute", False),
        matrix_dtype=dtype if casts else None,
    )


def check_arguments(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, module: ExpertsModule
) -> None:
    """Raises ValueError for inputs whose shapes or dtypes do not fit."""
    if hidden_states.dim() != 2 or top_k_index.dim() != 2 or len(hidden_states) != len(top_k_index):
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and top_k_index {tuple(top_k_index.shape)} must be (T, H) and "
            "(T, K) of the same T: flatten the batch first."
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights {tuple(top_k_weights.shape)} must have the shape of top_k_index "
            f"{tuple(top_k_index.shape)}: one weight for each assignment."
        )
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise ValueError(f"top_k_index is {top_k_index.dtype}: expert ids are integers, convert them with .long().")
    down = module.down_proj
    hidden = down.shape[2 if module.is_transposed else 1] if down.dim() == 3 else hidden_states.shape[1]
    if hidden_states.shape[1] != hidden:
        raise ValueError(
            f"hidden_states has width {hidden_states.shape[1]} and the experts {hidden}: they must agree."
        )


def _eager_forward(experts_class: type) -> Callable[..., torch.Tensor]:
    """Returns the forward that a class of experts was written with, before transformers wrapped it."""
    forwards = (vars(base).get("forward") for base in experts_class.__mro__)
    return next(forward.__wrapped__ for forward in forwards if hasattr(forward, "__wrapped__"))


def _suits_grouped_mm(module: ExpertsModule, hidden_states: torch.Tensor) -> bool:
    try:
        up, down, *_ = _matrices_of(module)
    except (AttributeError, IndexError):  # it holds its matrices in another way
        return False
    return up.dim() == down.dim() == 3 and takes_rows(hidden_states, up, down)


def _by_transformers(
    module: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Computes the experts by transformers' grouped_mm on an accelerator.

    The class's own loop over the experts computes them elsewhere, and for the dtypes and sizes that grouped_mm does not
    take.
    """
    # on CPUs grouped_mm rounds sums of 16-bit products more than the loop does, and is no faster
    if hidden_states.device.type == "cpu" or not _suits_grouped_mm(module, hidden_states):
        return _eager_forward(type(module))(module, hidden_states, top_k_index, top_k_weights)
    empty = (top_k_index < 0) | (top_k_index >= module.num_experts)
    if getattr(module, "_is_expert_parallel", False):
        # transformers' functions skip out-of-range ids only if this flag is set
        index = top_k_index.masked_fill(empty, module.num_experts)
    else:
        # a row that no expert takes may hold anything, and 0 times NaN is NaN
        hidden_states = hidden_states.masked_fill(empty.all(dim=-1, keepdim=True), 0)
        index = top_k_index.masked_fill(empty, 0)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, index, top_k_weights.masked_fill(empty, 0))
