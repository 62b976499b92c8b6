# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module plans an upcycling: it computes the result's configuration and size before any weight is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..configuration_moe import MoEConfig
from ..conversion import (
    DENSE_FAMILIES,
    SPARSE_FAMILIES,
    fields_without_effect,
    moe_config,
    text_source,
    towers,
)
from ..modeling_moe import MoEForCausalLM
from ..utils.errors import UserError
from ..utils.limits import refuse_vast_result
from .assembly import refuse_mismatch
from .attention import attention_fields
from .experts import reason_not_exact
from .options import UpcyclingOptions


# group of parameters -> the beginning of their names, up to the module that is counted; the first match wins
GROUPS = {
    "embedding": r".*\.embed_\w+\.",
    "output head": r"lm_head\.",
    "attention": r".*\.self_attn\.(?!gate\.|experts\.)",
    "attention experts": r".*\.self_attn\.experts\.",
    "routers": r".*\.(?:mlp|self_attn)\.gate\.",
    "routed experts": r".*\.mlp\.experts\.",
    "shared experts": r".*\.mlp\.shared_expert",
    "dense networks": r".*\.mlp\.",
    "norms": r".*norm\.",
}


@dataclass(frozen=True)
class TensorGroup:
    """Describes one group of parameters, a line of the plan's table.

    Attributes:
        name: name of the group, a key of `GROUPS`.
        count: number of modules in the group; for experts, layers x experts.
        params: number of parameters in the group.
        nbytes: size of the parameters in bytes.
    """

    name: str
    count: str
    params: int
    nbytes: int


@dataclass(frozen=True)
class UpcyclingPlan:
    """Holds the result's configuration and size.

    Attributes:
        config: configuration of the result.
        dtype: dtype of the result's weights.
        dense_params: number of parameters of the (first) source.
        params: number of parameters of the result.
        active_params: number of parameters of the result that a token uses.
        groups: the parameters by kind.
        reason_not_exact: why the result will not compute the dense function; None if it will.
        without_effect: fields of the sources' config.json that neither this package nor the sources' own models read.
        left_out: names of the (first) source's nested configurations, such as vision_config, whose parts are left out.
    """

    config: MoEConfig
    dtype: torch.dtype
    dense_params: int
    params: int
    active_params: int
    groups: tuple[TensorGroup, ...]
    reason_not_exact: str | None
    without_effect: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weights in bytes, on disk and in memory to serve them."""
        return sum(group.nbytes for group in self.groups)

    @property
    def bytes_to_train(self) -> int:
        """Memory to train all weights, without activations: weights, gradients and AdamW's two moments, all in `dtype`.

        That is 16 bytes for each parameter in fp32, and 8 in bf16.
        """
        return 4 * self.bytes_on_disk

    def cache_bytes(self, tokens: int = 1000) -> int:
        """Returns the size in bytes of one sequence's key-value cache, in the dtype of the weights.

        A layer with sliding-window attention stores at most `sliding_window` tokens.
        """
        config = self.config
        window = min(tokens, config.sliding_window or tokens)
        held = sum(window if kind == "sliding_attention" else tokens for kind in config.layer_types)
        return 2 * held * config.num_key_value_heads * config.head_dim * self.dtype.itemsize


def sparse_config(dense: MoEConfig, options: UpcyclingOptions, dtype: torch.dtype) -> MoEConfig:
    """Returns the configuration of the result.

    Args:
        dense: configuration of the (first) source.
        options: how to upcycle.
        dtype: dtype of the result's weights.

    Raises:
        UserError: if no model can be made from this source with these options.
    """
    options.check(dense)
    sparse = options.sparse_layers(dense.num_hidden_layers)
    changes = {
        "router_aux_loss_coef": options.router_aux_loss_coef,
        "router_z_loss_coef": options.router_z_loss_coef,
        "mlp_layer_types": ["sparse" if i in sparse else "dense" for i in range(dense.num_hidden_layers)],
        "dtype": dtype,
    }
    if sparse:
        changes |= _network_fields(dense, options)
    return dense.replace(**changes | attention_fields(dense, options))


def _network_fields(dense: MoEConfig, options: UpcyclingOptions) -> dict[str, Any]:
    """Returns the fields of sparse feed-forward networks."""
    parts = options.num_experts if options.method == "split" else options.granularity
    return {
        "num_experts": options.num_experts,
        "num_experts_per_tok": options.num_experts_per_tok,
        "expected_experts_per_tok": None,
        "moe_intermediate_size": dense.intermediate_size // parts,
        "norm_topk_prob": options.norm_topk_prob,
        "num_shared_experts": int(options.shared_expert),
        "shared_expert_intermediate_size": options.shared_expert * dense.intermediate_size,
    }


def tensor_groups(config: MoEConfig, dtype: torch.dtype) -> tuple[TensorGroup, ...]:
    """Counts the parameters of a model by group, in the order of `GROUPS`; empty groups are omitted."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    counted = {group: set() for group in GROUPS}
    params = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        group, owner = next((g, match.group()) for g, start in GROUPS.items() if (match := re.match(start, name)))
        counted[group].add(owner)
        params[group] += parameter.numel()
    counts = {group: str(len(owners)) for group, owners in counted.items() if owners}
    experts = {"routed experts": config.num_experts, "attention experts": config.attention_experts}
    return tuple(
        TensorGroup(
            group,
            f"{count} x {experts[group]}" if group in experts else count,
            params[group],
            params[group] * dtype.itemsize,
        )
        for group, count in counts.items()
    )


def make_plan(
    source: PreTrainedConfig,
    options: UpcyclingOptions,
    dtype: torch.dtype,
    further: Sequence[PreTrainedConfig] = (),
) -> UpcyclingPlan:
    """Plans the upcycling of dense models.

    Args:
        source: the dense model's configuration; its family must be one of `conversion.DENSE_FAMILIES`, or it wraps a text
            model of one.
        options: how to upcycle.
        dtype: dtype of the result's weights.
        further: configurations of `options.sources`.

    Raises:
        UserError: if a source is of another family, the sources differ in architecture, or no model can be made with
            these options.
    """
    left_out = towers(source)
    sources = (source, *further) = tuple(text_source(config) for config in (source, *further))
    for config in sources:
        if config.model_type not in DENSE_FAMILIES:
            sparse = config.model_type == MoEConfig.model_type or config.model_type in SPARSE_FAMILIES
            more = (
                ". The model is sparse already: convert it with `moe convert` (--dry_run prints its size), or change its "
                "experts with `moe resize`"
            )
            raise UserError(
                f"model_type {config.model_type!r} cannot be upcycled: it must be one of "
                f"{', '.join(sorted(DENSE_FAMILIES))}{more * sparse}"
            )
    dense, *others = (moe_config(config) for config in sources)
    refuse_mismatch([dense, *others], ["the first source", *(options.sources or [])])
    config = sparse_config(dense, options, dtype)
    refuse_vast_result(config, dtype)
    return UpcyclingPlan(
        config=config,
        dtype=dtype,
        dense_params=dense.num_params(),
        params=config.num_params(),
        active_params=config.num_active_params(),
        groups=tensor_groups(config, dtype),
        reason_not_exact=reason_not_exact(options, config),
        without_effect={name: value for config in sources for name, value in fields_without_effect(config).items()},
        left_out=tuple(left_out),
    )
