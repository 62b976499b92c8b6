"""Tests that derived fields follow changes in memory, at loading and in config.json, and that chosen fields do not change."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.configuration_fields import settings_of
from tests.builders import tiny_config


IDS = torch.arange(1, 13)[None]


@pytest.fixture
def model():
    return MoEForCausalLM(tiny_config(mlp_layer_types=None)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def by_hand(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_weights(model, layers=None, **fields):
    """Makes a new model with the fields of `model`, changed by `fields`, and with the weights of `model`."""
    chosen = {name: getattr(model.config, name) for name in settings_of(MoEConfig)}
    chosen |= {"layer_types": None, "mlp_layer_types": None} | fields
    other = MoEForCausalLM(MoEConfig(**chosen)).eval()
    missing, left = other.load_state_dict(model.state_dict(), strict=layers is None)
    assert not missing
    assert all(f"layers.{layers}." in name for name in left)
    return other


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_fewer_layers_at_load_cut_the_saved_lists(model, folder):
    expected = logits(with_weights(model, layers=2, num_hidden_layers=2))
    assert torch.equal(logits(MoEForCausalLM.from_pretrained(folder, num_hidden_layers=2)), expected)
    by_hand(folder, num_hidden_layers=2)
    assert torch.equal(logits(MoEForCausalLM.from_pretrained(folder)), expected)
    assert len(json.loads((folder / "config.json").read_text())["layer_types"]) == 3


def test_a_model_with_its_layers_cut_loads_again(model, tmp_path):
    model.model.layers = model.model.layers[:2]
    expected = logits(model)
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MoEForCausalLM.from_pretrained(tmp_path)), expected)


def test_a_chosen_list_of_layers_is_cut_and_never_lengthened():
    config = tiny_config(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    config.num_hidden_layers = 2
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.mlp_layer_types == ["sparse", "dense"]
    config.validate()
    assert config.sliding_window == 4
    config.num_hidden_layers = 1
    assert (config.layer_types, config.sliding_window) == (["full_attention"], None)
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="layer_types names 1 layers and num_hidden_layers is 3"):
        config.validate()


def test_a_window_given_at_load_has_an_effect(model, folder):
    expected = logits(with_weights(model, sliding_window=4))
    assert not torch.equal(expected, logits(model))
    assert torch.equal(logits(MoEForCausalLM.from_pretrained(folder, sliding_window=4)), expected)
    config = AutoConfig.from_pretrained(folder)
    config.sliding_window = 4
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, config=config)), expected)
    with pytest.raises(ValueError, match="sliding_window is 4 and no layer uses it"):
        MoEConfig(**(model.config.to_dict() | {"sliding_window": 4}))
    assert model.config.replace(sliding_window=4).layer_types == ["sliding_attention"] * 3
    assert (
        MoEForCausalLM.from_pretrained(folder, sliding_window=4, use_sliding_window=False).config.layer_types
        == ["full_attention"] * 3
    )


def test_dense_layers_at_load_are_refused_rather_than_made_at_random(folder):
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        MoEForCausalLM.from_pretrained(folder, first_k_dense_replace=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9: it must lie between 1 and num_experts \(5\)"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0"),
        ({"router_type": "expert_choice"}, r"set allow_noncausal=True if that is meant"),
        ({"router_bias_update_rate": 0.1}, r"set router_selection_bias=True"),
        ({"router_top_p": float("nan")}, r"router_top_p is nan"),
    ],
    ids=str,
)
def test_an_override_is_checked_as_a_new_configuration_is(folder, fields, message, tmp_path):
    for load in (MoEForCausalLM, AutoModelForCausalLM, AutoConfig):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(folder, **fields)
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        _assign_and(config, fields, MoEForCausalLM)
    with pytest.raises(ValueError, match=message):
        _assign_and(config, fields, lambda config: config.save_pretrained(tmp_path))


def _assign_and(config, fields, use):
    for name, value in fields.items():
        setattr(config, name, value)
    use(config)


def test_a_step_of_the_bias_at_load_gets_a_controller(folder):
    config = AutoConfig.from_pretrained(folder, router_bias_update_rate=0.1, router_selection_bias=True)
    assert config.router_controller == config.controller == "bias"
    config.router_bias_update_rate = 0.0
    assert config.router_controller is None


# field -> a value that differs from the derived value
STAYS = {"moe_intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6, "gated_experts": True}
STAYS |= {"shared_expert_intermediate_size": 7, "expected_experts_per_tok": 1, "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("changed", "value", "follows", "expected"),
    [
        ("intermediate_size", 50, "moe_intermediate_size", 50),
        ("num_attention_heads", 8, "num_key_value_heads", 8),
        ("hidden_size", 64, "head_dim", 16),
        ("gated_mlp", False, "gated_experts", False),
        ("num_shared_experts", 2, "shared_expert_intermediate_size", 80),
        ("num_experts_per_tok", 4, "expected_experts_per_tok", 4),
        ("router_gradient", "sparsemixer", "norm_topk_prob", False),
        ("n_shared_experts", 1, "shared_expert_intermediate_size", 40),
    ],
)
def test_a_derived_value_follows_and_a_chosen_one_does_not(changed, value, follows, expected):
    derived = dict.fromkeys(("moe_intermediate_size", "num_key_value_heads", "head_dim"))
    config = tiny_config(**derived)
    loaded = MoEConfig.from_dict(config.to_dict())
    for given in (config, loaded):
        setattr(given, changed, value)
        assert getattr(given, follows) == expected
    chosen = tiny_config(**derived)
    setattr(chosen, follows, stays := STAYS[follows])
    setattr(chosen, changed, value)
    assert getattr(chosen, follows) == stays
    setattr(chosen, follows, None)
    assert getattr(chosen, follows) == expected


def test_copies_know_what_is_derived_and_share_nothing():
    config = tiny_config(mlp_layer_types=None)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert copied == config
        copied.num_hidden_layers = 5
        assert copied.mlp_layer_types == ["sparse"] * 5
        assert config.mlp_layer_types == ["sparse"] * 3
    assert not any(name.startswith("_d") for name in config.to_dict())


def test_parallel_plans_follow_the_fields():
    config = tiny_config()
    assert config.base_model_tp_plan["layers.*.mlp.gate_proj"] == "colwise"
    config.mlp_layer_types = ["sparse"] * 3
    assert "layers.*.mlp.gate_proj" not in config.base_model_tp_plan
