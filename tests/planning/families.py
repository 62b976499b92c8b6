"""This module holds tiny configurations of ours and of transformers' own families, for the tests of plans."""

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.builders import SHAPE as SIZES
from tests.builders import tiny_config


SHAPE: dict[str, Any] = dict(SIZES)
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
SPARSE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, PreTrainedConfig] = {
    "moe": tiny_config(),
    "moe_latent": tiny_config(
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
        head_dim=None,
    ),
    "llama": LlamaConfig(**SHAPE),
    "mistral_window": MistralConfig(**SHAPE, sliding_window=8),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 6}, head_dim=8, sliding_window=8),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **SPARSE, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **SPARSE, head_dim=8),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=6, num_experts_per_tok=2, eos_token_id=1),
    "granitemoe": GraniteMoeConfig(**SHAPE, num_local_experts=6, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8),
    "glm4_moe": Glm4MoeConfig(
        **SHAPE,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        head_dim=8,
    ),
    "ernie4_5_moe": Ernie4_5_MoeConfig(**SHAPE, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "deepseek_v2": DeepseekV2Config(**SHAPE | LATENT),
    "deepseek_v3": DeepseekV3Config(**SHAPE | LATENT),
}
