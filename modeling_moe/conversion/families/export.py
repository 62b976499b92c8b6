# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module exports MoE checkpoints to transformers' own MoE families, under the classic names that every server loads.

A feature that the family cannot express is refused by name. Exact exports include upcycled Llama and Mistral models as
`mixtral`, upcycled Qwen2 models as `qwen2_moe`, and upcycled Qwen3 models as `qwen3_moe`.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...checkpoints import LazyTensor, State
from ...configuration_fields import settings_of, with_effect
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import COMMON
from .catalogue import SPARSE_ONLY, moe_config


# fields that do not change the logits in evaluation
TRAINING = with_effect(MoEConfig, "training")
# parameters of a feature that another, compared field switches on: if the feature differs, that field is already reported
DETAILS = with_effect(MoEConfig, "detail")
# fields that are compared only if they have an effect in the configuration
COMPARED_IF: dict[str, Callable[[MoEConfig], bool]] = {
    "intermediate_size": lambda config: "dense" in config.mlp_layer_types,
    "gated_mlp": lambda config: "dense" in config.mlp_layer_types,
    "rope_parameters": lambda config: config.position_embedding_type == "rope",
    "no_rope_layers": lambda config: 0 in (config.no_rope_layers or []),
    "attention_multiplier": lambda config: config.attention_multiplier != config.head_dim**-0.5,
    "qkv_bias": lambda config: not config.attention_bias,
    "sliding_window": lambda config: "sliding_attention" in config.layer_types,
    "shared_expert_gate": lambda config: config.has_shared_experts,
    "n_group": lambda config: config.topk_group < config.n_group,
    "router_gradient": lambda config: config.router_gradient == "sparsemixer",
}
# width of a shared expert of zeros: llama.cpp replaces a width of 0 by another one, and 256 is divisible by any usual number
# of processes and any block of quantised weights
ZERO_WIDTH = 256
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
ROUTED = re.compile(r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Target:
    """One of transformers' MoE families as the target of an export.

    Attributes:
        model_type: model type of the family.
        fields: returns the fields of the family's configuration that not all families share.
        tensors: maps a MoE checkpoint on disk to the names of the family's checkpoints, one tensor for each expert.
            `routed_scaling_factor` is multiplied into the routed experts' `down_proj`: exact for a power of two, rounded
            to the weights' dtype otherwise.
        absorbed: returns the fields that `tensors` merges into the weights, with the values that they have afterwards.
    """

    model_type: str
    fields: Callable[[MoEConfig], dict[str, Any]]
    tensors: Callable[[State, MoEConfig], State]
    absorbed: Callable[[MoEConfig], dict[str, Any]] = lambda config: {"routed_scaling_factor": 1.0}

    def config(self, config: MoEConfig) -> PreTrainedConfig:
        """Returns the family's configuration, which is equivalent only if [`Target.reasons`] is empty."""
        fields = {name: getattr(config, name) for name in (*COMMON, "dtype")} | _sparse(config) | self.fields(config)
        architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]]
        return CONFIG_MAPPING[self.model_type](**fields, architectures=architectures)

    def reasons(self, config: MoEConfig) -> list[str]:
        """Returns the features that the family cannot express, as texts that name field and value.

        A field is such a feature if it has an effect on the logits and would have another value after import. An empty list
        means that the export is exact, except for the rounding of `routed_scaling_factor`.
        """
        family, reasons = self.config(config), []
        implied = config.hidden_size // config.num_attention_heads
        if not hasattr(family, "head_dim") and config.head_dim != implied:
            reasons.append(f"head_dim={config.head_dim} ({self.model_type} has {implied})")
            # the reason above names this field, and the import below would stop at it
            family.head_dim = config.head_dim
        try:
            held = moe_config(family)
        except ValueError as error:
            return [
                *reasons,
                f"{self.model_type} has no such configuration ({' '.join(str(error.__cause__ or error).split())})",
            ]
        absorbed = self.absorbed(config)
        unread = SPARSE_ONLY if "sparse" not in config.mlp_layer_types else set()
        for name in settings_of(MoEConfig):
            if name in TRAINING | DETAILS | unread or (name in COMPARED_IF and not COMPARED_IF[name](config)):
                continue
            value, theirs = absorbed.get(name, getattr(config, name)), getattr(held, name)
            if value != theirs:
                reasons.append(_difference(name, getattr(config, name), self.model_type, theirs))
        return reasons


def _difference(name: str, value: Any, model_type: str, theirs: Any) -> str:
    """Returns field and values as text; for a list with an entry per layer, those of the first layer that differs."""
    if isinstance(value, list) and isinstance(theirs, list):
        layer = next(i for i, (mine, other) in enumerate(zip(value, theirs, strict=True)) if mine != other)
        name, value, theirs = f"{name}[{layer}]", value[layer], theirs[layer]
    return f"{name}={value!r} ({model_type} has {theirs!r})"


def _rope(config: MoEConfig) -> dict[str, Any]:
    """Returns the rotary embedding that these families can compute: one for all layers, over the whole head."""
    rope: dict[str, Any] = dict(copy.deepcopy(config.rope_parameters) or {})
    if any(isinstance(value, dict) for value in rope.values()):
        return {}
    if rope.get("partial_rotary_factor") != 1.0:
        rope.pop("partial_rotary_factor", None)
    return rope


def _sparse(config: MoEConfig) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(config),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": float(config.router_aux_loss_coef),
        "output_router_logits": config.output_router_logits,
    }


def _window(config: MoEConfig) -> int | None:
    return config.sliding_window if "sliding_attention" in config.layer_types else None


def _qwen(config: MoEConfig) -> dict[str, Any]:
    return {
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": config.mlp_only_layers,
        "use_sliding_window": _window(config) is not None,
        "sliding_window": _window(config),
    }


def _mixtral(config: MoEConfig) -> dict[str, Any]:
    return {
        "head_dim": config.head_dim,
        "intermediate_size": config.moe_intermediate_size,
        "sliding_window": _window(config),
        "router_jitter_noise": float(config.router_jitter_noise),
    }


def _qwen2_moe(config: MoEConfig) -> dict[str, Any]:
    return _qwen(config) | {
        "qkv_bias": True,
        "layer_types": config.layer_types,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size or ZERO_WIDTH,
    }


def _qwen2_moe_absorbed(config: MoEConfig) -> dict[str, Any]:
    return {
        "routed_scaling_factor": 1.0,
        "qkv_bias": True,
        "shared_expert_gate": True,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size or ZERO_WIDTH,
    }


def _qwen3_moe(config: MoEConfig) -> dict[str, Any]:
    return _qwen(config) | {"head_dim": config.head_dim, "attention_bias": config.attention_bias}


def _olmoe(config: MoEConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.moe_intermediate_size,
        "attention_bias": config.attention_bias,
        "clip_qkv": config.clip_qkv,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _zeros(*shape: int, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda index: torch.zeros(shape, dtype=dtype)[index])


def _scaled(state: State, config: MoEConfig) -> State:
    """Multiplies `routed_scaling_factor` into the routed experts' `down_proj`."""
    factor = config.routed_scaling_factor
    if factor == 1:
        return state
    down = {name for name in state if (match := ROUTED.search(name)) and match[2] == "down"}
    return {
        name: tensor.map(lambda weight: weight * factor) if name in down else tensor for name, tensor in state.items()
    }


def _mixtral_tensors(state: State, config: MoEConfig) -> State:
    def renamed(name: str) -> str:
        name = ROUTED.sub(lambda m: f".block_sparse_moe.experts.{m[1]}.{MIXTRAL_NAMES[m[2]]}.weight", name)
        return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")

    return {renamed(name): tensor for name, tensor in _scaled(state, config).items()}


def _qwen2_moe_tensors(state: State, config: MoEConfig) -> State:
    """Adds zeros for each part that Qwen2-MoE always has and the model lacks.

    These parts are: biases of query, key and value, which vLLM does not make optional; the shared expert; and the shared
    expert's gate. A gate of zeros has the sigmoid 1/2, so the output of an ungated shared expert is doubled.
    """
    result = {name.replace(".shared_experts.", ".shared_expert."): t for name, t in _scaled(state, config).items()}
    for layer, kind in enumerate(config.mlp_layer_types):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for part in "qkv":
            weight = state[f"{attention}{part}_proj.weight"]
            result.setdefault(f"{attention}{part}_proj.bias", _zeros(weight.shape[0], dtype=weight.dtype))
        if kind == "dense" or (config.has_shared_experts and config.shared_expert_gate):
            continue
        hidden, dtype = config.hidden_size, state[f"{attention}q_proj.weight"].dtype
        result[f"{mlp}shared_expert_gate.weight"] = _zeros(1, hidden, dtype=dtype)
        down = f"{mlp}shared_expert.down_proj.weight"
        if config.has_shared_experts:
            result[down] = result[down].map(lambda weight: 2 * weight)
        else:
            result[down] = _zeros(hidden, ZERO_WIDTH, dtype=dtype)
            for part in ("gate", "up"):
                result[f"{mlp}shared_expert.{part}_proj.weight"] = _zeros(ZERO_WIDTH, hidden, dtype=dtype)
    return result


TARGETS: dict[str, Target] = {
    "mixtral": Target("mixtral", _mixtral, _mixtral_tensors),
    "qwen2_moe": Target("qwen2_moe", _qwen2_moe, _qwen2_moe_tensors, _qwen2_moe_absorbed),
    "qwen3_moe": Target("qwen3_moe", _qwen3_moe, _scaled),
    "olmoe": Target("olmoe", _olmoe, _scaled),
}


def export_plan(config: MoEConfig, target: str) -> PreTrainedConfig:
    """Returns the configuration under which transformers' own model computes the same logits.

    Args:
        config: configuration of the MoE model.
        target: a key of `TARGETS`, whose `tensors` function maps the weights.

    Raises:
        UserError: if the target is unknown or cannot hold the model. The message names each field that prevents it, and
            the targets that can hold the model or else the nearest one.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r} is unknown: it must be moe or one of {', '.join(TARGETS)}")
    reasons = {name: candidate.reasons(config) for name, candidate in TARGETS.items()}
    if not reasons[target]:
        return TARGETS[target].config(config)
    able = [name for name in TARGETS if not reasons[name]]
    nearest = min(TARGETS, key=lambda name: (len(reasons[name]), name != target))
    if able:
        remedy = f"{' or '.join(able)} can"
    elif nearest == target:
        remedy = "no other target comes nearer"
    else:
        remedy = f"nor can another target; the nearest, {nearest}, fails for {', '.join(reasons[nearest])}"
    raise UserError(f"target {target} cannot hold this model for {', '.join(reasons[target])}; {remedy}")
