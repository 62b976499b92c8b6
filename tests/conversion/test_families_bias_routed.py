"""Families that route as DeepSeek-V3 does are imported with equal logits, router logits and text, from memory and from disk."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_moe.conversion import import_state, load_state
from modeling_moe.utils.errors import UserError
from tests.conversion import harness
from tests.conversion.harness import LATENT, SIZE, YARN, imported, lazy, moe_config


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
        "first_k_dense_replace": 0,
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


# family -> parts of names that its files have and its model in memory does not
ON_DISK = {
    "sarvam_moe": [
        "model.word_embeddings.",
        ".attention.query_key_value.",
        ".attention.dense.",
        ".attention.query_layernorm.",
        ".mlp.gate.expert_bias",
    ],
    "exaone_moe": [".mlp.e_score_correction_bias"],
    "hy_v3": [".mlp.router.gate.", ".mlp.expert_bias", ".mlp.shared_mlp."],
    "minimax_m2": [".block_sparse_moe.e_score_correction_bias", ".experts.0.w1."],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_from_disk(name, tmp_path):
    tensors = harness.check_disk(*random_source(name), tmp_path)
    for part in [".experts.0.", *ON_DISK.get(name, [])]:
        assert any(part in key for key in tensors), part


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_bitwise(name, tmp_path):
    got, expected = harness.bf16_outputs(random_source(name)[0], tmp_path)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("name", ["glm4_moe", "glm4_moe_lite", "exaone_moe", "hy_v3", "minimax_m2"])
def test_layers_that_predict_further_tokens_are_left_out(name):
    source, config = random_source(name)
    config.num_nextn_predict_layers = 1
    tensors = source.state_dict()
    further = "mtp.layers.0." if name == "exaone_moe" else "model.layers.3."
    extra = {key.replace("model.layers.2.", further): x for key, x in tensors.items() if "layers.2." in key}
    assert extra
    extra[f"{further}eh_proj.weight"] = torch.zeros(32, 64)
    target = moe_config(config)
    model = load_state(target, import_state(lazy(tensors | extra), config, target))
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **harness.TOLERANCE)


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2", "glm4_moe_lite"])
def test_fp8_weights(name, tmp_path):
    """Weights in fp8 with scales of blocks are read, as MiniMax-M2 is published."""
    source, config = random_source(name)
    source.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for key, weight in tensors.items():
        if weight.dim() != 2 or not key.startswith("model.layers.") or ".gate.weight" in key:
            continue
        scale = weight.abs().max() / 448
        packed |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.reshape(1, 1)}
        tensors[key] = (packed[key].float() * scale).to(torch.bfloat16).float()
    assert all(any(part in key for key in packed) for part in (".experts.1.", ".self_attn."))
    expected = imported(config, lazy(tensors))
    config.quantization_config = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128]}
    target = moe_config(config)
    model = load_state(target, import_state(lazy(tensors | packed), config, target)).float()
    ids = torch.randint(3, 99, (2, 9))
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dots1", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}),
        ("dots1", "quantization_config", {"quant_method": "gptq"}),
        ("glm4_moe", "quantization_config", {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        ("glm4_moe_lite", "rope_interleave", False),
        ("glm4_moe_lite", "qk_head_dim", 10),
        ("sarvam_mla", "rope_interleave", False),
        ("dots1", "scoring_func", "softmax"),
        ("solar_open", "use_qk_norm", True),
        ("solar_open", "topk_method", "greedy"),
        ("solar_open", "first_k_dense_replace", 1),
        ("minimax_m2", "scoring_func", "softmax"),
        ("solar_open", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}),
        ("exaone_moe", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
        ("glm4_moe_lite", "first_k_dense_replace", 2),
        ("hy_v3", "first_k_dense_replace", 2),
        ("hy_v3", "mlp_bias", True),
        ("minimax_m2", "hidden_act", "cosine"),
    ],
)
def test_unsupported_values_are_refused(name, field, value):
    if name not in CONFIGS:
        pytest.skip("this release of transformers lacks the family")
    config = copy.deepcopy(CONFIGS[name])
    moe_config(config)
    config.__dict__[field] = value  # the configuration's class refuses some of the values by itself
    match = "partial_rotary_factor" if field == "rope_parameters" else field
    with pytest.raises(UserError, match=match):
        moe_config(config)


def test_scales_of_latent_attention():
    """Yarn's mscale_all_dim is merged into the scale of the products of queries and keys."""
    for name in ("glm4_moe_lite", "glm4_moe_lite-yarn", "sarvam_mla-yarn"):
        if name in CONFIGS:
            source, config = random_source(name)
            model = imported(config, lazy(source.state_dict()))
            assert model.model.layers[0].self_attn.scaling == source.model.layers[0].self_attn.scaling
            assert (moe_config(config).attention_multiplier is not None) == name.endswith("-yarn")


def test_layers_without_a_window_do_not_rotate():
    assert moe_config(CONFIGS["exaone_moe"]).no_rope_layers == [1, 1, 0]
    full = moe_config(CONFIGS["exaone_moe-full"])
    assert (full.no_rope_layers, full.sliding_window) == ([0, 0, 0], None)


@pytest.mark.parametrize(("rope", "factor"), [({}, 0.5), ({"partial_rotary_factor": 0.25}, 0.25)])
def test_published_name_of_rotated_features(rope, factor):
    """MiniMax-M2 is published with rotary_dim, which a factor in rope_parameters overrides."""
    rope = {"rope_type": "default", "rope_theta": 100.0} | rope
    fields = FIELDS["minimax_m2"] | {"head_dim": 16, "rope_parameters": rope, "rotary_dim": 8}
    assert moe_config(CONFIG_MAPPING["minimax_m2"](**fields)).rope_parameters["partial_rotary_factor"] == factor


def test_balance_losses():
    """Only MiniMax-M2's model computes a balance loss."""
    coefficients = {name: moe_config(config).router_aux_loss_coef for name, config in CONFIGS.items()}
    assert set(coefficients.values()) == {0.0, 0.001}
    assert [name for name, coefficient in coefficients.items() if coefficient] == ["minimax_m2", "minimax_m2-tied"]


# fields of published config.json files that transformers' classes do not declare
PUBLISHED = {
    "dots1": {
        "scoring_func": "noaux_tc",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "sliding_window": None,
    },
    "glm4_moe": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm4_moe_lite": {"topk_method": "noaux_tc", "first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    "hy_v3": {"first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    "minimax_m2": {
        "attn_type_list": [1] * 62,
        "mtp_transformer_layers": 1,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "sliding_window": None,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_checkpoints(name):
    config = copy.deepcopy(CONFIGS[name])
    expected = moe_config(config)
    for field, value in PUBLISHED[name].items():
        setattr(config, field, value)
    assert moe_config(config).to_dict() == expected.to_dict()


# family whose class has the sizes of a published model as defaults -> fields that it lacks, parameters in billions
DEFAULTS = {
    "glm4_moe": ({"head_dim": 128}, 107),
    "glm4_moe_lite": ({}, 30),
    "sarvam_moe": ({}, 32),
    "sarvam_mla": ({}, 106),
    "solar_open": ({}, 103),
    "hy_v3": ({}, 295),
    "minimax_m2": ({"rotary_dim": 64}, 229),
}


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name in CONFIGS])
def test_published_models_have_their_numbers_of_parameters(name):
    fields, billions = DEFAULTS[name]
    config = CONFIG_MAPPING[name](**fields)
    with torch.device("meta"):
        source = AutoModelForCausalLM.from_config(config)
    count = moe_config(config).num_params()
    assert count == source.num_parameters()
    assert round(count / 1e9) == billions
