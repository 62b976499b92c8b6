# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A model family is described by a function that maps its configuration and a function that maps its tensors."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .quantized import refuse_unreadable
from .reading import reads


# fields that do not change what a model computes: those of every configuration, and bookkeeping of the tools that wrote it
IGNORED = {
    *PreTrainedConfig().to_dict(),
    "model_type",
    "_name_or_path",
    "_attn_implementation",
    "auto_map",
    "code_version",
} | {
    "_attn_implementation_autoset",
    "_model_name_or_path",
    "cache_implementation",
    "gradient_checkpointing",
    "pretraining_tp",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
}
# fields with one meaning in (nearly) every family
COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# fields of the layers that predict further tokens, which add nothing to the logits: num_nextn_predict_layers, num_mtp_layers,
# mtp_layer_types and others
PREDICTION = re.compile(r"(^|_)(mtp|nextn)(_|$)")

# old checkpoints contain buffers that are computed now: the causal mask, its fill value, the rotary frequencies
BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


class SourceFields:
    """A source's configuration that records which fields were read, so that unread fields can be refused.

    Args:
        config: configuration of the source.
    """

    def __init__(self, config: PreTrainedConfig):
        self.model_type = config.model_type
        self.dtype = config.dtype
        self._values = config.to_dict()
        # values are read as attributes too, because properties derive some, such as layer types from a pattern
        self._config = config
        self._read = set(IGNORED)
        self._unused: set[str] = set()
        self._parts: dict[str, SourceFields] = {}
        self._prefix = ""

    def part(self, name: str) -> "SourceFields":
        """Returns the fields of a configuration that is a field of this one, which [`SourceFields.refuse_unread`] judges too."""
        part = self._parts[name] = SourceFields(self.take(name))
        part.model_type, part._prefix = self.model_type, f"{name}."
        return part

    def report(self, name: str) -> None:
        """Marks a field that the model's code names but computes nothing with: it is reported if the source has it."""
        self._unused.add(name)

    def take(self, name: str, default: Any = None) -> Any:
        """Reads a field; returns `default` if the source has no such field."""
        self._read.add(name)
        return getattr(self._config, name, default)

    def same(self, *names: str) -> dict[str, Any]:
        """Reads fields whose name and meaning are the same in a `MoEConfig`."""
        return {name: self.take(name) for name in names}

    def replaced(self, **values: Any) -> "SourceFields":
        """Returns these fields with other values of some; a read of either counts for both."""
        other = copy.copy(self)
        other._config = copy.copy(self._config)
        vars(other._config).update(values)
        return other

    def require(self, name: str, *allowed: Any) -> None:
        """Reads a field for which a MoE supports only the values `allowed`.

        Raises:
            UserError: if the field has another value.
        """
        if (value := self.take(name, allowed[0])) not in allowed:
            raise UserError(
                f"{name} is {value!r} in the config.json of this {self.model_type} model, which cannot be converted: only "
                f"{' or '.join(map(repr, allowed))} can."
            )

    def refuse_partial_rotation(self) -> None:
        """Refuses a partial rotation of heads, for a family that rotates whole heads.

        transformers ignores the field in these families, or fails on it.

        Raises:
            UserError: if partial_rotary_factor is not 1, for all layers or for one type of layer.
        """
        rope = self.take("rope_parameters") or {}
        for kind in (rope, *rope.values()):
            if isinstance(kind, dict) and (factor := kind.get("partial_rotary_factor", 1.0)) != 1.0:
                raise UserError(
                    f"partial_rotary_factor is {factor!r} in the config.json of this {self.model_type} model, whose family "
                    "rotates whole heads: remove it."
                )

    def require_quantization(self, method: str) -> None:
        """Refuses a source that is quantised by another method than the one that only this family can read.

        Raises:
            UserError: names the method.
        """
        if (settings := self.take("quantization_config")) and settings.get("quant_method") != method:
            raise UserError(
                f"quantization_config is {settings!r} in the config.json of this {self.model_type} model, which cannot be "
                f"read: only the quant_method {method!r} can."
            )

    def refuse_unread(self) -> dict[str, Any]:
        """Refuses a field that nothing here has read, if the source's model may read it.

        Returns:
            The fields, with their values, that the source's model does not read either, see [`reads`]; a field `b` of a
            part `a` is named `a.b`.

        Raises:
            UserError: names the field.
        """
        if (settings := self._values.get("quantization_config")) and "quantization_config" not in self._read:
            refuse_unreadable(settings, self.model_type)
        without_effect = {}
        for name, value in self._values.items():
            known = name in self._read or name == "quantization_config" or name.endswith("_token_id")
            if known or value is None or PREDICTION.search(name):
                continue
            if name not in self._unused and reads(self._config, name):
                raise UserError(
                    f"{self._prefix}{name} ({value!r}) in the config.json of this {self.model_type} model is unknown, so equal "
                    "logits cannot be promised: remove the field if the model does not compute with it."
                )
            without_effect[self._prefix + name] = value
        for part in self._parts.values():
            without_effect |= part.refuse_unread()
        return without_effect


@dataclass(frozen=True)
class Family:
    """One of transformers' model types.

    Attributes:
        fields: maps the configuration of a source to [`MoEConfig`] fields.
        tensors: maps the source's tensors to names and layout of a MoE checkpoint on disk.
        sparse: whether the source itself is a Mixture of Experts.
    """

    fields: Callable[[SourceFields], dict[str, Any]]
    tensors: Callable[[State, MoEConfig], State] = lambda state, config: state
    sparse: bool = False


def _tied(embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Returns the embedding if the head equals it.

    Raises:
        UserError: if the two differ.
    """
    if not torch.equal(embedding, head):
        raise UserError(
            "tie_word_embeddings is true in config.json, but the checkpoint's head differs from its embedding: set the "
            "field to false."
        )
    return embedding


def split_qkv(name: str, fused: str, tensor: LazyTensor, config: MoEConfig) -> State:
    """Splits a fused projection, whose rows are those of all queries, then keys, then values.

    Args:
        name: name of the tensor.
        fused: part of the name in whose place the parts have q_proj, k_proj and v_proj.
        tensor: weight or bias.
        config: configuration of the result.
    """
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    rows = {"q_proj": slice(0, query), "k_proj": slice(query, query + key), "v_proj": slice(query + key, None)}
    return {name.replace(fused, part): tensor[places] for part, places in rows.items()}


def parameters(state: State, config: MoEConfig) -> State:
    """Removes buffers, and the second copy of a tied head, from a state with the names of a MoE checkpoint."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}
    if config.tie_word_embeddings and (head := state.pop("lm_head.weight", None)) is not None:
        embedding = state.get("model.embed_tokens.weight")
        state["model.embed_tokens.weight"] = head if embedding is None else LazyTensor.combine(_tied, embedding, head)
    return state
