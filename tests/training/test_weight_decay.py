"""These tests check which parameters `finetune` lets weight decay shrink."""

from transformers import TrainingArguments

from modeling_moe.training.trainer import FinetuneTrainer
from tests.builders import tiny_model


def test_weight_decay_spares_norms_biases_and_learned_factors(tmp_path):
    """An expert's factor of 1 that decayed to 0 would switch the expert off."""
    model = tiny_model(
        router_input_norm=True,
        router_expert_scale=True,
        router_bias=True,
        mlp_bias=True,
        qk_norm="head",
        attention_sinks=True,
        attn_implementation="eager",
    )
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    groups = FinetuneTrainer(model=model, args=args).create_optimizer().param_groups
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {name_of[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {name_of[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | spared == set(name_of.values())
    gate = "model.layers.0.mlp.gate."
    assert {gate + name for name in ("input_scale", "expert_scale", "bias")} <= spared
    assert "model.layers.0.self_attn.sinks" in spared
    assert gate + "weight" in decayed
    assert not any("norm" in name or "bias" in name for name in decayed)
