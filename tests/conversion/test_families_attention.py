"""Families with a feature of attention or norms that no earlier family has are imported with equal logits and text."""

import copy

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral4ForCausalLM,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.conversion import convert_checkpoint, fields_without_effect
from modeling_moe.conversion.families.catalogue import SPARSE_FAMILIES
from modeling_moe.utils.errors import UserError
from tests.conversion import harness
from tests.conversion.harness import LATENT, SIZE, YARN, lazy, moe_config


EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
PATTERN = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MISTRAL_ROPE = YARN | {
    "original_max_position_embeddings": 5,
    "mscale": 0.8,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
    "max_position_embeddings": 64,
}
DBRX = {
    "vocab_size": 99,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# family and variant -> fields
FIELDS = {
    "axk1": LATENT | {"q_lora_rank": 7, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7},
    "axk1-yarn": LATENT
    | {
        "q_lora_rank": 7,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "norm_topk_prob": False,
        "attention_bias": True,
        "n_shared_experts": 2,
        "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.0},
    },
    "mistral4": LATENT | {"q_lora_rank": 7, "rope_parameters": MISTRAL_ROPE},
    "mistral4-groups": LATENT
    | {
        "q_lora_rank": None,
        "n_group": 3,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "attention_bias": True,
        "rope_parameters": MISTRAL_ROPE | {"llama_4_scaling_beta": 0},
    },
    "hunyuan_v1_moe": SIZE | {"num_experts": 5, "moe_topk": 3, "head_dim": 12},
    "hunyuan_v1_moe-alpha": SIZE
    | {
        "num_experts": 4,
        "moe_topk": [2, 2, 2],
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
    },
    "afmoe": SIZE | EXPERTS | {"head_dim": 12, "mup_enabled": True, "route_scale": 1.7} | PATTERN,
    "afmoe-bias": SIZE
    | EXPERTS
    | {
        "head_dim": 8,
        "attention_bias": True,
        "num_dense_layers": 2,
        "num_shared_experts": 1,
        "global_attn_every_n_layers": 2,
        "sliding_window": 4,
        "rope_parameters": YARN,
    },
    "cohere2_moe": SIZE
    | {"num_experts": 5, "num_experts_per_tok": 3, "head_dim": 12, "logit_scale": 0.3}
    | {"num_shared_experts": 2, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 24, "sliding_window": 4},
    "cohere2_moe-sigmoid": SIZE
    | PATTERN
    | {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "expert_selection_fn": "sigmoid",
        "num_shared_experts": 1,
        "shared_expert_combination_strategy": "sum",
    },
    "cohere2_moe-rms": SIZE
    | PATTERN
    | {
        "num_experts": 4,
        "head_dim": 8,
        "rms_norm_eps": 1e-3,
        "expert_selection_fn": "sigmoid",
        "norm_topk_prob": False,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "prefix_dense_sliding_window_pattern": 2,
    },
    "cohere2_moe-full": SIZE
    | {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "num_shared_experts": 1,
        "sliding_window_pattern": 1,
    },
    "dbrx": DBRX
    | {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 100.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "dbrx-bare": DBRX
    | {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 2, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": None,
            "ffn_act_fn": {"name": "gelu"},
        },
    },
}
CONFIGS = {name: CONFIG_MAPPING[name.partition("-")[0]](**fields) for name, fields in FIELDS.items()}


def random_source(name: str):
    config = copy.deepcopy(CONFIGS[name])
    if name.startswith("mistral4"):
        # the auto class knows Mistral 4 as the text model of Mistral 3 only
        return harness.randomised(Mistral4ForCausalLM(config)), config
    return harness.random_source(config), config


@pytest.mark.parametrize("name", CONFIGS)
def test_from_disk(name, tmp_path):
    tensors = harness.check_disk(*random_source(name), tmp_path)
    assert any(".experts.0." in key for key in tensors) != name.startswith(("dbrx", "mistral4"))


# Cohere2-MoE rotates in fp32 by angles that are rounded to bf16, and DBRX routes in bf16
ROUNDED = ["cohere2_moe", "cohere2_moe-sigmoid", "cohere2_moe-rms", "dbrx", "dbrx-bare"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ROUNDED])
def test_bf16_is_bitwise(name, tmp_path):
    got, expected = harness.bf16_outputs(random_source(name)[0], tmp_path)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_differs_by_rounding(name, tmp_path):
    got, expected = harness.bf16_outputs(random_source(name)[0], tmp_path)
    difference = (got.logits - expected.logits).float()
    assert difference.square().mean() < 2e-3 * expected.logits.float().square().mean()


# fields in config.json files on the Hub that transformers' classes do not declare
PUBLISHED = {
    "axk1": {
        "aux_loss_alpha": 0.0001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
    },
    "hunyuan_v1_moe": {
        "moe_topk": [3, 3, 3],
        "num_shared_expert": [1, 1, 1],
        "moe_intermediate_size": [40, 40, 40],
        "use_qk_norm": True,
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "norm_type": "rms",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_checkpoints(name):
    config = copy.deepcopy(CONFIGS[name])
    for field, value in PUBLISHED[name].items():
        setattr(config, field, value)
    assert moe_config(config).num_params() == AutoModelForCausalLM.from_config(CONFIGS[name]).num_parameters()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("axk1", "rope_interleave", False),
        ("axk1", "scoring_func", "softmax"),
        ("mistral4", "rope_interleave", False),
        ("mistral4", "head_dim", 9),
        ("mistral4", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("hunyuan_v1_moe", "moe_topk", [3, 2, 3]),
        ("cohere2_moe", "expert_selection_fn", "relu"),
    ],
)
def test_unsupported_values_are_refused(name, field, value):
    config = copy.deepcopy(CONFIGS[name])
    moe_config(config)
    vars(config)[field] = value
    with pytest.raises(UserError, match=field):
        moe_config(config)


@pytest.mark.parametrize("rope", [None, {"rope_type": "default", "rope_theta": 100.0}])
def test_dbrx_rotates_by_the_theta_at_the_top_of_config_json(rope):
    """The published file has 500000 in attn_config alone, which transformers' model stores and does not rotate by."""
    parts = {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 24},
    }
    config = CONFIG_MAPPING["dbrx"](**DBRX, **parts, rope_parameters=rope)
    assert moe_config(config).rope_parameters["rope_theta"] == (100.0 if rope else 10000.0)
    assert fields_without_effect(config) == {"attn_config.rope_theta": 500000}
    harness.check_logits(harness.random_source(config), config, "left")


def test_fields_of_a_part_are_judged_as_others_are():
    config = copy.deepcopy(CONFIGS["dbrx"])
    # the configuration that was published with DBRX has this field, and no code of transformers reads it
    config.ffn_config.uniform_expert_assignment = False
    assert moe_config(config).norm_topk_prob is True
    assert fields_without_effect(config)["ffn_config.uniform_expert_assignment"] is False
    # transformers' shared modules read a field of this name
    config.attn_config.sliding_window = 4
    with pytest.raises(UserError, match=r"attn_config.sliding_window \(4\) in the config.json of this dbrx model"):
        moe_config(config)
    config.attn_config.sliding_window = None
    config.ffn_config.moe_normalize_expert_weights = 2.0
    with pytest.raises(UserError, match=r"moe_normalize_expert_weights is 2.0 in the config.json of this dbrx model"):
        moe_config(config)


def test_a_published_axk1_has_unused_norms_and_no_correction_bias():
    source, config = random_source("axk1")
    tensors = {}
    for name, tensor in source.state_dict().items():
        if "e_score_correction_bias" in name:
            tensor.zero_()
        else:
            tensors[name.replace("mlp.post_mlp_layernorm", "post_mlp_layernorm")] = tensor
    tensors["model.layers.0.post_mlp_layernorm.weight"] = torch.rand(32)
    ids = torch.randint(3, 99, (2, 9))
    got = harness.imported(config, lazy(tensors))(ids).logits
    torch.testing.assert_close(got, source(ids).logits, **harness.TOLERANCE)


def test_dbrx_experts_are_read_one_by_one():
    source, config = random_source("dbrx")
    target = moe_config(config)
    ours = SPARSE_FAMILIES["dbrx"].tensors(lazy(source.state_dict()), target)
    for part, name, transposed in (("gate", "w1", False), ("up", "v1", False), ("down", "w2", True)):
        rows = source.state_dict()[f"transformer.blocks.1.ffn.experts.mlp.{name}"][2 * 24 : 3 * 24]
        got = ours[f"model.layers.1.mlp.experts.2.{part}_proj.weight"].read()
        assert torch.equal(got, rows.T if transposed else rows)


def test_mistral4_is_read_as_the_text_model_of_mistral3(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config=CONFIGS["mistral4"].to_dict(), vision_config={"model_type": "pixtral", "image_size": 28} | vision
    )
    source = harness.randomised(Mistral3ForConditionalGeneration(config))
    source.save_pretrained(tmp_path / "source")
    target = convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe").config
    assert (target.llama_4_scaling_beta, target.kv_lora_rank) == (0.4, 10)
    ids = torch.randint(11, 99, (2, 9))
    got = MoEForCausalLM.from_pretrained(tmp_path / "moe").eval()(ids).logits
    torch.testing.assert_close(got, source(ids).logits, **harness.TOLERANCE)
