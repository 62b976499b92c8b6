# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module describes a family of transformers as the target of an export, and names what the family cannot hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...checkpoints import State
from ...configuration_fields import HAS_DEPTH, Setting, settings_of, with_effect
from ...configuration_moe import MoEConfig
from ..families.base import COMMON
from ..families.catalogue import SPARSE_ONLY, moe_config
from .parts import rope


# fields that do not change the logits in evaluation
TRAINING = with_effect(MoEConfig, "training")
# fields that other, compared fields repeat: the width of the shared experts, and the window
REPEATED = {"num_shared_experts", "use_sliding_window"}
# fields that are compared only if they have an effect in the configuration
COMPARED_IF: dict[str, Callable[[MoEConfig], bool]] = {
    "intermediate_size": lambda config: "dense" in config.mlp_layer_types,
    "gated_mlp": lambda config: "dense" in config.mlp_layer_types,
    "hidden_act": lambda config: config.swiglu_limit is None or "dense" in config.mlp_layer_types,
    "rope_parameters": lambda config: config.position_embedding_type == "rope",
    "no_rope_layers": lambda config: 0 in (config.no_rope_layers or []),
    "depth_layers": HAS_DEPTH.holds,
    "qkv_bias": lambda config: not config.attention_bias,
    "sliding_window": lambda config: "sliding_attention" in config.layer_types,
    "shared_expert_gate": lambda config: config.has_shared_experts,
    "n_group": lambda config: config.topk_group < config.n_group,
    "topk_group": lambda config: config.topk_group < config.n_group,
    "group_score": lambda config: config.topk_group < config.n_group,
    "router_gradient": lambda config: config.router_gradient == "sparsemixer",
}


def _scale_of_attention(config: MoEConfig) -> float | int | None:
    """Returns the factor on the products of queries and keys; None if it is 1 / sqrt(number of features of a head)."""
    usual = (config.qk_head_dim or config.head_dim) ** -0.5
    return None if config.attention_multiplier == usual else config.attention_multiplier


def _rope_of_attention(config: MoEConfig) -> dict[str, Any]:
    """Returns the parameters of the rotary embedding without a factor that lets all features rotate."""
    return {
        name: value
        for name, value in (config.rope_parameters or {}).items()
        if (name, value) != ("partial_rotary_factor", 1.0)
    }


# fields of which several values mean one thing -> the value that is compared
COMPARED_AS: dict[str, Callable[[MoEConfig], Any]] = {
    "attention_multiplier": _scale_of_attention,
    "rope_parameters": _rope_of_attention,
}


def _folded_scale(config: MoEConfig) -> dict[str, Any]:
    return {"routed_scaling_factor": 1.0}


@dataclass(frozen=True)
class Target:
    """One of transformers' MoE families as the target of an export.

    Attributes:
        model_type: model type of the family.
        fields: returns the fields of the family's configuration that not all families share, and fields that only servers
            read.
        tensors: maps a MoE checkpoint on disk to the names and layout of the family's checkpoints. Parts that the family
            always has, and the model lacks, are written as tensors that do not change the logits.
        absorbed: returns the fields that `tensors` merges into the weights, with the values that they have afterwards.
    """

    model_type: str
    fields: Callable[[MoEConfig], dict[str, Any]]
    tensors: Callable[[State, MoEConfig], State]
    absorbed: Callable[[MoEConfig], dict[str, Any]] = _folded_scale

    def config(self, config: MoEConfig) -> PreTrainedConfig:
        """Returns the family's configuration, which is equivalent only if [`Target.reasons`] is empty."""
        fields = {name: getattr(config, name) for name in (*COMMON, "dtype")}
        fields |= {"rope_parameters": rope(config), "output_router_logits": config.output_router_logits}
        fields |= {"num_experts_per_tok": config.num_experts_per_tok} | self.fields(config)
        architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]]
        return CONFIG_MAPPING[self.model_type](**fields, architectures=architectures)

    def reasons(self, config: MoEConfig) -> list[str]:
        """Returns the features that the family cannot express, as texts that name field and value.

        A field is such a feature if it has an effect on the logits and would have another value after import. An empty list
        means that the export is exact, except for the rounding of `routed_scaling_factor` where [`Target.rounds`] is true.
        """
        try:
            family, reasons = self.config(config), []
        except StrictDataclassError as error:
            return [self._impossible(error)]
        implied = config.hidden_size // config.num_attention_heads
        if not hasattr(family, "head_dim") and config.head_dim != implied:
            reasons.append(f"head_dim={config.head_dim} ({self.model_type} has {implied})")
            # the reason above names this field, and the import below would stop at it
            family.head_dim = config.head_dim
        try:
            held = moe_config(family)
        except ValueError as error:
            return [*reasons, self._impossible(error)]
        absorbed = self.absorbed(config)
        for name, declared in settings_of(MoEConfig).items():
            if not _is_compared(name, declared, config, held):
                continue
            value, theirs = (COMPARED_AS[name](c) if name in COMPARED_AS else getattr(c, name) for c in (config, held))
            if absorbed.get(name, value) != theirs:
                reasons.append(_difference(name, getattr(config, name), self.model_type, getattr(held, name)))
        return reasons

    def _impossible(self, error: Exception) -> str:
        return f"{self.model_type} has no such configuration ({' '.join(str(error.__cause__ or error).split())})"

    def rounds(self, config: MoEConfig) -> bool:
        """Returns whether `routed_scaling_factor` is multiplied into weights that it rounds: it is no power of two."""
        factor = config.routed_scaling_factor
        folded = self.absorbed(config).get("routed_scaling_factor", factor) != factor
        return folded and float(factor).hex().partition("p")[0] != "0x1.0000000000000"


def _is_compared(name: str, declared: Setting, config: MoEConfig, held: MoEConfig) -> bool:
    """Returns whether a field of a model must have the same value in the target.

    A detail of a feature, such as swiglu_alpha of swiglu_limit, is compared if both configurations have the feature;
    otherwise the field of the feature is reported. Fields of plain and of latent attention are treated likewise.
    """
    if declared.effect == "training" or name in REPEATED:
        return False
    if "sparse" not in config.mlp_layer_types and name in SPARSE_ONLY:
        return False
    if name in COMPARED_IF:
        return COMPARED_IF[name](config)
    if declared.effect == "detail" and not declared.conditions:
        return False  # it belongs to a kind of router, and router_type is compared
    other_attention = (config.kv_lora_rank is None) != (held.kv_lora_rank is None)
    if declared.effect != "detail" and not other_attention:
        return True
    return all(condition.holds(c) for condition in declared.conditions for c in (config, held))


def _difference(name: str, value: Any, model_type: str, theirs: Any) -> str:
    """Returns field and values as text; for a list with an entry per layer, those of the first layer that differs."""
    if isinstance(value, list) and isinstance(theirs, list):
        layer = next(i for i, (mine, other) in enumerate(zip(value, theirs, strict=True)) if mine != other)
        name, value, theirs = f"{name}[{layer}]", value[layer], theirs[layer]
    return f"{name}={value!r} ({model_type} has {theirs!r})"
