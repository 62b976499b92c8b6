"""Exports to transformers' own families have equal logits and classic names, or are refused with the field's name."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models import (
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granite,
    granitemoeshared,
    jetmoe,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.configuration_fields import settings_of
from modeling_moe.conversion import convert_checkpoint, moe_config
from modeling_moe.conversion.older_names import save_for_older_readers
from modeling_moe.conversion.targets.base import COMPARED_AS, COMPARED_IF, REPEATED, TRAINING
from modeling_moe.conversion.targets.catalogue import TARGETS, choose_target, export_plan
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.json_files import read_json
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
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "mscale_all_dim": 0.7,
}
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
SIGMOID = {"scoring_func": "sigmoid", "router_selection_bias": True}
GROUPS = SIGMOID | {"num_experts": 6, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
MOA = {
    "routed_attention": "moa",
    "attention_experts": 5,
    "attention_experts_per_tok": 3,
    "num_attention_heads": 6,
    "head_dim": 8,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
CLAMPED = {"swiglu_limit": 1.5, "swiglu_alpha": 1.3, "norm_type": "rms_fp32"}
BIASED = {"attention_bias": True, "mlp_bias": True, "router_bias": True, "attention_sinks": True}
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
    "jetmoe": ("jetmoe", MOA | {"attention_output_bias": True, "moe_output_bias": True, "final_norm_eps": 0.1}),
    "jetmoe-bare": ("jetmoe", MOA | {"tie_word_embeddings": True, "routed_scaling_factor": 2.5}),
    "granitemoeshared": ("granitemoeshared", {"num_shared_experts": 1, "shared_expert_intermediate_size": 20}),
    "granitemoeshared-multipliers": (
        "granitemoeshared",
        MULTIPLIERS | {"attention_bias": True, "tie_word_embeddings": True, "routed_scaling_factor": 2.5},
    ),
    "granitemoeshared-head_dim": ("granitemoeshared", {"head_dim": 12, "num_shared_experts": 2}),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT
        | GROUPS
        | {"mlp_layer_types": MIXED, "num_shared_experts": 2, "rope_parameters": YARN}
        | {"attention_multiplier": 10**-0.5 * (0.07 * math.log(8.0) + 1.0) ** 2},
    ),
    "deepseek_v3-bare": (
        "deepseek_v3",
        LATENT | {"scoring_func": "sigmoid", "norm_topk_prob": False, "q_lora_rank": None},
    ),
    "deepseek_v3-padded": (
        "deepseek_v3",
        LATENT | SIGMOID | {"num_shared_experts": 1, "shared_expert_intermediate_size": 30, "attention_bias": True},
    ),
    "glm4_moe": (
        "glm4_moe",
        GROUPS | {"mlp_layer_types": MIXED, "num_shared_experts": 1, "qkv_bias": True, "rope_parameters": PARTIAL},
    ),
    "glm4_moe-bare": ("glm4_moe", {"scoring_func": "sigmoid", "head_dim": 12, "norm_topk_prob": False}),
    "glm4_moe-norm": ("glm4_moe", SIGMOID | {"qk_norm": "head", "tie_word_embeddings": True}),
    "minimax_m2": ("minimax_m2", SIGMOID | {"qk_norm": "full", "head_dim": 12, "rope_parameters": PARTIAL}),
    "minimax_m2-bare": ("minimax_m2", {"scoring_func": "sigmoid", "qk_norm": "full", "routed_scaling_factor": 2.5}),
    "gpt_oss": ("gpt_oss", CLAMPED | BIASED | {"head_dim": 12, "sliding_window": 4, "layer_types": ALTERNATING}),
    "gpt_oss-bare": ("gpt_oss", CLAMPED | {"rope_parameters": YARN | {"mscale_all_dim": 0.0}}),
    "gpt_oss-scaled": ("gpt_oss", CLAMPED | BIASED | {"routed_scaling_factor": 2.5, "hidden_act": "gelu"}),
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
    "granitemoeshared": granitemoeshared.GraniteMoeSharedConfig(
        **SIZE,
        **MULTIPLIERS,
        intermediate_size=24,
        num_local_experts=5,
        num_experts_per_tok=3,
        shared_intermediate_size=20,
    ),
    "deepseek_v3": deepseek_v3.DeepseekV3Config(
        **SIZE | LATENT,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=3,
        topk_group=2,
        first_k_dense_replace=1,
        rope_parameters=YARN,
        num_nextn_predict_layers=0,
    ),
    "glm4_moe": glm4_moe.Glm4MoeConfig(
        **SIZE,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_experts_per_tok=3,
        head_dim=12,
        attention_bias=True,
        use_qk_norm=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
    ),
    "minimax_m2": minimax_m2.MiniMaxM2Config(
        **SIZE, intermediate_size=24, num_local_experts=5, num_experts_per_tok=3, head_dim=12, rotary_dim=6
    ),
    "gpt_oss": gpt_oss.GptOssConfig(
        **SIZE, intermediate_size=24, num_local_experts=5, num_experts_per_tok=3, head_dim=12, sliding_window=4
    ),
    "jetmoe": jetmoe.JetMoeConfig(
        **{name: value for name, value in SIZE.items() if name != "num_attention_heads"},
        intermediate_size=24,
        kv_channels=12,
        num_local_experts=5,
        num_experts_per_tok=3,
        rms_norm_eps=1e-5,
    ),
    "olmoe": olmoe.OlmoeConfig(**HF_EXPERTS, intermediate_size=24, clip_qkv=0.5, router_aux_loss_coef=0.02),
}


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "sinks" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    return model.eval()


def read_folder(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def export(folder, target: str, output):
    """Writes the MoE checkpoint in `folder` in the target's format; returns the written tensors."""
    config = MoEConfig.from_pretrained(folder)
    state = {name: LazyTensor.of(tensor) for name, tensor in read_folder(folder).items()}
    plan = export_plan(config, target)
    before = dict(state)
    lazy = TARGETS[target].tensors(state, config)
    assert state == before  # a caller may go on with the tensors that it gave
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
    if name.startswith("gpt_oss") and not hasattr(gpt_oss.GptOssConfig, "swiglu_limit"):
        pytest.skip("this release of transformers clamps gpt-oss at 7, whatever config.json says")
    target, fields = EXPRESSIBLE[name]
    model = randomised(MoEForCausalLM(MoEConfig(**MOE | fields)))
    model.save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", target, tmp_path / target)
    theirs = load_whole(tmp_path / target)
    assert theirs.config.model_type == target
    assert theirs.config.architectures == [type(theirs).__name__]
    assert theirs.config.eos_token_id == [2, 3]
    assert getattr(theirs.config, "router_aux_loss_coef", 0) == 0
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


@pytest.mark.parametrize("name", [name for name in EXPRESSIBLE if name.endswith("-bare") or "-" not in name])
def test_names_on_disk_are_those_that_transformers_writes(name, tmp_path):
    target, fields = EXPRESSIBLE[name]
    MoEForCausalLM(MoEConfig(**MOE | fields)).save_pretrained(tmp_path / "moe")
    tensors = export(tmp_path / "moe", target, tmp_path / "export")
    load_whole(tmp_path / "export").save_pretrained(tmp_path / "again")
    again = read_folder(tmp_path / "again")
    assert {key: tensor.shape for key, tensor in tensors.items()} == {
        key: tensor.shape for key, tensor in again.items()
    }
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())


DENSE = SIZE | {"intermediate_size": 40}
UPCYCLED = {
    "llama": ("mixtral", llama.LlamaConfig(**DENSE, head_dim=12, rope_parameters=LLAMA3_ROPE)),
    "granite": ("granitemoeshared", granite.GraniteConfig(**DENSE, **MULTIPLIERS)),
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
    (
        "mixtral",
        {"num_shared_experts": 1},
        r"shared_expert_intermediate_size=24 .*; granitemoeshared or qwen2_moe can$",
    ),
    ("mixtral", {"sliding_window": 4, "layer_types": WINDOWS}, r"layer_types\[0\]='full_attention' .*qwen2_moe can$"),
    ("olmoe", {}, r"qk_norm=None .*; mixtral or granitemoeshared or qwen2_moe can$"),
    ("olmoe", HEAD | {"sliding_window": 4}, r"sliding_window=4 \(olmoe has None\), .*; qwen3_moe can$"),
    ("qwen2_moe", {"head_dim": 12}, r"head_dim=12 \(qwen2_moe has 8\); mixtral or granite\w+ can$"),
    (
        "olmoe",
        {"hidden_size": 36, "head_dim": 8},
        r"head_dim=8 \(olmoe has 9\), qk_norm=None .*; mixtral or granite\w+ can$",
    ),
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
        r"attention_multiplier=0.5 \(qwen2_moe has None\); granitemoeshared can$",
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
    (
        "mixtral",
        {"swiglu_limit": 7.0, "swiglu_alpha": 1.5},
        r"for swiglu_limit=7.0 \(mixtral has None\), swiglu_alpha=1.5",
    ),
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
        "granitemoeshared",
        {"norm_topk_prob": False},
        r"norm_topk_prob=False \(granitemoeshared has True\); qwen2_moe can$",
    ),
    ("granitemoeshared", {"qkv_bias": True}, r"for qkv_bias=True \(granitemoeshared has False\); qwen2_moe can$"),
    ("granitemoeshared", {"sliding_window": 4}, r"sliding_window=4 .*; mixtral or qwen2_moe can$"),
    (
        "granitemoeshared",
        {"num_shared_experts": 1, "shared_expert_gate": True},
        r"for shared_expert_gate=True \(granitemoeshared has False\); qwen2_moe can$",
    ),
    ("deepseek_v3", {"scoring_func": "sigmoid"}, r"for kv_lora_rank=None \(deepseek_v3 has 512\); glm4_moe can$"),
    (
        "deepseek_v3",
        LATENT,
        r"for scoring_func='softmax' \(deepseek_v3 has 'sigmoid'\); no other target comes nearer$",
    ),
    (
        "deepseek_v3",
        LATENT | SIGMOID | {"attention_multiplier": 0.5},
        r"for attention_multiplier=0.5 \(deepseek_v3 has None",
    ),
    ("deepseek_v3", LATENT | GROUPS | {"group_score": "max"}, r"for group_score='max' \(deepseek_v3 has 'top2sum'\);"),
    (
        "deepseek_v3",
        LATENT | SIGMOID | {"mlp_layer_types": MIXED[::-1]},
        r"for mlp_layer_types\[2\]='dense' \(deepseek_v3 has 'sparse'\);",
    ),
    (
        "glm4_moe",
        SIGMOID | {"num_shared_experts": 1, "shared_expert_gate": True},
        r"for shared_expert_gate=True \(glm4_moe has False\);",
    ),
    ("glm4_moe", SIGMOID | {"attention_bias": True}, r"for attention_bias=True \(glm4_moe has False\);"),
    ("glm4_moe", SIGMOID | {"sliding_window": 4}, r"for sliding_window=4 \(glm4_moe has None\), layer_types"),
    ("glm4_moe", SIGMOID | {"qk_norm": "full"}, r"for qk_norm='full' \(glm4_moe has None\); minimax_m2 can$"),
    ("glm4_moe", LATENT | SIGMOID, r"for kv_lora_rank=16 \(glm4_moe has None\); deepseek_v3 can$"),
    ("glm4_moe", {"scoring_func": "sqrtsoftplus"}, r"for scoring_func='sqrtsoftplus' \(glm4_moe has 'sigmoid'\);"),
    ("minimax_m2", SIGMOID, r"for qk_norm=None \(minimax_m2 has 'full'\); glm4_moe can$"),
    (
        "minimax_m2",
        GROUPS | {"qk_norm": "full", "num_shared_experts": 1},
        r"shared_expert_intermediate_size=24 \(minimax_m2 has 0\), n_group=3|n_group=3 \(minimax_m2 has 1\), topk_group=2",
    ),
    ("gpt_oss", {"norm_type": "rms_fp32"}, r"for swiglu_limit=None \(gpt_oss has 7.0\);"),
    ("gpt_oss", CLAMPED | {"num_shared_experts": 1}, r"for shared_expert_intermediate_size=24 \(gpt_oss has 0\);"),
    ("gpt_oss", CLAMPED | {"norm_topk_prob": False}, r"for norm_topk_prob=False \(gpt_oss has True\);"),
    (
        "gpt_oss",
        CLAMPED | SIGMOID,
        r"for router_selection_bias=True .*, scoring_func='sigmoid' \(gpt_oss has 'softmax'\);",
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, case[0]) for name, case in EXPRESSIBLE.items() if case[0] not in ("qwen2_moe", "granitemoeshared")]
    + [
        ("qwen2_moe", "qwen2_moe"),
        ("granitemoeshared", "granitemoeshared"),
        ("granitemoeshared-multipliers", "granitemoeshared"),
        # vLLM and llama.cpp do not read Granite's head_dim, so that one server runs each target
        ("granitemoeshared-head_dim", "granitemoeshared"),
        ("qwen2_moe-ungated", "qwen2_moe"),
    ],
)
def test_auto_takes_the_target_that_most_servers_run(name, expected):
    choice = choose_target(MoEConfig(**MOE | EXPRESSIBLE[name][1]))
    assert choice.target == expected
    assert choice.reason.startswith(f"{expected} holds this model exactly")


def test_auto_names_the_other_targets_and_their_servers():
    choice = choose_target(MoEConfig(**MOE | {"sliding_window": 4}))
    assert choice.reason == ("mixtral holds this model exactly; qwen2_moe (vLLM, transformers) can hold it too.")


def test_auto_names_only_the_nearest_target_and_its_reasons_if_none_can():
    with pytest.raises(UserError, match=r"no target holds this model, .*nearest target, mixtral, ") as raised:
        choose_target(MoEConfig(**MOE | {"num_null_experts": 1}))
    told = str(raised.value)
    assert "num_null_experts=1" in told
    assert "gpt_oss" not in told
    assert len(told) < 250


def test_rounding_is_told_from_an_exact_factor():
    for target, factor, rounds in (("mixtral", 4, False), ("mixtral", 0.5, False), ("mixtral", 2.5, True)):
        assert TARGETS[target].rounds(MoEConfig(**MOE | {"routed_scaling_factor": factor})) is rounds
    assert not TARGETS["glm4_moe"].rounds(MoEConfig(**MOE | GROUPS))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}),
        ("glm4_moe", {"partial_rotary_factor": 0.5, "head_dim": 8, "num_nextn_predict_layers": 0}),
        ("glm4_moe-bare", {"partial_rotary_factor": 1.0, "n_shared_experts": 1}),
        ("minimax_m2", {"rotary_dim": 6, "scoring_func": "sigmoid", "use_routing_bias": True}),
        ("gpt_oss-bare", {"attention_bias": True, "sliding_window": 128}),
        ("granitemoeshared", {"attention_multiplier": 8**-0.5, "embedding_multiplier": 1.0, "logits_scaling": 1.0}),
    ],
)
def test_config_json_has_what_servers_read(name, expected, tmp_path):
    target, fields = EXPRESSIBLE[name]
    save_for_older_readers(export_plan(MoEConfig(**MOE | fields), target), tmp_path)
    written = read_json(tmp_path / "config.json")
    assert written | expected == written


def test_unknown_target_is_refused():
    with pytest.raises(
        UserError, match="target 'grok' is unknown: it must be moe, auto or one of mixtral, granitemoeshared"
    ):
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
    assert {*TRAINING, *REPEATED, *COMPARED_IF, *COMPARED_AS} <= set(settings_of(MoEConfig))
    assert len({*TRAINING, *REPEATED, *COMPARED_IF}) == len(TRAINING) + len(REPEATED) + len(COMPARED_IF)


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
    "attention_entropy_loss_coef": 0.5,
    "attention_expert_dropout": 0.5,
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
    "attention_entropy_loss_coef": {"routed_attention": "switch_head", "num_key_value_heads": 4},
    "attention_expert_dropout": {"routed_attention": "switch_head", "num_key_value_heads": 4},
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
