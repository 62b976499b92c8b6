# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a text uses of each expert, measured by running the model on it.

# T tokens, H hidden, E experts, K slots per token, L sparse layers
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling_moe import MoEForCausalLM
from ..router import Router
from ..utils.errors import UserError


@dataclass(frozen=True)
class LayerUsage:
    """How much a text uses the experts of a sparse layer; float64 on the CPU.

    Attributes:
        load: (E,), share of the tokens that are sent to the expert.
        mass: (E,), mean over all tokens of the expert's weight, 0 for those not sent to it.
        reap: (E,), mean over the tokens sent to the expert of its weight times the norm of its output: the saliency of
            REAP (arXiv:2510.13999); 0 without such tokens.
    """

    load: torch.Tensor
    mass: torch.Tensor
    reap: torch.Tensor


@dataclass(frozen=True)
class Usage:
    """How much a text uses the experts of a model.

    Attributes:
        layers: index of each sparse layer to what it uses.
        tokens: number of tokens measured.
    """

    layers: dict[int, LayerUsage]
    tokens: int

    def of(self, layer: int) -> LayerUsage:
        """Usage of a sparse layer.

        Raises:
            UserError: if it was not measured.
        """
        if layer not in self.layers:
            raise UserError(f"the usage lacks layer {layer}: measure it with the same model")
        return self.layers[layer]


class _Sums:
    """Sums (3, E) of a layer over the tokens that count: their number, weight, and weight times norm of the output."""

    def __init__(self, block: Any, device: torch.device):
        self.total = torch.zeros(3, block.experts.num_experts + 1, dtype=torch.float64, device=device)
        self.mask: torch.Tensor | None = None

    def see_context(self, block: nn.Module, args: tuple) -> None:
        """Keeps the mask of the tokens; a hook before the block."""
        self.mask = args[1].token_mask

    def see_experts(self, experts: Any, args: tuple, output: torch.Tensor) -> None:
        """Adds one pass; a hook after the experts. Each slot is computed once more, alone and unweighted."""
        tokens, index, weight = args
        empty = experts.num_experts
        for slot, factor in zip(index.split(1, dim=-1), weight.double().unbind(-1), strict=True):
            out = experts.forward(tokens, slot, torch.ones_like(slot, dtype=weight.dtype))  # (T, H)
            norm = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float64)
            chosen = slot[:, 0]
            if self.mask is not None:
                chosen = chosen.where(self.mask > 0, empty)
            values = torch.stack([torch.ones_like(factor), factor, factor * norm])
            self.total.index_add_(1, chosen.clamp(max=empty), values)


@torch.no_grad()
def measure_usage(model: MoEForCausalLM, batches: Iterable[dict[str, Any]]) -> Usage:
    """Runs a model over a text and measures what it uses of each expert, at twice the experts' cost.

    Args:
        model: on the device to run on, its experts not split over processes; its mode is left as it is.
        batches: keyword arguments of `model`, tensors: `input_ids` (B, S), `attention_mask` (B, S), 0 at tokens that
            do not count, and what its router asks for.

    Returns:
        Usage of every sparse layer, as routed in evaluation, after capacity.

    Raises:
        UserError: for a router that does not send tokens to experts (`soft_moe`, `lory`), or without any token.
    """
    blocks = {i: layer.mlp for i, layer in enumerate(model.model.layers) if layer.is_sparse}
    if any(block.mix is not Router.mix for block in blocks.values()):
        raise UserError(
            f"router_type={model.config.router_type!r} sends no token to an expert: measure a model that does"
        )
    sums = {i: _Sums(block, block.experts.down_proj.device) for i, block in blocks.items()}
    hooks = [block.register_forward_pre_hook(sums[i].see_context) for i, block in blocks.items()]
    hooks += [block.experts.register_forward_hook(sums[i].see_experts) for i, block in blocks.items()]
    was_training, tokens = model.training, 0
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            tokens += batch["input_ids"].numel() if mask is None else int((mask > 0).sum())
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if tokens == 0:
        raise UserError("there is no token to measure the usage with: give batches with some text")
    return Usage({i: _layer_usage(total.total[:, :-1].cpu(), tokens) for i, total in sums.items()}, tokens)


def _layer_usage(sums: torch.Tensor, tokens: int) -> LayerUsage:
    count, weight, saliency = sums
    return LayerUsage(load=count / tokens, mass=weight / tokens, reap=saliency / count.clamp(min=1))


# what experts can be ranked by
SCORES: dict[str, Callable[[LayerUsage], torch.Tensor]] = {
    "reap": lambda usage: usage.reap,
    "load": lambda usage: usage.load,
    "mass": lambda usage: usage.mass,
}
