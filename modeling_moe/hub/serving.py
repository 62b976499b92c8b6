# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says which servers compute a checkpoint correctly, so that a card names no other.

For transformers' own families, `modeling_moe.conversion.targets.servers` holds what is known of each server.
"""

from typing import Any

from transformers import PreTrainedConfig

from ..configuration_moe import MoEConfig
from ..conversion import SILU, Server, Verdict, exact_targets, verdicts
from ..conversion import servers as servers_of
from ..serving import refuse_vllm


# the package's plugin needs no flag; --model-impl transformers would bypass it
VLLM_BY_PLUGIN = Server(
    "vLLM, with this package beside it",
    "pip install --no-deps modeling-moe  # in vLLM's environment\nvllm serve {name}",
)
SGLANG_BY_CODE = Server(
    "SGLang, by its Transformers back end",
    "python -m sglang.launch_server --model-path {name} --trust-remote-code --model-impl transformers",
)


def servers(config: PreTrainedConfig) -> list[Server]:
    """Returns the servers that compute a checkpoint, of this package or of transformers' own families, as it is."""
    if config.model_type == MoEConfig.model_type:
        fit = {VLLM_BY_PLUGIN: _is_servable_by_plugin(config), SGLANG_BY_CODE: _is_servable_by_code(config)}
        return [server for server, is_fit in fit.items() if is_fit]
    return servers_of(config)


def unfit_servers(config: PreTrainedConfig) -> list[Verdict]:
    """Returns the servers that were tried with the format of a checkpoint and do not compute it, with the reasons."""
    return [verdict for verdict in verdicts(config) if verdict.faults]


def _is_servable_by_plugin(config: Any) -> bool:
    """Returns whether this package's plugin computes its model in vLLM, which was run for every kind of part but these."""
    try:
        refuse_vllm(config)
    except ValueError:
        return False
    return not (config.qk_norm_after_rope or config.moe_latent_size or config.lm_head_bias)


def _is_servable_by_code(config: Any) -> bool:
    """Returns whether SGLang's Transformers back end computes this package's model by the code beside the weights.

    It replaces the experts by kernels of its own, with SiLU, the norms and the head, and may replace a plain router of
    softmax or sigmoid scores; what these parts do beyond that would be lost.
    """
    plain_router = config.router_type == "topk" and config.scoring_func in ("softmax", "sigmoid")
    special = (
        *(config.capacity_factor, config.eval_capacity_factor, config.expert_capacity, config.swiglu_limit),
        *(config.num_null_experts, config.num_copy_experts, config.num_hash_layers, config.router_bias),
        *(config.router_selection_bias_on != "scores", config.router_expert_scale, config.moe_latent_size),
        *(config.router_input_norm, config.router_logit_scale != 1, config.router_logit_softcapping),
        *(config.mlp_bias, config.router_gradient == "sparsemixer", not config.gated_experts),
        *(config.attention_sinks, config.attn_logit_softcapping, config.final_logit_softcapping),
        *(config.logits_scaling != 1, config.lm_head_bias, config.position_embedding_type != "rope"),
        # the server's kernels of norms were never run on heads that are transposed for the rotation
        config.qk_norm_after_rope,
    )
    return plain_router and SILU.holds(config) and config.norm_type == "rms" and not any(special)


def exports(config: PreTrainedConfig) -> dict[str, list[Server]]:
    """Returns the formats to which `moe convert` exports a checkpoint of this package exactly, and the servers of each.

    The first one is the one that `--target auto` writes.
    """
    if not isinstance(config, MoEConfig):
        return {}
    found = exact_targets(config)
    # of several formats with equally many servers, sorting keeps the order
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
