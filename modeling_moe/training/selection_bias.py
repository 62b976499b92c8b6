# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the selection biases of transformers' own routers, and moves them once per optimizer step.

A selection bias takes part in the choice of a token's experts, and in nothing else. transformers loads it, and its models
never change it. It is found by what it is: a buffer or parameter with one number for each expert, beside the experts; and by
what it does: a large number in it sends every token to the expert, and the router logits stay as they are.

# E experts
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..monitoring import SparseLayer
from ..router_balancing import BiasController, all_ranks
from ..utils.errors import UserError
from .router_probe import Choice, ProbeError, RouterProbe


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

    def is_in_adapter(self, model: nn.Module) -> bool:
        """Says whether PEFT saves the bias with an adapter of `model`."""
        kept = [
            copy
            for m in model.modules()
            if isinstance(m, ModulesToSaveWrapper)
            for copy in m.modules_to_save.modules()
        ]
        return any(module is self.owner for module in kept)

    @property
    def is_narrow(self) -> bool:
        """Says whether the dtype has 16 bits, in which a step of 0.001 is lost: in bf16 0.5 + 0.001 is 0.5."""
        return self.tensor.dtype in (torch.bfloat16, torch.float16)

    def widen(self) -> torch.dtype:
        """Gives the bias the dtype fp32, and returns the old one."""
        old = self.tensor.dtype
        self.tensor.data = self.tensor.data.float()
        return old


def _candidates(block: nn.Module, layer: SparseLayer) -> Iterator[SelectionBias]:
    """Yields the buffers and parameters of a sparse block that have one number for each router output."""
    sizes = {layer.num_experts, *(len(weight) for weight in _router_weights(layer))}
    for module in block.modules():
        if module is layer.experts:
            continue
        found: dict[str, torch.Tensor] = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        found |= dict(module.named_parameters(recurse=False))
        for name, tensor in found.items():
            if tensor.is_floating_point() and tensor.numel() in sizes and tensor.shape[-1] == tensor.numel():
                yield SelectionBias(layer, module, name)


def _router_weights(layer: SparseLayer) -> list[torch.Tensor]:
    """Returns the matrices of a router, whose rows are its outputs."""
    parameters = () if layer.router is None else layer.router.parameters()
    return [parameter for parameter in parameters if parameter.dim() == 2]


def _selects(bias: SelectionBias, probe: RouterProbe, before: Choice) -> bool:
    """Says whether a tensor shifts the choice of experts, and leaves the router logits as they are."""
    outputs = bias.tensor.numel()
    # the expert with the fewest tokens, or one of them
    expert = int(torch.bincount(before.index.flatten().long(), minlength=outputs)[:outputs].argmin())
    kept = bias.tensor.detach().clone()
    try:
        bias.tensor.data.view(-1)[expert] += PROBE_BIAS
        after = probe.run()
    finally:
        bias.tensor.data.copy_(kept)
    unchanged = before.logits is None or after.logits is None or torch.equal(before.logits, after.logits)
    return unchanged and bool((after.index == expert).any(dim=-1).all())


def find_bias(model: nn.Module, layer: SparseLayer) -> SelectionBias | None:
    """Returns the selection bias of a sparse layer, or None if its router has none.

    If processes share the weights of the layer, its router cannot be run here; a buffer with one number for each expert is
    then taken for the bias.

    Raises:
        UserError: if the layer has a candidate, and its block cannot be run alone to verify it.
    """
    probe = RouterProbe(model, layer)
    found = list(_candidates(probe.block, layer))
    if not found:
        return None
    if any(isinstance(weight, DTensor) for weight in probe.block.parameters()):
        return next((bias for bias in found if bias.name in bias.owner._buffers), None)
    try:
        before = probe.run()
        return next((bias for bias in found if _selects(bias, probe, before)), None)
    except ProbeError as error:
        raise UserError(
            f"the selection bias of {layer.name} cannot be verified, because {error}: omit router_bias_update_rate"
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
