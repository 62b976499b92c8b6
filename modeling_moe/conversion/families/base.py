# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a model family is to a conversion: its configuration in our words, its tensors under our names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints import LazyTensor, State
from ...configuration_moe import MoEConfig
from ...utils.errors import UserError


# what every configuration carries and no model computes with; or bookkeeping of the tools that wrote it
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
    "pretraining_tp",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
}
# fields that mean the same in (nearly) every family
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

# old checkpoints hold what is computed: the causal mask, its fill value, the rotary frequencies
BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


class SourceFields:
    """A source's configuration, read field by field, so that a field that nobody read can be refused.

    Args:
        config: of the source.
    """

    def __init__(self, config: PreTrainedConfig):
        self.model_type = config.model_type
        self.dtype = config.dtype
        self._values = config.to_dict()
        # read through the config's own properties too: a layer type list that a pattern implies, for one
        self._config = config
        self._taken = set(IGNORED)

    def take(self, name: str, default: Any = None) -> Any:
        """The field's value; `default` if the source has no such field."""
        self._taken.add(name)
        return getattr(self._config, name, default)

    def same(self, *names: str) -> dict[str, Any]:
        """Fields whose name and meaning are the same here."""
        return {name: self.take(name) for name in names}

    def require(self, name: str, *allowed: Any) -> None:
        """Reads a field that can be held at these values alone.

        Raises:
            UserError: if it has another one.
        """
        if (value := self.take(name, allowed[0])) not in allowed:
            raise UserError(
                f"{name} is {value!r} in the config.json of this {self.model_type} model, which cannot be held: only "
                f"{' or '.join(map(repr, allowed))} can."
            )

    def refuse_partial_rotation(self) -> None:
        """Refuses heads that are to rotate in part, for a family that rotates whole heads.

        transformers ignores the field there, or fails on it.

        Raises:
            UserError: if partial_rotary_factor is not 1, for all layers or one kind of them.
        """
        rope = self.take("rope_parameters") or {}
        for kind in (rope, *rope.values()):
            if isinstance(kind, dict) and (factor := kind.get("partial_rotary_factor", 1.0)) != 1.0:
                raise UserError(
                    f"partial_rotary_factor is {factor!r} in the config.json of this {self.model_type} model, whose family "
                    "rotates whole heads: remove it."
                )

    def refuse_unread(self) -> None:
        """Refuses a field that nobody read: what it does to the model is not known.

        Raises:
            UserError: names the field.
        """
        if self._values.get("quantization_config") is not None and "quantization_config" not in self._taken:
            raise UserError(
                f"quantization_config is set in the config.json of this {self.model_type} model: dequantise the source first"
            )
        for name, value in self._values.items():
            bookkeeping = name.endswith("_token_id") or name in self._taken
            if not bookkeeping and value is not None:
                raise UserError(
                    f"{name} ({value!r}) in the config.json of this {self.model_type} model is unknown, so that equality "
                    "cannot be promised: remove the field if the model does not compute with it."
                )


@dataclass(frozen=True)
class Family:
    """One of transformers' model types.

    Attributes:
        fields: the [`MoEConfig`] fields of a source.
        tensors: the source's tensors under the names and in the layout of a MoE checkpoint on disk.
        sparse: whether the source is a Mixture of Experts itself.
    """

    fields: Callable[[SourceFields], dict[str, Any]]
    tensors: Callable[[State, MoEConfig], State] = lambda state, config: state
    sparse: bool = False


def _tied(embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    if not torch.equal(embedding, head):
        raise UserError(
            "tie_word_embeddings is true in config.json, but the checkpoint's head differs from its embedding: set the "
            "field to false."
        )
    return embedding


def parameters(state: State, config: MoEConfig) -> State:
    """A state under our names, without buffers and without the second copy of a tied head."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}
    if config.tie_word_embeddings and (head := state.pop("lm_head.weight", None)) is not None:
        embedding = state.get("model.embed_tokens.weight")
        state["model.embed_tokens.weight"] = head if embedding is None else LazyTensor.combine(_tied, embedding, head)
    return state
