# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes the losses of one sparse layer's router, as pure functions of a [`Routing`].

Losses return scalars in the dtype of the router logits. Their arguments have the same meaning everywhere:
`routing` holds T tokens; `token_mask` (T,) is 0 at padding, None without padding; `batch_size` is the number B of equally
long rows that the tokens form; `num_experts` is the number E of experts with weights, None if every router output has
weights; `weights` holds the tokens' weights in a mean ([`weigh_tokens`]), None for a mean over tokens; `parts` is the number of
equal parts of the router outputs in each of which a token chooses K / parts experts (`config.router_parts`), and a loss with it
is the mean of the parts' losses.

A weighted mean times the sum of the weights is a sum over tokens. The z, entropy and sequence balance losses of
micro-batches, each times [`loss_share`], therefore add up to the loss of the whole batch exactly, and the balance loss of
scope `"global"` does if all micro-batches know the whole batch's load. The balance loss of scope `"batch"`, the importance
loss and the load loss are not sums over tokens: over micro-batches they keep their size and no more.

# B rows, S tokens per row, T = B*S tokens, E experts, Z experts without weights, N = E + Z, K choices per token
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .configuration_fields import COEFFICIENT, ROUTED, ROUTED_IN_ANY_WAY, setting
from .router import Routing, RoutingContext, expert_load, masked_mean, num_real_tokens


class RouterLosses(NamedTuple):
    """The losses of one sparse layer's router, each a scalar; None where the coefficient is 0.

    Attributes:
        balance: load-balancing loss, computed whatever its coefficient is ([`load_balancing_loss`]).
        z: z-loss ([`router_z_loss`]).
        sequence_balance: DeepSeek's balance loss of each sequence ([`sequence_balance_loss`]).
        importance: importance loss ([`importance_loss`]).
        load: load loss ([`load_loss`]).
        entropy: entropy loss ([`router_entropy_loss`]).
        auxiliary: loss that the router's paper adds, with its weight ([`~modeling_moe.router.Router.auxiliary_loss`]);
            None if it adds none.
    """

    balance: torch.Tensor | None = None
    z: torch.Tensor | None = None
    sequence_balance: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    load: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None

    def weighted_sum(self, config: Any) -> torch.Tensor | None:
        """Returns the sum of the losses times their coefficients, a scalar; None if every coefficient is 0."""
        total = self.auxiliary
        for name, field in COEFFICIENTS.items():
            loss, coefficient = getattr(self, name), getattr(config, field)
            if loss is not None and coefficient != 0:
                total = coefficient * loss if total is None else total + coefficient * loss
        return total


# loss -> field of the configuration that holds the coefficient
COEFFICIENTS: dict[str, str] = {
    "balance": "router_aux_loss_coef",
    "z": "router_z_loss_coef",
    "sequence_balance": "router_seq_aux_loss_coef",
    "importance": "router_importance_loss_coef",
    "load": "router_load_loss_coef",
    "entropy": "router_entropy_loss_coef",
}


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class LossFields:
    """These fields configure the losses of routers."""

    router_aux_loss_coef: float | int = setting(
        0.01,
        "The coefficient of the load-balancing loss in training (Switch, arXiv:2101.03961, eq. 4), with the meaning that it "
        "has in transformers: perfect balance gives a loss of num_experts_per_tok.",
        COEFFICIENT,
        effect="training",
        conditions=(ROUTED,),
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
        conditions=(ROUTED_IN_ANY_WAY,),
        idle=(0,),
    )
    router_seq_aux_loss_coef: float | int = setting(
        0.0,
        "The coefficient of DeepSeek-V3's balance loss over each sequence in training; the paper uses 1e-4.",
        COEFFICIENT,
        effect="training",
        conditions=(ROUTED,),
    )
    router_importance_loss_coef: float | int = setting(
        0.0,
        "The coefficient of the importance loss in training (Shazeer et al., arXiv:1701.06538); the paper uses 0.1.",
        COEFFICIENT,
        effect="training",
        conditions=(ROUTED,),
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
        conditions=(ROUTED,),
    )


class TokenWeights(NamedTuple):
    """The weight of each token in the router losses, and the sequence that the token belongs to.

    Attributes:
        weight: (T,) weight of a token, 0 at padding.
        sequence: (T,) int64 number of the token's sequence, below `num_sequences`.
        num_sequences: at least the number of sequences.
    """

    weight: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int


def weigh_tokens(
    token_mask: torch.Tensor, begins: torch.Tensor | None = None, label_mask: torch.Tensor | None = None
) -> TokenWeights:
    """Weighs each sequence by its number of labels, shared evenly by its tokens, prompt included and padding excluded.

    A sequence then has the same weight in padded, packed and padding-free batches.

    Args:
        token_mask: (B, S) of a floating dtype, 0 at padding.
        begins: (B, S) bool, true where a sequence begins ([`~modeling_moe.model_packing.find_beginnings`]); None if each row
            is one sequence.
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


def balance_factors(load: torch.Tensor, tokens: torch.Tensor, num_experts: int | None = None) -> torch.Tensor:
    """Returns `N c_i / T`, by which the load-balancing loss multiplies the mean probability of expert i.

    Experts without weights each count with the mean load of all experts without weights, because it makes no difference
    which of them a token takes (AdaMoE, arXiv:2406.13233).

    Args:
        load: (..., N) number c_i of tokens sent to each expert, without gradient.
        tokens: (...) number T of tokens.
        num_experts: number of experts with weights, which come first; None for all N.
    """
    if num_experts is not None and num_experts < load.shape[-1]:
        real, idle = load[..., :num_experts], load[..., num_experts:]
        load = torch.cat([real, idle.mean(dim=-1, keepdim=True).expand_as(idle)], dim=-1)
    # below one: where K varies, `tokens` is a number of assignments over K
    return load * (load.shape[-1] / tokens.clamp(min=1e-6))[..., None]


def balanced_tokens(load: torch.Tensor, tokens: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """Returns the number of tokens (...) by which the load-balancing loss divides the load of each expert.

    If the number of experts differs between tokens, it is the number of assignments over K. Balance gives the loss K then,
    however many experts the tokens use, as it does where each token has K.

    Args:
        load: (..., N) number of tokens sent to each expert, without gradient.
        tokens: (...) number T of tokens.
        top_k: number K (`num_experts_per_tok`) if the number of experts differs between tokens, otherwise None.
    """
    return tokens if top_k is None else load.sum(dim=-1) / top_k


def balance(
    load: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor, num_experts: int | None = None
) -> torch.Tensor:
    """Returns `N sum_i f_i P_i` (...), with `f_i = c_i / T` of [`balance_factors`] and mean probabilities P (..., N)."""
    return (balance_factors(load, tokens, num_experts) * probs).sum(dim=-1)


def _sequence_loads(
    routing: Routing, token_mask: torch.Tensor | None, weights: TokenWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens sent to each expert and the tokens, padding excluded, of each sequence: (sequences, N), (sequences,)."""
    outputs, sequences = routing.probs.shape[-1], weights.num_sequences
    mask = torch.ones_like(routing.weight[:, 0]) if token_mask is None else token_mask.to(routing.weight.dtype)
    place = weights.sequence[:, None] * (outputs + 1) + routing.index
    counts = routing.probs.new_zeros(sequences * (outputs + 1))
    counts = counts.scatter_add(0, place.flatten(), mask[:, None].expand_as(routing.weight).flatten().to(counts.dtype))
    tokens = counts.new_zeros(sequences).scatter_add(0, weights.sequence, mask.to(counts.dtype))
    return counts.detach().view(-1, outputs + 1)[:, :outputs], tokens


def load_balancing_loss(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    batch_size: int = 1,
    num_experts: int | None = None,
    weights: TokenWeights | None = None,
    top_k: int | None = None,
) -> torch.Tensor:
    """Computes transformers' load-balancing loss `N sum_i f_i P_i` of each sequence, and averages it over sequences.

    f_i is the number of tokens sent to expert i over the number of tokens, P_i the mean probability of expert i (Switch
    Transformer, arXiv:2101.03961, eq. 4-6). With K choices per token the loss is K when all experts get the same share and
    E when the same K experts get everything. The gradient flows through P alone. If the number of experts differs between
    tokens, which no model of transformers has, `top_k` is `num_experts_per_tok` ([`balanced_tokens`]).

    With `batch_size=1` and without `weights` the batch is one sequence, which is what transformers computes.
    """
    if weights is None and batch_size == 1:
        load, tokens = expert_load(routing, token_mask), num_real_tokens(routing, token_mask)
        tokens = balanced_tokens(load, tokens, top_k)
        return balance(load, tokens, masked_mean(routing.probs, token_mask), num_experts)
    if weights is None:
        mask = torch.ones_like(routing.probs[:, 0]) if token_mask is None else token_mask.to(routing.probs.dtype)
        weights = weigh_tokens(mask.view(batch_size, -1))
    load, tokens = _sequence_loads(routing, token_mask, weights)
    factors = balance_factors(load, balanced_tokens(load, tokens, top_k), num_experts)  # (sequences, N)
    return masked_mean((factors[weights.sequence] * routing.probs).sum(dim=-1), weights.weight)


def sequence_balance_loss(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    batch_size: int = 1,
    num_experts: int | None = None,
    weights: TokenWeights | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """Computes DeepSeek-V3's complementary balance loss of each sequence (arXiv:2412.19437, eq. 17-20), and averages it.

    The load is that of the K experts with the highest probabilities, whatever bias or groups took part in the selection. As
    in the paper, the loss is divided by K: 1 when all experts get the same share.
    """
    by_part = _by_part(routing.probs.detach(), parts)
    best = by_part.topk(min(routing.index.shape[1] // parts, by_part.shape[2]), dim=-1).indices
    best = (best + torch.arange(parts, device=best.device)[:, None] * by_part.shape[2]).flatten(1)
    unbiased = routing._replace(index=best, weight=torch.ones_like(best, dtype=routing.probs.dtype))
    return load_balancing_loss(unbiased, token_mask, batch_size, num_experts, weights) / best.shape[1]


def _by_part(values: torch.Tensor, parts: int) -> torch.Tensor:
    """Returns values (T, N) of router outputs as (T, parts, N / parts)."""
    return values.unflatten(-1, (parts, -1))


def router_z_loss(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    weights: TokenWeights | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """Computes the mean of `logsumexp(logits)^2`, which keeps router logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    squares = _by_part(routing.logits, parts).logsumexp(dim=-1).square().mean(dim=-1)
    return masked_mean(squares, token_mask if weights is None else weights.weight)


def router_entropy_loss(
    routing: Routing,
    token_mask: torch.Tensor | None = None,
    weights: TokenWeights | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """Computes the mean entropy of a token's probabilities in nats: low when the router is sure (arXiv:2403.07652)."""
    entropy = torch.special.entr(_by_part(routing.probs, parts) * parts).sum(dim=-1).mean(dim=-1)
    return masked_mean(entropy, token_mask if weights is None else weights.weight)


def _squared_variation(values: torch.Tensor) -> torch.Tensor:
    """Returns the squared coefficient of variation of values (E,): population variance over squared mean."""
    return values.var(correction=0) / (values.mean().square() + 1e-10)


def importance_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, num_experts: int | None = None
) -> torch.Tensor:
    """Computes the squared variation of the experts' summed weights (Shazeer et al., arXiv:1701.06538, eq. 6-7)."""
    weight = routing.weight if token_mask is None else routing.weight * token_mask[:, None].to(routing.weight.dtype)
    outputs = routing.probs.shape[-1]
    importance = weight.new_zeros(outputs + 1).scatter_add(0, routing.index.flatten(), weight.flatten())
    return _squared_variation(importance[: num_experts or outputs])


def load_loss(
    routing: Routing, token_mask: torch.Tensor | None = None, num_experts: int | None = None
) -> torch.Tensor:
    """Computes the squared variation of the experts' expected load, the sum over tokens of the probability that the noise
    selects the expert (Shazeer et al., arXiv:1701.06538, eq. 8-11).

    Without noise, as in evaluation, the load is the number of tokens and the loss has no gradient.
    """
    if routing.selection_probability is None:
        return _squared_variation(expert_load(routing, token_mask)[:num_experts])
    mask = 1.0 if token_mask is None else token_mask[:, None].to(routing.selection_probability.dtype)
    return _squared_variation((routing.selection_probability * mask).sum(dim=0)[:num_experts])


def router_losses(
    routing: Routing,
    context: RoutingContext,
    config: Any,
    weights: TokenWeights | None = None,
    top_k: int | None = None,
) -> RouterLosses:
    """Computes the losses of one layer that have a coefficient, and the load-balancing loss in any case.

    With `router_aux_loss_scope="sequence"` the balance is that of each sequence, otherwise that of the batch, in which every
    token has the same weight, as in transformers. `top_k` is that of [`load_balancing_loss`].
    """
    mask, rows, experts, parts = context.token_mask, context.batch_size, config.num_experts, config.router_parts
    if config.router_aux_loss_scope == "sequence":
        balance_loss = load_balancing_loss(routing, mask, rows, experts, weights, top_k)
    else:
        balance_loss = load_balancing_loss(routing, mask, num_experts=experts, top_k=top_k)
    return RouterLosses(
        balance=balance_loss / parts,
        z=router_z_loss(routing, mask, weights, parts) if config.router_z_loss_coef else None,
        sequence_balance=(
            sequence_balance_loss(routing, mask, rows, experts, weights, parts)
            if config.router_seq_aux_loss_coef
            else None
        ),
        importance=importance_loss(routing, mask, experts) if config.router_importance_loss_coef else None,
        load=load_loss(routing, mask, experts) if config.router_load_loss_coef else None,
        entropy=router_entropy_loss(routing, mask, weights, parts) if config.router_entropy_loss_coef else None,
    )


class AttachLoss(torch.autograd.Function):
    """Returns a tensor unchanged; in backward it also starts the backward of a loss, with gradient 1.

    The model attaches the router losses to its hidden states where the caller computes the loss without our head. A factor
    on the caller's loss does not reach them; [`~modeling_moe.training.MoECallback`] applies the factors of a `Trainer`.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Returns `tensor`; `loss` is a scalar."""
        ctx.save_for_backward(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradient of `tensor`, as it came in, and 1 for `loss`."""
        (loss,) = ctx.saved_tensors
        return grad_outputs[0], torch.ones_like(loss)


def predicts_label(
    labels: torch.Tensor, shift_labels: torch.Tensor | None = None, ignore_index: int = -100, **_: Any
) -> torch.Tensor:
    """Marks the tokens (B, S) that predict a label, as transformers' causal language-model loss shifts them.

    Args:
        labels: (B, S) token ids, `ignore_index` where no label is given.
        shift_labels: (B, S) labels that the trainer has shifted already; None if it has not.
        ignore_index: value of a label that does not count.
    """
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return (shift_labels != ignore_index).to(labels.device)


def loss_share(labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> torch.Tensor | float:
    """Returns the share of an optimizer step's labels that this batch holds.

    Router losses weighted by the share add up, over micro-batches and ranks, to a mean, as the cross entropy does.

    Args:
        labels: (B, S) token ids.
        num_items_in_batch: number of labels of the optimizer step, as `Trainer` passes it; None for a mean over this batch.
        kwargs: arguments of [`predicts_label`].

    Returns:
        A number from 0 to 1, or a scalar tensor on the device of the labels.
    """
    if num_items_in_batch is None:
        return 1.0
    # a step without labels has no share: 0 / 0 would make every gradient NaN
    items = torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
    return predicts_label(labels, **kwargs).sum() / items
