# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module checks what types and ranges of single fields cannot express; each error names a field and a remedy."""

import functools
from collections.abc import Collection
from typing import Any

from .configuration_derived import PER_LAYER
from .configuration_fields import HAS_DEPTH, settings_of, shown
from .router import Router
from .router_catalogue import router_class


def check_layers(config: Any) -> None:
    """Checks the lists with one entry for each layer, and the sliding window.

    Raises:
        ValueError: for a list of another length or with an unknown entry, or a window that no layer uses.
    """
    for name in PER_LAYER:
        if (entries := getattr(config, name)) is None:
            continue
        if len(entries) != config.num_hidden_layers:
            raise ValueError(
                f"{name} names {len(entries)} layers and num_hidden_layers is {config.num_hidden_layers}: give one "
                "entry for each layer."
            )
        choices = settings_of(type(config))[name].choices or ()
        for entry in entries:
            if entry not in choices:
                raise ValueError(f"{name} has the entry {shown(entry)}: choose among {', '.join(map(str, choices))}.")
    slides = "sliding_attention" in config.layer_types
    if slides and config.sliding_window is None:
        raise ValueError("layer_types has sliding_attention but sliding_window is not set: set it, in tokens.")
    if config.sliding_window is not None and not (slides and config.use_sliding_window):
        raise ValueError(
            f"sliding_window is {config.sliding_window} and no layer uses it: leave layer_types unset or give it a "
            "sliding_attention, with use_sliding_window=True, or unset sliding_window."
        )


def check_choices(config: Any) -> None:
    """Checks the fields that hold a name of a catalogue.

    Raises:
        ValueError: for a name that the catalogue does not have.
    """
    for name, choices in _catalogues(type(config)).items():
        if (value := getattr(config, name)) not in choices:
            raise ValueError(f"{name} {value!r} is unknown: choose one of {', '.join(map(str, choices))}.")


@functools.cache
def _catalogues(cls: type) -> dict[str, Collection[str | int | None]]:
    """Returns the names that each field can have that holds one name of a catalogue."""
    declared = settings_of(cls).items()
    return {name: field.choices for name, field in declared if field.choices is not None and name not in PER_LAYER}


def check_model(config: Any) -> None:
    """Checks attention, experts and vocabulary.

    Raises:
        ValueError: for fields that contradict each other.
    """
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}): choose a divisor."
        )
    if config.kv_lora_rank is not None:
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(config, name) is None:
                raise ValueError(f"{name} is None: kv_lora_rank (latent attention) needs it, set it.")
    if config.head_dim is None:
        raise ValueError(
            f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads "
            f"({config.num_attention_heads}): change one of them or set head_dim."
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}: the rotary embedding needs an even number of at least 2.")
    if config.attention_sinks and config.attn_logit_softcapping is not None:
        raise ValueError("attention_sinks and attn_logit_softcapping exclude each other: unset one of them.")
    if config.swiglu_limit is not None and not config.gated_experts:
        raise ValueError("swiglu_limit clamps the gate of gated experts: set gated_experts=True or unset it.")
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(
            f"pad_token_id is {config.pad_token_id} and vocab_size {config.vocab_size}: it must lie within the vocabulary."
        )


def check_routing(config: Any) -> None:
    """Checks the numbers of experts, groups and capacity, and the router's own conditions.

    Raises:
        ValueError: for fields that contradict each other, or routing that is not causal without `allow_noncausal`.
    """
    _check_numbers_of_experts(config)
    router = router_class(config)
    _refuse_noncausal(config, router)
    _refuse_contradictions(config, router)
    router.validate(config)


def _check_numbers_of_experts(config: Any) -> None:
    experts, top_k, outputs = config.num_experts, config.num_experts_per_tok, config.num_router_outputs
    if not 1 <= top_k <= outputs:
        raise ValueError(f"num_experts_per_tok is {top_k}: it must lie between 1 and num_experts ({outputs}).")
    if not 0 < config.expected_experts_per_tok <= top_k:
        raise ValueError(
            f"expected_experts_per_tok is {config.expected_experts_per_tok}: it must be above 0 and at most "
            f"num_experts_per_tok ({top_k})."
        )
    if experts % config.n_group:
        raise ValueError(f"n_group ({config.n_group}) does not divide num_experts ({experts}): choose a divisor.")
    if not 1 <= config.topk_group <= config.n_group:
        raise ValueError(f"topk_group is {config.topk_group}: it must lie between 1 and n_group ({config.n_group}).")
    if config.n_group > 1 and top_k > config.topk_group * (experts // config.n_group):
        raise ValueError(
            f"num_experts_per_tok ({top_k}) exceeds the experts of topk_group={config.topk_group} groups of "
            f"{experts // config.n_group}: raise topk_group or lower num_experts_per_tok."
        )
    if config.max_experts_per_tok is not None and not 1 <= config.max_experts_per_tok <= experts:
        raise ValueError(
            f"max_experts_per_tok is {config.max_experts_per_tok}: it must lie between 1 and num_experts ({experts})."
        )


def _refuse_noncausal(config: Any, router: type[Router]) -> None:
    reason = None
    if not router.causal:
        reason = (
            f"router_type={config.router_type!r}: {router.__name__} chooses among all tokens of a sequence or batch"
        )
    elif config.capacity_priority != "token":
        reason = f"capacity_priority={config.capacity_priority!r}: a later token can take an earlier token's place in an expert"
    if reason is not None and not config.allow_noncausal:
        raise ValueError(
            f"{reason}, so that a token's experts reveal later tokens, which a causal language model must not see: set "
            "allow_noncausal=True if that is meant."
        )


def _refuse_contradictions(config: Any, router: type[Router]) -> None:
    weightless = config.num_null_experts + config.num_copy_experts
    rules = [
        (
            config.router_gradient == "sparsemixer"
            and (config.router_type != "topk" or config.router_jitter_noise <= 0),
            "router_gradient='sparsemixer' draws the experts itself, among those within router_jitter_noise: set "
            "router_type='topk' and a positive router_jitter_noise (0.01).",
        ),
        (
            weightless and ("num_null_experts" not in router.reads or config.n_group > 1 or config.num_hash_layers),
            "num_null_experts and num_copy_experts need router_type='topk', 'dag' or 'zaya' without n_group or num_hash_layers: "
            "set them to 0 or change these.",
        ),
        (
            config.num_copy_experts and config.moe_latent_size is not None,
            "num_copy_experts return the token, which the projections of moe_latent_size would change: set num_copy_experts "
            "to 0 or unset moe_latent_size.",
        ),
        (
            config.router_gradient == "dense"
            and (config.num_copy_experts or router.mix is not Router.mix or router.forward is not Router.forward),
            f"router_gradient='dense' cannot compute copy experts, nor {router.__name__}: set it to 'topk'.",
        ),
        (
            config.router_bias and router.logits is not Router.logits,
            f"router_bias has no effect with {router.__name__}: set it to False.",
        ),
        (
            config.has_capacity and router.mix is not Router.mix,
            f"{router.__name__} drops no token: leave capacity_factor, eval_capacity_factor and expert_capacity unset.",
        ),
        (
            config.router_seq_aux_loss_coef and router.variable_k,
            f"router_seq_aux_loss_coef needs a fixed number of experts per token, which {router.__name__} does not have: set "
            "it to 0, and router_aux_loss_scope='sequence' for a balance of each sequence.",
        ),
        (
            config.router_controller in ("bias", "proportional") and not config.router_bias_update_rate,
            f"router_controller={config.router_controller!r} needs a step: set router_bias_update_rate.",
        ),
        (
            config.capacity_running and config.capacity_priority != "token",
            "capacity_running follows the order of the tokens: set capacity_priority='token'.",
        ),
    ]
    for refused, message in rules:
        if refused:
            raise ValueError(message)


def check_size(config: Any) -> None:
    """Refuses a model that no machine can hold before any weight of it is made.

    Raises:
        ValueError: for more than 2^49 parameters.
    """
    if (params := config.num_params()) > 2**49:
        raise ValueError(
            f"vocab_size, hidden_size, num_hidden_layers, num_experts and the widths make {params:.1e} parameters, "
            "more than a petabyte: one of them is too large."
        )


def row_dependence(config: Any, training: bool) -> str | None:
    """Returns why a token's output depends on other sequences in its row, as a clause that names the field; else None."""
    router = router_class(config)
    sparse = "sparse" in config.mlp_layer_types
    factor = "capacity_factor" if training else "eval_capacity_factor"
    capacity = next((name for name in ("expert_capacity", factor) if getattr(config, name) is not None), None)
    if not (router.per_token and (router.causal or not training)) and sparse:
        return f"router_type={config.router_type!r} mixes the tokens of a row"
    if router.required_input is not None and sparse:
        return f"router_type={config.router_type!r} asks for {router.required_input}, which a request cannot give"
    if capacity is not None:
        return f"{capacity} counts the tokens of a row"
    if dynamic := _rope_types(config).intersection(("dynamic", "longrope")):
        return f"rope_parameters has rope_type={dynamic.pop()!r}, which follows the longest sequence of a row"
    return None


def refuse_continuous_batching(config: Any, training: bool) -> None:
    """Refuses continuous batching for a configuration in which it would change the output of a token.

    Continuous batching puts the tokens of many sequences into one row and their keys into pages.

    Raises:
        ValueError: names the field by which tokens depend on their neighbours in the row, or that pages cannot serve.
    """
    reason = row_dependence(config, training)
    if HAS_DEPTH.holds(config):
        reason = "depth_layers is set, and the pages have no place for the tokens that a layer skips"
    elif config.kv_lora_rank is not None:
        reason = "kv_lora_rank is set, and the pages have no room for latents"
    elif reason is None and config.routed_attention == "routing_transformer":
        reason = "routed_attention='routing_transformer' stores clusters of keys, for which the pages have no room"
    elif (
        reason is None
        and config.attn_logit_softcapping is not None
        and "flash" not in (config._attn_implementation or "")
    ):
        reason = "attn_logit_softcapping is set, which only flash attention applies to pages"
    if reason is not None:
        raise ValueError(f"continuous batching would change the text, because {reason}: call `generate` instead.")


def _rope_types(config: Any) -> set[str]:
    rope: dict = config.rope_parameters or {}
    by_kind = [rope.get(kind) or {} for kind in config.layer_types]
    return {parameters["rope_type"] for parameters in (rope, *by_kind) if "rope_type" in parameters}
