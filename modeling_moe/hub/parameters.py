# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the parameters of a model: all, those that a token uses, and the embeddings among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..monitoring import SparseLayer, experts_per_token, idle_parameters


@dataclass(frozen=True)
class ParameterCounts:
    """The numbers of parameters of a model; a shared matrix counts once.

    Attributes:
        total: all parameters.
        active: all but those of routed experts that a token is not sent to; None if the configuration does not say to
            how many experts a token is sent.
        embeddings: parameters of the embeddings of tokens and positions, and of the language-model head.
    """

    total: int
    active: int | None
    embeddings: int

    def rows(self) -> list[tuple[str, str]]:
        """Returns titles and texts of a table."""
        rows = [("Total parameters", f"{self.total:,}")]
        if self.active is not None:
            rows.append(("Active parameters per token", f"{self.active:,} ({self.active / self.total:.1%})"))
        return [
            *rows,
            ("Embeddings and head", f"{self.embeddings:,} ({self.embeddings / self.total:.1%} of the total)"),
        ]


def count_parameters(model: PreTrainedModel, layers: Sequence[SparseLayer], is_sparse: bool) -> ParameterCounts:
    """Counts the parameters of a model of any family, which may lie on the meta device.

    Args:
        model: the model.
        layers: the sparse layers that can be reached.
        is_sparse: whether the model has routed experts, reached or not.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules = [module for module in (*tables, model.get_output_embeddings()) if module is not None]
    embeddings = sum({id(p): p.numel() for module in modules for p in module.parameters(recurse=False)}.values())
    config: Any = model.config
    if hasattr(config, "num_active_params"):
        # the routers of this package's model decide how many experts a token uses, whatever the head is
        return ParameterCounts(total, total - (config.num_params() - config.num_active_params()), embeddings)
    top_k = experts_per_token(config)
    if not is_sparse:
        return ParameterCounts(total, total, embeddings)
    if top_k is None or not layers:
        return ParameterCounts(total, None, embeddings)
    idle = sum(idle_parameters(layer.experts, top_k) for layer in layers)
    return ParameterCounts(total, round(total - idle), embeddings)
