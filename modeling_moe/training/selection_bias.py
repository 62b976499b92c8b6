# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the selection biases of transformers' own routers, and moves them once per optimizer step.

A selection bias takes part in the choice of a token's experts, and in nothing else. transformers loads it, and its models
never change it. It is found by what it is: a tensor without gradient, with one number for each expert, beside the experts;
and by what it does: a large number in it sends every token to the expert, and the router logits stay as they are.

# T tokens, H hidden, E experts, K choices per token
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..monitoring import SparseLayer
from ..router_balancing import BiasController, all_ranks


logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
# larger than any score that chooses experts, and exact in bf16
PROBE_BIAS = 16384.0


class SelectionBias(NamedTuple):
    """The selection bias of one sparse layer: the buffer or parameter `name` of the module `owner`, with E numbers."""

    layer: SparseLayer
    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """Returns the bias, (E,) or (1, E)."""
        return getattr(self.owner, self.name)

    def widen(self) -> None:
        """Gives a 16-bit bias the dtype fp32, in which a step of 0.001 is not lost: in bf16 0.5 + 0.001 is 0.5."""
        if self.tensor.dtype in (torch.bfloat16, torch.float16):
            logger.warning(
                f"the selection bias of {self.layer.name} is now float32 instead of {self.tensor.dtype}, in which its small "
                "steps would be lost; save the model in float32, or the saved bias is rounded."
            )
            self.tensor.data = self.tensor.data.float()


class _Chosen(Exception):
    """Ends a probe where the experts would compute; holds the ids of the chosen experts (T, K)."""

    def __init__(self, index: torch.Tensor):
        super().__init__()
        self.index = index


class _Probe(NamedTuple):
    """The choice of a router for random tokens: expert ids (T, K), and the router logits, None if unknown."""

    index: torch.Tensor
    logits: torch.Tensor | None


def _candidates(block: nn.Module, layer: SparseLayer) -> Iterator[SelectionBias]:
    """Yields the tensors of a sparse block without gradient that have one number for each router output."""
    sizes = {layer.num_experts, *(len(weight) for weight in _router_weights(layer))}
    for module in block.modules():
        if module is layer.experts:
            continue
        found: dict[str, torch.Tensor] = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        found |= {n: p for n, p in module.named_parameters(recurse=False) if not p.requires_grad}
        for name, tensor in found.items():
            if tensor.is_floating_point() and tensor.numel() in sizes and tensor.shape[-1] == tensor.numel():
                yield SelectionBias(layer, module, name)


def _router_weights(layer: SparseLayer) -> list[torch.Tensor]:
    """Returns the matrices of a router, whose rows are its outputs."""
    parameters = () if layer.router is None else layer.router.parameters()
    return [parameter for parameter in parameters if parameter.dim() == 2]


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Puts a block into evaluation mode, in which no noise is drawn."""
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _probe(block: nn.Module, layer: SparseLayer, tokens: torch.Tensor) -> _Probe:
    """Runs a block on tokens (1, T, H) up to its experts."""
    logits: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        logits.append((output if isinstance(output, tuple) else (output,))[layer.logits_index])

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Chosen(kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

    hooks = [layer.experts.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)]
    if layer.router is not None:
        hooks.append(layer.router.register_forward_hook(keep))
    try:
        with _evaluating(block):
            block(tokens)
    except _Chosen as chosen:
        return _Probe(chosen.index, logits[-1].clone() if logits else None)
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(f"{layer.name} is not called by the module that holds it.")


def _selects(block: nn.Module, bias: SelectionBias, tokens: torch.Tensor) -> bool:
    """Says whether a tensor shifts the choice of experts, and leaves the router logits as they are."""
    before = _probe(block, bias.layer, tokens)
    taken = torch.bincount(before.index.flatten().long(), minlength=bias.tensor.numel())
    expert = int(taken[: bias.tensor.numel()].argmin())  # the expert with the fewest tokens, or one of them
    kept = bias.tensor.detach().clone()
    try:
        bias.tensor.data.view(-1)[expert] += PROBE_BIAS
        after = _probe(block, bias.layer, tokens)
    finally:
        bias.tensor.data.copy_(kept)
    unchanged = before.logits is None or after.logits is None or torch.equal(before.logits, after.logits)
    return unchanged and bool((after.index == expert).any(dim=-1).all())


def find_bias(model: nn.Module, layer: SparseLayer, hidden_size: int) -> SelectionBias | None:
    """Returns the selection bias of a sparse layer, or None if its router has none.

    A block whose weights are split over processes cannot be run alone; there a buffer with one number for each expert is
    taken for the bias.

    Raises:
        ValueError: if the layer has a candidate, and its block cannot be run alone to verify it.
    """
    block = model.get_submodule(layer.name.rpartition(".")[0])
    found = list(_candidates(block, layer))
    if not found:
        return None
    weights = list(block.parameters())
    if any(isinstance(weight, DTensor) or weight.is_meta for weight in weights):
        return next((bias for bias in found if isinstance(bias.owner._buffers.get(bias.name), torch.Tensor)), None)
    dtype = next((weight.dtype for weight in weights if weight.dim() > 1 and weight.is_floating_point()), None)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, PROBE_TOKENS, hidden_size, generator=generator).to(found[0].tensor.device, dtype)
    try:
        return next((bias for bias in found if _selects(block, bias, tokens)), None)
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"the selection bias of {layer.name} cannot be verified, because {type(block).__name__} does not run alone: omit "
            "router_bias_update_rate."
        ) from error


@torch.no_grad()
def move_biases(biases: list[SelectionBias], loads: list[torch.Tensor], rate: float) -> None:
    """Moves each bias by the sign of the imbalance, `b_i += rate * sign(mean(load) - load_i)` (arXiv:2408.15664).

    All ranks must call it; their loads are summed. A step without tokens moves nothing.

    Args:
        biases: the selection biases of the layers.
        loads: tokens (E,) sent to each expert of each layer on this rank.
        rate: step size.
    """
    device = loads[0].device
    totals = all_ranks(torch.cat([load.to(device) for load in loads])).split([len(load) for load in loads])
    for bias, total in zip(biases, totals, strict=True):
        tensor = bias.tensor
        # the controller of this package's routers, on a view of the bias
        router = SimpleNamespace(e_score_correction_bias=tensor.data.view(-1), bias_update_rate=rate)
        BiasController().step_layer(router, total.to(tensor.device))
