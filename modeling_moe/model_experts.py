# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the routed experts, and derives parameters from theirs: without gradient, or merged by a router."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .checkpoint_layout import fill_experts
from .configuration_moe import MoEConfig


class ExpertParameters(NamedTuple):
    """The parameters of experts, under the names that [`ExpertsBase`] gives them.

    Attributes:
        weights: name -> weight or bias, with E experts in the first dimension.
        low_rank: name of a weight -> low-rank update that `modeling_moe.lora` adds to the weight.
    """

    weights: dict[str, torch.Tensor]
    low_rank: dict[str, Any]


def _parameters(experts: Any) -> ExpertParameters:
    names = [experts.up_name, "down_proj"]
    if experts.has_bias:
        names += [f"{experts.up_name}_bias", "down_proj_bias"]
    # read as attributes: PEFT and quantizers compute what they put in the place of a parameter
    return ExpertParameters({name: getattr(experts, name) for name in names}, experts.__dict__.get("low_rank", {}))


def detached_parameters(experts: Any) -> ExpertParameters:
    """Returns the experts' parameters without gradient."""
    weights, updates = _parameters(experts)
    updates = {name: update._replace(a=update.a.detach(), b=update.b.detach()) for name, update in updates.items()}
    return ExpertParameters({name: weight.detach() for name, weight in weights.items()}, updates)


def merged_parameters(experts: Any, gates: torch.Tensor) -> ExpertParameters:
    """Returns the parameters of G experts, each the sum of E experts weighted by a row of `gates` (G, E).

    Raises:
        ValueError: for low-rank updates with dropout, which a merged weight cannot have.
    """
    weights, updates = _parameters(experts)
    for name, update in updates.items():
        if update.dropout:
            raise ValueError("router_type='lory' merges the experts' weights: set lora_dropout to 0.")
        weights[name] = weights[name] + update.scaling * (update.b @ update.a).to(weights[name].dtype)
    return ExpertParameters({name: torch.tensordot(gates.to(w.dtype), w, dims=1) for name, w in weights.items()}, {})


@use_experts_implementation
class ExpertsBase(nn.Module):
    """Routed experts in plain PyTorch, by which every other implementation is tested.

    Experts with a gate have `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I); experts without a gate have
    `up_proj` (E, I, H) and `down_proj`. With biases there are `gate_up_proj_bias` (E, 2I) or `up_proj_bias` (E, I), and
    `down_proj_bias` (E, H). H is `moe_latent_size` if that is set, else `hidden_size`.
    """

    if TYPE_CHECKING:

        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            """The decorator of transformers adds this method."""
            raise NotImplementedError

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        hidden, width = config.moe_latent_size or config.hidden_size, config.moe_intermediate_size
        self.up_name, rows = ("gate_up_proj", 2 * width) if config.gated_experts else ("up_proj", width)
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(self.num_experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        if config.mlp_bias:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # `Trainer` resumes by `load_state_dict`, which does not convert the layout on disk
        missing, errors = fill_experts(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys.extend(missing)
        error_msgs.extend(errors)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers, expert ids; `num_experts` and above mark an empty assignment.
            top_k_weights: (T, K) factors on the experts' outputs.

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        # one unbind: with an index per expert, each backward would fill a gradient of the whole tensor
        up, down = getattr(self, self.up_name).unbind(0), self.down_proj.unbind(0)
        output, top_k_index = torch.zeros_like(hidden_states), top_k_index.long()
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            if len(token) == 0:
                continue
            up_bias = getattr(self, f"{self.up_name}_bias")[expert] if self.has_bias else None
            down_bias = self.down_proj_bias[expert] if self.has_bias else None
            states = nn.functional.linear(hidden_states[token], up[expert], up_bias)
            states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
            states = nn.functional.linear(states, down[expert], down_bias)
            states = states * top_k_weights[token, choice, None]
            output = output.index_add(0, token, states.to(output.dtype))
        return output


class MoEExperts(ExpertsBase):
    """Routed experts, computed by the implementation that `config._experts_implementation` names."""

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        # transformers' decorator sets these two for the class; here they follow the configuration
        self.has_gate, self.has_bias = config.gated_experts, config.mlp_bias
        self.gate_clamp = None
        if config.swiglu_limit is not None:
            alpha = config.swiglu_alpha
            self.gate_clamp = (None if alpha is None else float(alpha), float(config.swiglu_limit))
        # transformers' experts functions skip out-of-range ids only if this flag is set, and the flag costs a masking pass
        self._is_expert_parallel = config.has_empty_slots

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gates: torch.Tensor | None = None,
        frozen: bool = False,
    ) -> torch.Tensor:
        """Computes the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers, expert ids; `num_experts` and above mark an empty assignment.
            top_k_weights: (T, K) factors on the experts' outputs.
            gates: (G, E) weights by which the E experts are merged into G experts, of which the ids are then; None without.
            frozen: whether the experts' weights get no gradient.

        Returns:
            (T, H) in the dtype of `hidden_states`.

        Raises:
            ValueError: for `gates` with LoRA on the experts and dropout, which a merged weight cannot have.
        """
        experts = self
        if gates is not None:
            experts = self._with(merged_parameters(self, gates), len(gates))
        elif frozen:
            experts = self._with(detached_parameters(self), self.num_experts)
        return ExpertsBase.forward(experts, hidden_states, top_k_index, top_k_weights)

    def _with(self, parameters: ExpertParameters, num_experts: int) -> "MoEExperts":
        """Returns experts that compute with other parameters, tensors through which gradients flow."""
        experts = MoEExperts.__new__(MoEExperts)
        experts.__dict__.update(self.__dict__, _parameters=parameters.weights, low_rank=parameters.low_rank)
        experts.num_experts = num_experts
        return experts

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Maps (R, 2I), gate first, to (R, I): `act(gate) * up`, clamped with `swiglu_limit`, or gpt-oss's clamped gate."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.gate_clamp is None:
            return self.act_fn(gate) * up
        alpha, limit = self.gate_clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if alpha is None:
            return self.act_fn(gate) * up
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
