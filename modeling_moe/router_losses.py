# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Losses of one sparse layer: pure functions of its [`Routing`] and of which tokens count.

All take the same arguments: `routing` of T tokens; `token_mask` (T,), 0 for tokens that do not count (padding), None if all
do; `batch_size`, the number B of equally long sequences that the tokens are; `num_experts`, the number E of experts with
weights, if the router also has Z without; `weights`, what each token counts in a mean ([`weigh_tokens`]), None for means
over the tokens and over the rows. All return a scalar in the dtype of the logits.

A mean over weighted tokens times the sum of the weights is a sum over tokens: so the z, entropy and sequence balance losses
of micro-batches, each times [`loss_share`], add up to the whole batch's exactly. The balance of scope `"global"` does when
all know the same load; the balance of scope `"batch"`, importance and load are no sums, and keep their size alone.

# B rows, S tokens of each, T = B*S tokens, E experts, Z experts without weights, K slots per token
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .configuration_fields import COEFFICIENT, SPARSE, setting
from .router import Routing, RoutingContext, expert_load, masked_mean


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class LossFields:
    """Router losses."""

    router_aux_loss_coef: float | int = setting(
        0.01,
        "The coefficient of the load-balancing loss in training (Switch, arXiv:2101.03961, eq. 4), with the meaning that it "
        "has in transformers: perfect balance gives a loss of num_experts_per_tok.",
        COEFFICIENT,
        effect="training",
        conditions=(SPARSE,),
        idle=(0,),
    )
    router_aux_loss_scope: Literal["sequence", "batch", "global"] = setting(
        "batch",
        'The tokens over which the load-balancing loss measures balance: each "sequence", the "batch", or "global", which '
        "pools all processes and micro-batches of an optimizer step so far (arXiv:2501.11873) and needs update_routers after "
        "each step, which MoECallback calls.",
        effect="training",
        by_router=True,
    )
    router_z_loss_coef: float | int = setting(
        0.001,
        "The coefficient of the z-loss of router logits in training (ST-MoE, arXiv:2202.08906, eq. 5).",
        COEFFICIENT,
        effect="training",
        conditions=(SPARSE,),
        idle=(0,),
    )
    router_seq_aux_loss_coef: float | int = setting(
        0.0,
        "The coefficient of DeepSeek-V3's balance loss over each sequence in training; the paper uses 1e-4.",
        COEFFICIENT,
        effect="training",
        conditions=(SPARSE,),
    )
    router_importance_loss_coef: float | int = setting(
        0.0,
        "The coefficient of the importance loss in training (Shazeer et al., arXiv:1701.06538); the paper uses 0.1.",
        COEFFICIENT,
        effect="training",
        conditions=(SPARSE,),
    )
    router_load_loss_coef: float | int = setting(
        0.0,
        "The coefficient of the load loss in training (Shazeer et al., arXiv:1701.06538); the loss has a gradient with "
        "router_type='noisy_topk' only.",
        COEFFICIENT,
        effect="training",
        by_router=True,
    )
    router_entropy_loss_coef: float | int = setting(
        0.0,
        "The coefficient of the entropy of a token's router probabilities in training; the paper of router_type='top_p' uses "
        "1e-4.",
        COEFFICIENT,
        effect="training",
        conditions=(SPARSE,),
    )


class TokenWeights(NamedTuple):
    """What each token counts in the router losses, and the sequence it belongs to.

    Attributes:
        weight: (T,), 0 at padding.
        sequence: (T,) int64, below `num_sequences`.
        num_sequences: at least the number of sequences.
    """

    weight: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int

    def as_one(self) -> "TokenWeights":
        """The same weights, all tokens in one sequence."""
        return self._replace(sequence=torch.zeros_like(self.sequence), num_sequences=1)


def weigh_tokens(
    token_mask: torch.Tensor, begins: torch.Tensor | None = None, label_mask: torch.Tensor | None = None
) -> TokenWeights:
    """Gives each sequence the weight of its labels, shared evenly by all of its tokens that count, prompts too.

    Whatever batch a sequence is in, it weighs the same, in padded, packed and padding-free batches.

    Args:
        token_mask: (B, S) of a floating dtype, 0 at padding.
        begins: (B, S) bool, whether a token begins a sequence, as [`~modeling_moe.model_packing.find_beginnings`] says; None
            if each row is one.
        label_mask: (B, S), true where a token predicts a label; None to give every sequence the weight 1.
    """
    rows, length = token_mask.shape
    if begins is None:
        sequence, bound = torch.arange(rows, device=token_mask.device).repeat_interleave(length), rows
    else:
        context = RoutingContext(rows, begins=begins.flatten())
        sequence, bound = context.sequences(rows * length, token_mask.device), rows * length
    mask = token_mask.flatten()
    tokens = mask.new_zeros(bound).scatter_add(0, sequence, mask)
    weight = (tokens > 0).to(mask.dtype)
    if label_mask is not None:
        weight = mask.new_zeros(bound).scatter_add(0, sequence, label_mask.flatten().to(mask))
    return TokenWeights(mask * (weight / tokens.clamp(min=1))[sequence], sequence, bound)


def mean_probs(routing: Routing, token_mask: torch.Tensor | None = None, batch_size: int = 1) -> torch.Tensor:
    """Mean probability of each expert over each sequence's tokens that count: (B, E + Z)."""
    probs = routing.probs.unflatten(0, (batch_size, -1)).transpose(0, 1)  # (S, B, E + Z)
    if token_mask is None:
        return probs.mean(dim=0)
    mask = token_mask.view(batch_size, -1).T[..., None].to(probs.dtype)
    return (mask * probs).sum(dim=0) / mask.sum(dim=0).clamp(min=1)


def balance_factors(load: torch.Tensor, num_experts: int | None = None) -> torch.Tensor:
    """`N f_i` with f_i expert i's share of the load, N their number: what [`balance`] multiplies the probabilities by.

    Experts beyond the first `num_experts`, which have no weights, each count with the mean share of all of them: which one
    a token takes makes no difference (AdaMoE, arXiv:2406.13233).

    Args:
        load: (..., N), without gradient.
        num_experts: number of experts with weights; all N if not given.
    """
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    if num_experts is not None and num_experts < share.shape[-1]:
        real, idle = share[..., :num_experts], share[..., num_experts:]
        share = torch.cat([real, idle.mean(dim=-1, keepdim=True).expand_as(idle)], dim=-1)
    return share.shape[-1] * share


def balance(load: torch.Tensor, probs: torch.Tensor, num_experts: int | None = None) -> torch.Tensor:
    """`sum_i N f_i P_i` with f_i as of [`balance_factors`], P_i expert i's mean probability (..., N): (...)."""
    return (balance_factors(load, num_experts) * probs).sum(dim=-1)


def sequence_load(routing: Routing, token_mask: torch.Tensor | None, weights: TokenWeights) -> torch.Tensor:
    """Number of each sequence's tokens that count and were sent to each expert: (sequences, E + Z), no gradient."""
    outputs = routing.probs.shape[-1]
    ones = torch.ones_like(routing.weight) if token_mask is None else token_mask[:, None].expand_as(routing.weight)
    counts = routing.probs.new_zeros(weights.num_sequences * (outputs + 1))
    place = weights.sequence[:, None] * (outputs + 1) + routing.index
    counts = counts.scatter_add(0, place.flatten(), ones.flatten().to(counts.dtype)).detach()
    return counts.view(-1, outputs + 1)[:, :outputs]


def load_balancing_loss(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    batch_size: int = 1,
    num_experts: int | None = None,
    weights: TokenWeights | None = None,
) -> torch.Tensor:
    """[`balance`] of each sequence, averaged over them (`batch_size=1`, or one sequence: of the batch as one).

    Switch Transformer (arXiv:2101.03961), eq. 4-6, for any K: 1 when all experts get the same share, E / K when the
    same K experts get all. The gradient flows through P alone.
    """
    if weights is None:
        mask = torch.ones_like(routing.probs[:, 0]) if token_mask is None else token_mask.to(routing.probs.dtype)
        weights = weigh_tokens(mask.view(batch_size, -1))
    factors = balance_factors(sequence_load(routing, token_mask, weights), num_experts)
    factors = factors if weights.num_sequences == 1 else factors[weights.sequence]  # (T, E + Z) or (1, E + Z)
    return masked_mean((factors * routing.probs).sum(dim=-1), weights.weight)


def router_z_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, weights: TokenWeights | None = None, **_
) -> torch.Tensor:
    """Mean of `logsumexp(logits)^2`: keeps the router's logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return masked_mean(routing.logits.logsumexp(dim=-1).square(), token_mask if weights is None else weights.weight)


def sequence_balance_loss(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    batch_size: int = 1,
    num_experts: int | None = None,
    weights: TokenWeights | None = None,
) -> torch.Tensor:
    """DeepSeek-V3's complementary loss (arXiv:2412.19437, eq. 17-20): [`balance`] of each sequence, averaged.

    Its shares are those of the K experts with the highest scores, whatever bias or groups the selection added.
    """
    best = routing.probs.detach().topk(min(routing.index.shape[1], routing.probs.shape[1]), dim=-1).indices
    unbiased = routing._replace(index=best, weight=torch.ones_like(best, dtype=routing.probs.dtype))
    return load_balancing_loss(unbiased, token_mask, batch_size, num_experts, weights)


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
    if routing.selection_probability is None:
        return coefficient_of_variation_squared(expert_load(routing, token_mask)[:num_experts])
    mask = 1.0 if token_mask is None else token_mask[:, None].to(routing.selection_probability.dtype)
    return coefficient_of_variation_squared((routing.selection_probability * mask).sum(dim=0)[:num_experts])


def router_entropy_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, weights: TokenWeights | None = None, **_
) -> torch.Tensor:
    """Mean entropy of the tokens' probabilities, in nats: low when the router is sure (arXiv:2403.07652)."""
    return masked_mean(
        torch.special.entr(routing.probs).sum(dim=-1), token_mask if weights is None else weights.weight
    )


# field of the configuration that holds the coefficient -> loss
LOSSES = {
    "router_aux_loss_coef": load_balancing_loss,
    "router_z_loss_coef": router_z_loss,
    "router_seq_aux_loss_coef": sequence_balance_loss,
    "router_importance_loss_coef": importance_loss,
    "router_load_loss_coef": load_loss,
    "router_entropy_loss_coef": router_entropy_loss,
}


def router_losses(
    routing: Routing, context: RoutingContext, config, weights: TokenWeights | None = None
) -> torch.Tensor:
    """Values (len(LOSSES),) of the losses of one layer; 0 where the coefficient is, but for the balance loss.

    `router_aux_loss_scope` says of what the balance is: each sequence or the batch.
    """
    fields = {"token_mask": context.token_mask, "batch_size": context.batch_size, "num_experts": config.num_experts}
    fields["weights"] = weights
    whole = fields | {"batch_size": 1, "weights": None if weights is None else weights.as_one()}
    values = []
    for name, loss in LOSSES.items():
        if getattr(config, name) == 0 and name != "router_aux_loss_coef":
            values.append(routing.logits.new_zeros(()))
            continue
        pooled = name == "router_aux_loss_coef" and config.router_aux_loss_scope != "sequence"
        values.append(loss(routing, **(whole if pooled else fields)))
    return torch.stack(values)


class AttachLoss(torch.autograd.Function):
    """Identity on a tensor whose backward also sends the gradient 1 into `loss`: for losses nobody else adds.

    A factor on the trainer's loss does not reach it; [`~modeling_moe.training.MoECallback`] puts those of a `Trainer`
    on `loss`.
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


def predicts_label(labels: torch.Tensor, shift_labels=None, ignore_index=-100, **_) -> torch.Tensor:
    """Which tokens (B, S) predict a label, as transformers' causal LM loss counts them.

    Args:
        labels: (B, S) token ids, `ignore_index` where none is predicted.
        shift_labels: the same already shifted, if the trainer did that.
    """
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return (shift_labels != ignore_index).to(labels.device)


def loss_share(labels: torch.Tensor, num_items_in_batch=None, **kwargs):
    """This batch's part of an optimizer step whose losses are divided by all of its labels.

    Weighting the router losses by it makes their sum over micro-batches and ranks a mean, as the cross entropy's is.

    Args:
        labels: (B, S) token ids.
        num_items_in_batch: number of labels of the optimizer step, as `Trainer` passes it; None for a plain mean.
        kwargs: as of [`predicts_label`].

    Returns:
        A number from 0 to 1, or a scalar tensor on the labels' device.
    """
    if num_items_in_batch is None:
        return 1.0
    # a step without any label has no share: 0 / 0 would make every gradient NaN
    return predicts_label(labels, **kwargs).sum() / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(
        min=1
    )
