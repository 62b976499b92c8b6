# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the feed-forward network of dense layers and of shared experts."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN


class MoEMLP(nn.Module):
    """A feed-forward network `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    With `dense_swiglu_limit` L, the gate is `min(gate(x), L)` and up is `clamp(up(x), -L, L)`.

    Args:
        config: the model's configuration; `hidden_size`, `mlp_bias`, `hidden_act` and `dense_swiglu_limit` are read.
        intermediate_size: width of the network.
        gated: whether the network has a gate.
    """

    def __init__(self, config: Any, intermediate_size: int, gated: bool):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.limit = config.dense_swiglu_limit

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., H) to (..., H)."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


class OutputBias(nn.Module):
    """A bias that is added to the output of a sparse feed-forward network, whatever the routing weights are."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def init_weights(self, std: float) -> None:
        """Fills the bias of a new model with 0."""
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., H) to (..., H)."""
        return hidden_states + self.bias
