"""FlexOlmo, Mellum, Flint, ERNIE-4.5 and the sparse Granites are imported with equal logits, from memory and from disk."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from modeling_moe.conversion import import_state, load_state
from modeling_moe.conversion.families.catalogue import SPARSE_FAMILIES
from modeling_moe.utils.errors import UserError
from tests.conversion import harness
from tests.conversion.harness import SIZE, YARN, lazy, moe_config


ROPE = {"rope_type": "default", "rope_theta": 100.0}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GRANITE = SIZE | {
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
ERNIE = SIZE | {"moe_num_experts": 5, "moe_k": 3, "moe_intermediate_size": 24}

FIELDS = {
    "flex_olmo": SIZE | EXPERTS,
    "flex_olmo-renormalised": SIZE | EXPERTS | {"norm_topk_prob": True, "attention_bias": True},
    "mellum": SIZE
    | EXPERTS
    | WINDOW
    | {
        "moe_intermediate_size": 24,
        "head_dim": 12,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"full_attention": YARN, "sliding_attention": ROPE},
    },
    "mellum-full": SIZE | EXPERTS | {"moe_intermediate_size": 24, "norm_topk_prob": False, "attention_bias": True},
    "flint": SIZE
    | EXPERTS
    | WINDOW
    | {
        "moe_intermediate_size": 24,
        "head_dim": 12,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
        "rope_parameters": ROPE,
    },
    "flint-bias": SIZE
    | EXPERTS
    | {
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "shared_expert_intermediate_size": 36,
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        "norm_topk_prob": False,
        "attention_bias": True,
        "sliding_window": 3,
    },
    "ernie4_5_moe": ERNIE | {"moe_num_shared_experts": 2, "rope_parameters": ROPE},
    "ernie4_5_moe-few": ERNIE
    | {
        "head_dim": 12,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 2,
        "tie_word_embeddings": False,
    },
    "granitemoe": GRANITE,
    "granitemoe-tied": GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "rope_parameters": YARN},
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 20},
    "granitemoeshared-bare": GRANITE | {"shared_intermediate_size": 0, "num_key_value_heads": 4},
    "granitemoe_swa": GRANITE | WINDOW | {"shared_intermediate_size": 20},
    "granitemoe_swa-rope": GRANITE | WINDOW | {"layer_rope_theta": [100.0, 0, 100.0], "attention_bias": True},
    "granitemoe_swa-thetas": GRANITE | WINDOW | {"layer_rope_theta": [100.0, 5000.0, 0]},
    "granitemoe_swa-none": GRANITE | WINDOW | {"layer_rope_theta": [0, 0, 0]},
}
# transformers 5.17 has no Flint
CONFIGS: dict[str, PreTrainedConfig] = {
    name: CONFIG_MAPPING[name.partition("-")[0]](**copy.deepcopy(fields))
    for name, fields in FIELDS.items()
    if name.partition("-")[0] in CONFIG_MAPPING
}


def random_source(name: str):
    return harness.random_source(CONFIGS[name]), CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_from_disk(name, tmp_path):
    tensors = harness.check_disk(*random_source(name), tmp_path)
    # files have one tensor for each expert, or Granite's fused ones, under older names where there are older checkpoints
    family = CONFIGS[name].model_type
    older = any(key.endswith(".block_sparse_moe.input_linear.weight") for key in tensors)
    assert older == (family in ("granitemoe", "granitemoeshared"))
    assert any(".experts.0." in key for key in tensors) != family.startswith("granite")


# families that round in other places than a MoE
ROUNDED = ("flint", "ernie4_5_moe", "granitemoe_swa")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.partition("-")[0] not in ROUNDED])
def test_bf16_is_bitwise(name, tmp_path):
    got, expected = harness.bf16_outputs(harness.random_source(CONFIGS[name]), tmp_path)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.partition("-")[0] in ROUNDED])
def test_bf16_is_close(name, tmp_path):
    """Flint, Granite with a window and ERNIE round in other places than a MoE.

    Flint multiplies queries and keys in fp32, Granite with a window scales the output by a sigmoid where a MoE adds a column
    to the softmax, and ERNIE adds up the products of queries and keys in another order of their features.
    """
    got, expected = harness.bf16_outputs(harness.random_source(CONFIGS[name]), tmp_path)
    scale = expected.logits.float().abs().mean()
    assert (got.logits.float() - expected.logits.float()).abs().mean() < 0.03 * scale


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ernie4_5_moe", "use_bias", True),
        ("ernie4_5_moe", "moe_norm_min", 0.5),
        ("granitemoe_swa", "layer_rope_theta", [100.0, 0, 200.0]),
        ("granitemoe_swa", "layer_rope_theta", [100.0, 0]),
        ("mellum-full", "rope_parameters", {"full_attention": ROPE | {"partial_rotary_factor": 0.5}}),
        ("flex_olmo", "quantization_config", {"quant_method": "awq"}),
        # transformers' code reads these names, so that they are refused where the conversion does not
        ("flex_olmo", "sliding_window", 4),
        ("granitemoe", "layer_types", ["full_attention"] * 3),
    ],
)
def test_unsupported_values_are_refused(name, field, value):
    config = copy.deepcopy(CONFIGS[name])
    moe_config(config)
    setattr(config, field, value)
    with pytest.raises(UserError, match=field if field != "rope_parameters" else "partial_rotary_factor"):
        moe_config(config)


def test_balance_loss_is_kept():
    for name, fields in FIELDS.items():
        if name in CONFIGS:
            config = CONFIG_MAPPING[name.partition("-")[0]](**copy.deepcopy(fields), router_aux_loss_coef=0.02)
            assert (moe_config(config).router_aux_loss_coef, moe_config(config).router_z_loss_coef) == (0.02, 0.0)


@pytest.mark.parametrize(
    ("name", "extra"),
    [("mellum", "mtp.layers.0.fc.weight"), ("ernie4_5_moe", "model.mtp_block.0.input_layernorm.weight")],
)
def test_prediction_layers_are_left_out(name, extra):
    source, config = harness.random_source(CONFIGS[name]), CONFIGS[name]
    target = moe_config(config)
    model = load_state(target, import_state(lazy(source.state_dict() | {extra: torch.zeros(3)}), config, target))
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **harness.TOLERANCE)


def test_published_names():
    """ERNIE's bias lies beside the gate in files, and Flint's sinks have another name there."""
    bias = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    state = SPARSE_FAMILIES["ernie4_5_moe"].tensors(
        lazy({bias: torch.rand(1, 5)}), moe_config(CONFIGS["ernie4_5_moe"])
    )
    assert {name: tensor.shape for name, tensor in state.items()} == {
        "model.layers.1.mlp.gate.e_score_correction_bias": (5,)
    }
    if "flint" in CONFIGS:
        sinks = lazy({"model.layers.0.self_attn.softmax_offset": torch.rand(4)})
        assert list(SPARSE_FAMILIES["flint"].tensors(sinks, moe_config(CONFIGS["flint"]))) == [
            "model.layers.0.self_attn.sinks"
        ]
