# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures the gradients that the routers of any MoE get in an optimizer step."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .layers import SparseLayer


def _norms(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the Euclidean norm of each tensor, by one fused call for tensors of one kind."""
    kinds: dict[tuple, list[int]] = {}
    for place, gradient in enumerate(gradients):
        kinds.setdefault((type(gradient), gradient.device, gradient.dtype), []).append(place)
    norms: dict[int, torch.Tensor] = {}
    for places in kinds.values():
        norms.update(zip(places, torch._foreach_norm([gradients[i] for i in places]), strict=True))
    return [norms[place] for place in range(len(gradients))]


def _value(norm: torch.Tensor) -> float:
    # the norm of a tensor that processes share is known after a collective
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class RouterGradientMeter:
    """Measures the norms of the routers' gradients in an optimizer step, without waiting for the device until `read`.

    The gradients are those that the optimizer gets: summed over micro-batches, averaged over the processes of DDP and
    FSDP2, without the loss scale of fp16 training, and clipped.

    Args:
        model: the model that is trained.
        layers: its sparse layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[SparseLayer]):
        self._model = model
        routers = {layer.name: layer.router for layer in layers if layer.router is not None}
        trained = {
            layer: [weight for weight in router.parameters() if weight.requires_grad]
            for layer, router in routers.items()
        }
        self._weights = {layer: weights for layer, weights in trained.items() if weights}
        self._norms: dict[str, list[torch.Tensor]] | None = None

    @torch.no_grad()
    def measure(self) -> None:
        """Measures the gradients; call it between backward and the optimizer's step."""
        found = [(layer, weight.grad) for layer, weights in self._weights.items() for weight in weights]
        found = [(layer, gradient) for layer, gradient in found if gradient is not None]
        if not found and all(weight.grad is None for weight in self._model.parameters()):
            self._norms = None
            return
        self._norms = {layer: [] for layer in self._weights}
        for (layer, _), norm in zip(found, _norms([gradient for _, gradient in found]), strict=True):
            self._norms[layer].append(norm)

    def read(self) -> dict[str, float]:
        """Returns the norms of the last measurement; all processes must call it.

        Returns:
            Qualified name of a layer's experts -> Euclidean norm of the gradient of the layer's router, 0 without a gradient.
            Layers with a frozen or an unknown router are missing. The dictionary is empty where no parameter of the model held a
            gradient (DeepSpeed, and FSDP1 without `use_orig_params`).
        """
        norms = self._norms or {}
        return {layer: sum(_value(norm) ** 2 for norm in of_layer) ** 0.5 for layer, of_layer in norms.items()}
