# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps dense model families to a MoE whose layers are all dense: fields of the configuration and tensors."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from .base import COMMON, Family, SourceFields, parameters, split_qkv


GPT2_NAMES = {
    "wte.": "embed_tokens.",
    "wpe.": "embed_positions.",
    "ln_f.": "norm.",
    "h.": "layers.",
}
GPT2_LAYER_NAMES = {
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_attn.": ".self_attn.qkv_proj.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}
GPT_NEOX_NAMES = {
    "gpt_neox.embed_in.": "model.embed_tokens.",
    "gpt_neox.final_layer_norm.": "model.norm.",
    "gpt_neox.": "model.",
    "embed_out.": "lm_head.",
    ".attention.query_key_value.": ".self_attn.qkv_proj.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}


def _dense(
    fields: SourceFields, common: Iterable[str] = (*COMMON, "head_dim"), partial: bool = False
) -> dict[str, Any]:
    """Reads the fields `common` of a dense model; `partial` allows heads that rotate only in part."""
    if not partial:
        fields.refuse_partial_rotation()
    values = fields.same(*common)
    return values | {"mlp_layer_types": ["dense"] * values["num_hidden_layers"]}


def _window_by_layer(fields: SourceFields) -> dict[str, Any]:
    """Reads the sliding window and the layers that use it.

    transformers' configuration has already merged Qwen's two switches into `layer_types`.
    """
    fields.same("use_sliding_window", "max_window_layers")
    return fields.same("sliding_window", "layer_types")


def _window_everywhere(fields: SourceFields) -> dict[str, Any]:
    """Reads a sliding window that all layers use."""
    window = fields.take("sliding_window")
    implied = "full_attention" if window is None else "sliding_attention"
    fields.require("layer_types", None, [implied] * fields.take("num_hidden_layers"))
    return {"sliding_window": window}


def _llama(fields: SourceFields) -> dict[str, Any]:
    # SmolLM2 sets this field, and transformers does not read it
    fields.take("is_llama_config")
    fields.require("rope_interleaved", False)
    return _dense(fields) | fields.same("attention_bias", "mlp_bias")


def _mistral(fields: SourceFields) -> dict[str, Any]:
    return _dense(fields) | _window_everywhere(fields)


def _qwen2(fields: SourceFields) -> dict[str, Any]:
    fields.require("use_mrope", False)
    return _dense(fields) | _window_by_layer(fields) | {"qkv_bias": True}


def _qwen3(fields: SourceFields) -> dict[str, Any]:
    return _dense(fields) | _window_by_layer(fields) | fields.same("attention_bias") | {"qk_norm": "head"}


def _smollm3(fields: SourceFields) -> dict[str, Any]:
    values = _dense(fields) | _window_by_layer(fields) | fields.same("attention_bias", "mlp_bias")
    fields.take("no_rope_layer_interval")
    return values | {"no_rope_layers": fields.take("no_rope_layers")[: values["num_hidden_layers"]]}


def _olmo2(fields: SourceFields) -> dict[str, Any]:
    norms = {"norm_type": "rms_fp32", "norm_placement": "post", "qk_norm": "full"}
    return _dense(fields) | fields.same("attention_bias") | norms | {"rope_fp32": True}


def _olmo3(fields: SourceFields) -> dict[str, Any]:
    return _olmo2(fields) | fields.same("sliding_window", "layer_types")


def _phi3(fields: SourceFields) -> dict[str, Any]:
    # Phi-4-mini names features that the family does not have
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.require(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.require(name, 1)
    # rope_parameters contains the first two; transformers' model has no dropout after the embedding
    fields.same("original_max_position_embeddings", "partial_rotary_factor", "embd_pdrop")
    return _dense(fields, partial=True) | _window_everywhere(fields) | fields.same("resid_pdrop")


def _gemma(fields: SourceFields) -> dict[str, Any]:
    fields.require("use_bidirectional_attention", None, False)
    # the model reads hidden_activation instead of hidden_act, and only `generate` reads cache_implementation
    fields.same("hidden_act", "cache_implementation")
    values = _dense(fields, {*COMMON, "head_dim"} - {"hidden_act"})
    window = fields.same("sliding_window", "layer_types")
    scaling = {"attention_multiplier": fields.take("query_pre_attn_scalar") ** -0.5, "scale_embeddings": True}
    norms = {"norm_type": "rms_plus_one", "norm_placement": "sandwich"}
    same = fields.same("attention_bias", "final_logit_softcapping")
    return values | window | scaling | norms | same | {"hidden_act": fields.take("hidden_activation")}


def _gemma2(fields: SourceFields) -> dict[str, Any]:
    # transformers reads sliding_window instead
    fields.take("sliding_window_size")
    return _gemma(fields) | fields.same("attn_logit_softcapping")


def _gemma3_text(fields: SourceFields) -> dict[str, Any]:
    # transformers' model ignores this field, so another value would change nothing there
    fields.require("attn_logit_softcapping", None)
    fields.same("sliding_window_pattern", "_sliding_window_pattern")
    return _gemma(fields) | {"qk_norm": "head"}


def _granite(fields: SourceFields) -> dict[str, Any]:
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return _dense(fields) | fields.same("attention_bias", "mlp_bias", *multipliers)


def _gpt2(fields: SourceFields) -> dict[str, Any]:
    for name in ("reorder_and_upcast_attn", "add_cross_attention"):
        fields.require(name, False)
    # these belong to other heads and to text generation; n_ctx repeats n_positions
    heads = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
    fields.same(*(f"summary_{name}" for name in heads), "task_specific_params", "n_ctx")
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
    }
    same = ("vocab_size", "initializer_range", "use_cache", "tie_word_embeddings", "resid_pdrop", "embd_pdrop")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    values = {name: fields.take(theirs) for name, theirs in names.items()} | fields.same(*same, *tokens)
    inner = fields.take("n_inner")
    return values | {
        "intermediate_size": 4 * values["hidden_size"] if inner is None else inner,
        "attention_multiplier": None if fields.take("scale_attn_weights") else 1.0,
        "scale_attn_by_inverse_layer_idx": fields.take("scale_attn_by_inverse_layer_idx"),
        "position_embedding_type": "learned",
        "norm_type": "layer",
        "attention_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "mlp_layer_types": ["dense"] * values["num_hidden_layers"],
    }


def _gpt_neox(fields: SourceFields) -> dict[str, Any]:
    # these belong to another head and to encoder-decoders, or are names of dropout that transformers does not read
    fields.same("classifier_dropout", "is_decoder", "attention_probs_dropout_prob", "hidden_dropout_prob")
    values = _dense(fields, {*COMMON} - {"num_key_value_heads", "rms_norm_eps"}, partial=True)
    dropout = fields.take("hidden_dropout")
    return values | {
        "rms_norm_eps": fields.take("layer_norm_eps"),
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "norm_type": "layer",
        "norm_placement": "parallel" if fields.take("use_parallel_residual") else "pre",
        "attention_bias": fields.take("attention_bias"),
        "mlp_bias": True,
        "gated_mlp": False,
    }


def _split(tensor: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    """Splits a tensor along `dim` into blocks of these sizes and a last block with the rest."""
    edges = [0, *accumulate(sizes), None]
    before = (slice(None),) * dim
    return [tensor[(*before, slice(*pair))] for pair in pairwise(edges)]


def _qkv_sizes(config: MoEConfig) -> tuple[int, int]:
    """Returns the number of rows of the queries and of the keys in a fused projection; the values have the rest."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _named(name: str, fused: str, names: str, parts: Sequence[LazyTensor]) -> State:
    """Names the parts of a fused projection by replacing `fused` in the name by each of `names`."""
    return {name.replace(fused, new): part for new, part in zip(names.split(), parts, strict=True)}


def _phi3_tensors(state: State, config: MoEConfig) -> State:
    """Splits Phi-3's fused projections."""
    result: State = {}
    for name, tensor in state.items():
        if ".qkv_proj." in name:
            result |= split_qkv(name, "qkv_proj", tensor, config)
        elif ".gate_up_proj." in name:
            result |= _named(name, "gate_up_proj", "gate_proj up_proj", _split(tensor, [config.intermediate_size]))
        else:
            result[name] = tensor
    return parameters(result, config)


def _gpt2_tensors(state: State, config: MoEConfig) -> State:
    """Renames GPT-2's tensors, transposes the weights and splits the fused projection."""
    result: State = {}
    for source, tensor in state.items():
        name = source.removeprefix("transformer.")
        for old, new in GPT2_NAMES.items():
            if name.startswith(old):
                name = "model." + new + name.removeprefix(old)
        for old, new in GPT2_LAYER_NAMES.items():
            name = name.replace(old, new)
        # GPT-2's `Conv1D` stores the weight as (in, out)
        orient = LazyTensor.transpose if ".c_" in source and len(tensor.shape) == 2 else lambda part: part
        if ".qkv_proj." in name:
            parts = _split(tensor, _qkv_sizes(config), dim=len(tensor.shape) - 1)
            result |= _named(name, "qkv_proj", "q_proj k_proj v_proj", [orient(part) for part in parts])
        else:
            result[name] = orient(tensor)
    return parameters(result, config)


def _gpt_neox_tensors(state: State, config: MoEConfig) -> State:
    """Renames GPT-NeoX's tensors and splits the fused projection, whose rows are ordered by head."""
    result: State = {}
    width = config.head_dim
    for name, tensor in state.items():
        for old, new in GPT_NEOX_NAMES.items():
            name = name.replace(old, new)
        if ".qkv_proj." in name:
            # rows are ordered by head: query, key and value of the first head, then of the second, ...
            heads = range(0, tensor.shape[0], 3 * width)
            parts = [LazyTensor.cat([tensor[h + i * width : h + (i + 1) * width] for h in heads]) for i in range(3)]
            result |= _named(name, "qkv_proj", "q_proj k_proj v_proj", parts)
        else:
            result[name] = tensor
    return parameters(result, config)


DENSE_FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, parameters),
    "mistral": Family(_mistral, parameters),
    "qwen2": Family(_qwen2, parameters),
    "qwen3": Family(_qwen3, parameters),
    "smollm3": Family(_smollm3, parameters),
    "olmo2": Family(_olmo2, parameters),
    "olmo3": Family(_olmo3, parameters),
    "phi3": Family(_phi3, _phi3_tensors),
    "gemma2": Family(_gemma2, parameters),
    "gemma3_text": Family(_gemma3_text, parameters),
    "granite": Family(_granite, parameters),
    "gpt2": Family(_gpt2, _gpt2_tensors),
    "gpt_neox": Family(_gpt_neox, _gpt_neox_tensors),
}
