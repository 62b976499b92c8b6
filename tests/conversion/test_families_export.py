"""Exports to transformers' own families have equal logits and classic names, or are refused with the field's name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models import llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.configuration_fields import settings_of
from modeling_moe.conversion import convert_checkpoint, moe_config
from modeling_moe.conversion.families.export import COMPARED_IF, DETAILS, TARGETS, TRAINING, export_plan
from modeling_moe.conversion.older_names import save_for_older_readers
from modeling_moe.utils.errors import UserError
from tests.builders import LLAMA3_ROPE


SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
MOE = SIZE | {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0,
}
MIXED = ["dense", "sparse", "sparse"]
WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
EXPRESSIBLE = {
    "mixtral": ("mixtral", {}),
    "mixtral-head_dim-gelu": ("mixtral", {"head_dim": 12, "hidden_act": "gelu"}),
    "mixtral-window-tied": ("mixtral", {"sliding_window": 4, "tie_word_embeddings": True}),
    "mixtral-rope-scaling": ("mixtral", {"rope_parameters": LLAMA3_ROPE, "routed_scaling_factor": 2.5}),
    "mixtral-trained-elsewise": ("mixtral", {"capacity_factor": 0.5, "router_gradient": "dense"}),
    "mixtral-all-groups": ("mixtral", {"num_experts": 6, "n_group": 2, "topk_group": 2, "gated_mlp": True}),
    "mixtral-said-otherwise": ("mixtral", {"attention_multiplier": 8**-0.5, "no_rope_layers": [1, 1, 1]}),
    "qwen2_moe": ("qwen2_moe", {"qkv_bias": True, "num_shared_experts": 2, "shared_expert_gate": True}),
    "qwen2_moe-ungated": ("qwen2_moe", {"num_shared_experts": 1, "norm_topk_prob": False}),
    "qwen2_moe-unshared-dense": ("qwen2_moe", {"qkv_bias": True, "mlp_layer_types": MIXED}),
    "qwen2_moe-windows": ("qwen2_moe", {"sliding_window": 4, "layer_types": WINDOWS, "routed_scaling_factor": 0.5}),
    "qwen2_moe-ungated-dense-scaled": (
        "qwen2_moe",
        {"mlp_layer_types": MIXED, "num_shared_experts": 1, "routed_scaling_factor": 4, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", {"qk_norm": "head", "head_dim": 12}),
    "qwen3_moe-dense": ("qwen3_moe", {"qk_norm": "head", "mlp_layer_types": MIXED, "norm_topk_prob": False}),
    "qwen3_moe-window": (
        "qwen3_moe",
        {"qk_norm": "head", "sliding_window": 4, "attention_bias": True, "routed_scaling_factor": 2},
    ),
    "olmoe": ("olmoe", {"qk_norm": "full", "clip_qkv": 0.5, "norm_topk_prob": False}),
    "olmoe-bias": ("olmoe", {"qk_norm": "full", "attention_bias": True, "routed_scaling_factor": 2.5}),
}
HF_EXPERTS = SIZE | {"num_experts": 5, "num_experts_per_tok": 3}
QWEN_EXPERTS = HF_EXPERTS | {"intermediate_size": 40, "moe_intermediate_size": 24}
SOURCES = {
    "mixtral": mixtral.MixtralConfig(
        **SIZE, intermediate_size=24, num_local_experts=5, head_dim=12, sliding_window=4, router_jitter_noise=0.1
    ),
    "qwen2_moe": qwen2_moe.Qwen2MoeConfig(**QWEN_EXPERTS, shared_expert_intermediate_size=20, mlp_only_layers=[1]),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(**QWEN_EXPERTS, head_dim=12, tie_word_embeddings=True),
    "olmoe": olmoe.OlmoeConfig(**HF_EXPERTS, intermediate_size=24, clip_qkv=0.5, router_aux_loss_coef=0.02),
}


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def read_folder(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def export(folder, target: str, output):
    """Writes the MoE checkpoint in `folder` in the target's format; returns the written tensors."""
    config = MoEConfig.from_pretrained(folder)
    state = {name: LazyTensor.of(tensor) for name, tensor in read_folder(folder).items()}
    plan = export_plan(config, target)
    lazy = TARGETS[target].tensors(state, config)
    tensors = {name: tensor.read().contiguous() for name, tensor in lazy.items()}
    for name, tensor in tensors.items():
        assert (tuple(tensor.shape), tensor.dtype) == (lazy[name].shape, lazy[name].dtype)
    output.mkdir()
    save_for_older_readers(plan, output)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return tensors


def load_whole(folder):
    """Loads a folder with transformers and asserts that no tensor is missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_same_logits(name, tmp_path):
    target, fields = EXPRESSIBLE[name]
    model = randomised(MoEForCausalLM(MoEConfig(**MOE | fields)))
    model.save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", target, tmp_path / target)
    theirs = load_whole(tmp_path / target)
    assert theirs.config.model_type == target
    assert theirs.config.architectures == [type(theirs).__name__]
    assert theirs.config.eos_token_id == [2, 3]
    assert theirs.config.router_aux_loss_coef == 0
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixtral", {f"block_sparse_moe.experts.4.{part}.weight" for part in ("w1", "w2", "w3")}),
        (
            "qwen2_moe-unshared-dense",
            {"mlp.shared_expert.down_proj.weight", "mlp.shared_expert_gate.weight", "self_attn.k_proj.bias"},
        ),
        ("qwen3_moe", {f"mlp.experts.4.{part}_proj.weight" for part in ("gate", "up", "down")}),
        ("olmoe", {"mlp.gate.weight", "mlp.experts.0.up_proj.weight"}),
    ],
)
def test_classic_names_on_disk(name, expected, tmp_path):
    target, fields = EXPRESSIBLE[name]
    MoEForCausalLM(MoEConfig(**MOE | fields)).save_pretrained(tmp_path / "moe")
    tensors = export(tmp_path / "moe", target, tmp_path / target)
    assert {f"model.layers.2.{tensor}" for tensor in expected} <= set(tensors)
    assert ("model.layers.2.block_sparse_moe.gate.weight" in tensors) == (target == "mixtral")
    # a checkpoint has one tensor for each expert
    assert all(tensor.dim() <= 2 for tensor in tensors.values())


@pytest.mark.parametrize("target", SOURCES)
def test_round_trip_is_bitwise(target, tmp_path):
    source = SOURCES[target]
    randomised(AutoModelForCausalLM.from_config(source)).save_pretrained(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    tensors = export(tmp_path / "moe", target, tmp_path / "back")
    expected = read_folder(tmp_path / "source")
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    back = TARGETS[target].config(moe_config(source))
    for name in set(source.to_dict()) - {"architectures", "dtype", "max_window_layers"}:
        assert getattr(back, name) == getattr(source, name), name


DENSE = SIZE | {"intermediate_size": 40}
UPCYCLED = {
    "llama": ("mixtral", llama.LlamaConfig(**DENSE, head_dim=12, rope_parameters=LLAMA3_ROPE)),
    "mistral": ("mixtral", mistral.MistralConfig(**DENSE, sliding_window=4)),
    "qwen2": ("qwen2_moe", qwen2.Qwen2Config(**DENSE, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("qwen3_moe", qwen3.Qwen3Config(**DENSE, head_dim=12, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("family", UPCYCLED)
def test_copies_of_a_dense_network_compute_what_it_does(family, tmp_path):
    target, source = UPCYCLED[family]
    dense = randomised(AutoModelForCausalLM.from_config(source))
    model = MoEForCausalLM(MoEConfig(**moe_config(source).to_dict() | {"mlp_layer_types": ["sparse"] * 3})).eval()
    weights = {}
    for name, tensor in dense.state_dict().items():
        before, is_mlp, part = name.partition(".mlp.")
        names = [f"{before}.mlp.experts.{expert}.{part}" for expert in range(8)] if is_mlp else [name]
        weights |= dict.fromkeys(names, tensor)
    model.load_state_dict(weights | {k: v for k, v in model.state_dict().items() if k.endswith("mlp.gate.weight")})
    model.save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", target, tmp_path / target)
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(load_whole(tmp_path / target)(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)


def test_weights_absorb_fields_exactly_in_bf16(tmp_path):
    fields = {"num_shared_experts": 1, "routed_scaling_factor": 4}
    model = randomised(MoEForCausalLM(MoEConfig(**MOE | fields))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "moe")
    ours = read_folder(tmp_path / "moe")
    theirs = export(tmp_path / "moe", "qwen2_moe", tmp_path / "qwen2_moe")
    mlp = "model.layers.1.mlp."
    assert torch.equal(theirs[f"{mlp}experts.2.down_proj.weight"] / 4, ours[f"{mlp}experts.2.down_proj.weight"])
    assert torch.equal(theirs[f"{mlp}experts.2.up_proj.weight"], ours[f"{mlp}experts.2.up_proj.weight"])
    down = ours[f"{mlp}shared_experts.down_proj.weight"]
    assert torch.equal(theirs[f"{mlp}shared_expert.down_proj.weight"] / 2, down)
    dtypes = {name: tensor.dtype for name, tensor in theirs.items()}
    routers = {name for name in dtypes if name.endswith("mlp.gate.weight")}
    assert {dtypes.pop(name) for name in routers} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}


HEAD = {"qk_norm": "head"}
REFUSED = [
    ("mixtral", {"norm_topk_prob": False}, r"norm_topk_prob=False \(mixtral has True\); qwen2_moe can$"),
    ("mixtral", {"mlp_layer_types": MIXED}, r"mlp_layer_types\[0\]='dense' \(mixtral has 'sparse'\); qwen2_moe can$"),
    ("mixtral", HEAD | {"head_dim": 12}, r"qk_norm='head' \(mixtral has None\); qwen3_moe can$"),
    ("mixtral", {"qkv_bias": True}, r"qkv_bias=True \(mixtral has False\); qwen2_moe can$"),
    ("mixtral", {"qk_norm": "full", "clip_qkv": 2.0}, r"qk_norm='full' .*, clip_qkv=2.0 .*; olmoe can$"),
    ("mixtral", {"num_shared_experts": 1}, r"shared_expert_intermediate_size=24 \(mixtral has 0\); qwen2_moe can$"),
    ("mixtral", {"sliding_window": 4, "layer_types": WINDOWS}, r"layer_types\[0\]='full_attention' .*qwen2_moe can$"),
    ("olmoe", {}, r"qk_norm=None \(olmoe has 'full'\); mixtral or qwen2_moe can$"),
    ("olmoe", HEAD | {"sliding_window": 4}, r"sliding_window=4 \(olmoe has None\), .*; qwen3_moe can$"),
    ("qwen2_moe", {"head_dim": 12}, r"head_dim=12 \(qwen2_moe has 8\); mixtral can$"),
    ("olmoe", {"hidden_size": 36, "head_dim": 8}, r"head_dim=8 \(olmoe has 9\), qk_norm=None .*; mixtral can$"),
    ("qwen3_moe", HEAD | {"num_null_experts": 1}, r"num_null_experts=1 \(qwen3_moe has 0\); no other target"),
    (
        "mixtral",
        {"num_null_experts": 1, "num_experts_per_tok": 6},
        r"no such configuration \(num_experts_per_tok is 6",
    ),
    ("mixtral", {"num_copy_experts": 1}, r"num_copy_experts=1 \(mixtral has 0\); no other"),
    ("mixtral", {"scoring_func": "sigmoid"}, r"scoring_func='sigmoid' \(mixtral has 'softmax'\)"),
    ("mixtral", {"router_selection_bias": True}, r"router_selection_bias=True \(mixtral has False\)"),
    ("mixtral", {"num_experts": 6, "n_group": 3, "topk_group": 2}, r"n_group=3 \(mixtral has 1\)"),
    ("mixtral", {"router_type": "hash"}, r"router_type='hash' \(mixtral has 'topk'\)"),
    ("mixtral", {"num_hash_layers": 1}, r"num_hash_layers=1 \(mixtral has 0\)"),
    ("mixtral", {"router_type": "expert_choice", "allow_noncausal": True}, "router_type='expert_choice'"),
    (
        "mixtral",
        {"router_gradient": "sparsemixer", "router_jitter_noise": 0.1},
        r"router_gradient='sparsemixer' .*the nearest, qwen2_moe, fails for router_gradient='sparsemixer'",
    ),
    ("mixtral", {"eval_capacity_factor": 1.0}, r"eval_capacity_factor=1.0 \(mixtral has None\)"),
    ("mixtral", {"expert_capacity": 2}, r"expert_capacity=2 \(mixtral has None\)"),
    ("mixtral", {"mlp_bias": True}, r"mlp_bias=True \(mixtral has False\)"),
    ("mixtral", {"gated_experts": False}, r"gated_experts=False \(mixtral has True\)"),
    ("qwen3_moe", HEAD | {"gated_mlp": False, "gated_experts": True, "mlp_layer_types": MIXED}, "gated_mlp=False"),
    (
        "mixtral",
        HEAD | {"mlp_layer_types": MIXED, "mlp_bias": True},
        r"; nor can another target; the nearest, qwen3_moe, fails for mlp_bias=True \(qwen3_moe has False\)$",
    ),
    ("mixtral", {"norm_type": "layer"}, r"norm_type='layer' \(mixtral has 'rms'\)"),
    ("mixtral", {"norm_type": "rms_fp32"}, r"norm_type='rms_fp32' \(mixtral has 'rms'\)"),
    ("mixtral", {"norm_placement": "post"}, r"norm_placement='post' \(mixtral has 'pre'\); no other"),
    (
        "qwen2_moe",
        {"attention_multiplier": 0.5},
        r"attention_multiplier=0.5 \(qwen2_moe has None\); no other target comes nearer$",
    ),
    ("qwen2_moe", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30.0 \(qwen2_moe has None\)"),
    ("mixtral", {"attention_sinks": True}, "attention_sinks=True"),
    ("mixtral", {"attn_output_gate": True}, r"attn_output_gate=True \(mixtral has False\)"),
    ("qwen3_moe", HEAD | {"qk_norm_after_rope": True}, r"qk_norm_after_rope=True \(qwen3_moe has False\)"),
    ("mixtral", {"sparse_output_norm": True}, r"sparse_output_norm=True \(mixtral has False\)"),
    (
        "mixtral",
        {"norm_type": "layer", "norm_bias": False},
        r"norm_type='layer' .*, norm_bias=False \(mixtral has True\)",
    ),
    ("mixtral", {"norm_placement": "parallel_shared"}, r"norm_placement='parallel_shared' \(mixtral has 'pre'\)"),
    (
        "mixtral",
        {
            "rope_parameters": {"rope_theta": 1e4, "original_max_position_embeddings": 8},
            "llama_4_scaling_beta": 0.1,
        },
        r"llama_4_scaling_beta=0.1 \(mixtral has None\)",
    ),
    ("mixtral", {"lm_head_bias": True}, r"lm_head_bias=True \(mixtral has False\)"),
    (
        "mixtral",
        {"position_embedding_type": "learned"},
        r"for position_embedding_type='learned' \(mixtral has 'rope'\);",
    ),
    ("mixtral", {"no_rope_layers": [1, 1, 0]}, r"no_rope_layers=\[1, 1, 0\] \(mixtral has None\)"),
    ("mixtral", {"scale_embeddings": True}, "scale_embeddings=True"),
    ("mixtral", {"logits_scaling": 8.0, "residual_multiplier": 0.5}, "residual_multiplier=0.5 .*, logits_scaling=8.0"),
    ("mixtral", {"router_bias": True}, "router_bias=True"),
    ("mixtral", {"swiglu_limit": 7.0, "swiglu_alpha": 1.5}, r"for swiglu_limit=7.0 \(mixtral has None\);"),
    (
        "mixtral",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        r"for kv_lora_rank=16 \(mixtral has None\);",
    ),
    (
        "mixtral",
        {
            "rope_parameters": {
                name: {"rope_type": "default", "rope_theta": 100.0} for name in ("full_attention", "sliding_attention")
            }
        },
        "rope_parameters=.*sliding_attention",
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        "rope_parameters=.*partial_rotary_factor",
    ),
]


@pytest.mark.parametrize(("target", "fields", "message"), REFUSED)
def test_refusal_names_field_and_nearest_target(target, fields, message):
    with pytest.raises(UserError, match=message):
        export_plan(MoEConfig(**MOE | fields), target)


def test_unknown_target_is_refused():
    with pytest.raises(UserError, match="target 'grok' is unknown: it must be moe or one of mixtral, qwen2_moe"):
        export_plan(MoEConfig(**MOE), "grok")


def test_field_that_no_table_names_is_compared(monkeypatch):
    declared = settings_of(MoEConfig)
    monkeypatch.setitem(declared, "new_switch", declared["attention_bias"])
    monkeypatch.setattr(MoEConfig, "new_switch", False, raising=False)
    config = MoEConfig(**MOE)
    assert TARGETS["mixtral"].reasons(config) == []
    config.new_switch = True
    assert TARGETS["mixtral"].reasons(config) == ["new_switch=True (mixtral has False)"]


def test_tables_name_fields_that_exist_once():
    assert {*TRAINING, *DETAILS, *COMPARED_IF} <= set(settings_of(MoEConfig))
    assert len({*TRAINING, *DETAILS, *COMPARED_IF}) == len(TRAINING) + len(DETAILS) + len(COMPARED_IF)


CHANGED = {
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "experts_recompute": True,
    "allow_noncausal": True,
    "expected_experts_per_tok": 1,
    "router_controller": "quantile",
    "router_bias_update_rate": 0.1,
    "router_ema_decay": 0.5,
    "router_jitter_noise": 0.5,
    "router_sparsity_coef": 0.5,
    "router_sparsity_step": 2.0,
    "capacity_factor": 0.5,
    "router_aux_loss_coef": 0.5,
    "router_aux_loss_scope": "global",
    "router_z_loss_coef": 0.5,
    "router_seq_aux_loss_coef": 0.5,
    "router_importance_loss_coef": 0.5,
    "router_load_loss_coef": 0.5,
    "router_entropy_loss_coef": 0.5,
    "output_router_logits": True,
    "use_cache": False,
    "pad_token_id": 5,
    "bos_token_id": 5,
    "eos_token_id": 5,
}


# fields without which a changed one would be refused, as nothing would read it
READERS = {
    "expected_experts_per_tok": {
        "router_selection_bias": True,
        "router_controller": "proportional",
        "router_bias_update_rate": 0.1,
    },
    "router_ema_decay": {"router_selection_bias": True, "router_controller": "quantile"},
    "router_load_loss_coef": {"router_type": "noisy_topk"},
    "router_sparsity_coef": {"router_type": "remoe"},
    "router_sparsity_step": {"router_type": "remoe"},
}


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_fields_not_compared_leave_the_logits_alone(name):
    fields = MOE | READERS.get(name, {"router_selection_bias": True})
    model = randomised(MoEForCausalLM(MoEConfig(**fields)))
    config = MoEConfig(**fields | {name: CHANGED[name]})
    assert getattr(config, name) != getattr(model.config, name)
    other = MoEForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(3, 99, (2, 9))
    assert torch.equal(other(ids).logits, model(ids).logits)
