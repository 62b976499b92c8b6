"""Tiny models of transformers' MoE families, whose sizes differ from their number of experts."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel


BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 12,
    "layer_types": ["linear_attention", "full_attention"],
}
# families that run in every test run
COMMON = {
    "mixtral": LOCAL,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 12},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
    "olmoe": EXPERTS,
    "deepseek_v2": ROUTED | LATENT | {"n_shared_experts": 1},
    "deepseek_v3": ROUTED
    | LATENT
    | {"n_shared_experts": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0},
    "gpt_oss": LOCAL | {"layer_types": ["sliding_attention", "full_attention"]},
    "glm4_moe": ROUTED | {"n_shared_experts": 1},
    "minimax_m2": LOCAL | {"rotary_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1},
    "granitemoe": LOCAL,
}
# families that run with the slow tests
MORE = {
    "afmoe": EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1},
    "axk1": ROUTED | LATENT | {"n_shared_experts": 1},
    "bailing_hybrid": EXPERTS
    | LATENT
    | {
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "cohere2_moe": EXPERTS | {"first_k_dense_replace": 1},
    "exaone_moe": EXPERTS | {"n_group": 1, "topk_group": 1},
    "flex_olmo": EXPERTS,
    "flint": EXPERTS | {"mlp_only_layers": [0]},
    "gemma4_text": EXPERTS
    | {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
    },
    "glm4_moe_lite": ROUTED | LATENT | {"n_shared_experts": 1, "head_dim": 8},
    "granitemoeshared": LOCAL | {"shared_intermediate_size": 12},
    "granitemoehybrid": LOCAL
    | {"shared_intermediate_size": 12, "layer_types": ["attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "hy_v3": EXPERTS | {"first_k_dense_replace": 1},
    "kolibri1": LOCAL,
    "laguna": EXPERTS,
    "lfm2_moe": EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mellum": EXPERTS,
    "minimax": LOCAL | {"layer_types": ["full_attention"] * 2},
    "nemotron_h": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_shared_expert_intermediate_size": 12,
        "layers_block_type": ["attention", "moe"],
        "moe_latent_size": 16,
    },
    "phimoe": LOCAL,
    "qwen3_5_moe_text": EXPERTS | DELTA,
    "qwen3_next": EXPERTS | DELTA,
    "solar_open": ROUTED | {"n_shared_experts": 1},
    "zaya": EXPERTS | {"num_experts_per_tok": 1},
}
FAMILIES = COMMON | MORE


def tiny_family(model_type: str, **fields) -> PreTrainedModel:
    """Returns a tiny random model of a family in fp32, in evaluation mode, with random selection biases."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**BASE | FAMILIES[model_type] | fields)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 2 and not tensor.any():
                tensor.normal_(std=0.2)  # a router that begins with zeros
            if any(part in name for part in ("bias", "scale")) and tensor.is_floating_point() and "norm" not in name:
                tensor.normal_(std=0.1).abs_()
    return model
