# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps JetMoE, whose attention and feed-forward networks are both mixtures of experts, to a MoE.

# E experts, H hidden, G key heads, D features of a head
"""

from typing import Any

from ...checkpoints import State
from ...configuration_moe import MoEConfig
from .base import Family, SourceFields
from .sparse_parts import moe_tensors, sparse, unfused


# part of a tensor's name in JetMoE -> part of the name in a MoE, in which experts are fused
NAMES = {
    ".self_attention.experts.input_linear.weight": ".self_attn.experts.up_proj",
    ".self_attention.experts.output_linear.weight": ".self_attn.experts.down_proj",
    ".self_attention.experts.router.layer.": ".self_attn.gate.",
    ".self_attention.experts.bias": ".self_attn.o_bias",
    ".mlp.input_linear.weight": ".mlp.experts.gate_up_proj",
    ".mlp.output_linear.weight": ".mlp.experts.down_proj",
    ".mlp.router.layer.": ".mlp.gate.",
    ".mlp.bias": ".mlp.output_bias.bias",
}
KEYS_AND_VALUES = ".self_attention.kv_proj."
# transformers gives this epsilon to all norms of the layers, and rms_norm_eps to the last norm alone
LAYER_EPS = 1e-6
# transformers pools the routers of attention and of feed-forward networks in one balance loss, which is K in balance; a MoE adds
# the losses of the two kinds, each of which is K in balance
KINDS_OF_ROUTERS = 2


def _jetmoe(fields: SourceFields) -> dict[str, Any]:
    values = sparse(fields)
    final_eps = values["rms_norm_eps"]
    # another name of head_dim
    fields.take("kv_channels")
    # every JetMoE has the biases
    fields.report("bias")
    return values | {
        # transformers' model does not read the field
        "num_attention_heads": values["num_key_value_heads"] * values["num_experts_per_tok"],
        "head_dim": fields.take("head_dim"),
        "hidden_act": fields.take("activation_function"),
        "rms_norm_eps": LAYER_EPS,
        "final_norm_eps": None if final_eps == LAYER_EPS else final_eps,
        "router_aux_loss_coef": fields.take("aux_loss_coef") / KINDS_OF_ROUTERS,
        # a softmax over the chosen logits is a softmax over all with renormalised weights
        "norm_topk_prob": True,
        "moe_output_bias": True,
        "attention_output_bias": True,
        "routed_attention": "moa",
        "attention_experts": values["num_experts"],
        "attention_experts_per_tok": values["num_experts_per_tok"],
    }


def _jetmoe_tensors(state: State, config: MoEConfig) -> State:
    """Renames and splits tensors; no row moves, since each expert has one query head for each key head, in the keys' order."""
    tensors: State = {}
    for name, tensor in state.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if KEYS_AND_VALUES in name:
            width = tensor.shape[0] // 2
            tensors[name.replace(KEYS_AND_VALUES, ".self_attn.k_proj.")] = tensor[:width]
            tensors[name.replace(KEYS_AND_VALUES, ".self_attn.v_proj.")] = tensor[width:]
        elif name.endswith(".self_attn.experts.up_proj"):
            tensors |= unfused(name, tensor)
        else:
            tensors[name] = tensor
    return moe_tensors(tensors, config)


JETMOE_FAMILIES: dict[str, Family] = {"jetmoe": Family(_jetmoe, _jetmoe_tensors, sparse=True)}
