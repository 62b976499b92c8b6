# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lists the forms of attention with a router, by the names that `routed_attention` can have."""

from dataclasses import dataclass
from typing import Any

from .attention import PLAIN, AttentionBase, MoEAttention
from .attention_latent import MoELatentAttention
from .attention_moa import MixtureOfAttentionHeads
from .attention_moh import MixtureOfHeads
from .attention_routed import RoutedAttention
from .attention_routing_transformer import RoutingTransformerAttention
from .attention_switch_head import SwitchHeadAttention
from .configuration_fields import HAS_DEPTH, HAS_ROUTED_ATTENTION, Range, setting


# routed_attention -> class
ROUTED_ATTENTION: dict[str, type[RoutedAttention]] = {
    "moa": MixtureOfAttentionHeads,
    "switch_head": SwitchHeadAttention,
    "moh": MixtureOfHeads,
    "routing_transformer": RoutingTransformerAttention,
}


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class RoutedAttentionFields:
    """These fields configure routers inside attention."""

    routed_attention: str | None = setting(
        None,
        "The form of attention in which a router chooses what each token uses, in all layers; None means plain attention. "
        '"moa": the query and output projections are experts, keys and values are shared (JetMoE); "switch_head": each head has '
        'experts for its values and for its outputs; "moh": the heads of plain attention are experts; "routing_transformer": '
        "a query attends to keys of its own cluster.",
        choices=(None, *ROUTED_ATTENTION),
        conditions=(PLAIN,),
    )
    attention_experts: int = setting(
        8,
        "The number of experts of routed attention in each layer, for switch_head on each side of each head. For moh it is the "
        "number of routed heads, the last ones of num_attention_heads; for routing_transformer the number of clusters of each "
        "key head.",
        Range(1, 2**16),
        conditions=(HAS_ROUTED_ATTENTION,),
    )
    attention_experts_per_tok: int = setting(
        2,
        "The number of experts of routed attention that a token uses, for switch_head on each side of each head. For moa they "
        "share the num_attention_heads query heads. It is 1 for routing_transformer.",
        Range(1, 2**16),
        conditions=(HAS_ROUTED_ATTENTION,),
    )


def attention_support(config: Any) -> dict[str, bool]:
    """Returns which attention implementations serve a configuration, by the names of transformers' class variables."""
    routes_mask = config.routed_attention is not None and ROUTED_ATTENTION[config.routed_attention].routes_mask
    # flash and flex attention take neither a mask for each head nor a mask with holes
    masks = routes_mask or HAS_DEPTH.holds(config)
    return {
        # torch's attention function supports neither
        "_supports_sdpa": config.attn_logit_softcapping is None and not config.attention_sinks,
        "_supports_flash_attn": not masks,
        "_supports_flex_attn": not masks,
    }


def stacked_attention_experts(config: Any) -> int:
    """Returns the number of experts that are stacked in one parameter of an attention layer; 0 without routed attention."""
    return 0 if config.routed_attention is None else ROUTED_ATTENTION[config.routed_attention].stacked_experts(config)


def attention_class(config: Any) -> type[AttentionBase] | type[MoELatentAttention]:
    """Returns the class of the attention of all layers."""
    if config.routed_attention is not None:
        return ROUTED_ATTENTION[config.routed_attention]
    return MoEAttention if config.kv_lora_rank is None else MoELatentAttention


def check_attention_routing(config: Any) -> None:
    """Checks the fields of routed attention against each other.

    Raises:
        ValueError: for fields that contradict each other.
    """
    if config.routed_attention is None:
        return
    experts, top_k = config.attention_experts, config.attention_experts_per_tok
    if top_k > experts:
        raise ValueError(
            f"attention_experts_per_tok is {top_k}: it must lie between 1 and attention_experts ({experts})."
        )
    ROUTED_ATTENTION[config.routed_attention].validate(config)
