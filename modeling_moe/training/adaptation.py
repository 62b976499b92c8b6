# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module adapts the routers of any MoE to a domain by a few tokens of it, and trains routers to be adapted so.

The method is first-order model-agnostic meta-learning (FOMAML, Finn et al., arXiv:1703.03400, section 5.2) or Reptile (Nichol et
al., arXiv:1803.02999), restricted to the routers: the experts stay what they are, and a domain chooses among them.

# B rows, S tokens per row
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..monitoring import UnreachableRouting, next_labels, sparse_layers
from ..router_balancing import writes_without_step
from ..utils.errors import UserError


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights of the routers of experts by their names in the model; of routers with adapters, those of the adapters.

    The routers of `depth_layers`, which choose tokens for a layer and no experts, are not among them.

    Args:
        model: any MoE whose experts follow transformers' experts interface.

    Raises:
        UserError: if the model is dense, declares no routers, has split them over processes, or has routers without weights.
    """
    try:
        routers = [layer.router for layer in sparse_layers(model)]
    except UnreachableRouting as error:
        raise UserError(str(error)) from error
    inside = {id(parameter) for router in routers if router is not None for parameter in router.parameters()}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        # PEFT keeps the router that an adapter replaces
        if id(parameter) in inside and parameter.is_floating_point() and ".original_module." not in name
    }
    adapters = {name: p for name, p in found.items() if ".lora_" in name}
    found = adapters or found
    if not found:
        raise UserError("the model has no router with weights to adapt: choose another router")
    if any(isinstance(parameter, DTensor) for parameter in found.values()):
        raise UserError(
            "routers that are split over processes cannot be adapted: adapt a model that one process holds"
        )
    return found


def _cross_entropy(model: Any, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean loss of the next tokens in nats, without router losses; padding is not predicted."""
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = next_labels(ids, attention_mask).to(logits.device)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@contextmanager
def _only_routers(model: nn.Module, routers: dict[str, nn.Parameter]) -> Iterator[None]:
    """Puts the model into evaluation mode, without noise and router losses, in which the routers alone get a gradient."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    inside = {id(parameter) for parameter in routers.values()}
    model.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(id(parameter) in inside)
    try:
        yield
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
        for module, training in modes:
            module.training = training


class RouterAdaptation:
    """Routers that were adapted; [`adapt_router`] makes one. At the end of a `with` block the routers are what they were.

    Attributes:
        routers: the adapted weights, by their names in the model.
        losses: loss of the support tokens before each step, in nats per token.
    """

    def __init__(self, model: nn.Module, routers: dict[str, nn.Parameter]):
        self.routers, self._model = routers, model
        self._before = {name: parameter.detach().clone() for name, parameter in routers.items()}
        self.losses: list[float] = []

    def __enter__(self) -> "RouterAdaptation":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the routers their weights from before the adaptation, bit for bit; a second call does nothing."""
        with writes_without_step(self._model, self.routers.values()):
            for name, weight in self._before.items():
                self.routers[name].copy_(weight)
        self._before = {}

    @torch.no_grad()
    def change(self) -> dict[str, torch.Tensor]:
        """Returns what the adaptation has added to the weights of the routers, by their names in the model."""
        return {name: self.routers[name] - weight for name, weight in self._before.items()}


def adapt_router(
    model: nn.Module,
    support_ids: torch.Tensor,
    *,
    learning_rate: float,
    steps: int = 1,
    attention_mask: torch.Tensor | None = None,
) -> RouterAdaptation:
    """Adapts the routers of any MoE to a domain, by gradient steps on the loss of a few tokens of the domain.

    Each step is `W -= learning_rate * dL/dW` for the routers' weights `W` alone, with the cross entropy `L` of the support tokens
    in evaluation mode. The rest of the model does not change, no `.grad` is written, and no optimizer holds a state. Routers
    in 16 bits, which some models of transformers have, round each step.

    Args:
        model: any causal MoE, on any device; adapters may be around the routers.
        support_ids: (B, S) or (S,) int64 tokens of the domain, at least 2.
        learning_rate: size of a step; useful sizes depend on the model, and are far above those of Adam.
        steps: number of steps.
        attention_mask: 0 at padding, of the shape of `support_ids`; None without padding.

    Returns:
        A context manager that undoes the adaptation, and a handle with `restore()`. Without a `with` block the routers stay
        adapted.

    Raises:
        UserError: if an argument is out of range, or the model has no routers that can be adapted.

    Example:
        >>> with adapt_router(model, tokenizer(sample, return_tensors="pt")["input_ids"], learning_rate=1.0):
        ...     model.generate(**prompt)
    """
    if not learning_rate > 0 or steps < 1:
        raise UserError(f"learning_rate is {learning_rate} and steps is {steps}: both must be positive")
    ids = support_ids if support_ids.dim() == 2 else support_ids[None]
    if attention_mask is not None:
        if attention_mask.shape != support_ids.shape:
            raise UserError(
                f"attention_mask is {tuple(attention_mask.shape)} and support_ids {tuple(support_ids.shape)}: give one shape"
            )
        attention_mask = attention_mask.view_as(ids)
    if ids.shape[-1] < 2:
        raise UserError(f"support_ids has {ids.shape[-1]} tokens in a row: give at least 2")
    if not (next_labels(ids, attention_mask) != -100).any():
        raise UserError("support_ids has no token to predict: give rows with at least 2 tokens that are not padding")
    routers = router_parameters(model)
    adaptation = RouterAdaptation(model, routers)
    try:
        with writes_without_step(model, routers.values()), _only_routers(model, routers), torch.enable_grad():
            for _ in range(steps):
                loss = _cross_entropy(model, ids, attention_mask)
                gradients = torch.autograd.grad(loss, list(routers.values()), allow_unused=True)
                adaptation.losses.append(loss.item())
                _descend(routers, gradients, learning_rate)
    except BaseException:
        adaptation.restore()
        raise
    return adaptation


@torch.no_grad()
def _descend(routers: dict[str, nn.Parameter], gradients: Sequence[torch.Tensor | None], learning_rate: float) -> None:
    for parameter, gradient in zip(routers.values(), gradients, strict=True):
        if gradient is not None:
            parameter.sub_(learning_rate * gradient)


Meta = Callable[
    [Any, RouterAdaptation, torch.Tensor, torch.Tensor | None, float], tuple[list[torch.Tensor | None], float]
]
"""Computes the gradients of adapted routers, and the query loss, from the model, the adaptation, the query tokens with their
attention mask, and the rate."""


def _fomaml(
    model: Any, adaptation: RouterAdaptation, query_ids: torch.Tensor, mask: torch.Tensor | None, rate: float
) -> tuple[list[torch.Tensor | None], float]:
    # the first label is never predicted
    labels = torch.cat([query_ids[:, :1], next_labels(query_ids, mask)], dim=1)
    loss = model(input_ids=query_ids, attention_mask=mask, labels=labels, use_cache=False).loss
    wanted = list(adaptation.routers.values())
    return list(torch.autograd.grad(loss, wanted, allow_unused=True)), loss.item()


def _reptile(
    model: Any, adaptation: RouterAdaptation, query_ids: torch.Tensor, mask: torch.Tensor | None, rate: float
) -> tuple[list[torch.Tensor | None], float]:
    further = adapt_router(model, query_ids, learning_rate=rate, attention_mask=mask)
    return [-change / rate for change in adaptation.change().values()], further.losses[0]


# method -> function that computes the outer gradient
META_METHODS: dict[str, Meta] = {"fomaml": _fomaml, "reptile": _reptile}


def meta_gradient(
    model: nn.Module,
    support_ids: torch.Tensor,
    query_ids: torch.Tensor,
    *,
    learning_rate: float,
    steps: int = 1,
    method: str = "fomaml",
    weight: float = 1.0,
    support_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> float:
    """Adds the outer gradient of one domain to the `.grad` of the routers, which keep their weights.

    The routers are adapted on the support tokens by [`adapt_router`]. With `"fomaml"` the gradient is that of the query tokens'
    loss at the adapted weights, router losses included in training mode. With `"reptile"` a further step is made on the query
    tokens, and the gradient is the way from the adapted weights back to those before, divided by `learning_rate`.
    An optimizer of the caller steps after the domains of a step.

    Args:
        model: any causal MoE, in one process.
        support_ids: (B, S) int64 tokens of a domain.
        query_ids: (B, S) int64 other tokens of the domain.
        learning_rate: size of an inner step.
        steps: number of inner steps on the support tokens.
        method: `"fomaml"` or `"reptile"`.
        weight: factor on the gradient, such as 1 / number of domains in a step.
        support_mask, query_mask: (B, S), 0 at padding of the support and of the query; None without padding.

    Returns:
        The loss of the query tokens after the adaptation, in nats per token; with `"fomaml"` in training mode with the router
        losses.

    Raises:
        UserError: if an argument is out of range, the model has no routers that can be adapted, or they are frozen.
    """
    if method not in META_METHODS:
        raise UserError(f"method {method!r} is unknown: it must be one of {', '.join(META_METHODS)}")
    if not all(parameter.requires_grad for parameter in router_parameters(model).values()):
        raise UserError("the routers are frozen, so that no optimizer trains them: call requires_grad_(True) on them")
    inner: dict[str, Any] = {"learning_rate": learning_rate, "steps": steps, "attention_mask": support_mask}
    with adapt_router(model, support_ids, **inner) as adaptation:
        gradients, loss = META_METHODS[method](model, adaptation, query_ids, query_mask, learning_rate)
    for parameter, gradient in zip(router_parameters(model).values(), gradients, strict=True):
        if gradient is not None:
            parameter.grad = weight * gradient + (0 if parameter.grad is None else parameter.grad)
    return loss
