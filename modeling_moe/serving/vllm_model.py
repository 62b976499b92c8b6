# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs this package's decoder in vLLM, by vLLM's Transformers back end. Only vLLM imports this module.

vLLM brings attention, linear layers and the head. The routers stay this package's Python code ("external routing" in vLLM's
log), whatever `router_type` is. The experts run in vLLM's fused kernels if they compute what these compute (`silu(gate) * up`
without biases), and else in this package's code.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.moe import MoEMixin, TransformersMoERunner

from ..checkpoint_layout import fill_experts
from ..modeling_moe import MoEBlock
from .vllm_limits import has_fused_experts, refuse_vllm


class VllmMoEForCausalLM(TransformersMoEForCausalLM):
    """The decoder with a language-model head, as vLLM builds it from a checkpoint's configuration.

    Raises:
        ValueError: for a configuration that vLLM would compute wrongly; the message names the field and the remedy.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        refuse_vllm(config)
        self._fused = has_fused_experts(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.pp_group.is_last_rank and config.logits_scaling != 1.0:
            # vLLM scales after its cap, and MoEForCausalLM before: cap * tanh(x / scaling / cap)
            scaling, cap = config.logits_scaling, config.final_logit_softcapping
            self.logits_processor.scale = 1.0 / scaling
            self.logits_processor.soft_cap = None if cap is None else cap * scaling

    def recursive_replace(self) -> None:
        """Replaces layers by vLLM's, and lets the experts run fused or as they are."""
        if self._fused:
            super().recursive_replace()
            for block in self._sparse_blocks():
                if not isinstance(block.experts, TransformersMoERunner):
                    raise ValueError(
                        "this release of vLLM routes a MoEBlock itself, which would lose the checkpoint's own routing: "
                        "install vllm 0.32."
                    )
                block.experts.register_forward_pre_hook(_fill_empty_assignments)
            return
        # what vLLM's methods of a mixture of experts read, for a model without vLLM's experts
        self.mlp_layers, self.moe_layers, self.num_moe_layers = [], [], 0
        self.num_routed_experts = self.num_logical_experts = self.num_physical_experts = self.config.num_experts
        self.num_local_physical_experts = self.config.num_experts
        self.num_expert_groups, self.num_shared_experts, self.num_redundant_experts = 1, 0, 0
        super(MoEMixin, self).recursive_replace()
        for block in self._sparse_blocks():
            experts: Any = block.experts
            # vLLM's loader calls it, where it cannot fuse the tensors of single experts itself
            experts.load_weights = functools.partial(_load_experts, experts)

    def _sparse_blocks(self) -> list[MoEBlock]:
        return [module for module in self.model.modules() if isinstance(module, MoEBlock)]


def _fill_empty_assignments(experts: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Gives expert 0 with weight 0 to each empty assignment: vLLM's kernels read the weights of every id."""
    hidden_states, index, weight = args
    real = index < experts.moe_config.num_experts
    return hidden_states, index.where(real, 0), weight.where(real, 0.0)


def _load_experts(experts: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Loads a layer's experts, stored one by one or fused, into the tensors of the model; returns the tensors' names."""
    state = dict(weights)
    missing, errors = fill_experts(experts, state, "")
    if missing or errors:
        raise ValueError(f"the experts' weights are incomplete: {', '.join([*missing, *errors])}")
    parameters = dict(experts.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])
    return set(parameters)
