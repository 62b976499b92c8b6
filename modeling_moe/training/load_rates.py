# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives each expert a learning rate by the share of the step's tokens that the expert has seen.

# T tokens, E experts, K choices per token
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..monitoring import LayerPass, UnreachableRouting, observe
from ..monitoring.ranks import is_distributed, repeats_batch, sum_over_ranks
from ..utils.errors import UserError


# optimizers whose steps are scaled, since a step that is scaled twice would get the share in place of the share's root
_SCALED: "WeakSet[Optimizer]" = WeakSet()
SPLIT = "FSDP, DeepSpeed or expert parallelism splits them, train with DDP"


def _is_split(weight: torch.Tensor) -> bool:
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


class LoadRates:
    """Scales each expert's step by the square root of the expert's share of the tokens; [`scale_by_load`] makes one.

    It keeps nothing from one step to the next, so that a resumed run needs nothing of it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        if optimizer in _SCALED:
            raise UserError(
                "the optimizer trains experts by their load already: call remove() of the other handle first"
            )
        try:
            self._observation = observe(model, self._count)
        except UnreachableRouting as error:
            raise UserError(f"experts cannot be trained by their load: {error}") from error
        self._model = model
        self._weights = {
            layer.name: [weight for weight in layer.experts.parameters(recurse=False) if weight.requires_grad]
            for layer in self._observation.layers
        }
        self._sizes = {layer.name: layer.num_experts for layer in self._observation.layers}
        problem = self._problem(optimizer)
        if problem is not None:
            self._observation.remove()
            raise UserError(f"experts cannot be trained by their load: {problem}")
        self._sums: dict[str, torch.Tensor] = {}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._optimizer = optimizer
        _SCALED.add(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._shrink),
        ]

    def _problem(self, optimizer: Optimizer) -> str | None:
        weights = [weight for weights in self._weights.values() for weight in weights]
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not weights or any(id(weight) not in stepped for weight in weights):
            return "the optimizer does not step the experts' own weights"
        if any(_is_split(weight) for weight in weights):
            return SPLIT
        for name, size in self._sizes.items():
            if any(len(weight) != size for weight in self._weights[name]):
                return (
                    f"the two matrices of an expert of {name} are chosen one by one (routed_attention='switch_head'), so that no "
                    "share is that of both: use a number or sqrt_share"
                )
        return None

    def _count(self, event: LayerPass) -> None:
        """Adds the tokens of each expert (E,), and the number of tokens, to the layer's sums (E + 1,)."""
        if event.recomputed or not event.training:
            return
        experts = event.layer.num_experts
        arrived = event.arrived if event.token_mask is None else event.arrived[event.token_mask]
        counts = torch.bincount(arrived.flatten().clamp(max=experts), minlength=experts + 1).to(torch.float32)
        counts[experts] = len(arrived)
        name = event.layer.name
        self._sums[name] = counts if name not in self._sums else self._sums[name] + counts

    def shares(self) -> dict[str, torch.Tensor]:
        """Returns the share (E,) of the tokens since the last step that each expert has seen, over all processes, by layer."""
        sums = {name: torch.zeros(size + 1) for name, size in self._sizes.items()} | self._sums
        if is_distributed():
            sums = sum_over_ranks(sums, {}, not repeats_batch(self._model)).tensors
        return {name: total[:-1] / total[-1].clamp(min=1) for name, total in sums.items()}

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, *_: Any) -> None:
        # Accelerate splits the weights after the optimizer was made, and puts others in their place
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for weights in self._weights.values():
            if any(id(weight) not in stepped for weight in weights):
                raise UserError(f"experts cannot be trained by their load: {SPLIT}")
        if not self._sums:
            raise UserError(
                "experts cannot be trained by their load: no training pass since the last step was seen: call model.train() "
                "before the passes"
            )
        self._before = {
            name: [weight.detach().clone() for weight in weights] for name, weights in self._weights.items()
        }

    @torch.no_grad()
    def _shrink(self, *_: Any) -> None:
        for name, share in self.shares().items():
            for weight, before in zip(self._weights[name], self._before[name], strict=True):
                factor = share.sqrt().clamp(max=1).to(weight).view(-1, *[1] * (weight.dim() - 1))
                weight.copy_(torch.lerp(before, weight, factor))
        self._sums, self._before = {}, {}

    def remove(self) -> None:
        """Removes all hooks from the model and the optimizer."""
        self._observation.remove()
        while self._hooks:
            self._hooks.pop().remove()
            _SCALED.discard(self._optimizer)


def scale_by_load(model: nn.Module, optimizer: Optimizer) -> LoadRates:
    """Scales the step of each expert by sqrt(n / T), where n of the T tokens of the optimizer step chose the expert.

    This is the square-root scaling of Adam's learning rate with the batch (Malladi et al., arXiv:2205.10287), applied to each
    expert's own batch: an expert without a token stays as it is, weight decay and momentum included, and in balance the
    factor is sqrt(K / E). All micro-batches and processes count, padding and dropped assignments do not. In a layer of
    `depth_layers` T counts the tokens that the layer has processed. During a step there is a copy of the experts' weights.

    Args:
        model: any MoE of transformers, also in DDP.
        optimizer: any optimizer of torch that steps the experts; also inside Accelerate's wrapper.

    Returns:
        A handle with `remove()`.

    Raises:
        UserError: if the experts cannot be reached, are split over processes, are those of SwitchHead, or are not trained by
            `optimizer`, or if the optimizer has a handle already; and by a step without a pass in training mode before it.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.1))
        >>> scale_by_load(model, optimizer)
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, optimizers=(optimizer, None))
    """
    return LoadRates(model, optimizer)
