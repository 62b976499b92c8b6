# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps Mixture-of-Experts families to a MoE: fields of the configuration and tensors.

Two layouts of experts are accepted: one tensor for each expert, as on disk, and transformers' fused tensors in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import COMMON, Family, SourceFields, parameters


# part of a tensor's name in a source -> part of the name in a MoE; no family uses a part for anything else
RENAMED = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w3.": ".up_proj.",
    ".w2.": ".down_proj.",
    ".shared_expert.": ".shared_experts.",
    ".mlp.router.": ".mlp.gate.",
}
# in DeepSeek-V3's fp8 checkpoints, a square of weights with this side shares a scale
FP8_BLOCK = 128


def _sparse(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields that all sparse families share: the given ones of `COMMON`, and the number of experts."""
    fields.refuse_partial_rotation()
    common = {name: value for name, value in fields.same(*COMMON).items() if value is not None}
    # configurations of one family use either the family's name for the number or transformers' standard name
    counts = [fields.take(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    return common | {
        "num_experts": next((count for count in counts if count is not None), None),
        "num_experts_per_tok": fields.take("num_experts_per_tok"),
        "output_router_logits": fields.take("output_router_logits", False),
        "router_z_loss_coef": 0.0,
    }


def _standard(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of [`_sparse`], head_dim and the coefficient of transformers' balance loss."""
    return _sparse(fields) | fields.same("head_dim", "router_aux_loss_coef")


def _mixtral(fields: SourceFields) -> dict[str, Any]:
    return _standard(fields) | fields.same("router_jitter_noise", "sliding_window") | {"norm_topk_prob": True}


def _qwen(fields: SourceFields) -> dict[str, Any]:
    dense, step = fields.take("mlp_only_layers") or [], fields.take("decoder_sparse_step", 1)
    layers = range(fields.take("num_hidden_layers"))
    # transformers' configuration has already merged these two into sliding_window and layer_types
    fields.same("use_sliding_window", "max_window_layers")
    if fields.take("use_sliding_window") and fields.take("sliding_window") == 0:
        raise UserError(
            f"sliding_window is 0 in the config.json of this {fields.model_type} model: set use_sliding_window to false"
        )
    return _standard(fields) | {
        "moe_intermediate_size": fields.take("moe_intermediate_size"),
        "norm_topk_prob": fields.take("norm_topk_prob"),
        "sliding_window": fields.take("sliding_window") or None,
        "mlp_layer_types": ["dense" if i in dense or (i + 1) % step else "sparse" for i in layers],
    }


def _qwen2_moe(fields: SourceFields) -> dict[str, Any]:
    same = fields.same("qkv_bias", "layer_types", "shared_expert_intermediate_size")
    return _qwen(fields) | same | {"num_shared_experts": 1, "shared_expert_gate": True}


def _qwen3_moe(fields: SourceFields) -> dict[str, Any]:
    return _qwen(fields) | fields.same("attention_bias") | {"qk_norm": "head"}


def _olmoe(fields: SourceFields) -> dict[str, Any]:
    return _standard(fields) | fields.same("attention_bias", "clip_qkv", "norm_topk_prob") | {"qk_norm": "full"}


def _gpt_oss(fields: SourceFields) -> dict[str, Any]:
    fields.require("hidden_act", "silu")
    _require_quantization(fields, "mxfp4")
    # these repeat num_experts_per_tok and a number in rope_parameters
    fields.require("experts_per_token", None, fields.take("num_experts_per_tok"))
    fields.take("initial_context_length")
    same = _standard(fields) | fields.same("attention_bias", "sliding_window", "layer_types")
    return same | {
        "norm_type": "rms_fp32",
        "attention_sinks": True,
        "moe_intermediate_size": fields.take("intermediate_size"),
        "mlp_bias": True,
        # older releases of transformers have these two as constants in the model
        "swiglu_limit": fields.take("swiglu_limit", 7.0),
        "swiglu_alpha": fields.take("swiglu_alpha", 1.702),
        "router_bias": True,
        "norm_topk_prob": True,
    }


def _deepseek_sparse(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields that DeepSeek's three generations share."""
    dense, every = fields.take("first_k_dense_replace", 0), fields.take("moe_layer_freq", 1)
    layers = range(fields.take("num_hidden_layers"))
    fields.take("ep_size")
    return _sparse(fields) | {
        "attention_bias": fields.take("attention_bias", False),
        "moe_intermediate_size": fields.take("moe_intermediate_size"),
        "mlp_layer_types": ["sparse" if i >= dense and i % every == 0 else "dense" for i in layers],
        "num_shared_experts": fields.take("n_shared_experts") or 0,
    }


def _deepseek_balance(fields: SourceFields) -> dict[str, Any]:
    """Returns the balance loss of the first two generations, which transformers' models do not compute.

    DeepSeek's loss is 1 in balance, where `router_aux_loss_coef` weighs one that is K in balance.
    """
    alpha, top_k = fields.take("aux_loss_alpha", 0.0), fields.take("num_experts_per_tok")
    if isinstance(alpha, (int, float)) and isinstance(top_k, int) and top_k > 0:  # MoEConfig refuses other values
        alpha = alpha / top_k
    return {
        "router_aux_loss_coef": alpha,
        "router_aux_loss_scope": "sequence" if fields.take("seq_aux", True) else "batch",
    }


def _deepseek(fields: SourceFields) -> dict[str, Any]:
    fields.require("scoring_func", "softmax")
    values = _deepseek_sparse(fields) | _deepseek_balance(fields)
    # transformers has no class for this model, so rope_theta is still outside rope_parameters
    rope = {"rope_theta": fields.take("rope_theta", 10000.0)} | (fields.take("rope_parameters") or {})
    # the model's own code does not renormalise the weight of a single expert
    renormalise = bool(fields.take("norm_topk_prob", False)) and values["num_experts_per_tok"] > 1
    return values | {"rope_parameters": rope, "norm_topk_prob": renormalise}


def _latent_attention(fields: SourceFields) -> dict[str, Any]:
    """Reads the fields of multi-head latent attention; yarn's `mscale_all_dim` is merged into the scale of q·k."""
    widths = fields.same("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    # both fields follow from the widths, and transformers' model fails on other values
    plain, rotated = widths["qk_nope_head_dim"], widths["qk_rope_head_dim"]
    fields.require("head_dim", rotated, None)
    fields.require("qk_head_dim", plain + rotated, None)
    rope, scale = fields.take("rope_parameters"), None
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        mscale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
        scale = (plain + rotated) ** -0.5 * mscale * mscale
    return widths | {"attention_multiplier": scale}


def _deepseek_v2(fields: SourceFields) -> dict[str, Any]:
    fields.require("scoring_func", "softmax")
    fields.require("topk_method", "greedy", "group_limited_greedy")
    fields.require("mlp_bias", False)
    # if it is true, DeepSeek's code renormalises and transformers does not
    fields.require("norm_topk_prob", False, None)
    groups: dict[str, Any] = fields.same("n_group", "topk_group")
    if fields.take("topk_method") == "greedy":
        groups = {"n_group": 1, "topk_group": 1}
    if isinstance(groups["n_group"], int) and groups["n_group"] > 1:
        groups["group_score"] = "max"
    router = groups | {"norm_topk_prob": False} | fields.same("routed_scaling_factor")
    return _deepseek_sparse(fields) | _deepseek_balance(fields) | _latent_attention(fields) | router


def _deepseek_v3(fields: SourceFields) -> dict[str, Any]:
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    fields.require("rope_interleave", True)
    fields.require("seq_aux", True)
    _require_quantization(fields, "fp8", weight_block_size=[FP8_BLOCK, FP8_BLOCK])
    # the layers that predict further tokens are not converted
    fields.same("num_nextn_predict_layers", "num_mtp_layers")
    router = fields.same("n_group", "topk_group", "routed_scaling_factor")
    router |= {
        # the family treats null as false
        "norm_topk_prob": bool(fields.take("norm_topk_prob")),
        "scoring_func": "sigmoid",
        "group_score": "top2sum",
        "router_selection_bias": True,
        "router_aux_loss_coef": 0.0,
        "router_seq_aux_loss_coef": fields.take("aux_loss_alpha", 0.0),
    }
    return _deepseek_sparse(fields) | _latent_attention(fields) | router


def _require_quantization(fields: SourceFields, method: str, **settings: Any) -> None:
    """Refuses a quantised source that the family's `tensors` function cannot read.

    Raises:
        UserError: names the settings that can be read.
    """
    found = fields.take("quantization_config")
    wanted = {"quant_method": method} | settings
    if found and any(found.get(name) != value for name, value in wanted.items()):
        raise UserError(
            f"quantization_config is {found!r} in the config.json of this {fields.model_type} model, which cannot be "
            f"read: only {wanted!r} can."
        )


def _pairs_to_halves(width: int, plain: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that reorders the last `width - plain` rows of each head from interleaved pairs to halves."""
    order = [*range(plain), *range(plain, width, 2), *range(plain + 1, width, 2)]
    return lambda tensor: tensor.unflatten(0, (-1, width))[:, order].flatten(0, 1)


def _unfused(name: str, tensor: LazyTensor) -> State:
    """Splits fused experts: `experts.gate_up_proj` (E, 2I, H), gate first, or `experts.down_proj` (E, H, I)."""
    prefix, _, kind = name.rpartition(".")
    width = tensor.shape[1] // 2
    parts = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
    if kind == "down_proj":
        parts = {kind: slice(None)}
    return {
        f"{prefix}.{e}.{part}.weight": tensor[e, rows] for e in range(tensor.shape[0]) for part, rows in parts.items()
    }


def _moe_tensors(state: State, config: MoEConfig) -> State:
    """Renames the tensors of all families except gpt-oss and splits fused experts."""
    tensors = {}
    for name, tensor in parameters(state, config).items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        tensors |= _unfused(name, tensor) if fused else {name: tensor}
    return tensors


def _latent_tensors(state: State, config: MoEConfig) -> State:
    """Applies [`_moe_tensors`], and reorders the rotated rows of queries and keys from interleaved pairs to halves."""
    plain, rotated, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    if plain is None or rotated is None or rank is None:
        raise UserError(
            "kv_lora_rank, qk_nope_head_dim and qk_rope_head_dim must be set in the config.json of a DeepSeek model: "
            "download it again"
        )
    query = _pairs_to_halves(plain + rotated, plain)
    key = _pairs_to_halves(rank + rotated, rank)
    reorder = {"q_proj": query, "q_b_proj": query, "kv_a_proj_with_mqa": key}
    tensors = {}
    for name, tensor in _moe_tensors(state, config).items():
        function = reorder.get(name.split(".")[-2]) if ".self_attn." in name else None
        tensors[name] = tensor if function is None else tensor.map(function)
    return tensors


def _from_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantises an fp8 matrix (N, M) with scales of blocks (ceil(N / FP8_BLOCK), ceil(M / FP8_BLOCK)) to fp32."""
    for dim, size in enumerate(weight.shape):
        scale = scale.repeat_interleave(FP8_BLOCK, dim).narrow(dim, 0, size)
    return weight.float() * scale


def _deepseek_v3_tensors(state: State, config: MoEConfig) -> State:
    """Applies [`_latent_tensors`] after dropping the layers that predict further tokens and dequantising fp8 to bf16."""
    kept = {}
    for name, tensor in state.items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= config.num_hidden_layers:
            continue
        if name.endswith("weight_scale_inv"):
            continue
        if (scale := f"{name}_scale_inv") in state:
            tensor = LazyTensor.combine(_from_fp8, tensor, state[scale], dtype=torch.bfloat16)
        kept[name] = tensor.to(torch.float32) if name.endswith("e_score_correction_bias") else tensor
    return _latent_tensors(kept, config)


def _from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantises an expert's matrix to bf16 (N, M).

    Args:
        blocks: (N, M / 32, 16), two values in a byte.
        scales: (N, M / 32).
    """
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)[0].T


def _gpt_oss_experts(state: State, name: str) -> list[LazyTensor]:
    """Returns the experts' matrices (out, in) from the tensor `name` (E, in, out), or from mxfp4 blocks and scales."""
    tensor = state[name]
    if not name.endswith("_blocks"):
        return [tensor[expert].transpose() for expert in range(tensor.shape[0])]
    scales = state[f"{name.removesuffix('_blocks')}_scales"]
    experts, rows, groups, size = tensor.shape
    shape = (rows, 2 * groups * size)
    return [
        LazyTensor.combine(_from_mxfp4, tensor[expert], scales[expert], shape=shape, dtype=torch.bfloat16)
        for expert in range(experts)
    ]


def _gpt_oss_tensors(state: State, config: MoEConfig) -> State:
    """Splits fused experts, and separates the rows of their gate and up projections, which alternate in the source."""
    tensors = {}
    for name, tensor in state.items():
        experts, _, kind = name.rpartition(".")
        if kind == "gate_up_proj_bias":
            tensors[name] = tensor.map(lambda rows: torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1))
        elif kind in ("gate_up_proj", "gate_up_proj_blocks"):
            for expert, matrix in enumerate(_gpt_oss_experts(state, name)):
                shape = (matrix.shape[0] // 2, matrix.shape[1])
                tensors[f"{experts}.{expert}.gate_proj.weight"] = matrix.map(lambda rows: rows[0::2], shape=shape)
                tensors[f"{experts}.{expert}.up_proj.weight"] = matrix.map(lambda rows: rows[1::2], shape=shape)
        elif kind in ("down_proj", "down_proj_blocks"):
            for expert, matrix in enumerate(_gpt_oss_experts(state, name)):
                tensors[f"{experts}.{expert}.down_proj.weight"] = matrix
        elif not kind.endswith("_scales"):
            tensors[name] = tensor
    return _moe_tensors(tensors, config)


SPARSE_FAMILIES: dict[str, Family] = {
    "mixtral": Family(_mixtral, _moe_tensors, sparse=True),
    "qwen2_moe": Family(_qwen2_moe, _moe_tensors, sparse=True),
    "qwen3_moe": Family(_qwen3_moe, _moe_tensors, sparse=True),
    "olmoe": Family(_olmoe, _moe_tensors, sparse=True),
    "deepseek": Family(_deepseek, _moe_tensors, sparse=True),
    "deepseek_v2": Family(_deepseek_v2, _latent_tensors, sparse=True),
    "deepseek_v3": Family(_deepseek_v3, _deepseek_v3_tensors, sparse=True),
    "gpt_oss": Family(_gpt_oss, _gpt_oss_tensors, sparse=True),
}
