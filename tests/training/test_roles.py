"""These tests check which role each parameter of a model has, and which learning rate and weight decay follow from it."""

import math
import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from modeling_moe.lora import moe_lora_config
from modeling_moe.training import parameter_groups, parameter_roles
from modeling_moe.training.trainer import FinetuneTrainer
from modeling_moe.utils.errors import UserError
from tests.builders import save_llama, tiny_model
from tests.training.families import tiny


# model type -> role -> names below the decoder layer that have it
EXPECTED = {
    "mixtral": {
        "router": {"mlp.gate.weight"},
        "expert": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        "shared": set(),
    },
    "qwen2_moe": {
        "router": {"mlp.gate.weight"},
        "expert": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        "shared": {f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
        | {"mlp.shared_expert_gate.weight"},
    },
    "gpt_oss": {
        "router": {"mlp.router.weight", "mlp.router.bias"},
        "expert": {
            f"mlp.experts.{name}" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        },
        "shared": set(),
    },
    # experts and routers are children of the decoder layer
    "gemma4_text": {
        "router": {"router.proj.weight", "router.scale", "router.per_expert_scale"},
        "expert": {"experts.gate_up_proj", "experts.down_proj"},
        "shared": set(),
    },
}


def below(name: str) -> str:
    """Returns a parameter's name below the decoder layer."""
    return re.sub(r".*layers\.\d+\.", "", name)


def by_name(model, groups) -> dict[str, dict]:
    """Returns the group of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_roles_of_transformers_own_models(model_type):
    roles = parameter_roles(tiny(model_type))
    for role, names in EXPECTED[model_type].items():
        assert {below(name) for name in roles if roles[name] == role} == names
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "attention"
    assert roles["model.norm.weight"] == "other"
    assert "lm_head.weight" not in roles or roles["lm_head.weight"] == "embedding"


def test_roles_of_this_packages_model_and_of_an_adapter():
    model = tiny_model(num_shared_experts=1)
    roles = parameter_roles(model)
    assert {role for name, role in roles.items() if ".shared_experts." in name} == {"shared"}
    assert {below(name) for name, role in roles.items() if role == "router"} == {"mlp.gate.weight"}
    assert roles["model.layers.1.mlp.down_proj.weight"] == "other"  # the dense layer
    adapted = get_peft_model(model, moe_lora_config(model, r=2, experts=True, router=True))
    roles = parameter_roles(adapted)
    trained = {name: roles[name] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert set(trained.values()) == {"router", "expert", "attention"}
    assert all((role == "expert") == (".experts." in name) for name, role in trained.items())
    assert all((role == "router") == (".gate." in name) for name, role in trained.items())
    groups = by_name(adapted, parameter_groups(adapted, 1.0, rates={"expert": "share"}))
    assert groups.keys() == trained.keys()
    assert {group["lr"] for name, group in groups.items() if trained[name] == "expert"} == {3 / 5}


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma4_text", "inkling2_text", "jamba", "zaya"])
def test_decay_is_that_of_finetune(model_type, tmp_path):
    """Weight decay leaves out norms, biases of experts (E, I), and learned factors such as Gemma's `scale`."""
    model = tiny(model_type)
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    expected = by_name(model, FinetuneTrainer(model=model, args=args).create_optimizer().param_groups)
    found = by_name(model, parameter_groups(model, 1e-3, 0.1))
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        name: group["weight_decay"] for name, group in expected.items()
    }
    spared = {below(name) for name, group in found.items() if not group["weight_decay"]}
    assert all(name in spared for name in map(below, found) if name.endswith(("_bias", ".scale", "norm.weight")))


def test_rates_and_decays_by_role():
    model = tiny("mixtral")  # two of twelve experts
    rates = {"router": 0.5, "expert": "sqrt_share", "embedding": 2.0}
    groups = parameter_groups(model, 0.1, 0.3, rates=rates, weight_decays={"router": 0.0, "attention": 0.7})
    named = by_name(model, groups)
    assert named.keys() == {name for name, _ in model.named_parameters()}
    expected = {
        "mlp.gate.weight": (0.05, 0.0),
        "mlp.experts.down_proj": (0.1 * math.sqrt(2 / 12), 0.3),
        "self_attn.q_proj.weight": (0.1, 0.7),
        "input_layernorm.weight": (0.1, 0.0),
        "model.embed_tokens.weight": (0.2, 0.3),
    }
    found = {below(name): (group["lr"], group["weight_decay"]) for name, group in named.items()}
    assert {name: found[name] for name in expected} == expected
    assert groups[0]["lr"] == 0.1  # which `Trainer` logs
    assert all(group["params"] for group in groups)


def test_routed_attention_is_attention_with_experts_of_its_own_number():
    """SwitchHead: 4 heads choose 2 of 3 experts on each side."""
    fields = {"attention_experts": 3, "attention_experts_per_tok": 2, "num_key_value_heads": 4}
    model = tiny_model(routed_attention="switch_head", num_attention_heads=4, **fields)
    roles = {below(name): role for name, role in parameter_roles(model).items()}
    inside = {name.removeprefix("self_attn."): role for name, role in roles.items() if name.startswith("self_attn.")}
    assert inside == {
        "q_proj.weight": "attention",
        "k_proj.weight": "attention",
        "gate.weight": "router",
        "experts.up_proj": "expert",
        "experts.down_proj": "expert",
    }
    groups = by_name(model, parameter_groups(model, 1.0, rates={"expert": "share", "attention": 0.5}))
    rates = {below(name): group["lr"] for name, group in groups.items()}
    assert rates["self_attn.experts.up_proj"] == pytest.approx(2 / 3)
    assert rates["self_attn.q_proj.weight"] == 0.5
    config = model.config
    assert rates["mlp.experts.down_proj"] == pytest.approx(config.num_experts_per_tok / config.num_experts)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_router_that_chooses_tokens_for_a_layer_is_a_router(kind):
    model = tiny_model(depth_layers=[0, 1], num_hidden_layers=2, mlp_layer_types=[kind] * 2)
    routers = {name for name, role in parameter_roles(model).items() if role == "router"}
    assert "model.layers.1.depth.gate.weight" in routers
    assert routers == {name for name, _ in model.named_parameters() if ".gate." in name}


def test_groups_train_the_roles_at_their_rates():
    """Plain SGD: the change of each weight is the rate of its role times the gradient."""
    model = tiny("olmoe")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rates = {"router": 0.25, "expert": 0.0}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5, rates=rates), lr=1.0)
    ids = torch.arange(4, 20)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        rate = 0.5 * rates.get(roles[name], 1.0)
        torch.testing.assert_close(parameter, before[name] - rate * parameter.grad)


def test_a_dense_model_has_groups(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "dense"))
    roles = {group["role"] for group in parameter_groups(dense, 1e-3, rates={"embedding": 0.5})}
    assert roles == {"other", "attention", "embedding"}
    with pytest.raises(UserError, match="rate router has no effect: the model trains no parameter of this role"):
        parameter_groups(dense, 1e-3, rates={"router": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": {"gate": 0.5}}, "rate 'gate' is no role: choose among other, attention"),
        ({"weight_decays": {"shared": 0.5}}, "weight decay shared has no effect"),
        (
            {"rates": {"expert": "cube"}},
            "rate 'cube' is unknown: give a number, or for experts one of sqrt_share, share",
        ),
        ({"rates": {"router": "share"}}, "rate share is for experts, not for router: give a number"),
        ({"weight_decays": {"router": -1.0}}, "weight decay -1.0 of router: it must be a number from 0"),
        ({"weight_decays": {"router": math.nan}}, "weight decay nan of router: it must be a number from 0"),
        ({"rates": {"router": -1.0}}, "rate -1.0 of router: it must be a number from 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        parameter_groups(tiny("mixtral"), 1e-3, **options)


def test_experts_out_of_reach_are_refused():
    with pytest.raises(
        UserError, match="cannot be divided by role: JetMoeForCausalLM computes its experts in JetMoeMoE"
    ):
        parameter_groups(tiny("jetmoe"), 1e-3)
