# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Losses of one sparse layer: pure functions of its [`Routing`] and of which tokens count.

All take the same arguments: `routing` of T tokens; `token_mask` (T,), 0 for tokens that do not count (padding), None if all
do; `batch_size`, the number B of equally long sequences that the tokens are; `num_experts`, the number E of experts with
weights, if the router also has Z without. All return a scalar in the dtype of the logits.

# B sequences, S tokens of each, T = B*S tokens, E experts, Z experts without weights, K slots per token
"""

import torch

from .routing import Routing, RoutingContext, expert_load, masked_mean


def mean_probs(routing: Routing, token_mask: torch.Tensor | None = None, batch_size: int = 1) -> torch.Tensor:
    """Mean probability of each expert over each sequence's tokens that count: (B, E + Z)."""
    probs = routing.probs.unflatten(0, (batch_size, -1)).transpose(0, 1)  # (S, B, E + Z)
    if token_mask is None:
        return probs.mean(dim=0)
    mask = token_mask.view(batch_size, -1).T[..., None].to(probs.dtype)
    return (mask * probs).sum(dim=0) / mask.sum(dim=0).clamp(min=1)


def balance(load: torch.Tensor, probs: torch.Tensor, num_experts: int | None = None) -> torch.Tensor:
    """`sum_i N f_i P_i` with f_i expert i's share of the load, P_i its mean probability, N their number: (...).

    Experts beyond the first `num_experts`, which have no weights, each count with the mean share of all of them: which one
    a token takes makes no difference (AdaMoE, arXiv:2406.13233).

    Args:
        load: (..., N), without gradient.
        probs: (..., N).
        num_experts: number of experts with weights; all N if not given.
    """
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    if num_experts is not None and num_experts < share.shape[-1]:
        real, idle = share[..., :num_experts], share[..., num_experts:]
        share = torch.cat([real, idle.mean(dim=-1, keepdim=True).expand_as(idle)], dim=-1)
    return share.shape[-1] * (share * probs).sum(dim=-1)


def load_balancing_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, batch_size: int = 1, num_experts: int | None = None
) -> torch.Tensor:
    """[`balance`] of each sequence, averaged over them (`batch_size=1`: of the batch as one).

    Switch Transformer (arXiv:2101.03961), eq. 4-6, for any K: 1 when all experts get the same share, E / K when the
    same K experts get all. The gradient flows through P alone.
    """
    load = expert_load(routing, token_mask, batch_size).view(batch_size, -1)
    losses = balance(load, mean_probs(routing, token_mask, batch_size), num_experts)
    return losses.sum() / (load.sum(dim=-1) > 0).sum().clamp(min=1)


def router_z_loss(routing: Routing, token_mask: torch.Tensor | None = None, **_) -> torch.Tensor:
    """Mean of `logsumexp(logits)^2`: keeps the router's logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return masked_mean(routing.logits.logsumexp(dim=-1).square(), token_mask)


def sequence_balance_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, batch_size: int = 1, num_experts: int | None = None
) -> torch.Tensor:
    """DeepSeek-V3's complementary loss (arXiv:2412.19437, eq. 17-20): [`balance`] of each sequence, averaged.

    Its shares are those of the K experts with the highest scores, whatever bias or groups the selection added.
    """
    best = routing.probs.detach().topk(min(routing.index.shape[1], routing.probs.shape[1]), dim=-1).indices
    unbiased = routing._replace(index=best, weight=torch.ones_like(best, dtype=routing.probs.dtype))
    return load_balancing_loss(unbiased, token_mask, batch_size, num_experts)


def coefficient_of_variation_squared(values: torch.Tensor) -> torch.Tensor:
    """Population variance over squared mean of values (E,)."""
    return values.var(correction=0) / (values.mean().square() + 1e-10)


def importance_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, num_experts: int | None = None, **_
) -> torch.Tensor:
    """`CV(sum_t weight_t)^2` over the experts with weights (Shazeer et al., arXiv:1701.06538, eq. 6-7)."""
    weight = routing.weight if token_mask is None else routing.weight * token_mask[:, None].to(routing.weight.dtype)
    outputs = routing.probs.shape[-1]
    importance = weight.new_zeros(outputs + 1).scatter_add(0, routing.index.flatten(), weight.flatten())
    return coefficient_of_variation_squared(importance[: num_experts or outputs])


def load_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, num_experts: int | None = None, **_
) -> torch.Tensor:
    """`CV(sum_t P(t, i))^2` over the experts with weights, P the chance that token t chooses expert i
    (arXiv:1701.06538, eq. 8-11).

    Without noise (in evaluation) P is 1 or 0, and the loss has no gradient.
    """
    if routing.chance is None:
        return coefficient_of_variation_squared(expert_load(routing, token_mask)[:num_experts])
    mask = 1.0 if token_mask is None else token_mask[:, None].to(routing.chance.dtype)
    return coefficient_of_variation_squared((routing.chance * mask).sum(dim=0)[:num_experts])


def router_entropy_loss(routing: Routing, token_mask: torch.Tensor | None = None, **_) -> torch.Tensor:
    """Mean entropy of the tokens' probabilities, in nats: low when the router is sure (arXiv:2403.07652)."""
    return masked_mean(torch.special.entr(routing.probs).sum(dim=-1), token_mask)


# field of the configuration that holds the coefficient -> loss
LOSSES = {
    "router_aux_loss_coef": load_balancing_loss,
    "router_z_loss_coef": router_z_loss,
    "router_seq_aux_loss_coef": sequence_balance_loss,
    "router_importance_loss_coef": importance_loss,
    "router_load_loss_coef": load_loss,
    "router_entropy_loss_coef": router_entropy_loss,
}


def router_losses(routing: Routing, context: RoutingContext, config) -> torch.Tensor:
    """Values (len(LOSSES),) of the losses of one layer; 0 where the coefficient is, but for the balance loss.

    `router_aux_loss_scope` says of what the balance is: each sequence or the batch.
    """
    batch_size = {"router_aux_loss_coef": 1} if config.router_aux_loss_scope != "sequence" else {}
    values = []
    for name, loss in LOSSES.items():
        if getattr(config, name) == 0 and name != "router_aux_loss_coef":
            values.append(routing.logits.new_zeros(()))
            continue
        rows = batch_size.get(name, context.batch_size)
        values.append(loss(routing, token_mask=context.token_mask, batch_size=rows, num_experts=config.num_experts))
    return torch.stack(values)


class AttachLoss(torch.autograd.Function):
    """Identity on a tensor whose backward also sends the gradient 1 into `loss`: for losses nobody else adds.

    A factor on the trainer's loss does not reach it, such as the one that fp16 training scales its gradients by.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`; `loss` is a scalar."""
        ctx.save_for_backward(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes `grad` on to `tensor`."""
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def loss_share(labels: torch.Tensor, shift_labels=None, num_items_in_batch=None, ignore_index=-100, **_):
    """This batch's part of an optimizer step whose losses are divided by all of its labels.

    Weighting the router losses by it makes their sum over micro-batches and ranks a mean, as the cross entropy's is.

    Args:
        labels: (B, S) token ids, `ignore_index` where none is predicted.
        shift_labels: the same already shifted, if the trainer did that.
        num_items_in_batch: number of labels of the optimizer step, as `Trainer` passes it; None for a plain mean.

    Returns:
        A number from 0 to 1, or a scalar tensor on the labels' device.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    count = (targets != ignore_index).sum().to(labels.device)
    return count / torch.as_tensor(num_items_in_batch, device=labels.device)
