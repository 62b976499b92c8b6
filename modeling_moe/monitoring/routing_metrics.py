# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes routing metrics: pure functions, without gradient, of a [`Routing`] or of the experts' load.

Two arguments are common to the functions: `token_mask` (T,) is 0 for tokens to leave out, such as padding, and None
takes all tokens; `num_experts` is the number E of experts with weights, needed where the router also has Z experts
without. No function waits for the device.

# T tokens, E experts, Z experts without weights (null and copy), K experts per token
"""

from typing import NamedTuple

import torch

from ..router import Routing, expert_load, fp32_linear, masked_mean
from ..router_capacity import count_dropped
from ..router_losses import load_balancing_loss


def max_violation(load: torch.Tensor) -> torch.Tensor:
    """Returns the largest load divided by the mean load, minus 1 (MaxVio, arXiv:2408.15664).

    Args:
        load: (..., E) tokens sent to each expert, in one batch or summed over many.

    Returns:
        (...); 0 in balance, and 0 without any load.
    """
    mean = load.mean(dim=-1)
    return (load.amax(dim=-1) - mean) / mean.clamp(min=1e-10)


def load_variation(load: torch.Tensor) -> torch.Tensor:
    """Returns the coefficient of variation (...) of the load (..., E): deviation over mean (arXiv:1701.06538, eq. 7)."""
    return load.std(dim=-1, correction=0) / load.mean(dim=-1).clamp(min=1e-10)


def dead_experts(load: torch.Tensor) -> torch.Tensor:
    """Returns the share (...) of the experts whose load (..., E) is 0."""
    return (load == 0).to(load.dtype).mean(dim=-1)


@torch.no_grad()
def normalised_balance(
    routing: Routing, token_mask: torch.Tensor | None = None, num_experts: int | None = None
) -> torch.Tensor:
    """Returns the load-balancing loss over the mean number of assignments per token, a scalar.

    It is 1 in balance whatever K is, and E / K if the same K experts get all tokens. The loss, which transformers defines,
    is K in balance.
    """
    return load_balancing_loss(routing, token_mask, num_experts=num_experts, top_k=1)


@torch.no_grad()
def mean_experts(
    routing: Routing, token_mask: torch.Tensor | None = None, num_experts: int | None = None
) -> torch.Tensor:
    """Returns the mean number of experts with weights per token, a scalar; below K with empty or null assignments."""
    real = routing.index < (num_experts or routing.probs.shape[-1])
    return masked_mean(real.sum(dim=-1).to(routing.probs.dtype), token_mask)


@torch.no_grad()
def dropped_share(before: Routing, after: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the share of the assignments that the capacity dropped, a scalar; 0 if there were no assignments.

    Args:
        before: routing before the capacity.
        after: routing after the capacity, in which dropped assignments are empty.
        token_mask: (T,).
    """
    dropped, assigned = count_dropped(before, after, token_mask)
    return dropped / assigned.clamp(min=1)


class Entropies(NamedTuple):
    """Three entropies of a router's probabilities in nats, each a scalar.

    Attributes:
        token: mean over the tokens of the entropy of the token's probabilities; low if the router is sure.
        marginal: entropy of the mean probabilities; log(E + Z) in balance, low in collapse.
        difference: marginal - token, the mutual information of token and expert; high if the router is sure and
            balanced.
    """

    token: torch.Tensor
    marginal: torch.Tensor
    difference: torch.Tensor


@torch.no_grad()
def entropies(routing: Routing, token_mask: torch.Tensor | None = None) -> Entropies:
    """Returns three entropies over T tokens, since a single one cannot distinguish a sure router from a collapsed one.

    The token entropy is that of arXiv:2403.07652; the difference follows Mod-Squad's of task and expert,
    arXiv:2212.08066.
    """
    token = masked_mean(torch.special.entr(routing.probs).sum(dim=-1), token_mask)
    marginal = torch.special.entr(masked_mean(routing.probs, token_mask)).sum(dim=-1)
    return Entropies(token, marginal, marginal - token)


@torch.no_grad()
def gate_margin(routing: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the mean difference of a token's K-th and (K + 1)-th largest probability, a scalar; 0 if K is all
    experts.

    Near 0, noise or rounding changes the choice.
    """
    top_k = routing.index.shape[-1]
    if top_k >= routing.probs.shape[-1]:
        return routing.probs.new_zeros(())
    best = routing.probs.topk(top_k + 1, dim=-1).values
    return masked_mean(best[:, -2] - best[:, -1], token_mask)


@torch.no_grad()
def co_activation(routing: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the share of the tokens that use both of two experts, and on the diagonal the share of one expert.

    A row divided by its diagonal element is OLMoE's co-activation (arXiv:2409.02060).

    Returns:
        (E + Z, E + Z).
    """
    tokens, outputs = routing.probs.shape
    used = routing.probs.new_zeros(tokens, outputs + 1).scatter(-1, routing.index, 1.0)[:, :outputs]
    count: int | torch.Tensor = max(tokens, 1)
    if token_mask is not None:
        used = used * (token_mask > 0)[:, None]
        count = (token_mask > 0).sum().clamp(min=1)
    return fp32_linear(used.T, used.T) / count


@torch.no_grad()
def expert_domain_share(
    routing: Routing, domain: torch.Tensor, num_domains: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the share of each domain's assignments that go to each expert.

    This is OLMoE's domain specialisation (arXiv:2409.02060) divided by K.

    Args:
        routing: routing of T tokens.
        domain: (T,) int64, the domain, task or language of each token, below `num_domains`.
        num_domains: number of domains.
        token_mask: (T,).

    Returns:
        (num_domains, E + Z); rows sum to 1, or to 0 for a domain without assignments.
    """
    outputs = routing.probs.shape[-1]
    ones = (
        torch.ones_like(routing.weight) if token_mask is None else (token_mask > 0)[:, None].expand_as(routing.weight)
    )
    counts = routing.probs.new_zeros(num_domains * (outputs + 1))
    cell = domain[:, None] * (outputs + 1) + routing.index
    counts = counts.scatter_add(0, cell.flatten(), ones.flatten().to(counts.dtype))
    counts = counts.view(num_domains, outputs + 1)[:, :outputs]
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def summary(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    num_experts: int | None = None,
    dropped: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the metrics to log at each step, as 0-dimensional tensors on the router's device.

    Args:
        routing: routing of T tokens, before the capacity.
        token_mask: (T,).
        num_experts: number E of experts with weights, of which the balance is measured.
        dropped: (2,), the result of [`~modeling_moe.router_capacity.count_dropped`]; adds `dropped_share`.
    """
    load = expert_load(routing, token_mask)[:num_experts]
    entropy = entropies(routing, token_mask)
    metrics = {
        "normalised_balance": normalised_balance(routing, token_mask, num_experts),
        "max_violation": max_violation(load),
        "load_variation": load_variation(load),
        "dead_experts": dead_experts(load),
        "mean_experts": mean_experts(routing, token_mask, num_experts),
        "token_entropy": entropy.token,
        "marginal_entropy": entropy.marginal,
        "entropy_difference": entropy.difference,
        "gate_margin": gate_margin(routing, token_mask),
    }
    if dropped is not None:
        metrics["dropped_share"] = dropped[0] / dropped[1].clamp(min=1)
    return metrics
