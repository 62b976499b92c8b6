# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module prepares what all decoder layers of one pass read: embeddings, positions, masks, and the context of the routers.

# B rows, S tokens per row, T = B*S tokens, H hidden
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.import_utils import is_tracing

from .compatibility import cache_keyword
from .model_packing import find_beginnings
from .router import RoutingContext
from .router_losses import TokenWeights, weigh_tokens


# attention type -> function of transformers that makes a mask
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class LayerInputs(NamedTuple):
    """The inputs that all decoder layers of one pass share.

    Attributes:
        position_ids: (B, S) or (1, S) int64.
        attention_masks: attention type -> mask of transformers.
        cache: key-value cache; None without one.
        context: what the routers know of the batch.
    """

    position_ids: torch.Tensor
    attention_masks: dict[str, Any]
    cache: Cache | None
    context: RoutingContext


def prepare_inputs(
    config: Any,
    inputs_embeds: torch.Tensor,
    *,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    use_cache: bool | None,
    task_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> LayerInputs:
    """Prepares the layers' inputs from the arguments of [`~modeling_moe.modeling_moe.MoEModel`].

    Args:
        config: the model's configuration.
        inputs_embeds: (B, S, H) embeddings.
        input_ids, attention_mask, position_ids, cache, use_cache, task_ids: as the model got them.
        cu_seq_lens: `cu_seq_lens_q` as the model got it.
    """
    context = routing_context(inputs_embeds, input_ids, attention_mask, task_ids)
    if inputs_embeds.shape[1] > 1:  # a single token goes on with its row's sequence
        mask = context.by_row(context.token_mask)
        begins = find_beginnings((inputs_embeds.shape[0], inputs_embeds.shape[1]), position_ids, mask, cu_seq_lens)
        context = context._replace(begins=None if begins is None else begins.flatten())
    # transformers looks for packed sequences where a mask is made without a cache; a new cache holds nothing
    mask_cache = cache
    if use_cache and cache is None:
        cache = DynamicCache(config=config)
    if position_ids is None:
        mask_cache = cache
        past = cache.get_seq_length() if cache is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
    masks = attention_masks(config, attention_mask, inputs_embeds, mask_cache, position_ids)
    return LayerInputs(position_ids, masks, cache, context)


def attention_masks(
    config: Any, attention_mask: Any, inputs_embeds: torch.Tensor, cache: Cache | None, position_ids: torch.Tensor
) -> dict[str, Any]:
    """Makes one mask for each attention type in use; masks that are already prepared, as `generate` does, are kept.

    Prepared masks are a dictionary by attention type, or one mask (B or 1, heads or 1, S, S') for all types.

    Raises:
        ValueError: for a prepared mask of integers.
    """
    masks = attention_mask
    if not isinstance(masks, dict):
        masks = {
            layer_type: MASKS[layer_type](
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache_keyword(cache),
            )
            for layer_type in set(config.layer_types)
        }
    return {layer_type: _readable(mask, config, inputs_embeds.dtype) for layer_type, mask in masks.items()}


def _readable(mask: Any, config: Any, dtype: torch.dtype) -> Any:
    """Returns a mask that the attention function reads rightly: eager attention adds it, whatever the mask's dtype is."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} of {mask.dtype}: give bool, true where a token attends, or numbers of the "
            "model's dtype, which are added to the products."
        )
    if config._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def routing_context(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    task_ids: torch.Tensor | None,
) -> RoutingContext:
    """Returns what the routers know of the batch.

    A padding mask over cached tokens and new ones is cut to the last S.

    Raises:
        ValueError: if `task_ids` has neither one entry per row nor one per token.
    """
    batch_size, length = inputs_embeds.shape[:2]
    token_mask = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        # some callers number the sequences in the mask
        token_mask = attention_mask[:, -length:].reshape(-1) > 0
    if task_ids is not None:
        if task_ids.shape not in ((batch_size,), (batch_size, length)):
            raise ValueError(
                f"task_ids has shape {tuple(task_ids.shape)}: give one task for each sequence, ({batch_size},), or for "
                f"each token, ({batch_size}, {length})."
            )
        task_ids = (task_ids if task_ids.dim() == 2 else task_ids[:, None]).expand(-1, length).reshape(-1)
    return RoutingContext(batch_size, token_mask, None if input_ids is None else input_ids.reshape(-1), task_ids)


def loss_weights(
    inputs_embeds: torch.Tensor, context: RoutingContext, label_mask: torch.Tensor | None
) -> TokenWeights:
    """Weighs each token in the router losses, in fp32 or fp64."""
    dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
    mask = torch.ones(inputs_embeds.shape[:2], dtype=dtype, device=inputs_embeds.device)
    if context.token_mask is not None:
        mask = context.token_mask.view(mask.shape).to(mask)
    return weigh_tokens(mask, context.by_row(context.begins), label_mask)


def token_embeddings(
    table: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, training: bool
) -> torch.Tensor:
    """Returns the embeddings (B, S, H) of the tokens, given or looked up in `table`.

    Raises:
        ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, or for embeddings with a NaN.
    """
    if (input_ids is None) ^ (inputs_embeds is not None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if inputs_embeds is None:
        return table(input_ids)
    refuse_nan(inputs_embeds, training)
    return inputs_embeds


def refuse_nan(inputs_embeds: torch.Tensor, training: bool) -> None:
    """Refuses embeddings (B, S, H) with a NaN; on an accelerator in training only, where the check may synchronise.

    Raises:
        ValueError: names the row and the position of the first NaN.
    """
    if is_tracing(inputs_embeds) or not (training or inputs_embeds.device.type == "cpu"):
        return
    if inputs_embeds.isnan().any():
        row, position = inputs_embeds.isnan().any(dim=-1).nonzero()[0].tolist()
        raise ValueError(
            f"inputs_embeds has a NaN in row {row} at position {position}: check what computes the embeddings."
        )
