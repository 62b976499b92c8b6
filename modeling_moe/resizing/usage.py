# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures how much a text uses each expert, by running the model on the text.

# T tokens, H hidden, E experts, K experts per token
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..modeling_moe import MoEBlock, MoEExperts, MoEForCausalLM
from ..router import Router, RoutingContext
from ..utils.errors import UserError


@dataclass(frozen=True)
class LayerUsage:
    """Holds how much a text uses each expert of a sparse layer; all tensors are float64 on the CPU.

    Attributes:
        load: (E,), share of the tokens that are sent to the expert.
        mass: (E,), routing weight of the expert, averaged over all tokens; 0 for tokens that are not sent to it.
        reap: (E,), routing weight times norm of the expert's output, averaged over the tokens sent to the expert: the
            saliency of REAP (arXiv:2510.13999); 0 for an expert without tokens.
    """

    load: torch.Tensor
    mass: torch.Tensor
    reap: torch.Tensor


@dataclass(frozen=True)
class Usage:
    """Holds how much a text uses the experts of a model.

    Attributes:
        layers: the usage of each sparse layer, by layer index.
        tokens: number of tokens measured.
    """

    layers: dict[int, LayerUsage]
    tokens: int

    def of(self, layer: int) -> LayerUsage:
        """Returns the usage of a sparse layer.

        Raises:
            UserError: if the layer was not measured.
        """
        if layer not in self.layers:
            raise UserError(f"the usage lacks layer {layer}: measure it with the same model")
        return self.layers[layer]


class _Sums:
    """Sums three values of each expert over the unmasked tokens of a layer.

    Attributes:
        total: (3, E + 1) float64: number of tokens, routing weight, and routing weight times norm of the output. The
            last column collects empty and masked assignments.
        mask: (T,) token mask of the current pass; None if all tokens are unmasked.
    """

    def __init__(self, block: MoEBlock, device: torch.device):
        self.total = torch.zeros(3, block.experts.num_experts + 1, dtype=torch.float64, device=device)
        self.mask: torch.Tensor | None = None

    def see_context(self, block: MoEBlock, args: tuple[torch.Tensor, RoutingContext]) -> None:
        """Keeps the token mask; registered as a hook before the block."""
        self.mask = args[1].token_mask

    def see_experts(self, experts: MoEExperts, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Adds one pass; registered as a hook after the experts.

        The experts run once more on each assignment alone, with the weight 1, to obtain the norm of each output.
        """
        tokens, index, weight = args
        empty = experts.num_experts
        for choice, factor in zip(index.split(1, dim=-1), weight.double().unbind(-1), strict=True):
            out = experts.forward(tokens, choice, torch.ones_like(choice, dtype=weight.dtype))  # (T, H)
            norm = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float64)
            chosen = choice[:, 0]
            if self.mask is not None:
                chosen = chosen.where(self.mask > 0, empty)
            values = torch.stack([torch.ones_like(factor), factor, factor * norm])
            self.total.index_add_(1, chosen.clamp(max=empty), values)


@torch.no_grad()
def measure_usage(model: MoEForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> Usage:
    """Runs a model on a text and measures how much it uses each expert; the experts run twice.

    Args:
        model: model on the device to run on; its experts must not be split over processes. Its training mode is
            restored.
        batches: keyword arguments of `model`: `input_ids` (B, S), `attention_mask` (B, S), 0 at tokens to leave out,
            and the tensors that the router needs.

    Returns:
        The usage of every sparse layer, with the routing of evaluation, after capacity.

    Raises:
        UserError: if the router does not send tokens to experts (`soft_moe`, `lory`), or there is no token.
    """
    blocks = {i: layer.mlp for i, layer in enumerate(model.model.layers) if layer.is_sparse}
    if any(block.mix is not Router.mix for block in blocks.values()):
        raise UserError(
            f"router_type={model.config.router_type!r} does not send tokens to experts: measure a model whose router does"
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


# score -> function that returns the values (E,) by which experts are ranked
SCORES: dict[str, Callable[[LayerUsage], torch.Tensor]] = {
    "reap": lambda usage: usage.reap,
    "load": lambda usage: usage.load,
    "mass": lambda usage: usage.mass,
}
