"""MoEConfig: what it refuses and how it says so, aliases, parallel plans, parameter arithmetic."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from modeling_moe import MoEConfig, MoEForCausalLM
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok is 6: it must lie between 1 and num_experts \(5\)"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0: it must lie between 1"),
        ({"num_experts": 0}, r"num_experts is 0: a sparse layer needs at least 1"),
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
        ({"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef is -0.1: it must be 0 \(off\) or positive"),
        ({"router_z_loss_coef": -0.1}, r"router_z_loss_coef is -0.1"),
        ({"router_jitter_noise": -0.1}, r"router_jitter_noise is -0.1"),
        ({"router_bias_update_rate": 0.1}, r"set router_selection_bias=True"),
        ({"router_bias_update_rate": -1}, r"router_bias_update_rate is -1"),
        (
            {"router_controller": "pid", "router_selection_bias": True},
            r"'pid' needs a step: set router_bias_update_rate",
        ),
        (
            {"router_type": "base", "num_experts_per_tok": 1, "router_selection_bias": True, "allow_noncausal": True},
            r"set router_selection_bias=False and n_group=1",
        ),
        ({"router_controller": "quantile"}, r"set router_selection_bias=True"),
        ({"router_type": "expert_choice"}, r"chooses among all tokens .* set allow_noncausal=True if that is meant"),
        ({"capacity_priority": "k_major"}, r"a later token can take an earlier one's place, .* allow_noncausal=True"),
        (
            {"capacity_running": True, "capacity_priority": "k_major", "allow_noncausal": True},
            r"capacity_priority='token'",
        ),
        ({"capacity_factor": 0}, r"capacity_factor is 0: it must be positive"),
        ({"router_type": "segment", "capacity_factor": 1.0}, r"SegmentRouter drops no token: leave the capacity"),
        ({"router_gradient": "sparsemixer"}, r"set router_type='topk' and a positive router_jitter_noise"),
        ({"router_gradient": "dense", "num_copy_experts": 1}, r"cannot compute copy experts"),
        ({"router_gradient": "dense", "router_type": "segment"}, r"nor SegmentRouter: set it to 'topk'"),
        (
            {"num_null_experts": 2, "router_type": "top_p"},
            r"num_null_experts and num_copy_experts need router_type='topk'",
        ),
        ({"num_null_experts": -2}, r"num_null_experts is -2"),
        ({"router_selection_bias": True, "router_type": "relu"}, r"no effect with ReLURouter: set it to False"),
        (
            {"n_group": 5, "topk_group": 5, "router_type": "top_p"},
            r"n_group has no effect with TopPRouter: set it to 1",
        ),
        ({"max_experts_per_tok": 2}, r"max_experts_per_tok has no effect with TopKRouter: leave it unset"),
        ({"router_type": "relu", "router_seq_aux_loss_coef": 1}, r"set it to 0, and router_aux_loss_scope='sequence'"),
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
    with pytest.raises(StrictDataclassFieldValidationError, match="field 'num_experts'"):
        tiny_config(num_experts="five")


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
    # what servers read, and default otherwise to something else
    assert {"norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group"} <= set(written)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "qk_norm": "head"},
        {"qk_norm": "full", "gated_experts": False},
        {"gated_mlp": False, "mlp_bias": True, "num_shared_experts": 2},
        {"num_shared_experts": 1, "shared_expert_gate": True, "shared_expert_intermediate_size": 10},
        {"mlp_layer_types": ["dense"] * 3},
    ],
    ids=str,
)
def test_parameter_arithmetic(fields):
    config = tiny_config(**fields)
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    counted = dict(model.named_parameters())
    assert sum(p.numel() for p in counted.values()) == config.num_params()
    idle = sum(p.numel() for name, p in counted.items() if ".mlp.experts." in name)
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
