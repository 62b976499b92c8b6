# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures how far training has moved the experts of any MoE: their weights, their outputs and who uses them.

# T tokens, H hidden, E experts of the earlier model, K choices per token
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..utils.errors import UserError
from .batches import next_labels
from .layers import SparseLayer, refuse_skipped_tokens, sparse_layers
from .observing import LayerPass, observe


Batches = Mapping[str, Iterable[Mapping[str, torch.Tensor]]]
"""Maps a domain to batches, each a mapping with `input_ids` (B, S) and optionally `attention_mask` (B, S), 0 at padding."""


class DomainDrift(NamedTuple):
    """What has changed in one sparse layer for the tokens of one domain.

    Attributes:
        rerouted: share of the assignments of the earlier model that the later model does not make.
        new_share: share of the assignments of the later model that go to experts which the earlier model does not have.
        load: (E,) assignments of the earlier model to each expert.
        output_change: (E,) norm of the change of an expert's outputs over the norm of its outputs, both over all tokens that used
            the expert in the earlier model, with the hidden states of the earlier model; nan for an expert without a token.
        output_cosine: (E,) mean cosine of an expert's earlier and later output for a token; nan for an expert without a token.
    """

    rerouted: float
    new_share: float
    load: torch.Tensor
    output_change: torch.Tensor
    output_cosine: torch.Tensor


@dataclass(frozen=True)
class LayerDrift:
    """What has changed in one sparse layer.

    Attributes:
        layer: index of the decoder layer.
        name: qualified name of the experts module.
        weight_change: (E,) norm of the change of an expert's weights over the norm of its weights.
        weight_cosine: (E,) cosine of an expert's earlier and later weights as one vector.
        domains: what has changed for the tokens of each domain.
    """

    layer: int
    name: str
    weight_change: torch.Tensor
    weight_cosine: torch.Tensor
    domains: dict[str, DomainDrift]


@dataclass(frozen=True)
class Drift:
    """What training has changed between two checkpoints of a model; [`expert_drift`] makes one. Tensors are fp64 on the CPU.

    Attributes:
        layers: the sparse layers, in the order of the model.
        loss_before: cross entropy of the earlier model on each domain, in nats per token.
        loss_after: cross entropy of the later model on each domain, in nats per token.
    """

    layers: list[LayerDrift]
    loss_before: dict[str, float]
    loss_after: dict[str, float]

    @property
    def forgetting(self) -> dict[str, float]:
        """By how many nats per token each domain costs more than before; negative where the model has learned."""
        return {domain: self.loss_after[domain] - before for domain, before in self.loss_before.items()}

    def mean(self, name: str, domain: str | None = None) -> float:
        """Returns the mean over layers, and over the experts that were used, of an attribute of the layers or of a domain.

        Args:
            name: attribute of [`LayerDrift`], or with a domain of [`DomainDrift`].
            domain: the domain.
        """
        values = [getattr(layer if domain is None else layer.domains[domain], name) for layer in self.layers]
        return torch.stack([torch.as_tensor(value, dtype=torch.float64).nanmean() for value in values]).mean().item()


@dataclass
class _Sums:
    """Sums over the tokens of one domain in one layer."""

    experts: int
    kept: float = 0.0
    assignments: float = 0.0
    later: float = 0.0
    new: float = 0.0
    load: torch.Tensor = field(init=False)
    squares: torch.Tensor = field(init=False)
    changes: torch.Tensor = field(init=False)
    cosines: torch.Tensor = field(init=False)

    def __post_init__(self):
        for name in ("load", "squares", "changes", "cosines"):
            setattr(self, name, torch.zeros(self.experts, dtype=torch.float64))

    def result(self) -> DomainDrift:
        used = self.load.where(self.load > 0, torch.nan)
        return DomainDrift(
            rerouted=1 - self.kept / self.assignments if self.assignments else float("nan"),
            new_share=self.new / self.later if self.later else float("nan"),
            load=self.load,
            output_change=(self.changes / self.squares.where(self.load > 0, torch.nan)).sqrt(),
            output_cosine=self.cosines / used,
        )


@torch.no_grad()
def expert_drift(before: nn.Module, after: nn.Module, batches: Batches) -> Drift:
    """Compares two checkpoints of any MoE: how the experts' weights, outputs and tokens, and the loss, have changed.

    The later model may have more experts, which follow those of the earlier model ([`~modeling_moe.resizing.growth.grow`]).
    Outputs are compared for equal inputs: the hidden states that an expert received in the earlier model. The choice and the loss
    are compared in the models' own passes.

    Args:
        before: the earlier model, any causal MoE whose experts follow transformers' experts interface. Merge adapters first.
        after: the later model.
        batches: tokens of each domain.

    Raises:
        UnreachableRouting: a ValueError, if a model is dense, its experts cannot be reached, or depth_layers lets sparse layers
            skip tokens.
        UserError: if the models do not have equal layers, one has an adapter or routed attention, or a domain has no token to
            predict.
    """
    pairs = _paired(before, after)
    modes = [(module, module.training) for model in (before, after) for module in model.modules()]
    before.eval()
    after.eval()
    losses: dict[str, list[float]] = {}
    sums = {domain: [_Sums(one.num_experts) for one, _ in pairs] for domain in batches}
    try:
        for domain, rows in batches.items():
            nats, tokens = torch.zeros(2, dtype=torch.float64), 0
            for batch in rows:
                earlier, one = _passes(before, batch)
                later, two = _passes(after, batch)
                for place, pair in enumerate(pairs):
                    _add(sums[domain][place], pair, earlier[pair[0].name], later[pair[1].name])
                nats += torch.tensor([one[0], two[0]], dtype=torch.float64)
                tokens += one[1]
            if tokens == 0:
                raise UserError(
                    f"domain {domain!r} has no token to predict: give batches with rows of at least 2 tokens"
                )
            losses[domain] = (nats / tokens).tolist()
    finally:
        for module, training in modes:
            module.training = training
    layers = [
        LayerDrift(one.layer, one.name, *_weights(one, two), {domain: sums[domain][i].result() for domain in batches})
        for i, (one, two) in enumerate(pairs)
    ]
    return Drift(layers, *({domain: values[i] for domain, values in losses.items()} for i in range(2)))


def _paired(before: nn.Module, after: nn.Module) -> list[tuple[SparseLayer, SparseLayer]]:
    """Returns the sparse layers of the two models in pairs."""
    layers = [sparse_layers(model) for model in (before, after)]
    if any(hasattr(module, "base_layer") for model in (before, after) for module in model.modules()):
        raise UserError("experts inside an adapter cannot be compared: merge the adapter first, by merge_and_unload()")
    attending = next((one.name for one in (*layers[0], *layers[1]) if getattr(one.experts, "attends", False)), None)
    if attending is not None:
        raise UserError(
            f"{attending} are experts of attention, which give no output for single tokens: compare models without "
            "routed_attention"
        )
    for found in layers:
        refuse_skipped_tokens(found)
    counts = [len(found) for found in layers]
    if counts[0] != counts[1]:
        raise UserError(f"the models have {counts[0]} and {counts[1]} sparse layers: compare checkpoints of one model")
    pairs = list(zip(*layers, strict=True))
    for one, two in pairs:
        if two.num_experts < one.num_experts:
            raise UserError(
                f"{two.name} has {two.num_experts} experts after {one.num_experts} before: experts may be added, not removed"
            )
        if [shape[1:] for shape in _shapes(one)] != [shape[1:] for shape in _shapes(two)]:
            raise UserError(
                f"the experts of {two.name} have other shapes than before: compare checkpoints of one model"
            )
    return pairs


def _shapes(layer: SparseLayer) -> list[torch.Size]:
    return [parameter.shape for parameter in layer.experts.parameters(recurse=False)]


def _passes(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, LayerPass], tuple[float, int]]:
    """Runs a model; returns the pass of each layer by name, and the sum of the losses with the number of predicted tokens."""
    events: dict[str, LayerPass] = {}

    def keep(event: LayerPass) -> None:
        events[event.layer.name] = event

    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with observe(model, keep):
        logits = model(**batch, use_cache=False).logits[:, :-1].double()
    labels = next_labels(batch["input_ids"], batch.get("attention_mask")).to(logits.device)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return events, (nats.item(), int((labels != -100).sum()))


def _add(sums: _Sums, pair: tuple[SparseLayer, SparseLayer], earlier: LayerPass, later: LayerPass) -> None:
    """Adds one batch to the sums of a layer."""
    experts = sums.experts
    device = earlier.index.device
    real = torch.ones(len(earlier.index), dtype=torch.bool, device=device)
    if earlier.token_mask is not None:
        real = earlier.token_mask.to(device)
    index, others = earlier.index[real], later.index.to(device)[real]
    made = index < experts  # an empty assignment is none
    kept = (index[:, :, None] == others[:, None, :]).any(dim=-1) & made
    real_later = others < pair[1].num_experts
    sums.kept += kept.sum().item()
    sums.assignments += made.sum().item()
    sums.later += real_later.sum().item()
    sums.new += (real_later & (others >= experts)).sum().item()
    token, choice = torch.where(made)
    states, expert = earlier.hidden_states[real][token], index[token, choice].long()
    one, two = (_outputs(layer, states, expert).to(device) for layer in pair)
    squares, changes = one.square().sum(dim=-1), (two - one).square().sum(dim=-1)
    cosines = nn.functional.cosine_similarity(one, two, dim=-1)
    for total, values in (
        (sums.load, torch.ones_like(squares)),
        (sums.squares, squares),
        (sums.changes, changes),
        (sums.cosines, cosines),
    ):
        total.index_add_(0, expert.cpu(), values.cpu())


def _outputs(layer: SparseLayer, states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Returns the output (N, H) in fp64 of expert `expert` (N,) for each of the hidden states (N, H)."""
    device = next(layer.experts.parameters()).device
    ones = torch.ones(len(states), 1, dtype=states.dtype, device=device)
    # by position: gpt-oss's own function has other names for these arguments
    return layer.experts(states.to(device), expert[:, None].to(device), ones).double()


def _weights(one: SparseLayer, two: SparseLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns relative change and cosine (E,) of the weights of each expert that both models have."""
    vectors = []
    for layer in (one, two):
        parameters = [parameter[: one.num_experts] for parameter in layer.experts.parameters(recurse=False)]
        vectors.append(torch.cat([parameter.flatten(1).double().cpu() for parameter in parameters], dim=1))
    change = (vectors[1] - vectors[0]).norm(dim=1) / vectors[0].norm(dim=1)
    return change, nn.functional.cosine_similarity(*vectors, dim=1)
