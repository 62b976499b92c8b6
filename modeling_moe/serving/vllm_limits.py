# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says which configurations vLLM computes exactly by this package's code, and whose experts it fuses."""

from typing import Any

from ..configuration_checks import row_dependence
from ..configuration_fields import HAS_DEPTH


def has_fused_experts(config: Any) -> bool:
    """Returns whether vLLM's fused kernels compute the experts: `silu(gate) * up` of hidden states, without biases or clamp."""
    plain = config.gated_experts and not config.mlp_bias and config.swiglu_limit is None
    # vLLM gives its experts `hidden_size` features
    plain = plain and config.moe_latent_size is None
    return plain and config.hidden_act in ("silu", "swish")


def refuse_vllm(config: Any) -> None:
    """Refuses a model whose text would be wrong in vLLM.

    Raises:
        ValueError: names the field by which a token's output depends on its neighbours in vLLM's batch, or that vLLM
            cannot compute, and the remedy.
    """
    reason = row_dependence(config, training=False)
    if reason is None and config.attention_sinks:
        reason = "attention_sinks is set, which vLLM does not find in this package's attention"
    if reason is None and config.routed_attention is not None:
        reason = "routed_attention is set, whose experts vLLM would take for those of a feed-forward network"
    if reason is None and HAS_DEPTH.holds(config):
        reason = "depth_layers is set, and vLLM's pages have no place for the tokens that a layer skips"
    if reason is not None:
        raise ValueError(f"vLLM would change the text, because {reason}: call `generate` of transformers instead.")
