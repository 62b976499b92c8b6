# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds, for each router of a model of transformers, the function from router logits to probabilities.

# T tokens, E experts, Z experts without weights, K choices per token
"""

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..monitoring import LayerPass, ScoringEvidence, SparseLayer, certain, explanation, sparse_layers
from ..utils.errors import UserError
from .router_probe import Choice, ProbeError, RouterProbe


class Scorings:
    """The scoring functions of a model's routers, which a probe of each router tells.

    If the probe tells nothing, because a router does not run alone or its logits are all equal, each training pass looks
    again, which waits for the device, until the function is certain.

    Raises:
        UserError: if a router returns no logits, or if no function explains the weights that a router gives.
    """

    def __init__(self, model: nn.Module):
        config: Any = next(module.config for module in model.modules() if isinstance(module, PreTrainedModel))
        self._configured = getattr(config.get_text_config(), "scoring_func", None)
        self.known: dict[int, str] = {}
        for layer in sparse_layers(model):
            with suppress(ProbeError):
                self._find(layer, RouterProbe(model, layer).run(), None)

    def of(self, event: LayerPass) -> str:
        """Returns the scoring function of a layer, one of [`~modeling_moe.monitoring.probabilities.SCORINGS`]."""
        known = self.known.get(id(event.layer.experts))
        if known is not None:
            return known
        return self._find(event.layer, Choice(event.index, event.weight, event.logits), event.token_mask)

    @torch.no_grad()
    def _find(self, layer: SparseLayer, choice: Choice, real: torch.Tensor | None) -> str:
        """Returns the function that explains a choice best, and keeps it if no other function does."""
        reason: str | None = "its router returns no router logits"
        if choice.logits is not None:
            evidence = ScoringEvidence(choice.index.shape[-1], choice.logits.float())
            evidence.add(choice.logits, choice.index, choice.weight, real)
            sums = evidence.sums.cpu()
            scoring, reason = explanation(sums, evidence.top_k, evidence.coarse, self._configured)
            if scoring is not None:
                if certain(sums, evidence.top_k, evidence.coarse) is not None or self._configured == scoring:
                    self.known[id(layer.experts)] = scoring
                return scoring
        raise UserError(
            f"{layer.name} can have no router loss, because {reason}: set the coefficients of the router losses to 0"
        )
