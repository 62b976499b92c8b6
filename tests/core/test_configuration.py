"""Tests of MoEConfig: refused values and their messages, aliases, parallel plans, parameter counts."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.configuration_fields import settings_of
from tests.builders import tiny_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok is 6: it must lie between 1 and num_experts \(5\)"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0: it must be from 1 to 131072\."),
        ({"num_experts": 0}, r"num_experts is 0: it must be from 1 to 65536\."),
        ({"n_group": 2}, r"n_group \(2\) does not divide num_experts \(5\): choose a divisor"),
        ({"n_group": 5, "topk_group": 6}, r"topk_group is 6: it must lie between 1 and n_group \(5\)"),
        ({"n_group": 5, "topk_group": 2}, r"num_experts_per_tok \(3\) exceeds the experts of topk_group=2"),
        ({"router_type": "oracle"}, r"router_type 'oracle' is unknown: choose one of topk"),
        ({"scoring_func": "relu"}, r"scoring_func 'relu' is unknown: choose one of softmax, sigmoid"),
        ({"hidden_act": "swoosh"}, r"hidden_act 'swoosh' is unknown: choose one of"),
        ({"mlp_layer_types": ["sparse"]}, r"mlp_layer_types names 1 layers and num_hidden_layers is 3"),
        ({"layer_types": ["full_attention"] * 4}, r"layer_types names 4 layers and num_hidden_layers is 3"),
        ({"layer_types": ["sliding_attention"] * 3}, r"sliding_window is not set"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": None, "hidden_size": 30}, r"hidden_size \(30\) is not a multiple of num_attention_heads \(4\)"),
        ({"head_dim": 7}, r"head_dim is 7: the rotary embedding needs an even number"),
        ({"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef is -0.1: it must be from 0 to 1e\+06\."),
        ({"router_z_loss_coef": -0.1}, r"router_z_loss_coef is -0.1"),
        ({"router_jitter_noise": -0.1}, r"router_jitter_noise is -0.1"),
        ({"router_bias_update_rate": 0.1}, r"set router_selection_bias=True"),
        ({"router_bias_update_rate": -1}, r"router_bias_update_rate is -1"),
        (
            {"router_controller": "proportional", "router_selection_bias": True},
            r"'proportional' needs a step: set router_bias_update_rate",
        ),
        (
            {
                "router_type": "base_layer",
                "num_experts_per_tok": 1,
                "router_selection_bias": True,
                "allow_noncausal": True,
            },
            r"set router_selection_bias=False and n_group=1",
        ),
        ({"router_controller": "quantile"}, r"set router_selection_bias=True"),
        ({"router_type": "expert_choice"}, r"chooses among all tokens .* set allow_noncausal=True if that is meant"),
        (
            {"capacity_priority": "k_major"},
            r"a later token can take an earlier token's place in an expert, .* allow_non",
        ),
        (
            {"capacity_running": True, "capacity_priority": "k_major", "allow_noncausal": True},
            r"capacity_priority='token'",
        ),
        ({"capacity_factor": 0}, r"capacity_factor is 0: it must be from 1e-06 to 1e\+06\."),
        ({"router_type": "lory", "capacity_factor": 1.0}, r"LoryRouter drops no token: leave capacity_fac"),
        ({"router_gradient": "sparsemixer"}, r"set router_type='topk' and a positive router_jitter_noise"),
        ({"router_gradient": "dense", "num_copy_experts": 1}, r"cannot compute copy experts"),
        ({"router_gradient": "dense", "router_type": "lory"}, r"nor LoryRouter: set it to 'topk'"),
        (
            {"num_null_experts": 2, "router_type": "top_p"},
            r"num_null_experts and num_copy_experts need router_type='topk'",
        ),
        ({"num_null_experts": -2}, r"num_null_experts is -2"),
        (
            {"router_selection_bias": True, "router_type": "remoe"},
            r"router_selection_bias is True, which nothing reads: choose a router_type .*topk.* instead of 'remoe', or set",
        ),
        (
            {"n_group": 5, "topk_group": 5, "router_type": "top_p"},
            r"n_group is 5, which nothing reads: .*, or set n_group to 1\.$",
        ),
        (
            {"router_type": "hash", "router_bias": True},
            r"router_bias is True, which nothing reads: choose a router_type",
        ),
        (
            {"router_type": "uniform", "num_experts_per_tok": 5, "router_bias": True},
            r"router_bias is True, which nothing",
        ),
        (
            {"router_type": "hierarchical", "n_group": 5, "topk_group": 3, "router_bias": True},
            r"router_bias is True, which nothing reads",
        ),
        ({"max_experts_per_tok": 2}, r"max_experts_per_tok is 2, which nothing reads: choose a router_type"),
        (
            {"router_type": "remoe", "router_seq_aux_loss_coef": 1},
            r"set it to 0, and router_aux_loss_scope='sequence'",
        ),
        ({"num_expert_per_tok": 2}, r"unknown field 'num_expert_per_tok' in MoEConfig: did you mean 'num_experts_per"),
        ({"router_aux_loss_coeff": 2}, r"did you mean 'router_aux_loss_coef'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_bad_preset_file(tmp_path):
    fields = json.loads(tiny_config().to_json_string())
    fields["num_experts_per_token"] = fields.pop("num_experts_per_tok")
    (tmp_path / "preset.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="unknown field 'num_experts_per_token' in MoEConfig: did you mean"):
        AutoConfig.from_pretrained(tmp_path / "preset.json")


def test_wrong_type_is_named():
    with pytest.raises(ValueError, match=r"^num_experts is 'five': it must be of type int\.$"):
        tiny_config(num_experts="five")


NUMBERS = {
    field.name: field
    for field in dataclasses.fields(MoEConfig)
    if field.name in settings_of(MoEConfig) and ("int" in str(field.type) or "float" in str(field.type))
}


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"no_rope_layers", "depth_layers"}))
def test_each_number_has_a_range_and_is_refused_beyond_it(name):
    limits = settings_of(MoEConfig)[name].limits
    assert limits is not None
    assert -math.inf < limits.lowest < limits.highest < math.inf
    for value in (limits.lowest, limits.highest):
        assert limits.holds(value) != (limits.open_below if value == limits.lowest else limits.open_above)
    beyond = [limits.highest * 2 + 1, limits.lowest - 1, math.nan, math.inf, -math.inf, True, "1", 10**5000]
    config = tiny_config()
    for value in beyond:
        for refuse in (
            lambda value=value: MoEConfig(**{name: value}),
            lambda value=value: setattr(config, name, value),
        ):
            with pytest.raises(ValueError, match=rf"^{name} is .*: it must be [^\n]*\.$"):
                refuse()


def test_a_range_says_which_of_its_ends_belong_to_it():
    with pytest.raises(ValueError, match=r"^attention_dropout is 1.0: it must be at least 0 and below 1\.$"):
        tiny_config(attention_dropout=1.0)
    with pytest.raises(ValueError, match=r"^router_top_p is 0: it must be above 0 and at most 1\.$"):
        tiny_config(router_top_p=0)
    with pytest.raises(ValueError, match=r"^head_dim is an integer of 16610 bits: it must be from 2 to 1048576\.$"):
        tiny_config(head_dim=10**5000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 1}, r"sliding_window is 1: it must be from 2"),
        ({"sliding_window": 4, "layer_types": ["full_attention"] * 3}, r"sliding_window is 4 and no layer uses it"),
        (
            {"layer_types": ["linear_attention"] * 3},
            r"layer_types has the entry 'linear_attention': choose among full",
        ),
        ({"mlp_layer_types": ["moe"] * 3}, r"mlp_layer_types has the entry 'moe': choose among sparse, dense"),
        ({"no_rope_layers": [1, 2, 0]}, r"no_rope_layers has the entry 2: choose among 0, 1"),
        ({"pad_token_id": 99}, r"pad_token_id is 99 and vocab_size 99: it must lie within the vocabulary"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id is \[1, -2\]: it must be from -1"),
        (
            {"expected_experts_per_tok": 4},
            r"expected_experts_per_tok is 4: it must be above 0 and at most num_experts_per",
        ),
        ({"dtype": "x"}, r"dtype is 'x': it must be the name of a floating-point dtype"),
        ({"torch_dtype": "int8"}, r"torch_dtype is 'int8': it must be the name of a floating-point dtype"),
        ({"num_labels": 10**9}, r"num_labels is 1000000000: it must be from 0 to 1048575"),
        ({"id2label": {"a": "b"}}, r"id2label is .*: it must be a dictionary whose keys are integers"),
        ({"id2label": 0}, r"id2label is 0: it must be "),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder is True"),
        (
            {"mlp_layer_types": None, "first_k_dense_replace": "x"},
            r"first_k_dense_replace is 'x': it must be a number",
        ),
        ({"mlp_layer_types": None, "first_k_dense_replace": -1}, r"first_k_dense_replace is -1"),
        (
            {"mlp_layer_types": None, "mlp_only_layers": [3]},
            r"mlp_only_layers is \[3\]: it must list layers from 0 to 2",
        ),
        ({"mlp_layer_types": None, "mlp_only_layers": "ab"}, r"mlp_only_layers is 'ab': it must list layers"),
        ({"mlp_only_layers": [0]}, r"mlp_layer_types names other dense layers than .* mlp_only_layers do: give one"),
        ({"n_routed_experts": 4, "num_local_experts": 6}, r"num_experts"),
        ({"n_shared_experts": "x"}, r"n_shared_experts is 'x': it must be of type int"),
        ({"qk_head_dim": 192}, r"qk_head_dim is no field that can be set"),
        ({"to_dict": {}}, r"to_dict is no field that can be set"),
        ({"per_layer_config": {0: {"num_experts": 2}}}, r"per_layer_config is not read: say what layers differ in by"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_values_that_types_and_ranges_let_pass_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("layers", [10**5, 10**9, 10**30])
def test_a_huge_number_of_layers_is_refused_before_lists_are_made(layers):
    with pytest.raises(ValueError, match=r"num_hidden_layers is 10*: it must be from 1 to 10000\."):
        MoEConfig(num_hidden_layers=layers)


def test_a_model_of_more_than_a_petabyte_is_refused_by_arithmetic():
    with pytest.raises(ValueError, match=r"make 1.7e\+15 parameters, more than a petabyte"):
        MoEConfig(num_experts=2**16, hidden_size=2**13, intermediate_size=2**16, num_attention_heads=16)


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_theta": math.nan}, r"rope_theta of rope_parameters is nan: it must be a number above 0"),
        ({"rope_theta": 0}, r"rope_theta of rope_parameters is 0"),
        ({"rope_theta": -1e4}, r"rope_theta of rope_parameters is -10000"),
        ({"rope_theta": "1"}, r"rope_theta of rope_parameters is '1'"),
        ({"rope_type": "nope"}, r"rope_parameters has rope_type 'nope': choose one of default, linear"),
        ({"rope_type": ["linear"]}, r"rope_parameters has rope_type \['linear'\]"),
        ({"rope_type": "linear"}, r"rope_parameters has no factor, which rope_type 'linear' needs: add it"),
        ({"rope_type": "linear", "factor": math.inf}, r"factor of rope_parameters is inf"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, r"beta_fast of rope_parameters must not"),
        ({"rope_type": "yarn", "factor": 2, "rope_theta": 1.0}, r"rope_type 'yarn' needs more than 1"),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 1, "short_factor": [1], "long_factor": [1]},
            r"rope_type 'longrope' needs more than 1",
        ),
        ({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}, r"high_freq_factor of"),
        ({"rope_type": "longrope", "short_factor": 1, "long_factor": [1.0]}, r"short_factor of .* list of 6 numbers"),
        ({"partial_rotary_factor": 0.01}, r"lets none of the 12 features of a head rotate"),
        ({"full_attention": [1], "sliding_attention": {}}, r"rope_parameters\['full_attention'\] is \[1\]"),
        ({"sliding_attention": dict(PLAIN_ROPE)}, r"rope_parameters has no 'full_attention', which layer_types has"),
    ],
    ids=str,
)
def test_a_rotary_number_that_transformers_leaves_unchecked_is_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_parameters=rope)


def test_rotation_in_part_with_latent_attention_is_refused():
    widths = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
    rope = PLAIN_ROPE | {"partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"partial_rotary_factor of rope_parameters is 0.5: in latent attention"):
        tiny_config(**widths, head_dim=None, num_key_value_heads=None, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"q_lora_rank is 0: it must be from 1"):
        tiny_config(**widths, head_dim=None, num_key_value_heads=None, q_lora_rank=0)
    config = tiny_config(**widths, num_key_value_heads=None)
    assert config.head_dim == 4
    config.head_dim = 6
    with pytest.raises(
        ValueError, match=r"head_dim is 6, which nothing reads: unset kv_lora_rank .*, or set head_dim to None"
    ):
        config.validate()


def test_foreign_keys_are_kept():
    config = tiny_config(my_note="x", sep_token_id=3, num_labels=4)
    assert config.my_note == "x"
    assert config.num_labels == 4


def test_one_expert_renormalised_warns_once(caplog, monkeypatch):
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            config = tiny_config(num_experts_per_tok=1, norm_topk_prob=True)
    assert config.num_experts_per_tok == 1
    assert sum("the router gets no gradient from the task" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("alias", ["num_local_experts", "n_routed_experts"])
def test_aliases(alias):
    config = MoEConfig(**{alias: 6})
    assert config.num_experts == getattr(config, alias) == 6
    assert alias not in config.to_dict()


def test_defaults_that_other_fields_imply():
    config = MoEConfig(hidden_size=64, num_attention_heads=4, n_shared_experts=2, moe_intermediate_size=10)
    assert (config.head_dim, config.num_key_value_heads, config.shared_expert_intermediate_size) == (16, 4, 20)
    assert set(config.mlp_layer_types) == {"sparse"}
    assert set(MoEConfig(sliding_window=8).layer_types) == {"sliding_attention"}


def test_dense_layers_by_the_names_of_others():
    assert tiny_config(mlp_layer_types=None, first_k_dense_replace=2).mlp_layer_types == ["dense", "dense", "sparse"]
    config = tiny_config(mlp_layer_types=None, mlp_only_layers=[1])
    assert config.mlp_layer_types == ["sparse", "dense", "sparse"]
    assert (config.mlp_only_layers, config.first_k_dense_replace) == ([1], 0)


def test_json_round_trip(tmp_path):
    config = tiny_config(num_shared_experts=1, scoring_func="sigmoid", sliding_window=8)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoEConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    written = json.loads((tmp_path / "config.json").read_text())
    # servers read these fields and have other defaults
    assert {"norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group"} <= set(written)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"lm_head_bias": True, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "qk_norm": "head"},
        {"qk_norm": "full", "gated_experts": False},
        {"gated_mlp": False, "mlp_bias": True, "num_shared_experts": 2},
        {"num_shared_experts": 1, "shared_expert_gate": True, "shared_expert_intermediate_size": 10},
        {"mlp_layer_types": ["dense"] * 3},
        {"qk_norm": "head", "norm_type": "layer"},
        {"qk_norm": "full", "norm_type": "layer"},
        {"qk_norm": "head", "norm_type": "layer", "norm_bias": False, "norm_placement": "parallel_shared"},
        {"sparse_output_norm": True, "mlp_layer_types": ["sparse", "dense", "sparse"]},
        {"attn_output_gate": True, "num_key_value_heads": 1},
        {"hidden_act": "xielu", "num_shared_experts": 1},
        {"moe_latent_size": 10},
        {"moe_latent_size": 10, "gated_experts": False, "mlp_bias": True, "num_shared_experts": 1},
        {"router_input_norm": True, "router_expert_scale": True, "num_null_experts": 2},
        {"router_type": "dag"},
        {"router_type": "zaya", "router_hidden_size": 20, "num_null_experts": 1},
    ],
    ids=str,
)
def test_parameter_arithmetic(fields):
    config = tiny_config(**fields)
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    counted = dict(model.named_parameters())
    assert sum(p.numel() for p in counted.values()) == config.num_params()
    idle = sum(p.numel() for name, p in counted.items() if ".mlp.experts." in name and ".act_fn." not in name)
    idle = idle * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    assert config.num_params() - idle == config.num_active_params()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": "head"},
        {"qk_norm": "full"},
        {"num_shared_experts": 1},
        {"mlp_layer_types": ["dense"] * 3},
        {"gated_mlp": False, "mlp_bias": True},
        {"attn_output_gate": True},
    ],
    ids=str,
)
def test_every_rule_of_a_parallel_plan_matches_a_module(fields):
    model = MoEForCausalLM(tiny_config(**fields))
    modules = {name for name, _ in model.model.named_modules()} | {name for name, _ in model.model.named_parameters()}
    modules = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in modules}
    assert set(model.config.base_model_tp_plan) | set(model.config.base_model_ep_plan) <= modules
    assert not any("plan" in name for name in model.config.to_dict())
    assert set(model.config.base_model_fsdp_plan) - {"layers.*"} <= modules
