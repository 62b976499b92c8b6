# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module predicts the experts of a layer by a twin of the layer's router, which leaves the router and its hooks alone.

# T tokens, K experts per token, E experts
"""

import copy
import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..monitoring import SparseLayer


# attributes of nn.Module that hold hooks
HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict))


class NoPrediction(ValueError):
    """The experts of a layer cannot be predicted; the message says why."""


class RouterTwin:
    """A RouterTwin computes what a router would choose, without any effect on the router.

    The twin shares the router's parameters and has buffers of its own, which it sets to the router's before each prediction. It
    has none of the router's hooks, so nothing is recorded; it is in evaluation mode, so no noise is drawn and no statistics
    are kept; and it records no gradient.

    Args:
        layer: the sparse layer of the router.

    Raises:
        NoPrediction: if the router cannot be called on hidden states alone, or cannot be copied.
    """

    def __init__(self, layer: SparseLayer):
        router = layer.router
        if router is None:
            raise NoPrediction("the model declares no router")
        parameters = list(router.parameters())
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise NoPrediction("the router is split over processes")
        _check_signature(router)
        memo: dict[int, Any] = {id(parameter): parameter for parameter in parameters}
        # before copying: a hook may refer to anything, the whole model among it
        memo |= {
            id(vars(part)[name]): OrderedDict() for part in router.modules() for name in HOOKS if name in vars(part)
        }
        try:
            self._twin = copy.deepcopy(router, memo).eval()
        except Exception as error:
            raise NoPrediction(f"the router cannot be copied ({type(error).__name__}: {error})") from error
        self._buffers = list(zip(self._twin.buffers(), router.buffers(), strict=True))
        self._num_experts, self._logits_index = layer.num_experts, layer.logits_index

    @torch.inference_mode()
    def predict(self, states: torch.Tensor, top_k: int, extra: int, limit: int) -> list[int]:
        """Returns the experts that the router would choose for hidden states.

        Args:
            states: (T, H) or (B, S, H) input of a router.
            top_k: number K of experts that a token chooses.
            extra: number of further experts: those that come next by the largest router logit of any token.
            limit: most experts to return.

        Returns:
            At most `limit` distinct ids: those of the chosen experts in ascending order, then the extra ones. Of more than
            `limit` chosen experts they are the lowest ids, which the pass uses first.

        Raises:
            NoPrediction: if the router fails, or returns no router logits.
        """
        try:
            for own, theirs in self._buffers:
                own.copy_(theirs)
            output = self._twin(states)
        except Exception as error:
            raise NoPrediction(
                f"the router cannot be called on hidden states alone ({type(error).__name__}: {error})"
            ) from error
        outputs = output if isinstance(output, tuple) else (output,)
        logits = self._logits(outputs)
        tokens = len(logits)
        index = next((found for found in outputs if _is_index(found, tokens, top_k)), None)
        if index is None:
            index = logits.topk(min(top_k, self._num_experts)).indices
        index = index[(index >= 0) & (index < self._num_experts)]
        chosen = index.unique()
        best = logits.amax(dim=0).index_fill_(0, chosen.long(), -torch.inf)
        ids = chosen.tolist()[:limit]
        room = min(extra, limit - len(ids), self._num_experts - len(chosen))
        return ids + best.topk(room).indices.tolist() if room > 0 else ids

    def _logits(self, outputs: tuple[Any, ...]) -> torch.Tensor:
        """Returns the router logits (T, E) among the outputs of the router."""
        logits = outputs[self._logits_index] if self._logits_index < len(outputs) else None
        if (
            not isinstance(logits, torch.Tensor)
            or not logits.is_floating_point()
            or logits.shape[-1] < self._num_experts
        ):
            raise NoPrediction("the router returns no router logits")
        return logits.reshape(-1, logits.shape[-1])[:, : self._num_experts]


def _is_index(output: Any, tokens: int, top_k: int) -> bool:
    """Returns True for a tensor that holds the ids of the chosen experts, (T, K) integers."""
    return (
        isinstance(output, torch.Tensor)
        and not output.is_floating_point()
        and output.dtype != torch.bool
        and output.shape[-1:] == (top_k,)
        and output.numel() == tokens * top_k
    )


def _check_signature(router: nn.Module) -> None:
    """Refuses a router that needs more than hidden states.

    Raises:
        NoPrediction: with the names of the arguments that are needed.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        parameter
        for parameter in inspect.signature(router.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind in (*kinds, inspect.Parameter.KEYWORD_ONLY)
    ]
    if len(required) > 1:
        names = ", ".join(parameter.name for parameter in required[1:])
        raise NoPrediction(f"the router needs {names} beside the hidden states")
