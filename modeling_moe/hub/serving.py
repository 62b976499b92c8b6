# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says which servers compute a checkpoint correctly, so that a card names no other.

A server often answers fluently and wrongly where a format or a field is not supported. The conditions below come from runs in
which the server's log-probabilities were compared with transformers'.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration_moe import MoEConfig
from ..conversion import TARGETS


class Server(NamedTuple):
    """A way to serve a checkpoint.

    Attributes:
        name: the server.
        commands: shell commands, in which `{name}` stands for the quoted name of the checkpoint.
    """

    name: str
    commands: str


VLLM = Server("vLLM", "vllm serve {name}")
VLLM_BY_CODE = Server("vLLM, by its Transformers back end", "vllm serve {name} --model-impl transformers")
LLAMA_CPP = Server(
    "llama.cpp",
    "python convert_hf_to_gguf.py {name} --outfile model.gguf  # from llama.cpp's repository, with a local folder\n"
    "llama-server -m model.gguf",
)
TRANSFORMERS = Server("transformers", "transformers serve {name}")
OWN_CODE = (
    Server("vLLM, by its Transformers back end", "vllm serve {name} --trust-remote-code --model-impl transformers"),
    Server(
        "SGLang, by its Transformers back end",
        "python -m sglang.launch_server --model-path {name} --trust-remote-code --model-impl transformers",
    ),
)


def _is_silu(config: Any) -> bool:
    return getattr(config, "hidden_act", None) in ("silu", "swish")


def _has_no_bias(config: Any) -> bool:
    return not getattr(config, "attention_bias", False)


def _has_no_window(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is None


def _is_sparse_throughout(config: Any) -> bool:
    return not getattr(config, "mlp_only_layers", None) and getattr(config, "decoder_sparse_step", 1) == 1


def _has_usual_heads(config: Any) -> bool:
    return getattr(config, "head_dim", None) in (None, config.hidden_size // config.num_attention_heads)


GRANITE: dict[Server, Callable[[Any], bool]] = {
    VLLM: lambda config: _is_silu(config) and _has_no_bias(config),
    LLAMA_CPP: lambda config: _is_silu(config) and _has_usual_heads(config),
}
# model_type -> server -> condition under which the server was exact
NATIVE: dict[str, dict[Server, Callable[[Any], bool]]] = {
    "mixtral": {VLLM: _is_silu, LLAMA_CPP: lambda config: _is_silu(config) and _has_no_window(config)},
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "qwen3_moe": {
        VLLM: lambda config: _is_silu(config) and _has_no_bias(config),
        LLAMA_CPP: lambda config: (
            _is_silu(config)
            and _has_no_bias(config)
            and _has_no_window(config)
            and config.norm_topk_prob
            and _is_sparse_throughout(config)
        ),
    },
    "qwen2_moe": {
        VLLM: lambda config: _is_silu(config) and getattr(config, "qkv_bias", True),
        LLAMA_CPP: lambda config: (
            _is_silu(config) and _has_no_window(config) and not config.norm_topk_prob and _is_sparse_throughout(config)
        ),
    },
    "olmoe": dict.fromkeys(
        (VLLM, LLAMA_CPP), lambda config: _is_silu(config) and _has_no_bias(config) and not config.norm_topk_prob
    ),
    "deepseek_v3": {
        VLLM_BY_CODE: _is_silu,
        LLAMA_CPP: lambda config: _is_silu(config) and getattr(config, "scoring_func", None) == "sigmoid",
    },
    "glm4_moe": {VLLM: _is_silu},
}


def servers(config: PreTrainedConfig) -> list[Server]:
    """Returns the servers that compute a checkpoint as it is."""
    if config.model_type == MoEConfig.model_type:
        return list(OWN_CODE) if _is_servable_by_code(config) else []
    found = [server for server, holds in NATIVE.get(config.model_type, {}).items() if holds(config)]
    return [*found, TRANSFORMERS] if config.model_type in CONFIG_MAPPING else found


def _is_servable_by_code(config: Any) -> bool:
    """Returns whether the servers' Transformers back ends compute this package's model by the code beside the weights.

    They replace the experts by kernels of their own, with SiLU, the norms and the head, and may replace a plain router of
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
        # the servers' kernels of norms were never run on heads that are transposed for the rotation
        config.qk_norm_after_rope,
    )
    return plain_router and _is_silu(config) and config.norm_type == "rms" and not any(special)


def exports(config: PreTrainedConfig) -> dict[str, list[Server]]:
    """Returns the formats to which `moe convert` exports a checkpoint of this package exactly, and the servers of each."""
    if not isinstance(config, MoEConfig):
        return {}
    # the configurations of other formats are tried, and what they would warn of does not concern this model
    warns = logging.getLogger(MoEConfig.__module__)
    disabled, warns.disabled = warns.disabled, True
    try:
        able = [target for target in TARGETS.values() if not target.reasons(config)]
    finally:
        warns.disabled = disabled
    return {target.model_type: servers(target.config(config)) for target in able}
