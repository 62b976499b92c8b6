"""This module lists the models that servers are asked about."""

from dataclasses import dataclass, field
from typing import Any


# a size that vLLM's and llama.cpp's kernels accept: heads of 32 features, the vocabulary of SmolLM2's tokenizer
SIZE = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
}

SIGMOID = {
    "scoring_func": "sigmoid",
    "router_selection_bias": True,
    "routed_scaling_factor": 2.5,
    "shared_expert_intermediate_size": 64,
}


@dataclass(frozen=True)
class Case:
    """A model, and where it is served.

    Attributes:
        name: name of the case.
        fields: fields of `MoEConfig` that differ from `SIZE`; options of the upcycling if `upcycled`.
        target: family to which the model is exported; None for a model that only this package's code computes.
        upcycled: whether the model is SmolLM2-135M, upcycled.
        vllm: arguments of `vllm.LLM` that differ from the usual ones of `ask_vllm`.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    upcycled: bool = False
    vllm: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name without blanks and commas."""
        return self.name.replace(",", "").replace(" ", "_")


EXPORTS = [
    Case("mixtral", {}, "mixtral"),
    Case(
        "qwen2_moe",
        {"qkv_bias": True, "norm_topk_prob": False, "shared_expert_intermediate_size": 64, "shared_expert_gate": True},
        "qwen2_moe",
    ),
    Case("qwen2_moe, without shared expert", {"norm_topk_prob": False}, "qwen2_moe"),
    Case("qwen3_moe", {"qk_norm": "head"}, "qwen3_moe"),
    Case(
        "qwen2_moe, ungated shared expert",
        {"norm_topk_prob": False, "shared_expert_intermediate_size": 64},
        "qwen2_moe",
    ),
    Case(
        "olmoe", {"rms_norm_eps": 1e-5, "qk_norm": "full", "norm_topk_prob": False, "num_key_value_heads": 2}, "olmoe"
    ),
    Case("granitemoeshared", {"shared_expert_intermediate_size": 64}, "granitemoeshared"),
    Case(
        "deepseek_v3",
        SIGMOID | LATENT | {"mlp_layer_types": ["dense", "sparse"], "n_group": 2, "topk_group": 1},
        "deepseek_v3",
    ),
    Case("glm4_moe", SIGMOID | {"mlp_layer_types": ["dense", "sparse"]}, "glm4_moe"),
    Case("minimax_m2", {"scoring_func": "sigmoid", "router_selection_bias": True, "qk_norm": "full"}, "minimax_m2"),
    Case(
        "gpt_oss",
        {
            "norm_type": "rms_fp32",
            "swiglu_limit": 7.0,
            "attention_sinks": True,
            "mlp_bias": True,
            "attention_bias": True,
            "router_bias": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            # as the published models; vLLM has no other rotation
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
        "gpt_oss",
    ),
    Case("SmolLM2 as mixtral", {"num_experts": 4, "num_experts_per_tok": 2, "noise": 0.1}, "mixtral", upcycled=True),
]
# the servers compute these wrongly without a word: convert must refuse them, or hub.serving must not name the server
SILENT = [
    Case("mixtral, sliding window", {"sliding_window": 8}, "mixtral"),
    Case("mixtral, GELU", {"hidden_act": "gelu"}, "mixtral"),
    Case("qwen3_moe, not renormalised", {"qk_norm": "head", "norm_topk_prob": False}, "qwen3_moe"),
    Case("qwen3_moe, attention bias", {"qk_norm": "head", "attention_bias": True}, "qwen3_moe"),
    Case("qwen2_moe, renormalised", {"qkv_bias": True, "norm_topk_prob": True}, "qwen2_moe"),
    Case(
        "olmoe, epsilon",
        {"qk_norm": "full", "norm_topk_prob": False, "num_key_value_heads": 2},
        "olmoe",
    ),
    Case(
        "olmoe, renormalised",
        {"rms_norm_eps": 1e-5, "qk_norm": "full", "norm_topk_prob": True, "num_key_value_heads": 2},
        "olmoe",
    ),
]
OWN_CODE = [
    Case(
        "sigmoid, bias, groups",
        {
            "scoring_func": "sigmoid",
            "router_selection_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "shared_expert_intermediate_size": 64,
        },
    ),
    Case("latent attention", LATENT),
    Case("hash", {"router_type": "hash"}),
    Case("top_p", {"router_type": "top_p"}),
    Case("remoe", {"router_type": "remoe"}),
    Case("continuous", {"router_type": "continuous"}),
    Case("expert_threshold", {"router_type": "expert_threshold"}),
    Case("null experts", {"num_null_experts": 2}),
    Case("copy experts", {"num_copy_experts": 2}),
    Case("router bias", {"router_bias": True}),
    Case("GELU", {"hidden_act": "gelu_pytorch_tanh"}),
    Case(
        "GELU, hash",
        {"hidden_act": "gelu", "router_type": "hash", "norm_type": "rms_plus_one", "scale_embeddings": True},
    ),
    Case("biases", {"mlp_bias": True, "attention_bias": True}),
    Case("clamped gate", {"swiglu_limit": 1.0}),
    Case(
        "without gate",
        {"gated_experts": False, "gated_mlp": False, "hidden_act": "relu2", "mlp_layer_types": ["dense", "sparse"]},
    ),
    Case(
        "logits scaled and capped",
        {
            "logits_scaling": 4.0,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 5.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
        },
    ),
    Case("latent experts", {"moe_latent_size": 32, "shared_expert_intermediate_size": 64}),
    Case("latent experts of an odd size, hash", {"moe_latent_size": 30, "router_type": "hash"}),
    Case("norm after rope", {"qk_norm": "head", "qk_norm_after_rope": True}),
    Case("clipped queries, tied embeddings", {"clip_qkv": 0.5, "tie_word_embeddings": True}),
    Case("sliding window", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    Case(
        "layer norm, learned positions",
        {"norm_type": "layer", "norm_placement": "parallel", "position_embedding_type": "learned"},
    ),
    Case(
        "without enforce_eager",
        {"shared_expert_intermediate_size": 64, "num_null_experts": 2},
        vllm={"enforce_eager": False},
    ),
    Case(
        "model_impl transformers",
        {"hidden_act": "gelu"},
        vllm={"model_impl": "transformers", "trust_remote_code": True},
    ),
]
# vLLM's plugin refuses these
REFUSED = [
    Case("expert_choice", {"router_type": "expert_choice", "allow_noncausal": True}),
    Case("capacity", {"eval_capacity_factor": 1.0}),
    Case("attention sinks", {"attention_sinks": True}),
]
CASES = [*EXPORTS, *SILENT, *OWN_CODE, *REFUSED]
