# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the parameters of a model: all, those that a token uses, and the embeddings among them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..monitoring import SparseLayer, active_parameters, embedding_modules


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


def count_parameters(model: PreTrainedModel, layers: Sequence[SparseLayer]) -> ParameterCounts:
    """Counts the parameters of a model of any family, which may lie on the meta device.

    Args:
        model: the model.
        layers: the sparse layers that can be reached.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = (parameter for module in embedding_modules(model) for parameter in module.parameters(recurse=False))
    embeddings = sum({id(parameter): parameter.numel() for parameter in tables}.values())
    active = active_parameters(model.config, [layer.experts for layer in layers], total)
    return ParameterCounts(total, active, embeddings)
