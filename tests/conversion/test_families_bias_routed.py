"""Families that route as DeepSeek-V3 does are imported with equal logits, router logits and text, from memory and from disk."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING

from modeling_moe.utils.errors import UserError
from tests.conversion import harness
from tests.conversion.harness import LATENT, SIZE, YARN, moe_config


EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
ROUTED = SIZE | EXPERTS | {"n_routed_experts": 6, "n_shared_experts": 2}
GROUPS = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7}
WINDOW = {"sliding_window": 4}

# family and variant -> fields
FIELDS = {
    "dots1": ROUTED | GROUPS | {"first_k_dense_replace": 1, "norm_topk_prob": True, "attention_bias": True},
    "dots1-window": ROUTED | WINDOW | {"n_shared_experts": 1, "head_dim": 12, "max_window_layers": 1},
    "glm4_moe": ROUTED | GROUPS | {"head_dim": 12, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe-bare": ROUTED
    | {
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0, "partial_rotary_factor": 0.75},
    },
    "glm4_moe_lite": LATENT | GROUPS | {"q_lora_rank": 7, "n_shared_experts": 2},
    "glm4_moe_lite-yarn": LATENT
    | {
        "q_lora_rank": None,
        "attention_bias": True,
        "norm_topk_prob": False,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.0},
    },
    "sarvam_moe": ROUTED | GROUPS | {"head_dim": 12, "attention_bias": True},
    "sarvam_moe-bare": ROUTED
    | {
        "head_dim": 10,
        "use_qk_norm": False,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
    },
    "sarvam_mla": LATENT | GROUPS | {"n_shared_experts": 2},
    "sarvam_mla-yarn": LATENT
    | {
        "q_lora_rank": 7,
        "norm_topk_prob": False,
        "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.0},
    },
    "solar_open": ROUTED | GROUPS | {"head_dim": 12, "attention_bias": True},
    "solar_open-bare": ROUTED
    | {
        "head_dim": 8,
        "norm_topk_prob": False,
        "n_shared_experts": 1,
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    },
    "exaone_moe": SIZE
    | EXPERTS
    | GROUPS
    | WINDOW
    | {"num_experts": 6, "num_shared_experts": 2, "head_dim": 12, "sliding_window_pattern": 3},
    "exaone_moe-full": SIZE
    | EXPERTS
    | {
        "num_experts": 5,
        "layer_types": ["full_attention"] * 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "norm_topk_prob": False,
    },
    "hy_v3": SIZE
    | EXPERTS
    | {"num_experts": 5, "head_dim": 12, "num_shared_experts": 2, "router_scaling_factor": 1.7},
    "hy_v3-bias": SIZE
    | EXPERTS
    | {
        "num_experts": 5,
        "head_dim": 8,
        "attention_bias": True,
        "enable_moe_fp32_combine": False,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "rope_parameters": YARN,
    },
    "minimax_m2": SIZE
    | {
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "minimax_m2-tied": SIZE
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "tie_word_embeddings": True},
}
# Sarvam's families are younger than the oldest supported release of transformers
CONFIGS = {
    name: CONFIG_MAPPING[name.partition("-")[0]](**fields)
    for name, fields in FIELDS.items()
    if name.partition("-")[0] in CONFIG_MAPPING
}


def random_source(name: str):
    config = copy.deepcopy(CONFIGS[name])
    return harness.random_source(config), config


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits(name, side):
    harness.check_logits(*random_source(name), side)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_text_and_cached_decode(name):
    harness.check_text(*random_source(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_disk(name, tmp_path):
    tensors = harness.check_disk(*random_source(name), tmp_path)
    assert any(".experts.0." in key for key in tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_bitwise(name, tmp_path):
    got, expected = harness.bf16_outputs(random_source(name)[0], tmp_path)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "-" not in name])
def test_nothing_is_read_before_it_is_asked_for(name):
    harness.check_reading(*random_source(name))


@pytest.mark.parametrize("name", [name for name in CONFIGS if "-" not in name])
def test_unknown_field_is_refused(name):
    config = copy.deepcopy(CONFIGS[name])
    config.secret_gate = 0.5
    with pytest.raises(UserError, match=f"secret_gate .* of this {config.model_type} model is unknown"):
        moe_config(config)
