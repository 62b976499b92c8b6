# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs a model on texts of several domains and traces the routing of each sparse layer.

# D domains, L sparse layers, E experts, K experts per token, B blocks of S tokens in a batch,
# N tokens of all domains together
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...attention_experts import attends
from ..active_parameters import idle_parameters
from ..layers import SparseLayer, UnreachableRouting, refuse_skipped_tokens, sparse_layers
from ..observing import LayerPass, observe
from ..probabilities import ScoringEvidence, explanation, probabilities
from .data import LayerTrace, ModelTrace, TracedText
from .specialisation import LEVEL, is_too_little, significant_cells, specialisation
from .text_places import Batch, Texts, batches
from .token_texts import token_texts
from .top_tokens import TopTokens
from .trace_sums import TokenRouting, TraceSums, count_pairs, margins


if TYPE_CHECKING:
    # it takes seconds to import, and who only watches a model in training does not need it
    from datasets import Dataset


@dataclass(frozen=True)
class TraceOptions:
    """How much of the texts a trace shows.

    Attributes:
        batch_size: blocks of one forward pass.
        texts: number of texts of each domain that are traced token by token.
        text_tokens: largest number of tokens of such a text.
        top_tokens: largest number of tokens listed for an expert.
        seed: seed of the test of specialisation.
        keeps_sets: whether to keep a fingerprint of each token's set of experts, to compare two models.
    """

    batch_size: int = 8
    texts: int = 3
    text_tokens: int = 256
    top_tokens: int = 10
    seed: int = 0
    keeps_sets: bool = False


class Traced(NamedTuple):
    """A trace, and what a comparison of two models needs beside it.

    Attributes:
        trace: the routing of the model.
        blocks: token ids of each block of each domain.
        sets: L arrays (N,) uint32, fingerprints of each token's set of experts; empty unless asked for.
    """

    trace: ModelTrace
    blocks: list[list[np.ndarray]]
    sets: list[np.ndarray]


class _Tracer:
    """Takes in the passes of all layers, batch by batch.

    Attributes:
        sums: sums of each layer whose experts the model calls, by the experts' name; such as those for images are not called.
        paths: arrays (E of one layer, E of the next) int64, tokens by their first choice.
        shown: index, weight and margin of each traced text in each layer.
        sets: fingerprints of the tokens' sets of experts by layer; empty unless asked for.
    """

    def __init__(self, layers: Sequence[SparseLayer], texts: Texts, domains: int, options: TraceOptions):
        self.texts, self.options = texts, options
        self._sizes = (texts.unit_domain, domains, len(texts.edges) - 1, len(texts.tokens))
        self._layers = layers
        self.sums: dict[str, TraceSums] = {}
        self.paths: list[np.ndarray] = []
        self.shown: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}
        # models with different numbers of experts share the codes: a longer table begins with a shorter one
        random = np.random.default_rng(0)
        self._codes = random.integers(1, 2**32, max(layer.num_experts for layer in layers), dtype=np.uint64)
        self.sets: dict[str, np.ndarray] = {}
        self.batch: Batch | None = None
        self._called: list[str] = []
        self._choices: dict[str, np.ndarray] = {}
        self._scorings: dict[str, str | None] = {}

    def start(self, batch: Batch) -> None:
        """Prepares for the passes of a batch."""
        self.batch, self._choices = batch, {}

    def on_pass(self, event: LayerPass) -> None:
        """Adds a layer's pass; of a layer that runs several times on a batch, paths and texts show the first pass."""
        batch, name = self.batch, event.layer.name
        assert batch is not None
        if len(event.index) != len(batch.places.place):
            raise UnreachableRouting(
                f"the experts of {name} receive {len(event.index)} of the {len(batch.places.place)} tokens of a batch at once, "
                "so that their tokens cannot be told: report needs a model that gives all tokens to its experts in one call"
            )
        routing = token_routing(event, self._probabilities(event))
        if name not in self.sums:
            self.sums[name] = TraceSums(event.layer.num_experts, *self._sizes)
            if self.options.keeps_sets:
                self.sets[name] = np.zeros(sum(map(len, self.texts.blocks)), np.uint32)
        self.sums[name].add(batch.places, routing)
        if name in self._choices:
            return
        self._choices[name] = routing.first_choice()
        if self.options.keeps_sets:
            self.sets[name][batch.places.place] = _set_codes(routing.arrived, self._codes)
        for text, row in batch.texts.items():
            start = row * batch.length
            part = slice(start, start + min(batch.length, self.options.text_tokens))
            margin = None if routing.margin is None else routing.margin[part].astype(np.float32)
            index, weight = routing.index[part].astype(np.int32), routing.weight[part].astype(np.float32)
            weight[(index >= 0) & (routing.arrived[part] < 0)] = np.nan
            self.shown[text, name] = index, weight, margin

    def _probabilities(self, event: LayerPass) -> torch.Tensor | None:
        """Returns the probabilities of a pass; of a foreign router, as the weights of the first pass explain them."""
        if event.probs is not None or event.logits is None:
            return event.probs
        if event.layer.name not in self._scorings:
            self._scorings[event.layer.name] = _scoring(event)
        scoring = self._scorings[event.layer.name]
        return None if scoring is None else probabilities(event.logits, scoring)

    def finish_batch(self) -> None:
        """Adds the paths of a batch from layer to layer.

        Raises:
            UnreachableRouting: if no experts were called, or those of other layers than in the batch before.
        """
        called, before = list(self._choices), self._called or list(self._choices)
        if not called or called != before:
            raise UnreachableRouting(
                f"the model called the experts of {len(called)} and {len(before)} layers in two batches of text: report follows "
                "tokens through the layers that every batch passes"
                if called
                else f"the model does not call its experts ({self._layers[0].name}) for text: there is no routing to report"
            )
        self._called, pairs = called, list(pairwise(called))
        if not self.paths:
            self.paths = [np.zeros([self.sums[name].num_experts for name in pair], np.int64) for pair in pairs]
        for path, (name, following) in zip(self.paths, pairs, strict=True):
            source, target = self._choices[name], self._choices[following]
            both = (source >= 0) & (target >= 0)
            path += count_pairs(source[both], target[both], path.shape)


def _set_codes(arrived: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Returns a fingerprint (T,) uint32 of each token's set of experts, whatever their order: the exclusive or of codes."""
    ranked = np.sort(arrived, axis=-1)
    fresh = ranked >= 0
    fresh[:, 1:] &= ranked[:, 1:] != ranked[:, :-1]
    return np.bitwise_xor.reduce(np.where(fresh, codes[ranked], 0), axis=-1).astype(np.uint32)


def token_routing(event: LayerPass, probs: torch.Tensor | None) -> TokenRouting:
    """Returns the routing of a pass on the CPU, with -1 for assignments without an expert.

    Args:
        event: pass of a layer.
        probs: (T, E + Z) probabilities; None where they are not known.
    """
    experts = event.layer.num_experts
    index, arrived = event.index.cpu().long(), event.arrived.cpu().long()
    reaches = (arrived >= 0) & (arrived < experts)
    weight = event.weight.detach().cpu().double().where(reaches, 0.0)
    probs = None if probs is None else probs.detach().cpu().double()
    margin = None
    if probs is not None:
        chosen = (index < probs.shape[-1]).sum(dim=-1)
        margin = margins(probs, chosen).numpy() if (chosen < probs.shape[-1]).any() else None
    index = index.where((index >= 0) & (index < experts), -1)
    return TokenRouting(index.numpy(), arrived.where(reaches, -1).numpy(), weight.numpy(), probs, margin)


def _scoring(event: LayerPass) -> str | None:
    """Returns how a foreign router scores its logits, from the weights of one pass; None if it cannot be told."""
    assert event.logits is not None
    evidence = ScoringEvidence(event.index.shape[-1], torch.zeros((), dtype=torch.float64))
    evidence.add(event.logits.cpu(), event.index.cpu(), event.weight.cpu(), None)
    configured = getattr(getattr(event.layer.experts, "config", None), "scoring_func", None)
    return explanation(evidence.sums, evidence.top_k, evidence.coarse, configured).scoring


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the summed cross entropy in nats of the labels (B, S) that are not -100, of which the first has no prediction."""
    predictions = logits[:, :-1].flatten(0, 1)
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(predictions, labels[:, 1:].flatten(), reduction="sum").item()


def refuse_untraceable(layers: Sequence[SparseLayer]) -> None:
    """Refuses routers of this package that mix all tokens or all experts, and layers that skip tokens.

    Raises:
        UnreachableRouting: if a layer's router sends no tokens to experts, or a layer gets some tokens alone.
    """
    refuse_skipped_tokens(layers)
    for layer in layers:
        for module in layer.router.modules() if layer.router is not None else ():
            if getattr(module, "uses_all_experts", False):
                raise UnreachableRouting(
                    f"{type(module).__name__} sends no tokens to experts, it mixes all of them: there is no routing to report"
                )


def _trace_domain(
    model: PreTrainedModel, tracer: _Tracer, number: int, blocks: list[np.ndarray], labels: list[np.ndarray]
) -> float | None:
    """Runs a model on the blocks of a domain.

    Returns:
        The cross entropy in nats per token; None for a model without a language model's head.
    """
    total, scored = 0.0, 0
    for rows in tqdm(list(batches(blocks, tracer.options.batch_size)), desc=f"tracing domain {number + 1}"):
        ids, batch = tracer.texts.batch(number, rows)
        tracer.start(batch)
        outputs = model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False)
        tracer.finish_batch()
        logits = getattr(outputs, "logits", None)
        if logits is not None:
            target = torch.from_numpy(np.stack([labels[row] for row in rows])).to(logits.device)
            total += _summed_loss(logits, target)
            scored += int((target[:, 1:] != -100).sum())
    return total / scored if scored else None


@torch.no_grad()
def trace_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: "Mapping[str, Dataset]",
    name: str,
    options: TraceOptions | None = None,
) -> Traced:
    """Runs a model on texts and traces its routing.

    Args:
        model: any MoE of transformers that reads `input_ids`, on the device to run on. It stays in evaluation mode.
        tokenizer: tokenizer of the model.
        domains: name of each domain -> rows of `input_ids`, and optionally of `labels` (-100 for a token without loss), as
            [`~modeling_moe.data.pack`] returns them with `for_scoring`.
        name: name of the model in the report.
        options: how much of the texts a trace shows.

    Raises:
        UnreachableRouting: if the model is dense, its routing cannot be seen, or depth_layers lets sparse layers skip tokens.
    """
    options = options or TraceOptions()
    layers = sparse_layers(model)
    refuse_untraceable(layers)
    model.eval()
    blocks = [[np.asarray(ids) for ids in rows["input_ids"]] for rows in domains.values()]
    texts = Texts(blocks, options.texts)
    tracer = _Tracer(layers, texts, len(blocks), options)
    losses = {}
    with observe(model, tracer.on_pass):
        for number, (domain, rows) in enumerate(domains.items()):
            labels = [np.asarray(row) for row in rows["labels" if "labels" in rows.column_names else "input_ids"]]
            loss = _trace_domain(model, tracer, number, blocks[number], labels)
            losses |= {} if loss is None else {domain: loss}
    by_name = {layer.name: layer for layer in layers}
    layers = [by_name[name] for name in tracer.sums]
    layer_traces = _layer_traces(tracer, layers, tokenizer, options)
    trace = ModelTrace(
        name=name,
        facts=_facts(model, layers, layer_traces, texts),
        domains=list(domains),
        tokens={domain: sum(map(len, rows)) for domain, rows in zip(domains, blocks, strict=True)},
        losses=losses or None,
        layers=layer_traces,
        paths=tracer.paths,
        position_edges=texts.edges,
        texts=_traced_texts(tracer, list(domains), tokenizer),
    )
    return Traced(trace, blocks, list(tracer.sets.values()))


def _layer_traces(
    tracer: _Tracer, layers: Sequence[SparseLayer], tokenizer: PreTrainedTokenizerBase, options: TraceOptions
) -> list[LayerTrace]:
    texts, sums = tracer.texts, list(tracer.sums.values())
    finder = TopTokens(tokenizer, texts.blocks, texts.tokens, texts.occurrences)
    significant = _significant(texts, sums, options.seed)
    traces = []
    for layer, total, cells in zip(layers, sums, significant, strict=True):
        trace = LayerTrace(
            **vars(total.summary()),
            layer=layer.layer,
            name=layer.name,
            num_experts=layer.num_experts,
            top_k=total.top_k,
            by_domain=[total.summary(domain) for domain in range(total.domains)],
            load=total.load,
            co_activation=total.co_activation,
            position=total.position,
            specialisation=specialisation(total.load),
            significant=cells,
            top_tokens=finder.of_experts(total.taken, total.seen_at, options.top_tokens),
            attends=attends(layer.experts),
        )
        traces.append(trace)
    return traces


def _significant(texts: Texts, sums: Sequence[TraceSums], seed: int) -> list[np.ndarray]:
    """Returns the result (D, E) bool of the test of specialisation for each layer."""
    if not texts.tested:
        return [np.zeros((layer.domains, layer.num_experts), bool) for layer in sums]
    return significant_cells(
        [layer.unit_load[: texts.tested] for layer in sums], texts.unit_domain[: texts.tested], seed
    )


def _traced_texts(tracer: _Tracer, domains: list[str], tokenizer: PreTrainedTokenizerBase) -> list[TracedText]:
    top_k = max(total.top_k for total in tracer.sums.values())
    found = []
    for text, number in enumerate(tracer.texts.traced):
        layers = [tracer.shown[text, name] for name in tracer.sums]
        size = len(layers[0][0])
        index = np.full((len(layers), size, top_k), -1, np.int32)
        weight = np.zeros(index.shape, np.float32)
        margin = np.full(index.shape[:2], np.nan, np.float32)
        for layer, (chosen, weights, gaps) in enumerate(layers):
            index[layer, :, : chosen.shape[1]], weight[layer, :, : chosen.shape[1]] = chosen, weights
            if gaps is not None:
                margin[layer] = gaps
        domain = domains[tracer.texts.domain_of(number)]
        tokens = token_texts(tokenizer, tracer.texts.blocks[number][:size].tolist())
        known = any(gaps is not None for _, _, gaps in layers)
        found.append(TracedText(domain, tokens, index, weight, margin if known else None))
    return found


def _router_name(model: PreTrainedModel, layer: SparseLayer) -> str:
    named = getattr(model.config, "router_type", None)
    return str(named) if named else "unknown" if layer.router is None else type(layer.router).__name__


def _test_fact(units: list[int]) -> str:
    """Returns what the test of specialisation rests on, from the number of tested units of each domain."""
    if len(units) < 2:
        return "none, since there is one domain"
    if not min(units):
        return "none, since a domain is shorter than one block: give it more text, or make --max_length smaller"
    shown = f"permutes {' + '.join(map(str, units))} stretches of text of equal length; chance of any false finding {100 * LEVEL:.0f}\u00a0%"
    return f"{shown}; too little text to find anything" if is_too_little(units) else shown


def _places(layers: Sequence[SparseLayer]) -> str:
    """Returns how many layers have experts, and how many of these have them inside attention."""
    inside = sum(attends(layer.experts) for layer in layers)
    return f"{len(layers)}, of which {inside} inside attention" if inside else str(len(layers))


def _facts(
    model: PreTrainedModel, layers: Sequence[SparseLayer], traces: Sequence[LayerTrace], texts: Texts
) -> dict[str, str]:
    total = model.num_parameters()
    idle = sum(idle_parameters(layer.experts, trace.top_k) for layer, trace in zip(layers, traces, strict=True))
    experts = sorted({(layer.num_experts, trace.top_k) for layer, trace in zip(layers, traces, strict=True)})
    return {
        "Architecture": type(model).__name__,
        "Parameters": f"{total:,}, of which a token uses at most {total - round(idle):,}",
        "Sparse layers": _places(layers),
        "Experts per layer": "; ".join(f"{count}, of which a token uses at most {top_k}" for count, top_k in experts),
        "Router": _router_name(model, layers[0]),
        "Data type": str(model.dtype).removeprefix("torch."),
        "Text": f"blocks of at most {texts.edges[-1]} tokens",
        "Test of specialisation": _test_fact(
            np.bincount(texts.unit_domain[: texts.tested], minlength=traces[0].load.shape[0]).tolist()
        ),
    }
