# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads the experts that vLLM returns with its answers.

vLLM returns them as `RequestOutput.outputs[i].routed_experts`, a NumPy array (N, L, K) of uint8, uint16 or int16 in which the
rows are the tokens of prompt and answer but the last, which was never an input. Release 0.21 had the rows of the prompt apart,
as `RequestOutput.prompt_routed_experts`, and -1 in the rows of tokens that the prefix cache already held. The layers are all
decoder layers, with zeros for dense ones, or the sparse layers alone, depending on the release.

# S tokens of a text, N rows of the array, L layers, K experts per token
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..monitoring import sparse_layers


def texts_of_output(output: Any, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields token ids (S,) int64 and experts (N, L, K) int32 of each answer to a prompt, with L the sparse layers of a model.

    Args:
        output: a `RequestOutput` of vLLM.
        model: the model whose sparse layers are meant.

    Raises:
        ValueError: if there are no experts, or experts of other tokens or of another model.
    """
    prompt = getattr(output, "prompt_routed_experts", None)
    for answer in output.outputs:
        if answer.routed_experts is None:
            raise ValueError(
                "vLLM returned no routed experts: start it with enable_return_routed_experts=True, and read finished requests."
            )
        parts = [np.asarray(part) for part in (prompt, answer.routed_experts) if part is not None]
        experts = np.concatenate([part for part in parts if part.size])
        ids = [*output.prompt_token_ids, *answer.token_ids]
        if len(experts) not in (len(ids) - 1, len(ids)):
            raise ValueError(
                f"vLLM returned the experts of {len(experts)} tokens for a text of {len(ids)} tokens: read finished requests, "
                "with output_kind=RequestOutputKind.FINAL_ONLY."
            )
        yield torch.tensor(ids), torch.from_numpy(_of_sparse_layers(experts, model).astype(np.int32))


def _of_sparse_layers(experts: np.ndarray, model: nn.Module) -> np.ndarray:
    """Returns the rows (N, L, K) of the sparse layers of a model, from those of the sparse or of all decoder layers."""
    layers = sparse_layers(model)
    places = [layer.layer for layer in layers]
    inner: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    decoder_layers = inner.config.get_text_config().num_hidden_layers
    if len(set(places)) < len(places) or experts.shape[1] not in (len(layers), decoder_layers):
        raise ValueError(
            f"vLLM returned the experts of {experts.shape[1]} layers for a model with {len(layers)} routers in {decoder_layers} "
            "layers: give the model that vLLM ran, with at most one router in a layer."
        )
    if experts.shape[1] == decoder_layers:
        experts = experts[:, places]
    highest = min(layer.num_experts for layer in layers)
    if experts.size and experts.max() >= highest:
        raise ValueError(
            f"vLLM returned expert {experts.max()} for a model with {highest} experts: give the model that vLLM ran."
        )
    return experts
