# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Losses of one sparse layer: pure functions of its [`Routing`] and of which tokens count.

# T tokens, E experts, K experts per token
"""

import torch

from .routing import Routing, expert_load


def masked_mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens (dimension 0 of `values`) that count; 0 if none does."""
    if token_mask is None:
        return values.mean(dim=0)
    mask = token_mask.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    # no matrix product: autocast would run it in bf16
    return (mask * values).sum(dim=0) / mask.sum().clamp(min=1)


def load_balancing_loss(routing: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`E * sum_i f_i P_i` with f_i expert i's share of the assignments and P_i its mean probability.

    Switch Transformer (arXiv:2101.03961), eq. 4-6, for any K: 1 when all experts get the same share, E / K when the
    same K experts get all. The gradient flows through P alone.

    Args:
        routing: of T tokens.
        token_mask: (T,), 0 for tokens that do not count (padding).

    Returns:
        Scalar in the dtype of the logits.
    """
    load = expert_load(routing, token_mask)
    share = load / load.sum().clamp(min=1)
    return len(load) * (share * masked_mean(routing.probs, token_mask)).sum()


def router_z_loss(routing: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of `logsumexp(logits)^2` over the tokens: keeps the router's logits small.

    ST-MoE (arXiv:2202.08906), eq. 5.

    Args:
        routing: of T tokens.
        token_mask: (T,), 0 for tokens that do not count (padding).

    Returns:
        Scalar in the dtype of the logits.
    """
    return masked_mean(routing.logits.logsumexp(dim=-1).square(), token_mask)


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


# config field of the weight -> loss
LOSSES = {"router_aux_loss_coef": load_balancing_loss, "router_z_loss_coef": router_z_loss}
