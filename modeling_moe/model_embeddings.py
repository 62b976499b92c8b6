# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines token embeddings and rotary position embeddings.

# B rows, S tokens per row, H hidden, D width of the rotated part of a head
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from .configuration_fields import POSITIVE, PROBABILITY, Condition, Range, setting


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class EmbeddingFields:
    """These fields configure token and position embeddings."""

    max_position_embeddings: int = setting(
        4096, "The length in tokens of the longest sequence that the position embedding is meant for.", Range(1, 2**31)
    )
    position_embedding_type: Literal["rope", "learned"] = setting(
        "rope",
        'The position embedding: "rope" rotates queries and keys, "learned" adds a learned vector to each token embedding '
        "(GPT-2).",
        conditions=(
            Condition(lambda config: config.kv_lora_rank is None, "unset kv_lora_rank (latent attention rotates)"),
        ),
    )
    scale_embeddings: bool = setting(
        False, "Multiplies token embeddings by sqrt(hidden_size), rounded to their dtype, as in Gemma."
    )
    embedding_multiplier: float | int = setting(
        1.0, "The factor on the token embeddings before the first layer, as in Granite.", POSITIVE
    )
    embd_pdrop: float | int = setting(
        0.0, "The dropout probability of the first layer's input in training.", PROBABILITY, effect="training"
    )


class ScaledEmbedding(nn.Embedding):
    """Multiplies token embeddings by sqrt(H), rounded to the dtype of the weight (Gemma).

    PEFT multiplies the output of an adapter on an embedding by `embed_scale`, if the embedding has that attribute.
    """

    @property
    def embed_scale(self) -> float:
        """Returns the factor sqrt(H), which is not part of the weight."""
        return self.embedding_dim**0.5

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps token ids (B, S) to (B, S, H)."""
        states = super().forward(input)
        return states * states.new_full((), self.embed_scale)


class RotaryEmbeddings(nn.Module):
    """Computes the angles of the rotary embedding, for each attention type if `rope_parameters` has one entry per type (Gemma 3).

    A model with `position_embedding_type="learned"` has no angles.
    """

    def __init__(self, config):
        super().__init__()
        self.layer_types, self.fp32 = sorted(set(config.layer_types)), config.rope_fp32
        self.by_type = any(kind in config.rope_parameters for kind in self.layer_types)
        self.kinds = nn.ModuleDict()
        if config.position_embedding_type == "rope":
            for kind in self.layer_types if self.by_type else ["all"]:
                view = copy.copy(config)
                view.rope_parameters = config.rope_parameters[kind] if self.by_type else config.rope_parameters
                self.kinds[kind] = Phi3RotaryEmbedding(view)

    @property
    def inv_freq(self) -> torch.Tensor:
        """Returns the frequencies (D / 2,), if all attention types share them."""
        return self.kinds["all"].get_buffer("inv_freq")

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns cosines and sines (B, S, D) for an attention type; None for a model without rotary embedding."""
        if not self.kinds:
            return None
        hidden_states = hidden_states.float() if self.fp32 else hidden_states
        kind = layer_type if self.by_type and layer_type is not None else "all"
        return self.kinds[kind](hidden_states, position_ids)

    def for_each_type(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> dict[str, tuple | None]:
        """Returns cosines and sines (B, S, D), or None, for each attention type in use."""
        if not self.by_type:
            return dict.fromkeys(self.layer_types, self(hidden_states, position_ids))
        return {kind: self(hidden_states, position_ids, kind) for kind in self.layer_types}
