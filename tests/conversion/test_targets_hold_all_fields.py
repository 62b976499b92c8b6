"""Every field that changes the logits is refused by name by each target, or the export of the changed model has its logits."""

from typing import Any

import pytest
import torch

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.configuration_fields import settings_of
from modeling_moe.conversion import TARGETS
from tests.conversion.test_families_export import CLAMPED, LATENT, MOE, SIGMOID, export, load_whole, randomised


MOA = {"routed_attention": "moa", "attention_experts": 4, "attention_experts_per_tok": 2}
BASE: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "granitemoeshared": {"num_shared_experts": 1},
    "qwen3_moe": {"qk_norm": "head"},
    "qwen2_moe": {"num_shared_experts": 1},
    "deepseek_v3": LATENT | SIGMOID,
    "glm4_moe": SIGMOID,
    "minimax_m2": SIGMOID | {"qk_norm": "full"},
    "gpt_oss": CLAMPED,
    "olmoe": {"qk_norm": "full"},
    "jetmoe": MOA,
}
SHARED = {"num_shared_experts": 1}
SMALL: dict[str, Any] = MOE | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
GROUPED = {"n_group": 2, "topk_group": 1}
DENSE = {"mlp_layer_types": ["dense", "sparse"]}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
# field -> values of the field, and of others without which nothing would read it
CHANGED: dict[str, dict[str, Any]] = {
    "eval_capacity_factor": {"eval_capacity_factor": 0.5},
    "expert_capacity": {"expert_capacity": 2},
    "n_group": GROUPED,
    "group_score": GROUPED | {"group_score": "max"},
    "router_selection_bias": {"router_selection_bias": True},
    "router_selection_bias_on": {"router_selection_bias": True, "router_selection_bias_on": "logits"},
    "scoring_func": {"scoring_func": "sqrtsoftplus"},
    "router_bias": {"router_bias": True},
    "router_input_norm": {"router_input_norm": True},
    "router_logit_scale": {"router_logit_scale": 0.5},
    "router_logit_softcapping": {"router_logit_softcapping": 0.5},
    "norm_topk_prob": {"norm_topk_prob": False},
    "routed_scaling_factor": {"routed_scaling_factor": 2.5},
    "router_expert_scale": {"router_expert_scale": True},
    "num_null_experts": {"num_null_experts": 2},
    "num_copy_experts": {"num_copy_experts": 2},
    "router_gradient": {"router_gradient": "sparsemixer", "router_jitter_noise": 0.1, "norm_topk_prob": False},
    "router_jitter_noise": {"router_gradient": "sparsemixer", "router_jitter_noise": 0.3, "norm_topk_prob": False},
    "router_type": {"router_type": "top_p"},
    "router_hidden_size": {"router_type": "zaya", "router_hidden_size": 8},
    "num_hash_layers": {"num_hash_layers": 1},
    "num_experts": {"num_experts": 3},
    "num_experts_per_tok": {"num_experts_per_tok": 1},
    "moe_intermediate_size": {"moe_intermediate_size": 20},
    "gated_experts": {"gated_experts": False, "swiglu_limit": None},
    "swiglu_limit": {"swiglu_limit": 0.5},
    "swiglu_alpha": {"swiglu_limit": 0.5, "swiglu_alpha": 1.1},
    "moe_latent_size": {"moe_latent_size": 16},
    "shared_expert_intermediate_size": {"num_shared_experts": 1, "shared_expert_intermediate_size": 30},
    "shared_expert_gate": SHARED | {"shared_expert_gate": True},
    "shared_expert_combination_strategy": SHARED | {"shared_expert_combination_strategy": "average"},
    "kv_lora_rank": LATENT | {"kv_lora_rank": 8, "qk_norm": None},
    "q_lora_rank": LATENT | {"q_lora_rank": None, "qk_norm": None},
    "num_attention_heads": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "num_key_value_heads": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12},
    "attention_bias": {"attention_bias": True},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": "head"},
    "qk_norm_after_rope": {"qk_norm": "head", "qk_norm_after_rope": True},
    "attn_output_gate": {"attn_output_gate": True},
    "attention_output_bias": {"attention_output_bias": True},
    "moe_output_bias": {"moe_output_bias": True},
    "routed_attention": MOA,
    "attention_experts": MOA | {"attention_experts": 3},
    "attention_experts_per_tok": MOA | {"attention_experts_per_tok": 1},
    "attention_head_gates": {
        "routed_attention": "moh",
        "attention_experts": 2,
        "attention_experts_per_tok": 1,
        "attention_head_gates": "unit",
    },
    "attention_cluster_window": {
        "routed_attention": "routing_transformer",
        "attention_experts": 2,
        "attention_experts_per_tok": 1,
        "attention_cluster_window": 2,
    },
    "depth_layers": {"depth_layers": [0, 1]},
    "depth_capacity": {"depth_layers": [0, 1], "depth_capacity": 0.5},
    "depth_router": {"depth_layers": [0, 1], "depth_router": "expert_choice", "allow_noncausal": True},
    "clip_qkv": {"clip_qkv": 0.3},
    "attention_multiplier": {"attention_multiplier": 0.7},
    "llama_4_scaling_beta": {
        "llama_4_scaling_beta": 0.5,
        "rope_parameters": PLAIN_ROPE | {"original_max_position_embeddings": 4},
    },
    "scale_attn_by_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "attn_logit_softcapping": {"attn_logit_softcapping": 0.5},
    "attention_sinks": {"attention_sinks": True},
    "sliding_window": {"sliding_window": 3},
    "layer_types": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "final_norm_eps": {"final_norm_eps": 0.1},
    "norm_type": {"norm_type": "rms_plus_one"},
    "norm_bias": {"norm_type": "layer", "norm_bias": False},
    "norm_placement": {"norm_placement": "parallel_shared"},
    "sparse_output_norm": {"sparse_output_norm": True},
    "rope_parameters": {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5}},
    "rope_fp32": {"rope_fp32": True},
    "no_rope_layers": {"no_rope_layers": [1, 0]},
    "position_embedding_type": {"position_embedding_type": "learned"},
    "scale_embeddings": {"scale_embeddings": True},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "vocab_size": {"vocab_size": 80},
    "hidden_size": {"hidden_size": 48, "head_dim": None},
    "intermediate_size": DENSE | {"intermediate_size": 20},
    "num_hidden_layers": {"num_hidden_layers": 1},
    "hidden_act": {"hidden_act": "relu"},
    "residual_multiplier": {"residual_multiplier": 0.3},
    "gated_mlp": DENSE | {"gated_mlp": False, "gated_experts": True},
    "dense_swiglu_limit": DENSE | {"dense_swiglu_limit": 0.1},
    "mlp_bias": {"mlp_bias": True},
    "mlp_layer_types": DENSE,
    "lm_head_bias": {"lm_head_bias": True},
    "logits_scaling": {"logits_scaling": 3.0},
    "final_logit_softcapping": {"final_logit_softcapping": 0.5},
    "tie_word_embeddings": {"tie_word_embeddings": True},
}
# switches of the decoder that none of the targets' families has
OWN_SWITCHES = {
    *("lm_head_bias", "sparse_output_norm", "qk_norm_after_rope", "attn_output_gate", "llama_4_scaling_beta"),
    *("norm_bias", "norm_placement", "router_logit_scale", "router_logit_softcapping", "router_input_norm"),
    *("router_expert_scale", "router_selection_bias_on", "moe_latent_size", "dense_swiglu_limit"),
    *("shared_expert_combination_strategy", "router_gradient", "no_rope_layers", "rope_fp32"),
    *("attn_logit_softcapping", "final_logit_softcapping", "num_null_experts", "num_copy_experts"),
}
# field -> the field that JetMoE names in its place, since one number of JetMoE determines both
LIKEWISE = {
    "num_experts": "attention_experts",
    "num_experts_per_tok": "attention_experts_per_tok",
    "num_key_value_heads": "num_attention_heads",
}
# no other value of this field changes the logits of rotating positions
IDLE = {"max_position_embeddings"}


def test_every_field_that_changes_the_logits_is_listed():
    declared = settings_of(MoEConfig)
    function = {name for name, setting in declared.items() if setting.effect == "function"}
    assert function - IDLE <= set(CHANGED) <= set(declared)


def is_exact(config: MoEConfig, target: str, folder) -> bool:
    """Returns whether transformers computes the logits of a random model from its export."""
    model = randomised(MoEForCausalLM(config))
    model.save_pretrained(folder / "moe")
    export(folder / "moe", target, folder / target)
    ids = torch.randint(3, 80, (2, 12))
    with torch.no_grad():
        return torch.allclose(load_whole(folder / target)(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def built(fields: dict[str, Any]) -> MoEConfig | None:
    """Returns a configuration, or None for features that exclude each other, as latent attention excludes some."""
    try:
        return MoEConfig(**fields)
    except ValueError:
        return None


def changed_configs(target: str) -> dict[str, MoEConfig]:
    """Returns a model that the target holds, changed in one field, for each field of `CHANGED` that can be changed there."""
    made = {name: built(SMALL | BASE[target] | changed) for name, changed in CHANGED.items()}
    return {name: config for name, config in made.items() if config is not None}


@pytest.mark.parametrize("target", TARGETS)
def test_a_switch_that_no_family_of_the_targets_has_is_refused_by_name(target):
    assert not TARGETS[target].reasons(MoEConfig(**SMALL | BASE[target]))
    configs = changed_configs(target)
    found = {name: TARGETS[target].reasons(configs[name]) for name in OWN_SWITCHES & set(configs)}
    for name, reasons in found.items():
        assert any(reason.startswith((f"{name}=", f"{name}[")) for reason in reasons), (name, reasons)
    # latent attention and sigmoid scores exclude the others
    assert len(found) >= (13 if target == "deepseek_v3" else len(OWN_SWITCHES) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_field_is_refused_or_held(target, tmp_path):
    refused, held = set(), set()
    for name, config in changed_configs(target).items():
        if reasons := TARGETS[target].reasons(config):
            named = (*CHANGED[name], LIKEWISE.get(name, name), "no such configuration", "layer_types")
            assert any(text in reason for reason in reasons for text in named), (name, reasons)
            refused.add(name)
        else:
            assert is_exact(config, target, tmp_path / name), name
            held.add(name)
    assert len(refused) > 25
    assert len(held) > 8
