"""Tests that no field is ignored: a changed field changes what a model computes, or is refused by name."""

import functools
import json
import logging
import typing
import zlib
from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.configuration_fields import settings_of
from modeling_moe.router_catalogue import ROUTERS
from modeling_moe.router_losses import LossFields
from modeling_moe.utils.config_page import TITLES
from tests.builders import tiny_config


ROUTER_FIELDS = {
    item.name: item
    for group in TITLES
    if group.__module__.rpartition(".")[2].startswith("router")
    for item in fields(group)
}
ROUTER_FIELDS.pop("router_type")

SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.5,
    "allow_noncausal": True,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
# router_type -> fields that the router needs
NEEDS = {
    "hierarchical": {"n_group": 4, "topk_group": 2},
    "uniform": {"num_experts_per_tok": 4},
    "base_layer": {"num_experts_per_tok": 1},
    "sparsemixer": {"router_jitter_noise": 0.3},
    "task": {"num_tasks": 12},
    "mmoe": {"num_tasks": 12},
    "continuous": {"router_cutoff": 0.4},
    "lory": {"segment_length": 2},
    # the scores of a wide network saturate with these weights, so that groups would choose what all experts do
    "zaya": {"router_hidden_size": 4},
}
# field -> other fields that must be set so that something reads it
COMPANIONS = {
    "topk_group": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "group_score": {"n_group": 2, "topk_group": 1},
    "n_group": {"num_experts_per_tok": 1},
    "router_controller": {"router_selection_bias": True, "router_bias_update_rate": 0.1},
    "router_bias_update_rate": {"router_selection_bias": True},
    "router_ema_decay": {"router_selection_bias": True, "router_controller": "quantile"},
    "expected_experts_per_tok": {
        "router_selection_bias": True,
        "router_controller": "proportional",
        "router_bias_update_rate": 0.1,
    },
    "router_selection_bias_on": {"router_selection_bias": True},
    "router_threshold": {"router_threshold_mode": "fixed"},
    "capacity_running": {"capacity_factor": 0.8},
    "capacity_includes_k": {"capacity_factor": 0.5},
    "capacity_priority": {"capacity_factor": 0.5},
}
# field -> a value with which a tiny model computes something else
CHANGED = {
    "allow_noncausal": False,
    "router_controller": "proportional",
    "router_gradient": "dense",
    "router_aux_loss_scope": "sequence",
    "router_top_p": 0.9,
    "max_experts_per_tok": 1,
    "expert_capacity": 1,
    "capacity_factor": 0.5,
    "eval_capacity_factor": 0.5,
    "n_group": 2,
    "topk_group": 2,
    "router_threshold_mode": "fixed",
    "router_cutoff": 0.6,
    "expected_experts_per_tok": 0.5,
    "num_tasks": 13,
    "router_sparsity_step": 2.0,
    "capacity_priority": "probability",
    "segment_length": 3,
    "scoring_func": "sigmoid",
    "router_logit_softcapping": 0.5,
}
IDS = torch.arange(24).view(3, 8) * 7 % 32
# field whose change no pass can show -> the routers that read it
NO_EFFECT = {
    "allow_noncausal": set(ROUTERS),  # it permits routers and changes none
    "num_tasks": {"task", "mmoe"},  # more tasks than the batch names add rows that no token uses
}
# of a router without a gradient the losses are figures, which no gradient and no loss shows
FIGURES = {item.name for item in fields(LossFields)}


def changed(name: str, router: str):
    """Returns a value of a field that differs from the default."""
    default, kind, limits = ROUTER_FIELDS[name].default, ROUTER_FIELDS[name].type, settings_of(MoEConfig)[name].limits
    if name == "norm_topk_prob":
        return not ROUTERS[router].norm_topk_prob_default
    if name in CHANGED:
        return CHANGED[name]
    if isinstance(default, bool):
        return not default
    if typing.get_origin(kind) is typing.Literal:
        return next(option for option in typing.get_args(kind) if option != default)
    assert limits is not None
    value = default + 1 if isinstance(default, int) else default * 0.5 or 0.5
    assert limits.holds(value)
    return value


@functools.cache
def fingerprint(text: str) -> dict[str, torch.Tensor]:
    """Returns what a model computes in two optimizer steps of two micro-batches each, and then in evaluation.

    Args:
        text: the fields of the configuration as JSON.
    """
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(**json.loads(text)))
    for name, parameter in model.named_parameters():
        # by name, so that an additional parameter does not change the values of the others
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.data.normal_(std=0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0.2, -0.2, len(buffer)))
    tasks, found = {"task_ids": IDS % 12}, {}
    for step in range(2):
        for batch, ids in enumerate((IDS.roll(step), IDS.flip(1))):
            torch.manual_seed(1)
            outputs = model.train()(ids, labels=ids, **tasks)
            outputs.loss.backward()
            found |= {f"loss {step} {batch}": outputs.loss.detach(), f"logits {step} {batch}": outputs.logits.detach()}
        found |= {
            f"gradient {step} of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        model.update_routers()
        found |= {f"buffer {step} {name}": buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        found["evaluation"] = model.eval()(IDS, **tasks).logits
    return found


def differs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns whether the results differ in a tensor that both have."""
    return any(not torch.equal(first[name], second[name]) for name in first.keys() & second.keys())


def outcome(base: dict, name: str, value) -> str:
    """Returns what a change of a field does: "refused", "differs" or "ignored"; "none" if the base is refused."""
    try:
        before = MoEConfig(**base)
    except ValueError:
        return "none"
    if getattr(before, name) == value:
        return "none"
    try:
        MoEConfig(**base | {name: value})
    except ValueError:
        return "refused"
    texts = [json.dumps(fields, sort_keys=True) for fields in (base, base | {name: value})]
    return "differs" if differs(*map(fingerprint, texts)) else "ignored"


@pytest.mark.parametrize("name", ROUTER_FIELDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_field_changes_something_or_is_refused(router, name):
    base = SIZE | {"router_type": router} | NEEDS.get(router, {})
    outcomes = {outcome(base, name, changed(name, router))}
    if name in COMPANIONS:
        outcomes.add(outcome(base | COMPANIONS[name], name, changed(name, router)))
    assert outcomes != {"none"}
    is_figure = name in FIGURES and not ROUTERS[router].differentiable
    if router not in NO_EFFECT.get(name, ()) and not is_figure:
        assert "ignored" not in outcomes, outcomes


@pytest.mark.parametrize("name", sorted(set(ROUTER_FIELDS) - set(NO_EFFECT)))
def test_each_router_field_changes_something_with_some_router(name):
    for router in ROUTERS:
        base = SIZE | {"router_type": router} | NEEDS.get(router, {}) | COMPANIONS.get(name, {})
        if outcome(base, name, changed(name, router)) == "differs":
            return
    pytest.fail(f"{name} has no effect with any router")


# changes that leave a field unread -> message
UNREAD = [
    (
        {"router_top_p": 0.9},
        r"^router_top_p is 0.9, which nothing reads: choose a router_type that reads it \(top_p\)",
    ),
    ({"hash_seed": 3}, r"^hash_seed is 3, .* \(hash, hash_scored\) instead of 'topk', or set hash_seed to 0\.$"),
    (
        {"router_type": "hash", "norm_topk_prob": False},
        r"^norm_topk_prob is False, .*, or set norm_topk_prob to None\.$",
    ),
    (
        {"swiglu_alpha": 2.0},
        r"^swiglu_alpha is 2.0, which nothing reads: set swiglu_limit, or set swiglu_alpha to 1.702\.$",
    ),
    ({"shared_expert_gate": True}, r"^shared_expert_gate is True, .*: set num_shared_experts above 0, or "),
    (
        {"router_selection_bias_on": "logits"},
        r"^router_selection_bias_on is 'logits', .*: set router_selection_bias=True, or ",
    ),
    ({"router_type": "hash", "router_expert_scale": True}, r"^router_expert_scale is True, .*: choose a router_type"),
    (
        {"gated_mlp": False, "dense_swiglu_limit": 1.0},
        r"^dense_swiglu_limit is 1.0, .*: have a dense layer with gated_mlp=True, or shared",
    ),
    (
        {"mlp_layer_types": ["dense"] * 3, "moe_latent_size": 8},
        r"^moe_latent_size is 8, .*: give mlp_layer_types a sp",
    ),
    ({"q_lora_rank": 8}, r"^q_lora_rank is 8, which nothing reads: set kv_lora_rank"),
    ({"v_head_dim": 8}, r"^v_head_dim is 8, which nothing reads: set kv_lora_rank"),
    ({"capacity_running": True}, r"^capacity_running is True, .*: set capacity_factor or eval_capacity_factor, or "),
    (
        {"capacity_includes_k": False, "expert_capacity": 2},
        r"^capacity_includes_k is False, .*: unset expert_capacity",
    ),
    ({"capacity_factor": 1.0, "expert_capacity": 2}, r"^capacity_factor is 1.0, .*: unset expert_capacity, or "),
    (
        {"capacity_priority": "k_major", "allow_noncausal": True},
        r"^capacity_priority is 'k_major', which nothing reads",
    ),
    ({"group_score": "max"}, r"^group_score is 'max', which nothing reads: set n_group above 1"),
    ({"router_ema_decay": 0.5}, r"^router_ema_decay is 0.5, .*: set router_controller='quantile', router_type='exp"),
    ({"expected_experts_per_tok": 1}, r"^expected_experts_per_tok is 1, .*: set router_controller='proportional'"),
    (
        {"router_bias_update_rate": 0.1, "router_selection_bias": True, "router_controller": "quantile"},
        r"_rate is 0.1, wh",
    ),
    (
        {"router_type": "continuous", "router_threshold": 1.0},
        r"^router_threshold is 1.0, .*: set router_threshold_mode=",
    ),
    ({"qkv_bias": True, "attention_bias": True}, r"^qkv_bias is True, which nothing reads: set attention_bias=False"),
    (
        {"position_embedding_type": "learned", "rope_fp32": True},
        r"^rope_fp32 is True, .*: set position_embedding_type",
    ),
    (
        {"position_embedding_type": "learned", "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        r"^rope_par",
    ),
    (
        {"mlp_layer_types": ["dense"] * 3, "num_tasks": 2},
        r"^num_tasks is 2, .*: give mlp_layer_types a sparse layer, or ",
    ),
    (
        {"mlp_layer_types": ["dense"] * 3, "router_z_loss_coef": 1.0},
        r"^router_z_loss_coef is 1.0, .*a sparse layer or set routed_attention or give depth_layers a 1, or",
    ),
    (
        {"mlp_layer_types": ["dense"] * 3, "router_type": "gumbel_topk"},
        r"^router_type is 'gumbel_topk', which nothing reads",
    ),
    ({"mlp_layer_types": ["dense", "dense", "sparse"], "num_hash_layers": 2}, r"^num_hash_layers is 2, which nothing"),
    (
        {"num_hash_layers": 3, "router_temperature": 2.0, "router_type": "gumbel_topk"},
        r"^router_temperature is 2.0, which",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), UNREAD, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_field_that_nothing_reads_is_refused_with_the_remedy(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
    with pytest.raises(ValueError, match=message):
        tiny_config().replace(**changes)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **changes)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_defaults_and_values_that_ask_for_nothing_pass():
    defaults = {item.name: item.default for item in fields(MoEConfig) if item.name in settings_of(MoEConfig)}
    assert MoEConfig(**defaults).to_dict() == MoEConfig().to_dict()
    off = {
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0,
        "router_controller": None,
        "expected_experts_per_tok": 3,
    }
    assert tiny_config(mlp_layer_types=["dense"] * 3, **off).router_z_loss_coef == 0


def test_a_change_of_the_router_refuses_the_fields_of_the_old_one(tmp_path):
    config = tiny_config(router_type="top_p", router_top_p=0.9)
    config.save_pretrained(tmp_path)
    message = r"^router_top_p is 0.9, .* instead of 'topk', or set router_top_p to 0.4\.$"
    with pytest.raises(ValueError, match=message):
        config.replace(router_type="topk")
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_pretrained(tmp_path, router_type="topk")
    assert config.replace(router_type="topk", router_top_p=0.4).router_type == "topk"


def test_an_earlier_version_saved_fields_that_nothing_reads(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()
    saved = tiny_config(router_aux_loss_coef=0.0).to_dict() | {"code_version": "0.3.0"}
    saved |= {"router_top_p": 0.9, "swiglu_alpha": 2.0, "router_controller": "quantile", "router_ema_decay": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for _ in range(2):
        config = AutoConfig.from_pretrained(tmp_path)
    assert (config.router_top_p, config.swiglu_alpha) == (0.4, 1.702)
    assert (config.router_controller, config.router_ema_decay) == (None, 0.99)
    messages = [record.getMessage() for record in caplog.records if "nothing reads" in record.getMessage()]
    assert len(messages) == 1
    assert "swiglu_alpha=2.0, " in messages[0]
    assert "router_top_p=0.9" in messages[0]
    (tmp_path / "config.json").write_text(json.dumps(saved | {"code_version": "0.4.0"}))
    with pytest.raises(ValueError, match="which nothing reads"):
        AutoConfig.from_pretrained(tmp_path)


def test_where_every_sparse_layer_hashes_the_remedy_is_fewer_of_them():
    """The advice was to choose the router_type that the configuration has already."""
    with pytest.raises(ValueError, match="lower num_hash_layers, or set router_selection_bias to False"):
        tiny_config(router_selection_bias=True, num_hash_layers=3)
