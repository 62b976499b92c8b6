# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the experts of a mixture of attention heads from the attention of dense models.

# E experts, K experts per token, n query heads of the dense model, G key heads, D features of a head, H hidden

An expert is a copy of the query and the output projection, with all n heads; keys, values, norms, sinks and biases stay
shared. Each of a token's K experts then computes the dense attention, and the routing weights, a softmax over the K logits,
have the sum 1. The weighted sum of the experts is therefore the dense attention, whatever the router chooses. The cache
still has G heads of keys and values.
"""

from typing import Any

from ..checkpoints import LazyTensor
from ..configuration_moe import MoEConfig
from .experts import with_noise
from .options import UpcyclingOptions
from .request import LayerRequest, Network


# tensor of dense attention -> tensor of an expert on disk: the projection before attention, and the one after it
EXPERTS = {"q_proj.weight": "up_proj.weight", "o_proj.weight": "down_proj.weight"}
# bias of dense attention -> bias that all experts share
BIASES = {"q_proj.bias": "q_bias", "o_proj.bias": "o_bias"}


def attention_fields(dense: MoEConfig, options: UpcyclingOptions) -> dict[str, Any]:
    """Returns the fields in which a mixture of attention heads differs from the dense model that it computes."""
    if not options.attention_experts:
        return {}
    return {
        "routed_attention": "moa",
        "attention_experts": options.attention_experts,
        "attention_experts_per_tok": options.attention_experts_per_tok,
        # the heads of all experts of a token
        "num_attention_heads": dense.num_attention_heads * options.attention_experts_per_tok,
        # these would follow from the number of heads
        "num_key_value_heads": dense.num_key_value_heads,
        "head_dim": dense.head_dim,
    }


def attention_expert(request: LayerRequest, expert: int) -> Network:
    """Returns an expert of attention with noise, in the first source's dtype.

    With several sources the first source fills the first experts, the second source the next ones.
    """
    networks, options = request.networks, request.options
    network = networks[expert * len(networks) // options.num_experts]

    def noisy(theirs: str, ours: str) -> LazyTensor:
        return LazyTensor.combine(
            lambda weight: with_noise(weight, options.noise, request.generator(expert, ours), options.noise_std),
            network[theirs],
            dtype=networks[0][theirs].dtype,
        )

    return {ours: noisy(theirs, ours) for theirs, ours in EXPERTS.items()}
