# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module watches the routing of any Mixture of Experts in transformers, while the model runs as usual."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from .figures import LayerFacts, RoutingFigures, layer_figures, overall_figures, unseen
from .layer_sums import LayerSums, ProbabilitySums, add_pass, new_sums
from .layers import SparseLayer
from .observing import LayerPass, OnFailure, observe
from .probabilities import ScoringEvidence
from .ranks import is_distributed, repeats_batch, sum_over_ranks


class RoutingWatch:
    """Sums the routing of each sparse layer over all forward passes, on the layer's device, until it is read.

    It is a context manager, and a handle with `detach()`. A pass that activation checkpointing repeats counts once. The sums
    stay readable after `detach()`.

    Args:
        model: any model of transformers whose experts follow its experts interface, also with adapters, in DDP or FSDP.
        co_activation: whether to count which experts tokens use together, at the cost of one (E, T) by (T, E) product.
        training_only: whether to count only the passes of a model in training mode that record gradients.
        on_failure: function that gets an exception, after which the model runs on; by default it ends the model's pass.

    Raises:
        UnreachableRouting: if the model is dense, or its experts cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        co_activation: bool = True,
        training_only: bool = False,
        on_failure: OnFailure | None = None,
    ):
        self._model, self._co_activation, self._training_only = model, co_activation, training_only
        self._sums: dict[str, LayerSums] = {}
        self._observation = observe(model, self._add, on_failure)
        self._facts = _layer_facts(self._observation.layers)

    def __enter__(self) -> "RoutingWatch":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Removes all hooks from the model; a second call does nothing."""
        self._observation.remove()

    def reset(self) -> None:
        """Starts from 0 again."""
        self._sums = {}

    def read(self, reset: bool = False, *, across_ranks: bool = True) -> RoutingFigures:
        """Returns the figures of all tokens so far; the only method that waits for the device.

        In a distributed run the figures are those of all processes together, and every process must call it; a batch that
        tensor-parallel processes share counts once.

        Args:
            reset: whether to start from 0 afterwards.
            across_ranks: False for the figures of this process alone, which then need not call together with others.
        """
        if across_ranks and is_distributed():
            sums = _over_ranks(self._sums, not repeats_batch(self._model))
        else:
            sums = {name: _on_cpu(layer) for name, layer in self._sums.items()}
        layers = [
            layer_figures(facts, sums[facts.name]) if facts.name in sums else unseen(facts) for facts in self._facts
        ]
        if reset:
            self.reset()
        return RoutingFigures(layers, overall_figures(layers))

    def _add(self, event: LayerPass) -> None:
        if event.recomputed or (self._training_only and not event.training):
            return
        sums = self._sums.get(event.layer.name)
        if sums is None:
            sums = self._sums[event.layer.name] = new_sums(event, self._co_activation)
        add_pass(sums, event)


def _layer_facts(layers: list[SparseLayer]) -> list[LayerFacts]:
    """Describes the layers; where a decoder layer has several experts modules, the qualified name is the label."""
    shared = Counter(layer.layer for layer in layers)
    return [
        LayerFacts(
            layer=layer.layer,
            name=layer.name,
            label=f"layer_{layer.layer:02d}" if shared[layer.layer] == 1 else layer.name,
            num_experts=layer.num_experts,
            has_router=layer.router is not None,
            configured=getattr(getattr(layer.experts, "config", None), "scoring_func", None),
        )
        for layer in layers
    ]


def _tensors(sums: LayerSums) -> dict[str, torch.Tensor]:
    """Returns the sums of a layer by name."""
    tensors = {"counts": sums.counts, "dropped": sums.dropped, "tokens": sums.tokens}
    if sums.co_activation is not None:
        tensors["co_activation"] = sums.co_activation
    if sums.evidence is not None:
        tensors["evidence"] = sums.evidence.sums
    for scoring, total in sums.by_scoring.items():
        tensors |= {f"{scoring}/{name}": value for name, value in vars(total).items()}
    return tensors


def _from_tensors(tensors: dict[str, torch.Tensor], said: list[dict[str, Any]]) -> LayerSums:
    """Returns the sums of a layer from tensors on the CPU, and from what each process said of it."""
    names = set.intersection(*(set(one["scorings"]) for one in said))
    sums = LayerSums(
        counts=tensors["counts"],
        dropped=tensors["dropped"],
        tokens=tensors["tokens"],
        top_k=max(one["top_k"] for one in said),
        co_activation=tensors.get("co_activation"),
        notes=set().union(*(one["notes"] for one in said)),
    )
    for scoring in names:
        fields = ProbabilitySums.__dataclass_fields__
        sums.by_scoring[scoring] = ProbabilitySums(**{name: tensors[f"{scoring}/{name}"] for name in fields})
    if "evidence" in tensors:
        sums.evidence = ScoringEvidence(sums.top_k, tensors["evidence"])
        sums.evidence.sums, sums.evidence.coarse = tensors["evidence"], any(one["coarse"] for one in said)
    return sums


def _said(sums: LayerSums) -> dict[str, Any]:
    return {
        "top_k": sums.top_k,
        "notes": sums.notes,
        "scorings": sorted(sums.by_scoring),
        "coarse": sums.evidence is not None and sums.evidence.coarse,
    }


def _on_cpu(sums: LayerSums) -> LayerSums:
    tensors = {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in _tensors(sums).items()}
    return _from_tensors(tensors, [_said(sums)])


def _over_ranks(sums: dict[str, LayerSums], counts: bool) -> dict[str, LayerSums]:
    """Returns the sums of all processes; a process without a pass adds nothing."""
    tensors = {f"{name}//{key}": value for name, layer in sums.items() for key, value in _tensors(layer).items()}
    shared = sum_over_ranks(tensors, {name: _said(layer) for name, layer in sums.items()}, counts)
    total: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in shared.tensors.items():
        name, _, key = path.partition("//")
        total.setdefault(name, {})[key] = tensor
    return {
        name: _from_tensors(found, [fact[name] for fact in shared.facts if name in fact])
        for name, found in total.items()
    }


def watch(model: nn.Module, *, co_activation: bool = True, training_only: bool = False) -> RoutingWatch:
    """Watches the routing of any Mixture of Experts in transformers; nothing about the model's results changes.

    Example:
        >>> with watch(model) as routing:
        ...     model(input_ids=ids, attention_mask=mask)
        >>> figures = routing.read()
        >>> figures.overall["max_violation"], figures.layers[0].load

    Args:
        model: any model of transformers whose experts follow its experts interface, also with adapters, in DDP or FSDP.
        co_activation: whether to count which experts tokens use together.
        training_only: whether to count only the passes of a model in training mode that record gradients.

    Returns:
        A context manager, and a handle with `read()`, `reset()` and `detach()`.

    Raises:
        UnreachableRouting: if the model is dense, or its experts cannot be reached.
    """
    return RoutingWatch(model, co_activation=co_activation, training_only=training_only)
